"""A run that dies of SIGKILL anywhere and is resumed ends with the very bits of a run that was left alone.

The runs use two passes over each rollout in two minibatches, so that most deaths fall between updates that use log-
probabilities from before the first. They are processes of the command line, without the runtime type checks of the
test process: those draw from Python's random numbers.
"""

import random
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlalign.training.checkpoint import Checkpoints
from rlalign.training.metrics import metrics_hash, read
from tests.llm.commands import fault, rlalign

SEED = 20253
POINTS = ("token", "token", "reward", "loss", "update", "eval", "record", "samples", "file", "model")


@pytest.fixture(scope="module")
def undisturbed(workshop: Path) -> tuple[Path, dict[str, int]]:
    """A finished run, and how often it passed each point where a fault can strike."""
    done = rlalign(workshop, "train", "tiny.yaml", "--run-dir", "undisturbed", count=True)
    assert done.code == 0, done.err
    return workshop / "undisturbed", done.counts


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, random state, samples and all metrics but the clock's are equal to the last bit."""
    for name in ("model/model.safetensors", "best/model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert metrics_hash(one / "metrics.jsonl") == metrics_hash(other / "metrics.jsonl")
    samples = sorted(path.name for path in (one / "samples").iterdir())
    assert samples == sorted(path.name for path in (other / "samples").iterdir())
    for name in samples:
        assert (one / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes(), name
    last = Checkpoints(one / "checkpoints").latest(), Checkpoints(other / "checkpoints").latest()
    for path in last[0].glob("*.safetensors"):
        assert path.read_bytes() == (last[1] / path.name).read_bytes(), path.name


def kill_points(counts: dict[str, int]) -> list[tuple[str, int, bool]]:
    """Seeded: which passing of which point, and whether just before or just after it."""
    generator, points = random.Random(SEED), []
    for point in POINTS:
        points.append((point, generator.randint(1, counts[point]), point != "file" and generator.random() < 0.5))
    return points


@pytest.mark.parametrize("index", range(len(POINTS)), ids=lambda index: f"{index}-{POINTS[index]}")
def test_killed_at_a_random_point_and_resumed(workshop, undisturbed, index):
    whole, counts = undisturbed
    at, nth, after = kill_points(counts)[index]
    run = f"killed-{index}"
    died = rlalign(workshop, "train", "tiny.yaml", "--run-dir", run, faults=[fault(at, nth, after=after)])
    assert died.code == -9
    resumed = rlalign(workshop, "resume", run)
    assert resumed.code == 0, resumed.err
    assert_same_run(whole, workshop / run)


@pytest.mark.parametrize(
    ("at", "nth", "found"),
    [
        ("eval", 1, "No checkpoint yet"),  # before anything
        ("token", 15, "No checkpoint yet"),  # within the first rollout
        ("update", 2, "No checkpoint yet"),  # between the updates of the first rollout
        ("update", 9, "Resumed step 2 from ckpt-000002"),  # between the updates of the third
        ("save", 2, "Resumed step 2 from ckpt-000002"),  # when the second checkpoint was due
    ],
)
def test_resume_says_where_it_starts(workshop, undisturbed, at, nth, found):
    run = f"chosen-{at}-{nth}"
    assert rlalign(workshop, "train", "tiny.yaml", "--run-dir", run, faults=[fault(at, nth)]).code == -9
    resumed = rlalign(workshop, "resume", run)
    assert resumed.code == 0, resumed.err
    assert found in resumed.out
    assert_same_run(undisturbed[0], workshop / run)


def test_killed_again_while_resuming(workshop, undisturbed):
    run = "killed-thrice"
    assert rlalign(workshop, "train", "tiny.yaml", "--run-dir", run, faults=[fault("update", 5)]).code == -9
    for strike in (fault("token", 20), fault("file", 30), fault("record", 2)):
        assert rlalign(workshop, "resume", run, faults=[strike]).code == -9
    assert rlalign(workshop, "resume", run).code == 0
    assert_same_run(undisturbed[0], workshop / run)


def test_the_points_are_spread_over_the_run(undisturbed):
    _, counts = undisturbed
    points = kill_points(counts)
    assert {at for at, _, _ in points} == set(POINTS)
    shares = sorted(nth / counts[at] for at, nth, _ in points)
    assert shares[0] < 0.3
    assert shares[-1] > 0.7
    assert max(later - earlier for earlier, later in zip(shares, shares[1:], strict=False)) < 0.3


def test_a_reward_in_a_process_of_its_own_changes_nothing(workshop, undisturbed):
    run = "isolated"
    isolated = ("train", "tiny.yaml", "guard.isolation=process", "--run-dir", run)
    assert rlalign(workshop, *isolated, faults=[fault("reward", 4, after=True)]).code == -9
    assert rlalign(workshop, "resume", run).code == 0
    assert_same_run(undisturbed[0], workshop / run)


def test_the_budget_for_failing_rewards_resumes_too(workshop):
    """Errors stop a run in its first batch and are tolerated later: a resumed run is past its first batch."""
    reward = "rewards.0.function=rewards.py:stumbles"
    assert rlalign(workshop, "train", "tiny.yaml", reward, "--run-dir", "stumbles").code == 0
    killed = ("train", "tiny.yaml", reward, "--run-dir", "stumbles-killed")
    assert rlalign(workshop, *killed, faults=[fault("rollout", 6)]).code == -9
    resumed = rlalign(workshop, "resume", "stumbles-killed")
    assert resumed.code == 0, resumed.err
    assert_same_run(workshop / "stumbles", workshop / "stumbles-killed")
    failed = [r["reward/error_frac"] for r in read(workshop / "stumbles/metrics.jsonl") if r["kind"] == "train"]
    assert failed == [0.0, 0.0, 0.0, 1 / 16, 1 / 16, 1 / 16]


def test_an_adapter_and_a_reference_resume_too(workshop):
    settings = (
        "method=policy_gradient",
        "advantage.type=group_relative",
        "peft={r: 4, target_modules: [q_proj, v_proj]}",
        "kl.coef=0.05",
        "eval.save_best=false",
        "total_steps=4",
    )
    whole = rlalign(workshop, "train", "tiny.yaml", *settings, "--run-dir", "adapter", count=True)
    assert whole.code == 0, whole.err
    killed = ("train", "tiny.yaml", *settings, "--run-dir", "adapter-killed")
    assert rlalign(workshop, *killed, faults=[fault("update", whole.counts["update"] - 1)]).code == -9
    assert rlalign(workshop, "resume", "adapter-killed").code == 0
    one, other = (
        load_file(workshop / name / "model/adapter_model.safetensors") for name in ("adapter", "adapter-killed")
    )
    assert all(one[name].equal(other[name]) for name in one)
    assert any(bool(value.any()) for name, value in one.items() if "lora_B" in name)
    assert metrics_hash(workshop / "adapter/metrics.jsonl") == metrics_hash(workshop / "adapter-killed/metrics.jsonl")


def test_the_same_seed_gives_the_same_run_and_another_seed_another(workshop, undisturbed):
    assert rlalign(workshop, "train", "tiny.yaml", "--run-dir", "same").code == 0
    assert rlalign(workshop, "train", "tiny.yaml", "--seed", "4", "--run-dir", "other").code == 0
    whole, _ = undisturbed
    assert_same_run(whole, workshop / "same")
    assert metrics_hash(whole / "metrics.jsonl") != metrics_hash(workshop / "other/metrics.jsonl")
    one, other = (read(path / "metrics.jsonl") for path in (whole, workshop / "other"))
    assert [record["step"] for record in one] == [record["step"] for record in other] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_a_finished_run_has_nothing_left_to_do(workshop, undisturbed):
    whole, _ = undisturbed
    before = metrics_hash(whole / "metrics.jsonl")
    done = rlalign(workshop, "resume", "undisturbed")
    assert done.code == 0
    assert "undisturbed is finished" in done.out
    assert metrics_hash(whole / "metrics.jsonl") == before
