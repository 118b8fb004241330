"""Evaluation: whole episodes, the same starts each time, frozen statistics, raw rewards."""

import math

import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv

from rlalign.agents import PPO
from rlalign.agents.config import AgentEvalConfig
from rlalign.agents.envs import Environments
from rlalign.agents.episodes import EnvironmentFault
from rlalign.agents.evaluate import Evaluator, summary
from rlalign.training.journal import Journal
from tests.agents.small_agents import iterated, small
from tests.agents.tiny_environments import MODES, Scripted


def idle(observation, info, *, random):
    return np.zeros(len(observation), dtype=np.int64), {}


def nowhere():
    """A journal without a run directory writes nothing."""
    return Journal(None, total_steps=10)


class Length(Scripted):
    """Episodes as long as their seed, modulo 5, plus 1; each step pays 1."""

    def reset(self, *, seed=None, options=None):
        self.seeds = [*getattr(self, "seeds", []), seed]
        observation, info = super().reset(seed=seed)
        self.lengths = (1 + (seed or 0) % 5,)
        return observation, info

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, 1.0, terminated, truncated, info


def evaluator(mode, copies=3, decide=idle, **cfg):
    vector = SyncVectorEnv([lambda i=i: Length(i) for i in range(copies)], autoreset_mode=mode)
    return Evaluator(Environments(vector, name="Length", seed=0), decide, AgentEvalConfig(**cfg), seed=10)


@pytest.mark.parametrize("mode", MODES)
def test_every_start_is_played_once_to_its_end(mode):
    # Starts 10 to 16 last 1 2 3 4 5 1 2 steps. A quick copy plays no more episodes than a slow one.
    returns, lengths = evaluator(mode).play(7)
    assert returns.tolist() == lengths.tolist() == [1, 2, 3, 4, 5, 1, 2]


def test_every_evaluation_plays_the_same_starts():
    one = evaluator(MODES[0])
    assert one.play(5)[0].tolist() == one.play(5)[0].tolist()


def test_summary_by_hand():
    found = summary(np.array([1.0, 3.0]), np.array([4, 6]))
    assert (found["eval/return_mean"], found["eval/length_mean"], found["eval/n"]) == (2.0, 5.0, 2.0)
    assert found["eval/return_stderr"] == pytest.approx(2**0.5 / 2**0.5)  # sample deviation sqrt(2), over sqrt(2)
    assert found["eval/return_low"] >= 1.0 and found["eval/return_high"] <= 3.0
    assert found["eval/return_min"] == 1.0


@pytest.mark.parametrize(
    ("every", "before", "now", "due"), [(0, 0, 99, False), (10, 9, 10, True), (10, 10, 19, False), (10, 5, 31, True)]
)
def test_an_evaluation_is_due_when_its_step_was_passed(every, before, now, due):
    assert evaluator(MODES[0], every=every).due(before, now) == due


def test_patience_ends_a_run_without_a_new_best():
    one, journal = evaluator(MODES[0], episodes=3, patience=2), nowhere()
    assert one.record(5, journal)["eval/return_mean"] == 2.0
    assert (one.best, one.stale) == (2.0, 0)
    assert one.record(5, journal) == {}  # evaluated already
    one.record(6, journal)
    assert not one.out_of_patience
    one.record(7, journal)
    assert one.out_of_patience
    again = evaluator(MODES[0], patience=2)
    again.load_state_dict(one.state_dict())
    assert again.out_of_patience and again.evaluated_at == 7


def test_without_an_environment_nothing_is_evaluated():
    one = Evaluator(None, idle, AgentEvalConfig(), seed=0)
    assert one.record(3, nowhere()) == {}
    assert one.best == -math.inf


def test_sampled_actions_are_the_same_each_time_and_not_the_deterministic_ones():
    sampled = small(PPO, eval={"deterministic": False, "episodes": 6, "num_envs": 3})
    first = sampled.evaluate()
    assert first == sampled.evaluate()
    assert first["eval/return_mean"] != small(PPO).evaluate(6)["eval/return_mean"]


def test_evaluation_sees_through_frozen_statistics_and_counts_raw_rewards():
    agent = small(PPO, normalize={"observations": True, "rewards": True})
    iterated(agent)
    before = agent.model.observations.state_dict()["observation"]
    found = agent.evaluate(4)
    after = agent.model.observations.state_dict()["observation"]
    assert all(before[name].equal(after[name]) for name in before)
    assert int(agent.model.rewards.moments.count) == agent.collector.env_steps
    assert found["eval/return_mean"] == found["eval/length_mean"]  # the pole pays 1 per step


def test_evaluation_copies_are_not_those_of_training():
    agent = small(PPO)
    iterated(agent)
    state, place = agent.environments.state_dict(), agent.environments.observation.copy()
    agent.evaluate(3)
    np.testing.assert_array_equal(agent.environments.observation, place)
    for index, log in agent.environments.state_dict()["episodes"].items():
        assert log["taken"].equal(state["episodes"][index]["taken"])


def test_an_episode_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("rlalign.agents.envs.LONGEST_EPISODE", 3)
    with pytest.raises(EnvironmentFault, match="Length: an episode has not ended within 3 steps.*max_episode_steps"):
        evaluator(MODES[0]).play(7)
