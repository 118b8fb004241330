"""Several seeds of one config: processes of their own, failures that stay alone, Ctrl-C, and the aggregate."""

import json
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest

from rlalign.training import seeds
from rlalign.training.intervals import interquartile_mean
from rlalign.training.run_directory import RunDirectoryError
from rlalign.training.seeds import SeedsFailed, create, holds_seeds, read_plan, run_seeds, status_of
from rlalign.training.seeds_report import _grid, write_aggregate
from rlalign.training.signals import Interrupted

CHILD = """
import json, os, pathlib, signal, sys
run, seed, behaviour = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
run.mkdir(exist_ok=True)
(run / "config.resolved.json").write_text(json.dumps({"method": "ppo", "seed": seed, "total_env_steps": 10}))
def status(word):
    (run / "status.json").write_text(json.dumps({"status": word}))
status("running")
print(f"seed {seed} with {os.environ['OMP_NUM_THREADS']} thread", flush=True)
if behaviour == "fail":
    status("failed")
    sys.exit("Failed: RuntimeError: the pole is gone\\nFull traceback: elsewhere")
if behaviour == "wait":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    (run / "ready").touch()
    signal.sigwait({signal.SIGTERM})
    status("interrupted")
    sys.exit(75)
rows = [{"kind": "eval", "step": 0, "eval/return_mean": 1.0, "eval/return_stderr": 0.5}]
rows += [{"kind": "train", "step": s, "episode/return_mean": float(s * seed), "time/step_s": 1.0} for s in (5, 10)]
rows += [{"kind": "eval", "step": 10, "eval/return_mean": 10.0 * seed, "eval/return_stderr": 0.5}]
with (run / "metrics.jsonl").open("w") as file:
    file.writelines(json.dumps(row) + "\\n" for row in rows)
status("done")
"""


def plan(folder: Path, behaviours: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    create(folder, seeds=list(behaviours), config_text="# A toy.\nmethod: ppo\n", settings=["env.num_envs=2"])

    def command(folder: Path, plan: seeds.Plan, seed: int) -> list[str]:
        return [sys.executable, "-S", "-c", CHILD, str(folder / f"seed-{seed}"), str(seed), behaviours[seed]]

    monkeypatch.setattr(seeds, "command", command)
    return folder


def page_text(folder: Path) -> str:
    page = (folder / "report.html").read_text(encoding="utf-8")
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", page).split())


def test_all_seeds_are_trained_and_put_together(tmp_path, monkeypatch):
    told: list[str] = []
    folder = plan(tmp_path / "many", dict.fromkeys((1, 2, 3, 4), "train"), monkeypatch)
    run_seeds(folder, at_once=2, tell=told.append)
    assert [status_of(folder, seed) for seed in (1, 2, 3, 4)] == ["done"] * 4
    assert sum(line.endswith("done") for line in told) == 4
    assert "seed 4  eval  10  return 40 ±0.500" in told
    assert (folder / "seed-3.log").read_text() == "seed 3 with 1 thread\n"
    data = json.loads((folder / "aggregate.json").read_text())
    assert data["seeds"] == {"1": "done", "2": "done", "3": "done", "4": "done"}
    held_out = data["metrics"]["eval/return_mean"]
    assert held_out["values"] == {"1": 10.0, "2": 20.0, "3": 30.0, "4": 40.0}
    assert held_out["estimate"] == 25.0  # the middle half of 10, 20, 30, 40
    assert 10.0 <= held_out["low"] < 25.0 < held_out["high"] <= 40.0
    assert "eval/return_stderr" not in data["metrics"]
    assert data["metrics"]["episode/return_mean"]["values"]["4"] == 40.0
    curve = data["curves"]["eval/return_mean"]
    assert (curve["steps"], curve["estimate"]) == ([0.0, 10.0], [1.0, 25.0])
    text = page_text(folder)
    assert "Held-out return from 1 to 25 (interquartile mean of 4 seeds)." in text
    assert "Seeds lie between 10 and 40." in text
    assert "4 of 4 seeds done" in text
    assert text.count("report ") >= 1


def test_no_more_processes_than_asked_for(tmp_path, monkeypatch):
    folder = plan(tmp_path / "many", dict.fromkeys(range(5), "train"), monkeypatch)
    most, start = 0, seeds._Child.start
    alive: list[seeds._Child] = []

    def counted(folder: Path, plan: seeds.Plan, seed: int) -> seeds._Child:
        nonlocal most
        alive.append(start(folder, plan, seed))
        most = max(most, sum(child.process.poll() is None for child in alive))
        return alive[-1]

    monkeypatch.setattr(seeds._Child, "start", counted)
    run_seeds(folder, at_once=2, tell=lambda line: None)
    assert len(alive) == 5
    assert most <= 2


def test_a_failing_seed_stays_alone_and_is_said(tmp_path, monkeypatch):
    told: list[str] = []
    folder = plan(tmp_path / "many", {0: "train", 1: "fail", 2: "train"}, monkeypatch)
    with pytest.raises(SeedsFailed, match=r"1 of 3 seeds failed \(1\); the aggregate is over the other 2"):
        run_seeds(folder, at_once=3, tell=told.append)
    assert [status_of(folder, seed) for seed in (0, 1, 2)] == ["done", "failed", "done"]
    (line,) = [line for line in told if "FAILED" in line]
    assert line.startswith("seed 1  FAILED (exit code 1): RuntimeError: the pole is gone  (all of it: ")
    assert set(json.loads((folder / "aggregate.json").read_text())["metrics"]["eval/return_mean"]["values"]) == {
        "0",
        "2",
    }
    assert "2 of 3 seeds done" in page_text(folder)


def test_ctrl_c_stops_all_resumably_and_resume_trains_what_is_left(tmp_path, monkeypatch):
    folder = plan(tmp_path / "many", {0: "train", 1: "wait", 2: "wait", 3: "train"}, monkeypatch)
    told: list[str] = []

    def interrupt() -> None:
        while not ((folder / "seed-1/ready").exists() and (folder / "seed-2/ready").exists()):
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match="1 of 4 seeds are done. Continue: rlalign resume") as stopped:
        run_seeds(folder, at_once=2, tell=told.append)
    thread.join()
    assert stopped.value.exit_code == 75
    assert [status_of(folder, seed) for seed in range(4)] == ["done", "interrupted", "interrupted", "waiting"]
    plan_now = dict.fromkeys(range(4), "train")
    trained: list[int] = []

    def command(folder: Path, plan: seeds.Plan, seed: int) -> list[str]:
        trained.append(seed)
        return [sys.executable, "-S", "-c", CHILD, str(folder / f"seed-{seed}"), str(seed), plan_now[seed]]

    monkeypatch.setattr(seeds, "command", command)
    run_seeds(folder, at_once=4, tell=told.append)
    assert trained == [1, 2, 3]
    assert json.loads((folder / "aggregate.json").read_text())["metrics"]["eval/return_mean"]["estimate"] == 15.0


