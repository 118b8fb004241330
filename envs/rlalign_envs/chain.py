"""Environments whose values are known in closed form: a chain to walk along, and a reward of 1 forever."""

from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rlalign_envs.rows import RowsVectorEnv

LEFT, RIGHT = 0, 1
TILE = 24
"""Pixels of a state's square."""


class Chain(gym.Env[Any, Any]):
    """States 0 to length - 1 in a row. Start at 0; reaching the last state pays `goal_reward` and ends the episode.

    Every other step pays `step_reward`; going left from 0 stays there. `chain_values` has the values.

    Args:
        length: States, the goal included.
        step_reward: For each step that does not reach the goal.
        goal_reward: For the step that does.
        observation: `one_hot` is a vector of `length` numbers, `index` the number of the state.
        random_start: Start anywhere but at the goal, evenly.
        render_mode: None or `rgb_array`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        length: int = 10,
        *,
        step_reward: float = 0.0,
        goal_reward: float = 1.0,
        observation: Literal["one_hot", "index"] = "one_hot",
        random_start: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if length < 2:
            raise ValueError(f"`length` must be at least 2 (a start and a goal), got {length}.")
        if observation not in ("one_hot", "index"):
            raise ValueError(f"`observation` must be one_hot or index, got {observation!r}.")
        self.length, self.random_start = length, random_start
        self.step_reward, self.goal_reward = step_reward, goal_reward
        self.observation, self.render_mode = observation, render_mode
        self.action_space = gym.spaces.Discrete(2)
        self.observation_space = (
            gym.spaces.Box(0.0, 1.0, (length,), dtype=np.float32)
            if observation == "one_hot"
            else gym.spaces.Discrete(length)
        )
        self.state = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(self.length - 1)) if self.random_start else 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        goal = self.length - 1
        self.state = min(self.state + 1, goal) if action == RIGHT else max(self.state - 1, 0)
        there = self.state == goal
        return self._observe(), float(self.goal_reward if there else self.step_reward), there, False, {}

    def render(self) -> NDArray[np.uint8] | None:
        """The chain as squares: the agent dark, the goal green."""
        if self.render_mode is None:
            return None
        row = np.full((1, self.length, 3), 230, dtype=np.uint8)
        row[0, -1] = (90, 170, 90)
        row[0, self.state] = (40, 60, 120)
        return row.repeat(TILE, 0).repeat(TILE, 1)

    def _observe(self) -> Any:
        if self.observation == "index":
            return self.state
        return np.eye(self.length, dtype=np.float32)[self.state]


def chain_values(
    length: int = 10,
    *,
    gamma: float,
    right: float = 1.0,
    steps_left: int | None = None,
    step_reward: float = 0.0,
    goal_reward: float = 1.0,
) -> NDArray[np.floating[Any]]:
    """V of every state of `Chain` for a policy that goes right with probability `right` in all of them.

        V(s) = right (r + gamma V(s + 1)) + (1 - right) (r + gamma V(max(s - 1, 0))),     V(goal) = 0

    With right = 1 and k = length - 1 - s steps to go, V = gamma^(k-1) goal_reward + step_reward (1 - gamma^(k-1)) /
    (1 - gamma).
    A correct agent learns these values also under a time limit, since it bootstraps where an episode is cut.

    Args:
        gamma: Discount. With gamma = 1, `right` must be above 0.
        steps_left: Count rewards of this many steps only: what V becomes when a time limit is taken for an end, in a
            state with so many steps to go before it.

    Returns:
        `length` values; the last is that of the goal, 0.
    """
    goal = length - 1
    transition, reward = np.zeros((length, length)), np.zeros(length)
    for state in range(goal):
        for probability, following in ((right, state + 1), (1.0 - right, max(state - 1, 0))):
            transition[state, following] += probability
            reward[state] += probability * (goal_reward if following == goal else step_reward)
    if steps_left is None:
        return np.linalg.solve(np.eye(length) - gamma * transition, reward)
    values = np.zeros(length)
    for _ in range(steps_left):
        values = reward + gamma * transition @ values
    return values


class Forever(gym.Env[NDArray[np.float32], np.int64]):
    """Reward 1 at every step and no end, so V = 1 / (1 - gamma) everywhere, whatever the time limit.

    Args:
        clock: Observe t / (t + 10) after t steps, instead of a constant 1: tells the last state of a cut episode from
            the first of the next.
    """

    metadata = {"render_modes": []}

    def __init__(self, *, clock: bool = False, render_mode: str | None = None) -> None:
        self.clock, self.render_mode = clock, render_mode
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), dtype=np.float32)
        self.action_space = gym.spaces.Discrete(2)
        self.elapsed = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.elapsed = 0
        return _forever_observation(np.array(self.elapsed), self.clock), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self.elapsed += 1
        return _forever_observation(np.array(self.elapsed), self.clock), 1.0, False, False, {}


class ForeverVectorEnv(RowsVectorEnv):
    """`Forever` in rows, in any autoreset mode: `make_vec(id, num_envs, autoreset_mode="SameStep")`."""

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        clock: bool = False,
    ) -> None:
        single = Forever(clock=clock)
        super().__init__(
            num_envs=num_envs,
            single_observation_space=single.observation_space,
            single_action_space=single.action_space,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
        )
        self.clock = clock

    def start(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        return _forever_observation(np.zeros(len(rows)), self.clock)

    def advance(
        self, rows: NDArray[np.int64], actions: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
        observations = _forever_observation(self.elapsed[rows] + 1, self.clock)
        return observations, np.ones(len(rows)), np.zeros(len(rows), dtype=bool)


def _forever_observation(elapsed: NDArray[Any], clock: bool) -> NDArray[np.float32]:
    seen = elapsed / (elapsed + 10) if clock else np.ones_like(elapsed, dtype=np.float64)
    return seen[..., None].astype(np.float32)
