"""A bad environment costs one sentence that names copy, step and field; what was learned is kept."""

import re
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from rlalign.agents.envs import Environments
from rlalign.agents.episodes import EnvironmentFault, SeededEpisodes
from rlalign.training.metrics import metrics_hash
from tests.agents.tiny_environments import BAD, Bad
from tests.llm.commands import fault, rlalign

STEP_FAULTS = {
    "nan_observation": r"`place` has NaN or infinite entries: \[ ?[01]\. +nan\]",
    "infinite_observation": r"`place` has NaN or infinite entries: \[inf",
    "nan_reward": "the reward is nan",
    "infinite_reward": "the reward is -inf",
    "text_reward": "the reward is 'much', not a number",
    "list_reward": r"the reward is \[1.0\], not a number",
    "wrong_shape": r"`place` is of shape \(1,\), its space of \(2,\)",
    "wrong_dtype": "`room` is of dtype float64, its space of int64",
    "missing_part": "no part `room`",
    "raises": "ValueError: no such room",
    "old_interface": r"returned 4 values, not \(observation, reward, terminated, truncated, info\)",
}
RESET_FAULTS = [n for n in STEP_FAULTS if not n.endswith("reward")]


def copies(what, *, at=5, wrapped=None):
    """Three copies, of which the second goes wrong."""

    def make(index):
        env = Bad(what=what if index == 1 else "", at=at)
        return SeededEpisodes(wrapped(env) if wrapped else env, name="Bad", seed=0, index=index)

    return [partial(make, index) for index in range(3)]


def played(envs):
    envs.reset()
    for _ in range(20):
        envs.step(np.zeros(3, dtype=np.int64))


@pytest.mark.parametrize("what", STEP_FAULTS)
def test_a_step_that_goes_wrong_names_copy_step_and_field(what):
    envs = Environments(SyncVectorEnv(copies(what)), name="Bad", seed=0, own=True)
    with pytest.raises(EnvironmentFault, match=f"^Bad, copy 1, step [0-9].*{STEP_FAULTS[what]}") as raised:
        played(envs)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("what", RESET_FAULTS)
def test_a_reset_that_goes_wrong_too(what):
    envs = Environments(SyncVectorEnv(copies(what, at=0)), name="Bad", seed=0, own=True)
    expected = r"returned dict, not \(observation, info\)" if what == "old_interface" else STEP_FAULTS[what]
    with pytest.raises(EnvironmentFault, match=f"^Bad, copy 1, .*reset.*{expected}"):
        played(envs)


def test_an_old_interface_behind_gymnasium_s_own_wrappers():
    wrapped = partial(gym.wrappers.TimeLimit, max_episode_steps=9)
    envs = Environments(SyncVectorEnv(copies("old_interface", wrapped=wrapped)), name="Bad", seed=0, own=True)
    with pytest.raises(EnvironmentFault, match=r"copy 1, .*expected 5, got 4.*must return \(observation, reward, term"):
        played(envs)


