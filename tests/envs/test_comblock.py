"""The combination lock: probabilities, observations and rewards by hand, offline data by its formula."""

import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlalign_envs.comblock import BROKEN, CombinationLock, CombinationLockVectorEnv, Lock, comblock_offline, hadamard

P_GOOD = math.exp(10) / (math.exp(10) + 9)  # of the expert's one-hot action: 0.99959


class Script:
    """A generator with the uniform numbers given, and no noise."""

    def __init__(self, uniform, noise=0.0):
        self.uniform, self.noise = np.asarray(uniform, dtype=np.float64), noise

    def random(self, size):
        return np.broadcast_to(self.uniform, size)

    def standard_normal(self, size):
        return np.broadcast_to(np.asarray(self.noise, dtype=np.float64), size)


def one_hot(*choices):
    return np.eye(10)[list(choices)]


def zeros(count):
    return np.zeros(count, dtype=np.int64)


@pytest.mark.parametrize("kwargs", [{}, {"horizon": 2, "anti_shaped": "paper"}, {"horizon": 12, "lock_seed": 3}])
def test_environment_is_clean(kwargs):
    check_env(gym.make("rlalign_envs:CombinationLock-v0", **kwargs).unwrapped)


# ---------------------------------------------------------------- choices


def chosen(actions, draws):
    """Which choice each row's action makes, for given draws: by trying all right choices on a lock of one step."""
    lock, count = Lock(1), len(actions)
    found = np.full(count, -1)
    uniform = np.stack([draws, np.ones(count), np.ones(count)], -1)
    for choice in range(10):
        lock.right_choices = np.full((2, 1), choice)
        _, rewards = lock.advance(zeros(count), zeros(count), actions, Script(uniform))
        found[rewards == 1.0] = choice
    return found


def test_the_expert_is_right_with_probability_e10_over_e10_plus_9():
    grid = (np.arange(100_000) + 0.5) / 100_000
    counts = np.bincount(chosen(np.tile(one_hot(4), (100_000, 1)), grid), minlength=10)
    assert counts[4] == pytest.approx(100_000 * P_GOOD, abs=1)  # 99,959
    assert np.delete(counts, 4).tolist() == pytest.approx([4.54] * 9, abs=1)


def test_an_action_is_a_softmax_with_temperature_one_tenth():
    # exp(0.1 ln 2 / 0.1) = 2: the first choice is twice as likely as each of the nine others, 2/11
    action = np.zeros((1100, 10))
    action[:, 0] = 0.1 * math.log(2)
    counts = np.bincount(chosen(action, (np.arange(1100) + 0.5) / 1100), minlength=10)
    assert counts.tolist() == pytest.approx([200] + [100] * 9, abs=1)


def test_large_actions_do_not_overflow():
    actions = np.array([[0.0] * 9 + [1e6], [-1e6] * 9 + [-1e6 + 1e3]])
    assert chosen(actions, np.array([0.999, 0.001])).tolist() == [9, 9]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_actions_that_are_no_numbers_are_refused(bad):
    envs = CombinationLockVectorEnv(3)
    envs.reset(seed=0)
    actions = np.zeros((3, 10))
    actions[1, 4] = bad
    with pytest.raises(ValueError, match=r"those in rows \[1\] are not"):
        envs.step(actions)


# ---------------------------------------------------------------- observations


def test_observation_by_hand_for_one_step():
    # H = 1: D = 2^ceil(log2 5) = 8. Start in state 1: z = e1 + e3; the end in state 0: z = e0 + e4 (h after the step).
    lock = Lock(1)
    quiet = Script(0.0)
    assert lock.observe(np.array([1]), np.array([0]), quiet).tolist() == [[2, -2, 0, 0, 2, -2, 0, 0]]
    assert lock.observe(np.array([0]), np.array([1]), quiet).tolist() == [[2, 2, 2, 2, 0, 0, 0, 0]]


