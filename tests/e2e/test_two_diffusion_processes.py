"""Two processes take the denoising step that one takes: same samples, rewards, metrics, weights and evaluations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlalign.training.metrics import read
from tests.e2e.test_two_processes import TWO, python
from tests.e2e.two_diffusion_processes import ROUNDS, SCENARIOS
from tests.llm.commands import ROOT

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders that one process and two processes filled with every scenario."""
    folder = tmp_path_factory.mktemp("two")
    script = str(ROOT / "tests/e2e/two_diffusion_processes.py")
    for launcher, name in (((), "one"), (TWO, "two")):
        done = python(*launcher, script, str(folder / name), cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count('{"scenario": "guard"}') == (2 if launcher else 1)
    return folder / "one", folder / "two"


@pytest.mark.parametrize("name", SCENARIOS)
def test_samples_rewards_and_weights_are_those_of_one_process(runs, name):
    one, two = (load_file(folder / f"{name}.rollouts") for folder in runs)
    assert one.keys() == two.keys() and any(key.startswith("2/") for key in one)
    for key, expected in one.items():
        if not key.endswith("inputs/process/per_rollout") and "process" not in key and "place" not in key:
            torch.testing.assert_close(two[key], expected, rtol=0, atol=2e-5, equal_nan=True, msg=key)
    assert_weights_are_those_of_one_process(runs, name)


@pytest.mark.parametrize("name", ROUNDS)
def test_simulated_sets_and_weights_of_two_rounds_are_those_of_one_process(runs, name):
    """Samples are dealt out in turn, judged where they were drawn, and stand in the order of their numbers again."""
    for number in ("round-0", "round-1"):
        folders = [folder / name / "data" / number for folder in runs]
        one, two = (load_file(folder / "samples.safetensors") for folder in folders)
        assert one.keys() == two.keys() == {"latents", "prompts", "outcome/right", "outcome/far"}
        assert one["outcome/far"].isnan().any() and not one["outcome/far"].isnan().all()
        for key, expected in one.items():
            exact = not expected.is_floating_point() or key == "outcome/right"
            torch.testing.assert_close(two[key], expected, rtol=0, atol=0 if exact else 2e-5, equal_nan=True, msg=key)
        # The hash is that of the bits.
        said, here = (json.loads((folder / "settings.json").read_text()) | {"sha256": ""} for folder in folders)
        assert here == said
    assert_weights_are_those_of_one_process(runs, name)


def assert_weights_are_those_of_one_process(runs: tuple[Path, Path], name: str) -> None:
    expected = load_file(f"{runs[0] / name}.weights-0")
    first, second = (load_file(f"{runs[1] / name}.weights-{rank}") for rank in (0, 1))
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", [*SCENARIOS, *ROUNDS])
def test_metrics_and_evaluations_are_those_of_one_process(runs, name):
    logs = [read(folder / name / "metrics.jsonl") for folder in runs]
    assert [(r["kind"], r["step"]) for r in logs[0]] == [(r["kind"], r["step"]) for r in logs[1]]
    # What a process holds, and looks at for `norm_ratio`, is its own share.
    own = ("kind", "time/", "throughput/", "rollout/trajectory_mib", "policy/norm_ratio")
    for one, two in zip(*logs, strict=True):
        assert one.keys() == two.keys()
        one, two = ({key: value for key, value in r.items() if not key.startswith(own)} for r in (one, two))
        assert two == pytest.approx(one, rel=1e-3, abs=2e-5, nan_ok=True)
    for path in (runs[0] / name / "samples").iterdir():
        assert len(path.read_text().splitlines()) == len(
            (runs[1] / name / "samples" / path.name).read_text().splitlines()
        )
