"""Four rooms on a grid with one sparse reward, the values by value iteration, and offline data with an unseen room."""

from collections.abc import Sequence
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

LAYOUT = (
    "....#...",
    "....#...",
    "........",
    "....#...",
    "##.###.#",
    "....#...",
    "........",
    "....#...",
)
"""`#` is wall. Doors at (2, 4), (4, 2), (4, 6) and (6, 4)."""

SIZE = len(LAYOUT)
START, GOAL = (0, 0), (7, 7)
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Up, right, down, left."""
UPPER_RIGHT = tuple((row, column) for row in range(4) for column in range(5, SIZE))
TILE = 16
"""Pixels of a cell."""

Cell = tuple[int, int]
Observation = Literal["one_hot", "xy"]


class FourRoom(gym.Env[NDArray[np.float32], np.int64]):
    """Walk from the upper left to the lower right: entering the goal pays 1 and ends the episode, all else pays 0.

    A move into a wall stays. The shortest way has 14 steps, so V(start) = gamma^13 without slipping.

    Args:
        observation: `one_hot` is a vector over the 64 cells, walls included; `xy` is column and row, each in [0, 1].
        slip: Chance that a uniformly random move is made instead.
        random_start: Start in any cell but the goal, evenly.
        render_mode: None or `rgb_array`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        *,
        observation: Observation = "one_hot",
        slip: float = 0.0,
        random_start: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if observation not in ("one_hot", "xy"):
            raise ValueError(f"`observation` must be one_hot or xy, got {observation!r}.")
        if not 0.0 <= slip <= 1.0:
            raise ValueError(f"`slip` must be a probability, got {slip}.")
        self.observation: Observation = observation
        self.slip, self.random_start, self.render_mode = slip, random_start, render_mode
        self.action_space = gym.spaces.Discrete(len(MOVES))
        features = SIZE * SIZE if observation == "one_hot" else 2
        self.observation_space = gym.spaces.Box(0.0, 1.0, (features,), dtype=np.float32)
        self.cell = START

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.cell = _draw_cell(reachable_cells(), self.np_random) if self.random_start else START
        return observe([self.cell], self.observation)[0], {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if self.slip and self.np_random.random() < self.slip:
            action = self.np_random.integers(len(MOVES))
        self.cell = move(self.cell, int(action))
        there = self.cell == GOAL
        return observe([self.cell], self.observation)[0], float(there), there, False, {}

    def render(self) -> NDArray[np.uint8] | None:
        """Walls dark, the goal green, the agent blue."""
        if self.render_mode is None:
            return None
        picture = np.full((SIZE, SIZE, 3), 230, dtype=np.uint8)
        picture[walls()] = 70
        picture[GOAL] = (90, 170, 90)
        picture[self.cell] = (40, 60, 160)
        return picture.repeat(TILE, 0).repeat(TILE, 1)


def walls() -> NDArray[np.bool_]:
    """True where a wall stands, `[8, 8]`."""
    return np.array([[mark == "#" for mark in line] for line in LAYOUT])


def reachable_cells() -> list[Cell]:
    """Every cell that is no wall, the goal included, row by row; all can be reached from all."""
    return [(int(row), int(column)) for row, column in np.argwhere(~walls())]


def move(cell: Cell, action: int, closed: Sequence[Cell] = ()) -> Cell:
    """The cell an action leads to; walls, the border and `closed` cells stop it."""
    row, column = cell[0] + MOVES[action][0], cell[1] + MOVES[action][1]
    inside = 0 <= row < SIZE and 0 <= column < SIZE
    free = inside and LAYOUT[row][column] == "." and (row, column) not in closed
    return (row, column) if free else cell


def observe(cells: Sequence[Cell], observation: Observation = "one_hot") -> NDArray[np.float32]:
    """Observations of cells, one row each: to ask a value function about all `reachable_cells`."""
    places = np.array(cells)
    if observation == "one_hot":
        return np.eye(SIZE * SIZE, dtype=np.float32)[places[:, 0] * SIZE + places[:, 1]]
    return (places[:, ::-1] / (SIZE - 1)).astype(np.float32)


def optimal_values(*, gamma: float, slip: float = 0.0, closed: Sequence[Cell] = ()) -> NDArray[np.float64]:
    """V of the best policy by value iteration, `[8, 8]`: NaN in walls, 0 at the goal, where the episode is over.

    `closed` cells are taken for walls by those around them, as data that never enters them does.
    """
    values = np.zeros((SIZE, SIZE))
    while True:
        updated = _action_values(values, gamma, slip, closed).max(-1)
        if np.abs(updated - values).max() <= 1e-12:
            return np.where(walls(), np.nan, updated)
        values = updated


def optimal_actions(*, gamma: float = 0.9, slip: float = 0.0, closed: Sequence[Cell] = ()) -> NDArray[np.bool_]:
    """True for every action that is as good as any, `[8, 8, 4]`; none in walls and at the goal."""
    values = _action_values(np.nan_to_num(optimal_values(gamma=gamma, slip=slip, closed=closed)), gamma, slip, closed)
    best = values >= values.max(-1, keepdims=True) - 1e-9
    best[walls()] = False
    best[GOAL] = False
    return best


def four_room_offline(
    transitions: int = 2000,
    *,
    seed: int = 0,
    expert_share: float = 0.2,
    epsilon: float = 0.4,
    episode_steps: int = 50,
    observation: Observation = "one_hot",
    unseen: Sequence[Cell] = UPPER_RIGHT,
) -> dict[str, NDArray[Any]]:
    """Play mixed data: episodes of an epsilon-greedy expert from the start, and random walks from anywhere.

    Args:
        transitions: Rows, exactly; the last episode is cut to fit.
        expert_share: Share of episodes that the expert plays, who knows the best way through the cells that are seen.
        epsilon: How often the expert moves at random.
        episode_steps: Longest episode; a longer one is truncated.
        unseen: Cells that are never entered nor acted in: a move there is drawn again. The default is one room, where
            a value function has to be judged without data. () leaves none out.

    Returns:
        Flat arrays: `observations`, `actions`, `rewards`, `next_observations`, `terminated`, `truncated`, `episode`,
        `step` (inside its episode), and the `cells` and `next_cells` `[N, 2]` behind the observations.
    """
    generator = np.random.default_rng(seed)
    best = optimal_actions(closed=unseen)
    starts = [cell for cell in reachable_cells() if cell not in unseen]
    rows: list[tuple[Cell, int, Cell, int, int]] = []
    episode = 0
    while len(rows) < transitions:
        expert = generator.random() < expert_share
        cell = START if expert else _draw_cell(starts, generator)
        for step in range(episode_steps):
            greedy = expert and generator.random() >= epsilon
            candidates = best[cell] if greedy else [move(cell, one) not in unseen for one in range(len(MOVES))]
            action = int(generator.choice(np.flatnonzero(candidates)))
            following = move(cell, action)
            rows.append((cell, action, following, episode, step))
            cell = following
            if cell == GOAL:
                break
        episode += 1
    return _arrays(rows[:transitions], observation)


def _action_values(
    values: NDArray[np.float64], gamma: float, slip: float, closed: Sequence[Cell]
) -> NDArray[np.float64]:
    """Q of every action, `[8, 8, 4]`; 0 in walls and at the goal."""
    q = np.zeros((SIZE, SIZE, len(MOVES)))
    for cell in reachable_cells():
        if cell == GOAL:
            continue
        following = [move(cell, action, closed) for action in range(len(MOVES))]
        q[cell] = [float(there == GOAL) + gamma * values[there] for there in following]
    return (1 - slip) * q + slip * q.mean(-1, keepdims=True)


def _draw_cell(cells: Sequence[Cell], generator: np.random.Generator) -> Cell:
    candidates = [cell for cell in cells if cell != GOAL]
    return candidates[int(generator.integers(len(candidates)))]


def _arrays(rows: list[tuple[Cell, int, Cell, int, int]], observation: Observation) -> dict[str, NDArray[Any]]:
    cells, actions, following, episode, step = zip(*rows, strict=True)
    terminated = np.array([there == GOAL for there in following])
    # An episode ends where the next row belongs to another one, and at the last row of all.
    ended = np.append(np.diff(episode) != 0, True)
    return {
        "observations": observe(cells, observation),
        "actions": np.array(actions, dtype=np.int64),
        "rewards": terminated.astype(np.float32),
        "next_observations": observe(following, observation),
        "terminated": terminated,
        "truncated": ended & ~terminated,
        "episode": np.array(episode, dtype=np.int64),
        "step": np.array(step, dtype=np.int64),
        "cells": np.array(cells),
        "next_cells": np.array(following),
    }
