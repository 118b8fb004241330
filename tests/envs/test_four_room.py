"""Four rooms: distances, values and data, against search and the environment itself."""

from collections import deque

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlalign_envs.four_room import (
    GOAL,
    START,
    UPPER_RIGHT,
    FourRoom,
    four_room_offline,
    move,
    observe,
    optimal_actions,
    optimal_values,
    reachable_cells,
    walls,
)

UP, RIGHT, DOWN, LEFT = range(4)


def distances():
    """Steps to the goal by breadth-first search; moves can be walked back, so it starts at the goal."""
    found, queue = {GOAL: 0}, deque([GOAL])
    while queue:
        cell = queue.popleft()
        for action in range(4):
            there = move(cell, action)
            if there not in found:
                found[there] = found[cell] + 1
                queue.append(there)
    return found


@pytest.mark.parametrize(
    "kwargs", [{}, {"observation": "xy", "slip": 0.3, "random_start": True}, {"render_mode": "rgb_array"}]
)
def test_environment_is_clean(kwargs):
    check_env(gym.make("rlalign_envs:FourRoom-v0", **kwargs).unwrapped)


# ---------------------------------------------------------------- layout


def test_every_free_cell_reaches_the_goal():
    assert set(distances()) == set(reachable_cells())
    assert len(reachable_cells()) == 64 - walls().sum() == 53
    assert distances()[START] == 14


def test_moves_stop_at_walls_and_borders():
    assert move((0, 0), UP) == move((0, 0), LEFT) == (0, 0)
    assert move((0, 0), RIGHT) == (0, 1)
    assert move((0, 0), DOWN) == (1, 0)
    assert move((0, 3), RIGHT) == (0, 3)
    assert move((2, 3), RIGHT) == (2, 4)  # a door
    assert move((7, 7), DOWN) == (7, 7)


# ---------------------------------------------------------------- steps


def test_the_shortest_way_pays_one_at_its_end():
    env = FourRoom()
    env.reset()
    way = [DOWN, DOWN, RIGHT, RIGHT, DOWN, DOWN, DOWN, DOWN, RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, DOWN]
    played = [env.step(action)[1:4] for action in way]
    assert played == [(0.0, False, False)] * 13 + [(1.0, True, False)]
    assert env.cell == GOAL


def test_observations_tell_the_cell():
    assert observe([(1, 2)])[0].tolist() == np.eye(64)[10].tolist()
    assert observe([(1, 7)], "xy")[0].tolist() == pytest.approx([1.0, 1 / 7])
    assert len({tuple(row) for row in observe(reachable_cells(), "xy").tolist()}) == 53


def test_slipping_moves_at_random_as_often_as_said():
    env = FourRoom(slip=0.4)
    env.reset(seed=0)
    went = []
    for _ in range(4000):
        env.cell = (6, 6)  # free on all sides
        env.step(LEFT)
        went.append(env.cell == (6, 5))
    assert np.mean(went) == pytest.approx(0.6 + 0.4 / 4, abs=0.03)


def test_starts_follow_the_seed_and_leave_out_the_goal():
    env = FourRoom(random_start=True)
    starts = []
    for seed in range(400):
        env.reset(seed=seed)
        starts.append(env.cell)
    assert set(starts) == set(reachable_cells()) - {GOAL}
    env.reset(seed=3)
    assert env.cell == starts[3]


def test_the_registered_environment_has_a_time_limit():
    env = gym.make("rlalign_envs:FourRoom-v0")
    env.reset()
    assert [env.step(UP)[3] for _ in range(50)] == [False] * 49 + [True]


def test_the_picture_shows_walls_goal_and_agent():
    env = FourRoom(render_mode="rgb_array")
    env.reset()
    picture = env.render()
    assert picture.shape == (128, 128, 3)
    assert picture[8, 8].tolist() == [40, 60, 160]
    assert picture[120, 120].tolist() == [90, 170, 90]
    assert picture[8, 72].tolist() == [70, 70, 70]


# ---------------------------------------------------------------- values


