"""An interrupted run that is resumed ends with the bits of one that was left alone, and every seed has one story."""

import random

import pytest

from rlalign.agents import PPO, TRPO, PolicyGradientAgent
from rlalign.agents.saved import WEIGHTS
from rlalign.training import session
from rlalign.training.metrics import metrics_hash, read
from tests.agents.small_agents import small

NORMALISED = {"normalize": {"observations": True, "rewards": True}}
CHECKPOINTS = {"checkpoint": {"every": 100}, "max_episode_steps": 25}
ONLINE = {**CHECKPOINTS, "update_epochs": 2, "minibatch_size": 32, "schedule": "linear", "total_env_steps": 420}
EVALUATED = {"eval": {"every": 120, "episodes": 2, "num_envs": 2, "video": False, "before": True}}
RUNS = {
    "ppo": (PPO, {**ONLINE, **NORMALISED, **EVALUATED}),
    "ppo_native": (PPO, {**ONLINE, **NORMALISED, "vectorization": "native"}),
    "heads_native": (
        PPO,
        {**ONLINE, "value_head": "hl_gauss", "normalize_and_project": True, "vectorization": "native"},
    ),
    "heads": (PPO, {**ONLINE, "value_head": "hl_gauss", "normalize_and_project": True}),
    "trpo": (TRPO, {**CHECKPOINTS, **NORMALISED, "critic_epochs": 2, "total_env_steps": 420}),
    "groups": (
        PolicyGradientAgent,
        {
            **CHECKPOINTS,
            "num_envs": 8,
            "group_size": 4,
            "advantage": "leave_one_out",
            "normalize": {"observations": True},
            "total_env_steps": 900,
        },
    ),
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing it takes longer than the run."""
    monkeypatch.setattr(session, "write_report", lambda path: path)


def agent(name, folder, **more):
    cls, config = RUNS[name]
    return small(cls, run_dir=folder, **{**config, **more})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody disturbed, by name."""
    finished = {}

    def run(name):
        if name not in finished:
            finished[name] = tmp_path_factory.mktemp("whole") / name
            agent(name, finished[name]).fit()
        return finished[name]

    return run


def assert_same(one, other):
    assert (one / "model" / WEIGHTS).read_bytes() == (other / "model" / WEIGHTS).read_bytes()
    assert metrics_hash(one / "metrics.jsonl") == metrics_hash(other / "metrics.jsonl")


def stops():
    """Seeded: nine runs with the iteration each is stopped in."""
    generator = random.Random(20253)
    return [(name, generator.randint(1, 5 if name != "groups" else 3)) for name in (*RUNS, "ppo", "trpo", "heads")]


@pytest.mark.parametrize(("index", "name", "at"), [(i, *stop) for i, stop in enumerate(stops())])
def test_stopped_in_a_random_iteration_and_resumed(whole, tmp_path, index, name, at):
    steps = agent(name, tmp_path / "run").steps()
    for _ in range(at):
        next(steps)
    steps.close()  # before this iteration could be saved
    agent(name, tmp_path / "run").fit(resume=True)
    assert_same(whole(name), tmp_path / "run")


def test_stopped_again_and_again(whole, tmp_path):
    for resume in (False, True, True, True):
        steps = agent("ppo", tmp_path / "run").steps(resume=resume)
        for _ in range(3):
            next(steps, None)
        steps.close()
    agent("ppo", tmp_path / "run").fit(resume=True)
    assert_same(whole("ppo"), tmp_path / "run")


@pytest.mark.parametrize("name", ["ppo", "trpo", "groups"])
def test_one_seed_has_one_story_and_another_seed_another(whole, tmp_path, name):
    agent(name, tmp_path / "same").fit()
    agent(name, tmp_path / "other", seed=1).fit()
    assert_same(whole(name), tmp_path / "same")
    assert metrics_hash(tmp_path / "other/metrics.jsonl") != metrics_hash(whole(name) / "metrics.jsonl")


def test_looking_at_a_run_does_not_change_it(whole, tmp_path):
    """Neither evaluations by config, nor ones of yours, nor acting with the agent between iterations."""
    never = {"eval": {"every": 0, "episodes": 2, "num_envs": 2, "video": False}}
    watched = agent("ppo", tmp_path / "run", **never)
    for _ in watched.steps():
        watched.evaluate(3)
        watched.predict(watched.observation_space.sample(), deterministic=False)
    one, other = whole("ppo"), tmp_path / "run"
    assert (one / "model" / WEIGHTS).read_bytes() == (other / "model" / WEIGHTS).read_bytes()
    trained = [[r for r in read(path / "metrics.jsonl") if r["kind"] == "train"] for path in (one, other)]
    for record, again in zip(*trained, strict=True):
        assert {k: v for k, v in record.items() if not k.startswith(("time/", "throughput/"))} == {
            k: v for k, v in again.items() if not k.startswith(("time/", "throughput/"))
        }


def test_checkpoints_are_made_when_their_step_was_passed(tmp_path):
    # 64 decisions or fewer per iteration never hit a multiple of 100 exactly.
    trained = agent("ppo", tmp_path / "run", checkpoint={"every": 100, "keep": 50}).fit()
    steps = sorted(int(path.name.removeprefix("ckpt-")) for path in (tmp_path / "run/checkpoints").glob("ckpt-*"))
    assert [step // 100 for step in steps[:-1]] == list(range(1, len(steps)))
    assert steps[-1] == trained.step
