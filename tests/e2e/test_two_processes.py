"""Two processes take the step that one takes: same rollouts, rewards, metrics and weights, whatever each has to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlalign.training.checkpoint import Checkpoints
from rlalign.training.metrics import read
from tests.e2e.two_processes import SCENARIOS
from tests.llm.commands import ROOT
from tests.llm.conftest import tokenizer_file, workshop  # noqa: F401

pytestmark = pytest.mark.e2e
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "envs")])
    command = [sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def runs(workshop: Path) -> tuple[Path, Path]:  # noqa: F811
    """The folders that one process and two processes filled with every scenario."""
    script = str(ROOT / "tests/e2e/two_processes.py")
    for launcher, folder in (((), "one"), (TWO, "two")):
        done = python(*launcher, script, str(workshop / "model"), str(workshop / folder), cwd=workshop)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count('{"scenario": "token"}') == (2 if launcher else 1)
    return workshop / "one", workshop / "two"


@pytest.mark.parametrize("name", SCENARIOS)
def test_rollouts_rewards_and_weights_are_those_of_one_process(runs, name):
    one, two = runs
    rollouts = [load_file(folder / f"{name}.rollouts") for folder in runs]
    assert rollouts[0].keys() == rollouts[1].keys()
    assert any(key.startswith("2/") for key in rollouts[0])
    for key, expected in rollouts[0].items():
        exact = not expected.is_floating_point() or "reward" in key and name != "kl_in_reward"
        tolerance = 0 if exact else 2e-5
        torch.testing.assert_close(rollouts[1][key], expected, rtol=0, atol=tolerance, equal_nan=True, msg=key)
    expected = load_file(one / f"{name}.weights-0")
    first, second = (load_file(two / f"{name}.weights-{rank}") for rank in (0, 1))
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", SCENARIOS)
def test_metrics_and_held_out_samples_are_those_of_one_process(runs, name):
    logs = [read(folder / name / "metrics.jsonl") for folder in runs]
    assert [(r["kind"], r["step"]) for r in logs[0]] == [(r["kind"], r["step"]) for r in logs[1]]
    for one, two in zip(*logs, strict=True):
        # The largest difference to sampling is the largest of rounding errors, which depend on who shares a batch.
        assert one.keys() == two.keys()
        own = ("kind", "time/", "throughput/", "policy/sampling_gap")
        one, two = ({key: value for key, value in r.items() if not key.startswith(own)} for r in (one, two))
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5, nan_ok=True)
    for path in (runs[0] / name / "samples").glob("eval-*.jsonl"):
        assert path.read_bytes() == (runs[1] / name / "samples" / path.name).read_bytes()


def test_the_scenarios_are_what_they_say(runs):
    one, two = runs
    live = [
        record["signal/group_frac"]
        for record in read(one / "one_group_with_signal/metrics.jsonl")[1:-1]
        if "signal/group_frac" in record
    ]
    assert 0.25 in live
    failed = [
        record["reward/error_frac"]
        for record in read(two / "fails_on_one_process/metrics.jsonl")
        if record["kind"] == "train"
    ]
    assert failed == [0.0, 0.25, 0.25]
    assert Checkpoints(two / "stopped_by_one_process/checkpoints").steps() == [2, 3]
    plain, stopped = (load_file(two / f"{name}.weights-0") for name in ("token", "stopped_by_one_process"))
    assert all(torch.equal(plain[key], stopped[key]) for key in plain)


FAILING = """

def one_process(prompts, completions, **columns):
    import os
    if os.environ["RANK"] == "1":
        raise RuntimeError("no grader on this machine")
    return [float(len(text) % 2 == 0) for text in completions]
"""


def test_a_reward_error_on_one_process_ends_them_all_with_its_message(workshop):  # noqa: F811
    """The other process waits in a collective for rows that will never come."""
    with (workshop / "rewards.py").open("a") as file:
        file.write(FAILING)
    command = (
        "train",
        "tiny.yaml",
        "rewards.0.function=rewards.py:one_process",
        "data.eval=null",
        "--run-dir",
        "failing",
    )
    done = python(*TWO, "-m", "rlalign", *command, cwd=workshop)
    assert done.returncode != 0
    assert (
        "reward 'one_process' failed on row 0 of 8 (raised): raised RuntimeError: no grader on this machine"
        in done.stderr
    )
    assert json.loads((workshop / "failing/status.json").read_text())["status"] == "failed"


def test_the_command_line_trains_with_two_processes(workshop):  # noqa: F811
    command = ("train", "tiny.yaml", "total_steps=2", "--run-dir", "launched")
    done = python(*TWO, "-m", "rlalign", *command, cwd=workshop)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report: launched/report.html") == 1
    assert [r["step"] for r in read(workshop / "launched/metrics.jsonl")] == [0, 1, 2, 2]
