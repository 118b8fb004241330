"""Agents find answers that are known beforehand."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from rlalign.agents import PPO, TRPO, PolicyGradientAgent
from rlalign_envs.chain import chain_values

pytestmark = pytest.mark.learning

MODES = list(AutoresetMode)
QUIET = {"episodes": 20, "num_envs": 4, "video": False}


def trained(agent, iterations):
    """Iterations without a run directory."""
    for _ in range(iterations):
        agent.iterate()
        agent.iteration += 1
    return agent


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ["mse", "hl_gauss"])
def test_reward_1_forever_is_worth_1_over_1_minus_gamma_under_a_time_limit(mode, head):
    # Episodes are cut after 20 steps and show their clock: who takes a cut for an end learns V = 1 in the last state.
    envs = gym.make_vec("rlalign_envs:Forever-v0", 4, autoreset_mode=mode, clock=True)
    settings = {"gamma": 0.9, "learning_rate": 5e-3, "rollout_steps": 64, "minibatch_size": 64, "update_epochs": 10}
    agent = trained(PPO(envs, value_head=head, network={"hidden": [32]}, **settings), 25)
    elapsed = torch.arange(20.0)
    values = agent.model.critic.values({"vector": (elapsed / (elapsed + 10))[:, None]}).detach()
    torch.testing.assert_close(values, torch.full((20,), 10.0), rtol=0.04, atol=0)


@pytest.mark.parametrize("cls", [PPO, TRPO])
def test_the_chain_is_walked_and_its_values_are_known(cls):
    kwargs = {"length": 5, "random_start": True}
    settings = {"kwargs": kwargs, "num_envs": 8, "rollout_steps": 64, "gamma": 0.9, "network": {"hidden": [32]}}
    agent = cls("rlalign_envs:Chain-v0", minibatch_size=64, optim={"learning_rate": 3e-3}, **settings)
    trained(agent, 40)
    states = np.eye(5, dtype=np.float32)[:4]
    actions, info = agent.predict(states)
    assert actions.tolist() == [1, 1, 1, 1]
    right = float(np.exp(info["log_prob"]).min())
    low, high = chain_values(5, gamma=0.9, right=right)[:4], chain_values(5, gamma=0.9)[:4]
    assert right > 0.8
    assert (info["value"] > low - 0.05).all() and (info["value"] < high + 0.05).all()


@pytest.mark.parametrize("estimator", ["group_relative", "leave_one_out", "beta_normalized"])
def test_group_estimators_learn_from_success_alone(estimator):
    # Six steps for a walk of four: a random walk rarely gets there.
    agent = PolicyGradientAgent(
        "rlalign_envs:Chain-v0",
        kwargs={"length": 5},
        max_episode_steps=6,
        num_envs=32,
        group_size=8,
        advantage=estimator,
        success_threshold=0.5,
        learning_rate=1e-2,
        eval=QUIET,
    )
    assert agent.iterate()["reward/mean"] < 0.6
    agent.iteration += 1
    trained(agent, 40)
    assert agent.iterate()["reward/mean"] > 0.9
    assert agent.evaluate()["eval/return_mean"] == 1.0


def test_ppo_balances_the_pole(tmp_path):
    agent = PPO(
        "CartPole-v1",
        rollout_steps=32,
        minibatch_size=256,
        update_epochs=20,
        gamma=0.98,
        gae_lambda=0.8,
        optim={"learning_rate": 1e-3, "schedule": "linear"},
        eval=QUIET,
        run_dir=tmp_path / "run",
    )
    agent.fit(total_env_steps=40_000)
    assert agent.evaluate()["eval/return_mean"] > 300


def test_trpo_balances_the_pole():
    agent = TRPO("CartPole-v1", rollout_steps=128, gae_lambda=0.95, optim={"learning_rate": 1e-3}, eval=QUIET)
    assert trained(agent, 25).evaluate()["eval/return_mean"] > 200


def test_normalisation_makes_up_for_scale():
    """Rewards of a thousand and observations of a millionth: PPO learns with normalisers, in one setting for all."""
    from gymnasium.wrappers import TransformObservation, TransformReward

    def make():
        env = TransformReward(gym.make("CartPole-v1"), lambda r: 1e3 * r)
        space = gym.spaces.Box(-np.inf, np.inf, (4,))
        return TransformObservation(env, lambda seen: (seen * 1e-6).astype(np.float32), space)

    agent = PPO(
        gym.vector.SyncVectorEnv([make] * 8),
        rollout_steps=64,
        minibatch_size=128,
        normalize={"observations": True, "rewards": True},
        learning_rate=1e-3,
    )
    trained(agent, 40)
    assert agent.collector.episodes.metrics()["episode/length_mean"] > 80