def test_a_seed_is_trained_from_the_config_or_resumed(tmp_path):
    folder = tmp_path / "many"
    made = create(folder, seeds=[3], config_text="method: ppo\n", settings=["env.num_envs=2"])
    assert read_plan(folder) == made
    run = str(folder / "seed-3")
    base = [sys.executable, "-m", "rlalign"]
    fresh = ["train", str(folder / "config.yaml"), "env.num_envs=2", "seed=3", "--run-dir", run]
    assert seeds.command(folder, made, 3) == [*base, *fresh]
    Path(run).mkdir()
    (Path(run) / "config.resolved.json").touch()
    assert seeds.command(folder, made, 3) == [*base, "resume", run]


def test_a_used_folder_is_refused(tmp_path):
    create(tmp_path / "many", seeds=[0, 1], config_text="", settings=[])
    assert holds_seeds(tmp_path / "many")
    with pytest.raises(RunDirectoryError, match="rlalign resume"):
        create(tmp_path / "many", seeds=[0, 1], config_text="", settings=[])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RunDirectoryError, match="not an empty directory"):
        create(tmp_path / "other", seeds=[0, 1], config_text="", settings=[])
    (tmp_path / "many" / "seeds.json").write_text("{")
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        read_plan(tmp_path / "many")


def test_a_page_can_be_drawn_before_any_seed_is_done(tmp_path):
    create(tmp_path / "many", seeds=[0, 1], config_text="", settings=[])
    write_aggregate(tmp_path / "many")
    assert "No seed is done yet." in page_text(tmp_path / "many")
    data = json.loads((tmp_path / "many" / "aggregate.json").read_text())
    assert (data["metrics"], data["seeds"]) == ({}, {"0": "waiting", "1": "waiting"})


def test_curves_are_compared_record_by_record_or_on_a_common_stretch():
    assert _grid([[0.0, 10.0], [0.0, 12.0]]) == [0.0, 11.0]
    uneven = _grid([[0.0, 10.0], [2.0, 6.0, 12.0]])
    assert uneven == [2.0, 6.0, 10.0]  # where every seed has been
    assert _grid([[0.0, 1.0], [5.0, 6.0, 7.0]]) == [5.0]


def test_the_middle_of_the_seeds_ignores_an_outlier():
    values = [10.0, 11.0, 12.0, 1000.0]
    assert float(interquartile_mean(values)) == 11.5