def test_noise_enters_the_first_places_before_the_rotation():
    lock = Lock(1)
    seen = lock.observe(np.array([BROKEN]), np.array([1]), Script(0.0, noise=[1.0, 2.0, 3.0, 4.0]))
    z = seen[0] @ hadamard(8) / 8  # undo the rotation
    assert z.tolist() == pytest.approx([0.1, 0.2, 1.3, 0.4, 1.0, 0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(("horizon", "size"), [(1, 8), (4, 8), (5, 16), (12, 16), (13, 32), (28, 32), (50, 64)])
def test_observation_size_is_a_power_of_two(horizon, size):
    lock = Lock(horizon)
    assert lock.observe(zeros(1), np.array([horizon]), np.random.default_rng(0)).shape == (1, size)


def test_noise_has_deviation_one_tenth_per_place():
    lock = Lock(5)
    seen = lock.observe(zeros(20_000), zeros(20_000), np.random.default_rng(0))
    # every rotated entry is a sum of 8 noises
    assert seen.std(0).tolist() == pytest.approx([0.1 * 8**0.5] * 16, rel=0.03)
    assert np.abs(seen).max() < lock.observation_space().high[0]


def test_hadamard_is_sylvesters():
    assert hadamard(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (hadamard(16) @ hadamard(16)).tolist() == (16 * np.eye(16)).tolist()


# ---------------------------------------------------------------- transitions and rewards


def advance(lock, state, step, choice, switch, pay):
    states, rewards = lock.advance(
        np.array([state]), np.array([step]), 100 * one_hot(choice), Script([0.5, switch, pay])
    )
    return int(states[0]), float(rewards[0])


@pytest.mark.parametrize("anti_shaped", ["official", "paper"])
def test_transitions_and_rewards_by_table(anti_shaped):
    lock = Lock(3, anti_shaped=anti_shaped)
    lock.right_choices = np.array([[1, 2, 3], [4, 5, 6]])
    decoy = 0.1 if anti_shaped == "paper" else 0.0
    last_broken = 0.1 if anti_shaped == "official" else 0.0
    yes, no = 0.4, 0.6
    # (state, step, choice, switch, pay) -> (next state, reward)
    table = {
        (0, 0, 1, no, yes): (0, 0.0),
        (0, 0, 1, yes, yes): (1, 0.0),
        (1, 1, 5, no, yes): (1, 0.0),
        (1, 1, 5, yes, yes): (0, 0.0),
        (0, 0, 4, no, yes): (BROKEN, decoy),  # right in the other state only
        (0, 0, 4, no, no): (BROKEN, 0.0),
        (1, 1, 2, yes, yes): (BROKEN, decoy),
        (BROKEN, 1, 5, yes, yes): (BROKEN, 0.0),
        (0, 2, 3, yes, yes): (0, 1.0),
        (1, 2, 6, yes, no): (1, 1.0),
        (0, 2, 6, yes, yes): (BROKEN, 0.1),
        (0, 2, 6, yes, no): (BROKEN, 0.0),
        (BROKEN, 2, 3, no, yes): (BROKEN, last_broken),
        (BROKEN, 2, 6, no, no): (BROKEN, 0.0),
    }
    assert {case: advance(lock, *case) for case in table} == table


def test_episodes_last_exactly_the_horizon():
    env = CombinationLock(4)
    env.reset(seed=0)
    ends = [env.step(np.zeros(10))[2:4] for _ in range(4)]
    assert ends == [(False, False)] * 3 + [(True, False)]
    with pytest.raises(ValueError, match="over after 4 steps: call `reset`"):
        env.step(np.zeros(10))


def test_starts_are_even_and_switches_too():
    rng, lock = np.random.default_rng(0), Lock(2)
    states = lock.start(10_000, rng)
    assert states.mean() == pytest.approx(0.5, abs=0.02)
    actions = 100 * np.eye(10)[lock.right_choices[states, 0]]
    following, _ = lock.advance(states, zeros(10_000), actions, rng)
    assert (following != states).mean() == pytest.approx(0.5, abs=0.02)
    assert set(following) == {0, 1}


# ---------------------------------------------------------------- seeds


def test_right_choices_come_from_the_lock_seed_alone():
    train, evaluation = (gym.make("rlalign_envs:CombinationLock-v0", lock_seed=4).unwrapped for _ in range(2))
    first, second = train.reset(seed=0)[0], evaluation.reset(seed=1)[0]
    assert train.lock.right_choices.tolist() == evaluation.lock.right_choices.tolist()
    assert not np.array_equal(first, second)
    vector = gym.make_vec("rlalign_envs:CombinationLock-v0", num_envs=2, lock_seed=4)
    assert vector.lock.right_choices.tolist() == train.lock.right_choices.tolist()
    assert Lock(5, lock_seed=5).right_choices.tolist() != train.lock.right_choices.tolist()


def test_the_same_seed_gives_the_same_episode():
    def play(seed):
        env = CombinationLock(3)
        env.reset(seed=seed)
        return [env.step(np.full(10, 0.1))[0].tolist() for _ in range(3)]

    assert play(0) == play(0)
    assert play(0) != play(1)


# ---------------------------------------------------------------- rows


def test_one_row_equals_the_single_environment_bit_for_bit():
    envs = gym.make_vec("rlalign_envs:CombinationLock-v0", num_envs=1, horizon=3)
    env = CombinationLock(3)
    assert isinstance(envs, CombinationLockVectorEnv)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(envs.reset(seed=7)[0][0], env.reset(seed=7)[0])
    over = False
    for _ in range(24):
        action = env.lock.expert_actions(env.states, np.minimum(env.elapsed, 2), rng, 0.3)
        rows = envs.step(action)
        single = (env.reset()[0], 0.0, False, False) if over else env.step(action[0])[:4]
        np.testing.assert_array_equal(rows[0][0], single[0])
        assert [part[0] for part in rows[1:4]] == list(single[1:])
        over = single[2]


class Recorder:
    """A generator that keeps what it drew, or replays one row of it."""

    def __init__(self, log=None, row=None):
        self.rng, self.log, self.row = np.random.default_rng(0), [] if log is None else log, row

    def _draw(self, draw, size):
        if self.row is not None:
            return self.log.pop(0)[self.row : self.row + 1]
        self.log.append(draw(size))
        return self.log[-1]

    def random(self, size):
        return self._draw(self.rng.random, size)

    def standard_normal(self, size):
        return self._draw(self.rng.standard_normal, size)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_many_rows_equal_as_many_single_environments(mode):
    recorder = Recorder()
    envs = gym.make_vec("rlalign_envs:CombinationLock-v0", num_envs=20, horizon=3, autoreset_mode=mode)
    envs.np_random = recorder
    history, rng = [envs.reset()], np.random.default_rng(1)
    actions = rng.random((8, 20, 10)) * 3
    history += [envs.step(action) for action in actions]
    rewards_seen = set()
    for row in range(20):
        env = CombinationLock(3)
        env.np_random = Recorder(list(recorder.log), row)
        observation, over = env.reset()[0], False
        np.testing.assert_array_equal(history[0][0][row], observation)
        for action, (observations, rewards, terminated, truncated, infos) in zip(actions, history[1:], strict=True):
            if over and mode == "NextStep":
                observation, reward, over = env.reset()[0], 0.0, False
            else:
                observation, reward, over, _, _ = env.step(action[row])
            rewards_seen.add(reward)
            assert (reward, over, False) == (rewards[row], terminated[row], truncated[row])
            if over and mode == "SameStep":
                np.testing.assert_array_equal(infos["final_obs"][row], observation)
                observation = env.reset()[0]
            np.testing.assert_array_equal(observations[row], observation)
    assert {0.0, 0.1} <= rewards_seen


# ---------------------------------------------------------------- offline data


@pytest.mark.parametrize("horizon", [3, 5])
def test_share_of_optimal_offline_episodes_follows_the_formula(horizon):
    # each step is right if the expert acts and hits, or explores and hits one in ten
    data, epsilon = comblock_offline(horizon, 50_000, seed=1), 1 / horizon
    expected = ((1 - epsilon) * P_GOOD + epsilon / 10) ** horizon
    share = (data["rewards"].sum(0) == 1.0).mean()
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 50_000))
    if horizon == 5:
        assert 0.36 < share < 0.38
    # of the others, one half takes the decoy at the last step
    decoy = (data["rewards"] == np.float32(0.1)).sum(1)
    assert decoy[:-1].tolist() == [0] * (horizon - 1)
    assert decoy[-1] / 50_000 == pytest.approx((1 - expected) / 2, abs=0.01)


def test_the_paper_form_pays_the_decoy_on_the_way_out():
    data = comblock_offline(4, 20_000, anti_shaped="paper", epsilon=1.0)
    # uniformly random actions are wrong nine times in ten: 0.9/2 leave with a decoy at step 0, 0.09/2 at step 1, ...
    decoy = (data["rewards"] == np.float32(0.1)).mean(1)
    assert decoy.tolist() == pytest.approx([0.45, 0.045, 0.0045, 0.00045], abs=0.015)
    assert data["states"][1].tolist().count(BROKEN) / 20_000 == pytest.approx(0.9, abs=0.01)


def test_offline_episodes_hang_together():
    data = comblock_offline(3, 50, seed=0)
    shapes = {name: array.shape for name, array in data.items()}
    assert shapes["observations"] == shapes["next_observations"] == (3, 50, 8)
    assert shapes["actions"] == (3, 50, 10)
    assert shapes["rewards"] == shapes["terminated"] == shapes["truncated"] == shapes["states"] == (3, 50)
    np.testing.assert_array_equal(data["observations"][1:], data["next_observations"][:-1])
    assert data["terminated"].all(1).tolist() == [False, False, True]
    assert not data["terminated"][:-1].any()
    assert not data["truncated"].any()
    assert {array.dtype.name for array in data.values()} == {"float32", "bool", "int64"}
    # the latent state is the largest of the first three places, once the rotation is undone
    z = data["observations"] @ hadamard(8) / 8
    np.testing.assert_array_equal(z[..., :3].argmax(-1), data["states"])


def test_without_exploration_the_expert_opens_the_lock():
    data = comblock_offline(5, 1000, epsilon=0.0)
    assert (data["rewards"][-1] == 1.0).mean() > 0.99
    assert data["actions"].sum(-1).tolist() == np.ones((5, 1000)).tolist()


def test_offline_data_follows_its_seed():
    first, again, other = (comblock_offline(2, 20, seed=seed) for seed in (0, 0, 1))
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first["actions"], other["actions"])


@pytest.mark.parametrize(
    ("settings", "message"), [({"horizon": 0}, "`horizon` must be"), ({"anti_shaped": "none"}, "got 'none'")]
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CombinationLock(**settings)
