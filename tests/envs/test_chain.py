"""Chain and Forever: values by hand, one episode step by step, and autoreset against Gymnasium's own."""

import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from rlalign_envs.chain import LEFT, RIGHT, Chain, Forever, ForeverVectorEnv, chain_values

MODES = ["NextStep", "SameStep", "Disabled"]


@pytest.mark.parametrize(
    ("id", "kwargs"),
    [
        ("Chain-v0", {}),
        ("Chain-v0", {"observation": "index", "random_start": True}),
        ("Chain-v0", {"render_mode": "rgb_array"}),
        ("Forever-v0", {}),
        ("Forever-v0", {"clock": True}),
    ],
)
def test_environments_are_clean(id, kwargs):
    check_env(gym.make(f"rlalign_envs:{id}", **kwargs).unwrapped)


def test_text_tasks_need_no_gymnasium():
    # None in sys.modules makes an import fail as if the package were not installed
    code = (
        "import sys; sys.modules['gymnasium'] = None; import rlalign_envs.arithmetic\n"
        "print([name for name in ('torch', 'rlalign', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": "envs"}
    )
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- values


def test_values_match_hand_arithmetic():
    # 4 states, gamma 1/2: the goal is 3, 2 and 1 steps away, the last of which pays 1
    assert chain_values(4, gamma=0.5).tolist() == [0.25, 0.5, 1.0, 0.0]
    # each step but the last costs 1: V(1) = -1 + 1/2, V(0) = -1 - 1/4
    assert chain_values(4, gamma=0.5, step_reward=-1.0).tolist() == [-1.25, -0.5, 1.0, 0.0]
    # with two steps left the goal is out of reach from 0
    assert chain_values(4, gamma=0.5, steps_left=2).tolist() == [0.0, 0.5, 1.0, 0.0]
    assert chain_values(4, gamma=0.5, steps_left=0).tolist() == [0.0] * 4


def test_values_of_the_random_walk_are_its_hitting_times():
    # one more step right takes 2 (j + 1) steps from state j, since 0 stays in place half of the time: 2 + 4 + 6
    got = chain_values(4, gamma=1.0, right=0.5, step_reward=-1.0, goal_reward=-1.0)
    assert got.tolist() == pytest.approx([-12.0, -10.0, -6.0, 0.0])


@pytest.mark.parametrize("gamma", [0.9, 0.99])
def test_values_agree_with_the_closed_form(gamma):
    k = np.arange(9, 0, -1)  # steps to the goal
    expected = gamma ** (k - 1) * 2.0 - 0.1 * (1 - gamma ** (k - 1)) / (1 - gamma)
    got = chain_values(10, gamma=gamma, step_reward=-0.1, goal_reward=2.0)
    assert got[:-1].tolist() == pytest.approx(expected.tolist())


def test_values_are_the_mean_returns_of_played_episodes():
    env, rng, gamma = Chain(3, step_reward=-0.5), np.random.default_rng(0), 0.8
    returns = []
    for _ in range(2000):
        env.reset()
        total, factor, over = 0.0, 1.0, False
        while not over:
            _, reward, over, _, _ = env.step(int(rng.random() < 0.7))
            total, factor = total + factor * reward, factor * gamma
        returns.append(total)
    expected = chain_values(3, gamma=gamma, right=0.7, step_reward=-0.5)[0]
    assert np.mean(returns) == pytest.approx(expected, abs=4 * np.std(returns) / 2000**0.5)


# ---------------------------------------------------------------- steps


def test_an_episode_step_by_step():
    env = Chain(3, step_reward=-0.25)
    assert env.reset()[0].tolist() == [1.0, 0.0, 0.0]
    played = [env.step(action)[:4] for action in (LEFT, RIGHT, LEFT, RIGHT, RIGHT)]
    assert [observation.tolist() for observation, *_ in played] == np.eye(3)[[0, 1, 0, 1, 2]].tolist()
    assert [rest for _, *rest in played] == [[-0.25, False, False]] * 4 + [[1.0, True, False]]


def test_registered_chain_is_cut_by_its_time_limit():
    env = gym.make("rlalign_envs:Chain-v0")
    env.reset(seed=0)
    ends = [env.step(LEFT)[2:4] for _ in range(50)]
    assert ends == [(False, False)] * 49 + [(False, True)]


def test_random_starts_are_every_state_but_the_goal_and_follow_the_seed():
    env = Chain(4, observation="index", random_start=True)
    starts = [env.reset(seed=seed)[0] for seed in range(40)]
    assert set(starts) == {0, 1, 2}
    assert [env.reset(seed=seed)[0] for seed in range(40)] == starts


