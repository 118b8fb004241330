"""Worker processes: the same outcomes as without, and what dies or hangs in one costs its job alone."""

from functools import partial

import numpy as np
import pytest

from rlalign_envs.assemblies import training_set
from rlalign_envs.stability import StabilitySimulator
from rlalign_envs.stability_workers import Workers

JOBS = """
import os, signal, threading

def work(job):
    match job:
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            threading.Event().wait()
        case "raise":
            raise ValueError("bad job")
    return job, os.getpid()

def hang(job):
    threading.Event().wait()

def unimportable(job):
    return job
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """A module that worker processes can import: spawn hands them this path."""
    (tmp_path / "worker_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    import worker_jobs  # pyright: ignore[reportMissingImports]

    return worker_jobs


def test_dead_hung_and_failing_jobs_cost_themselves_alone(jobs):
    workers = Workers(jobs.work, count=1, job_seconds=1.0)
    results, lost = workers.run(["a", "die", "b", "hang", "c", "raise", "d"])
    assert [r and r[0] for r in results] == ["a", None, "b", None, "c", None, "d"]
    assert lost == {
        1: "its worker died (exit code -9)",
        3: "took more than 1 seconds",
        5: "ValueError: bad job",
    }
    pids = [r[1] for r in results if r]
    assert pids[0] != pids[1] != pids[2] == pids[3]  # replaced after death and after hanging, kept after an error
    again, _ = workers.run(["e"])
    assert again == [("e", pids[3])]  # kept between runs
    process = workers._workers[0].process
    process.kill()
    process.join()
    replaced, lost = workers.run(["f"])  # died while idle: nothing is lost
    assert replaced[0][0] == "f"
    assert not lost
    workers.close()
    assert workers.run([]) == ([], {})


def test_more_workers_than_jobs_are_not_started(jobs):
    workers = Workers(jobs.work, count=2, job_seconds=60.0)
    results, _ = workers.run(["a"])
    assert len(workers._workers) == 1
    more, _ = workers.run(list("bcdefg"))
    assert [r[0] for r in more] == list("bcdefg")
    assert len(workers._workers) == 2
    assert results[0][0] == "a"
    workers.close()


def test_workers_that_cannot_start_say_why(tmp_path, monkeypatch, jobs):
    (tmp_path / "worker_jobs.py").write_text("")  # the function is gone when the worker looks for it
    workers = Workers(partial(jobs.unimportable), count=1, job_seconds=5.0)
    with pytest.raises(RuntimeError, match="__main__"):
        workers.run(["a"])


def test_workers_tell_the_same_as_this_process():
    objects, _ = training_set(12, seed=5)
    objects[3] = np.nan
    here = StabilitySimulator(perturbations=1).simulate(objects)
    simulator = StabilitySimulator(perturbations=1, bodies_per_world=4, workers=2)
    there = simulator.simulate(objects)
    simulator.close()
    assert here.keys() == there.keys()
    for name in here:
        np.testing.assert_array_equal(there[name], here[name], err_msg=name)
    assert "workers" not in simulator.settings


def test_lost_samples_are_unknown_and_told_of_once(jobs):
    objects, _ = training_set(5, seed=6)
    simulator = StabilitySimulator(perturbations=1, bodies_per_world=4, workers=1, job_seconds=0.5)
    simulator._workers.work = jobs.hang
    with pytest.warns(RuntimeWarning, match=r"5 of 5 samples were lost in 3 jobs \(took more than 0.5 s") as caught:
        told = simulator.simulate(objects)
    assert len(caught) == 1
    assert told["valid"].tolist() == [0] * 5
    assert np.isnan(told["stable"]).all()
    simulator.close()
