"""One environment whose episodes can be replayed."""

import gymnasium as gym
import numpy as np

from rlalign.agents.episodes import REPLAY, SeededEpisodes
from tests.agents.tiny_environments import ANY


def copy(index=0, seed=0, **kwargs):
    return SeededEpisodes(gym.make(ANY, disable_env_checker=True, **kwargs), name="Any", seed=seed, index=index)


def test_an_episode_is_a_function_of_seed_copy_and_number():
    def starts(index, seed):
        env = copy(index, seed)
        return np.stack([env.reset()[0] for _ in range(3)])

    assert len(np.unique(starts(0, 0), axis=0)) == 3
    np.testing.assert_array_equal(starts(0, 0), starts(0, 0))
    assert not np.isin(starts(0, 0), starts(1, 0)).any()
    assert not np.isin(starts(0, 0), starts(0, 1)).any()


def test_what_came_before_does_not_change_an_episode():
    played, fresh = copy(), copy()
    played.reset()
    for _ in range(4):
        played.step(1)
    fresh.reset()
    np.testing.assert_array_equal(played.reset()[0], fresh.reset()[0])


def test_a_given_seed_names_the_start():
    one, other = copy(0), copy(1)
    np.testing.assert_array_equal(one.reset(seed=5)[0], other.reset(seed=5)[0])
    assert one.replay_log()["start"] == 5


def test_playing_the_log_back_leads_to_the_same_place():
    env, again = copy(), copy()
    env.reset()
    env.reset()
    seen = [env.step(action)[0] for action in (0, 2, 1)]
    log = env.replay_log()
    assert (log["episode"], log["taken"].tolist()) == (1, [0, 2, 1])
    observation, _ = again.reset(options={REPLAY: {0: log}})
    np.testing.assert_array_equal(observation, seen[-1])
    for action in (1, 1):
        np.testing.assert_array_equal(env.step(action)[0], again.step(action)[0])
    np.testing.assert_array_equal(env.reset()[0], again.reset()[0])


def test_an_episode_that_was_over_restarts_at_the_next_step():
    env, again = copy(episode_steps=2), copy(episode_steps=2)
    env.reset()
    env.step(0)
    last, _, terminated, truncated, _ = env.step(0)
    assert terminated or truncated
    observation, _ = again.reset(options={REPLAY: {0: env.replay_log()}})
    np.testing.assert_array_equal(observation, last)
    started, reward, *flags, _ = again.step(0)
    np.testing.assert_array_equal(started, env.reset()[0])
    assert (reward, flags) == (0.0, [False, False])
    assert again.replay_log()["taken"] is None
