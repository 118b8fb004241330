"""Offline agents through the common surface: any data, with an environment or without, resumed bit by bit."""

import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlalign.agents import BC, IQL, ODICE, TD3BC
from rlalign.agents.datasets import load_dataset, save_npz
from rlalign.agents.run import load_agent
from rlalign.agents.saved import WEIGHTS
from rlalign.config import ConfigError
from rlalign.training import session
from rlalign.training.metrics import metrics_hash, read
from tests.agents.offline_data import random_batch, same_weights, stitched_chain

AGENTS = {"odice": ODICE, "bc": BC, "iql": IQL, "td3_bc": TD3BC}
TINY = {"hidden": [8, 8], "activation": "relu"}
POLE, PENDULUM = "rlalign_envs:cartpole_mixed", "rlalign_envs:pendulum_mixed"


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing it takes longer than the run."""
    monkeypatch.setattr(session, "write_report", lambda path: path)


def agent(name, *env, dataset=PENDULUM, **more):
    settings = {"batch_size": 16, "network": TINY, "eval": {"episodes": 2, "num_envs": 2, "video": False}}
    settings |= {} if name == "bc" else {"critic_network": TINY}
    settings |= {"network": {**TINY, "squash": True}} if name == "td3_bc" else {}
    return AGENTS[name](*env, dataset=dataset, **{**settings, **more})


def chain_data():
    """Discrete actions, no environment."""
    return stitched_chain()[0]


# ---------------------------------------------------------------- data alone


@pytest.mark.parametrize("name", AGENTS)
def test_without_any_environment_it_learns_acts_is_saved_and_comes_back(tmp_path, name):
    trained = agent(name, run_dir=tmp_path / "run").fit(total_updates=120)
    assert trained.step == 120
    seen = load_dataset(PENDULUM).transitions.observations[:5].numpy()
    actions, about = trained.predict(seen)
    assert (actions.shape, about["log_prob"].shape) == ((5, 1), (5,))
    assert np.abs(actions).max() <= 2.0
    for back in (AGENTS[name].load(tmp_path / "run"), load_agent(tmp_path / "run")):
        assert np.array_equal(back.predict(seen)[0], actions)
    with pytest.raises(ConfigError, match="no environment to evaluate in"):
        trained.evaluate()


@pytest.mark.parametrize("given", ["path", "transitions"])
def test_a_saved_agent_acts_when_its_data_is_gone_but_does_not_train(tmp_path, given):
    file = tmp_path / "data.npz"
    save_npz(chain_data(), file)
    trained = agent("odice", dataset=file if given == "path" else chain_data(), run_dir=tmp_path / "run")
    trained.fit(total_updates=3).save(tmp_path / "saved")
    file.unlink()
    back = ODICE.load(tmp_path / "saved")
    states = np.eye(3, dtype=np.float32)
    assert back.predict(states)[0].tolist() == trained.predict(states)[0].tolist()
    back.run_dir = tmp_path / "again"
    with pytest.raises(ConfigError, match="learns from recorded data: set `dataset`"):
        back.fit(total_updates=1)


def test_spaces_are_read_off_the_data():
    discrete, continuous = agent("bc", dataset=chain_data()), agent("bc", dataset=random_batch(0, actions=None))
    assert (discrete.observation_space.shape, discrete.action_space) == ((3,), gym.spaces.Discrete(2))
    assert continuous.action_space.shape == (2,)
    # They fill [-1, 1] as long as no action leaves it; the pendulum's do.
    assert continuous.action_space.high.tolist() == [1.0, 1.0]
    assert agent("bc").action_space.high.tolist() == [2.0]


def test_one_without_data_or_with_unfitting_data_says_so():
    with pytest.raises(ConfigError, match="set `dataset`, or pass `dataset=`"):
        agent("bc", dataset=None)
    with pytest.raises(ConfigError, match=r"shape \[3\], the environment's \[4\]"):
        agent("bc", "CartPole-v1")
    with pytest.raises(ConfigError, match="actions are discrete"):
        agent("bc", "Pendulum-v1", dataset=chain_data())
    with pytest.raises(ConfigError, match="counts `total_updates`"):
        agent("bc").fit(total_env_steps=10)


# ---------------------------------------------------------------- settings that only offline agents have


def test_imitation_sets_every_reward_to_zero():
    data = chain_data()
    assert float(agent("odice", dataset=data).buffer.transitions.rewards.abs().max()) == 10.0
    assert not agent("odice", dataset=data, rewards="none").buffer.transitions.rewards.any()
    # Then rewards cannot matter at all.
    other = data.with_rewards(torch.randn_like(data.rewards))
    one, two = (agent("odice", dataset=d, rewards="none", total_updates=20) for d in (data, other))
    for learner in (one, two):
        learner.iterate()
    assert same_weights(one.learner.modules, two.learner.modules)


def test_td3_bc_needs_a_bounded_policy_and_says_how():
    with pytest.raises(ConfigError, match="`network.squash` must be true"):
        agent("td3_bc", network={**TINY, "squash": False})
    with pytest.raises((ConfigError, ValueError), match="continuous, bounded action"):
        agent("td3_bc", dataset=chain_data())


def test_observations_are_normalised_by_the_data_and_stay_so(tmp_path):
    data = load_dataset(PENDULUM).transitions
    made = agent("bc", normalize_observations=True)
    seen = made.buffer.transitions.observations
    assert float(seen.mean(0).abs().max()) < 1e-3
    torch.testing.assert_close(seen.std(0), torch.ones(3), atol=1e-3, rtol=0)
    # Next observations by the same statistics, not by their own.
    expected = (data.next_observations - data.observations.mean(0)) / data.observations.std(0)
    torch.testing.assert_close(made.buffer.transitions.next_observations, expected, atol=1e-3, rtol=1e-3)
    made.save(tmp_path / "saved")
    some = data.observations[:4].numpy()
    assert np.array_equal(BC.load(tmp_path / "saved").predict(some)[0], made.predict(some)[0])


def test_squashed_actions_are_scaled_to_the_bounds():
    made = agent("bc", "Pendulum-v1", network={**TINY, "squash": True})
    recorded = load_dataset(PENDULUM).transitions.actions
    torch.testing.assert_close(made.buffer.transitions.actions, recorded / 2)


# ---------------------------------------------------------------- the same bits


def run(name, folder, **more):
    env, data = ("Pendulum-v1", PENDULUM) if name == "td3_bc" else ("CartPole-v1", POLE)
    settings = {"total_updates": 450, "checkpoint": {"every": 100}, "run_dir": folder}
    settings["eval"] = {"every": 200, "episodes": 2, "num_envs": 2, "video": False, "before": True}
    return agent(name, env, dataset=data, **{**settings, **more})


@pytest.mark.parametrize("name", AGENTS)
def test_a_stopped_run_ends_with_the_bits_of_one_left_alone(tmp_path, name):
    whole = run(name, tmp_path / "whole").fit()
    for resume in (False, True):
        steps = run(name, tmp_path / "stopped").steps(resume=resume)
        for _ in range(2):
            next(steps)
        steps.close()  # before this iteration could be saved
    run(name, tmp_path / "stopped").fit(resume=True)
    run(name, tmp_path / "same").fit()
    for other in ("stopped", "same"):
        assert (tmp_path / other / "model" / WEIGHTS).read_bytes() == (tmp_path / "whole/model" / WEIGHTS).read_bytes()
        assert metrics_hash(tmp_path / other / "metrics.jsonl") == metrics_hash(tmp_path / "whole/metrics.jsonl")
    records = [record for record in read(tmp_path / "whole/metrics.jsonl") if record["kind"] == "train"]
    assert [record["step"] for record in records] == [100, 200, 300, 400, 450]
    assert whole.step == 450


def test_another_seed_is_another_story(tmp_path):
    for seed in (0, 1):
        run("odice", tmp_path / str(seed), seed=seed, total_updates=100).fit()
    assert metrics_hash(tmp_path / "0/metrics.jsonl") != metrics_hash(tmp_path / "1/metrics.jsonl")


def test_a_run_without_environment_is_resumed_too(tmp_path):
    agent("odice", run_dir=tmp_path / "whole", total_updates=300).fit()
    steps = agent("odice", run_dir=tmp_path / "run", total_updates=300, checkpoint={"every": 100}).steps()
    next(steps), next(steps)
    steps.close()
    agent("odice", run_dir=tmp_path / "run", total_updates=300, checkpoint={"every": 100}).fit(resume=True)
    assert (tmp_path / "run/model" / WEIGHTS).read_bytes() == (tmp_path / "whole/model" / WEIGHTS).read_bytes()
    shutil.rmtree(tmp_path / "run")


def test_odice_finds_the_best_path_in_pieces_where_cloning_does_not(tmp_path):
    relu, adam = {"hidden": [16, 16], "activation": "relu"}, {"learning_rate": 5e-3, "max_grad_norm": None}
    shared = {"dataset": chain_data(), "network": relu, "optim": adam, "batch_size": 64}
    dice = ODICE(critic_network=relu, critic_optim=adam, target_tau=0.05, run_dir=tmp_path / "dice", **shared)
    clone = BC(run_dir=tmp_path / "clone", **shared)
    for one in (dice, clone):
        one.fit(total_updates=300)
    fork = np.eye(3, dtype=np.float32)[:1]
    assert dice.predict(fork)[0].tolist() == [0]
    assert clone.predict(fork)[0].tolist() == [1]


def test_training_without_data_stops_before_a_run_begins(tmp_path):
    agent = BC("CartPole-v1", run_dir=tmp_path / "run", eval={"video": False})
    with pytest.raises(ConfigError, match="BC learns from recorded data: set `dataset`"):
        agent.fit(total_updates=10)
    assert not (tmp_path / "run").exists()