def test_the_picture_shows_agent_and_goal():
    env = Chain(3, render_mode="rgb_array")
    env.reset()
    picture = env.render()
    assert picture.shape == (24, 72, 3)
    assert picture[12, [12, 36, 60]].tolist() == [[40, 60, 120], [230, 230, 230], [90, 170, 90]]


@pytest.mark.parametrize(
    ("settings", "message"), [({"length": 1}, "`length` must be"), ({"observation": "pixels"}, "got 'pixels'")]
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Chain(**settings)


# ---------------------------------------------------------------- forever


def test_forever_pays_one_until_the_time_limit():
    env = gym.make("rlalign_envs:Forever-v0", clock=True)
    assert env.reset()[0].tolist() == [0.0]
    played = [env.step(0) for _ in range(20)]
    assert [reward for _, reward, *_ in played] == [1.0] * 20
    assert [truncated for *_, truncated, _ in played] == [False] * 19 + [True]
    assert not any(terminated for _, _, terminated, *_ in played)
    assert played[-1][0][0] == pytest.approx(20 / 30)


def assert_same(got, expected):
    """Two step results, infos included: same keys, types and numbers."""
    for a, b in zip(got[:-1], expected[:-1], strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert got[-1].keys() == expected[-1].keys()
    for key, value in expected[-1].items():
        if key == "final_obs":
            assert [None if v is None else v.tolist() for v in got[-1][key]] == [
                None if v is None else v.tolist() for v in value
            ]
        else:
            np.testing.assert_equal(got[-1][key], value)


@pytest.mark.parametrize("mode", MODES)
def test_rows_behave_like_gymnasiums_sync_vector_env(mode):
    rows = gym.make_vec("rlalign_envs:Forever-v0", num_envs=3, max_episode_steps=4, autoreset_mode=mode, clock=True)
    sync = gym.make_vec(
        "rlalign_envs:Forever-v0",
        num_envs=3,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": mode},
        max_episode_steps=4,
        clock=True,
    )
    assert isinstance(rows, ForeverVectorEnv)
    assert rows.metadata["autoreset_mode"] is AutoresetMode(mode) is sync.metadata["autoreset_mode"]
    assert rows.observation_space == sync.observation_space
    assert rows.action_space == sync.action_space
    assert_same(rows.reset(seed=0), sync.reset(seed=0))
    for step in range(1, 14):
        got, expected = rows.step(np.zeros(3, dtype=np.int64)), sync.step(np.zeros(3, dtype=np.int64))
        assert_same(got, expected)
        over = got[2] | got[3]
        assert over.all() == (step % (5 if mode == "NextStep" else 4) == 4 % (5 if mode == "NextStep" else 4))
        if mode == "Disabled" and over.any():
            mask = np.array([True, True, True])
            assert_same(rows.reset(options={"reset_mask": mask}), sync.reset(options={"reset_mask": mask}))


def test_a_part_of_the_rows_can_be_reset():
    envs = ForeverVectorEnv(2, autoreset_mode="Disabled", max_episode_steps=2, clock=True)
    envs.reset()
    envs.step([0, 0])
    observations, _ = envs.reset(options={"reset_mask": np.array([True, False])})
    assert observations[:, 0].tolist() == pytest.approx([0.0, 1 / 11])
    assert envs.step([0, 0])[3].tolist() == [False, True]
    with pytest.raises(ValueError, match=r"the episodes in rows \[1\] are over"):
        envs.step([0, 0])


def test_returned_arrays_are_the_callers_own():
    envs = ForeverVectorEnv(2, clock=True)
    first, _ = envs.reset()
    second = envs.step([0, 0])[0]
    second[:] = 0.5
    assert first[:, 0].tolist() == [0.0, 0.0]
    kept, _ = envs.reset(options={"reset_mask": np.array([True, False])})
    assert kept[:, 0].tolist() == pytest.approx([0.0, 1 / 11])


def test_wrong_calls_are_explained():
    envs = ForeverVectorEnv(2)
    with pytest.raises(ValueError, match="call `reset`"):
        envs.step([0, 0])
    with pytest.raises(ValueError, match="call `reset`"):
        envs.reset(options={"reset_mask": np.array([True, False])})
    envs.reset()
    with pytest.raises(ValueError, match="2 environments need 2 actions, got 3"):
        envs.step([0, 0, 0])
    with pytest.raises(ValueError, match="`reset_mask` must be 2 booleans"):
        envs.reset(options={"reset_mask": np.array([False, False])})


def test_forever_is_a_plain_environment_too():
    env = Forever()
    assert env.reset()[0].tolist() == [1.0]
    assert env.step(1)[:4] == (np.array([1.0], dtype=np.float32), 1.0, False, False)