@pytest.mark.parametrize("what", ["nan_observation", "nan_reward"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environments_of_others_are_watched_too(what, mode):
    # At step 4 an episode ends: SAME_STEP keeps that observation apart.
    vector = SyncVectorEnv(
        [partial(Bad, what=what if index == 1 else "", at=4) for index in range(3)], autoreset_mode=mode
    )
    with pytest.raises(EnvironmentFault, match=r"^Theirs, copy 1, step 4: .*(NaN|nan)"):
        played(Environments(vector, name="Theirs", seed=0))


@pytest.mark.parametrize("what", ["raises", "wrong_shape"])
def test_a_fault_in_another_process_is_told_the_same(monkeypatch, what):
    vector = AsyncVectorEnv(copies(what), context="fork")
    monkeypatch.setattr(gym.logger, "min_level", 50)  # it prints the traceback besides
    try:
        with pytest.raises(EnvironmentFault, match=f"copy 1, .*{STEP_FAULTS[what]}"):
            played(Environments(vector, name="Bad", seed=0, own=True))
    finally:
        vector.close(terminate=True)


@pytest.mark.filterwarnings("ignore:.*Calling `close` while waiting:UserWarning")
@pytest.mark.parametrize("at", [3])
def test_a_hanging_copy_is_named(at):
    vector = AsyncVectorEnv(copies("hangs", at=at), context="fork")
    envs = Environments(vector, name="Bad", seed=0, own=True)
    envs.timeout = 0.3
    try:
        with pytest.raises(EnvironmentFault, match=r"copies \[1\], step 2: no answer within 0.3 s.*step_timeout_s"):
            played(envs)
    finally:
        vector.close(terminate=True)


# ---------------------------------------------------------------- the whole run

YAML = f"""# Tiny.
method: ppo
total_env_steps: 300
env:
  id: {BAD}
  num_envs: 2
  kwargs: {{what: WHAT, at: 60}}
network: {{hidden: [8]}}
rollout_steps: 16
minibatch_size: 16
update_epochs: 2
normalize: {{observations: true, rewards: true}}
eval: {{every: 100, episodes: 2, num_envs: 2, video: false}}
checkpoint: {{every: 50}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agents")
    (folder / "run.yaml").write_text(YAML.replace("WHAT", "''"))
    done = rlalign(folder, "train", "run.yaml", "--run-dir", "whole", count=True)
    assert done.code == 0, done.err
    return folder, done.counts


@pytest.mark.parametrize("what", ["nan_observation", "raises", "nan_reward"])
def test_a_failed_run_says_one_sentence_and_keeps_its_last_checkpoint(runs, what):
    folder, _ = runs
    failed = rlalign(folder, "train", "run.yaml", f"env.kwargs={{what: {what}, at: 60}}", "--run-dir", what)
    assert failed.code == 1
    sentence = failed.err.strip().splitlines()[0]
    assert re.search(f"{BAD}, copy 0, step .*{STEP_FAULTS[what].split(':')[0]}", sentence), failed.err
    assert "Traceback (most recent" not in failed.err
    assert list((folder / what / "checkpoints").glob("ckpt-*"))
    # Whoever mends the environment loses nothing.
    settings = (folder / what / "config.resolved.json").read_text().replace(what, "")
    (folder / what / "config.resolved.json").write_text(settings)
    resumed = rlalign(folder, "resume", what)
    assert resumed.code == 0, resumed.err
    assert "Resumed step" in resumed.out
    assert metrics_hash(folder / what / "metrics.jsonl") == metrics_hash(folder / "whole/metrics.jsonl")


KILLS = [
    ("env", 0.2),
    ("learn", 0.35),
    ("env", 0.5),
    ("play", 0.5),
    ("file", 0.7),
    ("learn", 0.8),
    ("record", 0.6),
    ("report", 1),
]


@pytest.mark.parametrize(("point", "share"), KILLS)
def test_killed_anywhere_and_resumed(runs, point, share):
    folder, counts = runs
    run = f"killed-{point}-{share}"
    nth = max(1, round(share * counts[point]))
    died = rlalign(folder, "train", "run.yaml", "--run-dir", run, faults=[fault(point, nth)])
    assert died.code == -9
    resumed = rlalign(folder, "resume", run)
    assert resumed.code == 0, resumed.err
    assert metrics_hash(folder / run / "metrics.jsonl") == metrics_hash(folder / "whole/metrics.jsonl")
    for name in ("agent.json", "agent.safetensors"):
        assert (folder / run / "model" / name).read_bytes() == (folder / "whole/model" / name).read_bytes()


def test_a_hang_ends_the_run_with_exit_code_1(runs):
    folder, _ = runs
    hanging = ("env.vectorization=async", "env.step_timeout_s=1.0", "env.kwargs={what: hangs, at: 60}")
    failed = rlalign(folder, "train", "run.yaml", *hanging, "--run-dir", "hangs")
    assert failed.code == 1
    assert "no answer within 1 s" in failed.err