def test_values_are_powers_of_gamma_in_the_distance():
    values = optimal_values(gamma=0.9)
    assert np.isnan(values).tolist() == walls().tolist()
    assert values[GOAL] == 0.0
    assert values[START] == pytest.approx(0.9**13)
    for cell, distance in distances().items():
        if distance:
            assert values[cell] == pytest.approx(0.9 ** (distance - 1))


def test_values_under_slipping_satisfy_bellmans_equation():
    gamma, slip = 0.95, 0.2
    values = optimal_values(gamma=gamma, slip=slip)
    for cell in reachable_cells():
        if cell == GOAL:
            continue
        q = [float(move(cell, a) == GOAL) + gamma * values[move(cell, a)] for a in range(4)]
        assert values[cell] == pytest.approx((1 - slip) * max(q) + slip * sum(q) / 4, abs=1e-9)
    assert values[START] < 0.95**13


def test_optimal_actions_are_those_that_come_closer():
    best, far = optimal_actions(), distances()
    for cell in reachable_cells():
        expected = [cell != GOAL and far[move(cell, action)] < far[cell] for action in range(4)]
        assert best[cell].tolist() == expected


# ---------------------------------------------------------------- data


@pytest.mark.parametrize("observation", ["one_hot", "xy"])
def test_data_replays_in_the_environment(observation):
    data = four_room_offline(seed=2, observation=observation)
    assert {len(array) for array in data.values()} == {2000}
    env = FourRoom(observation=observation)
    env.reset()
    for row in range(2000):
        env.cell = tuple(data["cells"][row])
        following, reward, terminated, _, _ = env.step(data["actions"][row])
        np.testing.assert_array_equal(following, data["next_observations"][row])
        np.testing.assert_array_equal(observe([tuple(data["cells"][row])], observation)[0], data["observations"][row])
        assert (reward, terminated) == (data["rewards"][row], data["terminated"][row])
        assert env.cell == tuple(data["next_cells"][row])


def test_episodes_end_where_they_say():
    data = four_room_offline(700, seed=0)
    ended = data["terminated"] | data["truncated"]
    assert not (data["terminated"] & data["truncated"]).any()
    for row in range(699):
        assert (data["episode"][row + 1] == data["episode"][row]) == (not ended[row])
        assert data["step"][row + 1] == (0 if ended[row] else data["step"][row] + 1)
        if not ended[row]:
            np.testing.assert_array_equal(data["cells"][row + 1], data["next_cells"][row])
    assert ended[-1]
    assert data["step"].max() == 49
    assert data["step"][data["truncated"]][:-1].tolist() == [49] * (data["truncated"].sum() - 1)


def test_one_room_stays_unseen_and_the_rest_is_covered():
    data = four_room_offline(seed=0)
    visited = {tuple(cell) for cell in data["cells"]}
    assert not visited & set(UPPER_RIGHT)
    assert not {tuple(cell) for cell in data["next_cells"]} & set(UPPER_RIGHT)
    assert visited == set(reachable_cells()) - set(UPPER_RIGHT) - {GOAL}
    assert set(UPPER_RIGHT) < {tuple(cell) for cell in four_room_offline(seed=0, unseen=())["cells"]}


def test_data_is_mixed():
    # the goal is reached, but most actions are no better than chance
    data = four_room_offline(seed=0)
    good = optimal_actions()[data["cells"][:, 0], data["cells"][:, 1], data["actions"]].mean()
    expert = four_room_offline(seed=0, expert_share=1.0, epsilon=0.0)
    assert data["terminated"].sum() >= 10
    assert 0.3 < good < 0.7
    assert optimal_actions()[expert["cells"][:, 0], expert["cells"][:, 1], expert["actions"]].all()
    assert expert["terminated"].sum() == 2000 // 14


def test_data_follows_its_seed():
    first, again, other = (four_room_offline(300, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["cells"], other["cells"])


@pytest.mark.parametrize(("settings", "message"), [({"slip": 1.5}, "`slip`"), ({"observation": "rgb"}, "got 'rgb'")])
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FourRoom(**settings)
