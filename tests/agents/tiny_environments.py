"""Environments that say what they see: any spaces, scripted episodes, faults on order. Ids work in other processes too.

`tests.agents.tiny_environments:AnySpaces-v0` and so on.
"""

import time
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

HERE = "tests.agents.tiny_environments"
ANY, BAD = f"{HERE}:AnySpaces-v0", f"{HERE}:Bad-v0"
MODES = list(AutoresetMode)

OBSERVATIONS = {
    "box": gym.spaces.Box(-2.0, 2.0, (3,)),
    "box_float64": gym.spaces.Box(-2.0, 2.0, (2,), dtype=np.float64),
    "grid": gym.spaces.Box(-2.0, 2.0, (2, 3)),
    "number": gym.spaces.Box(-1.0, 1.0, ()),
    "discrete": gym.spaces.Discrete(4, start=2),
    "multi_discrete": gym.spaces.MultiDiscrete([2, 3], start=[0, 5]),
    "multi_binary": gym.spaces.MultiBinary((2, 2)),
    "pixels": gym.spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8),
    "channels_first": gym.spaces.Box(0, 255, (2, 10, 10), dtype=np.uint8),
    "dict": gym.spaces.Dict(
        {
            "position": gym.spaces.Box(-2.0, 2.0, (2,)),
            "inventory": gym.spaces.Discrete(3),
            "camera": gym.spaces.Box(0, 255, (8, 8, 2), dtype=np.uint8),
        }
    ),
}
ACTIONS = {
    "discrete": gym.spaces.Discrete(3),
    "discrete_from_2": gym.spaces.Discrete(3, start=2),
    "multi_discrete": gym.spaces.MultiDiscrete([[2, 3], [4, 2]]),
    "multi_binary": gym.spaces.MultiBinary((2, 2)),
    "box": gym.spaces.Box(
        np.array([[-1, 0, 2]] * 2, dtype=np.float32), np.array([[1, 0.5, 5]] * 2, dtype=np.float32), dtype=np.float32
    ),
}


class AnySpaces(gym.Env[Any, Any]):
    """Random observations and rewards of the seed; refuses actions outside its space, and forbidden ones.

    Args:
        mask: Where the allowed actions are told: `info`, `observation` (a part of a Dict) or nowhere. Every step allows
            two of the actions.
    """

    def __init__(
        self, *, observation: str = "box", action: str = "discrete", mask: str = "", episode_steps: int = 7
    ) -> None:
        self.action_space, self.mask, self.episode_steps = ACTIONS[action], mask, episode_steps
        self.inner = deepcopy(OBSERVATIONS[observation])  # spaces carry random numbers

        self.observation_space: gym.Space[Any] = self.inner
        self.allowed = np.ones(0, dtype=np.int8)
        if mask == "observation":
            self.observation_space = gym.spaces.Dict(
                {"observation": self.inner, "action_mask": gym.spaces.MultiBinary(int(self.action_space.n))}
            )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.inner.seed(int(self.np_random.integers(2**31)))
        self.elapsed = 0
        return self._observe()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise AssertionError(f"{action!r} is not in {self.action_space}")
        if self.mask and not self.allowed[action - self.action_space.start]:
            raise AssertionError(f"action {action} is forbidden: {self.allowed}")
        self.elapsed += 1
        observation, info = self._observe()
        over = self.elapsed == self.episode_steps
        ends_well = bool(self.np_random.random() < 0.5)
        return observation, float(self.np_random.normal()), over and ends_well, over and not ends_well, info

    def _observe(self) -> tuple[Any, dict[str, Any]]:
        observation = self.inner.sample()
        if not self.mask:
            return observation, {}
        self.allowed = np.zeros(int(self.action_space.n), dtype=np.int8)
        self.allowed[self.np_random.permutation(len(self.allowed))[:2]] = 1
        if self.mask == "info":
            return observation, {"action_mask": self.allowed.astype(bool)}
        return {"observation": observation, "action_mask": self.allowed}, {}


class Scripted(gym.Env[Any, Any]):
    """Observes (copy, episode, t) and pays 100 copy + 10 episode + t, whatever the agent does.

    Episode k of a copy lasts `lengths[k % len(lengths)]` steps; even episodes terminate, odd ones are truncated, and
    every fifth is both.
    """

    def __init__(self, copy: int, lengths: tuple[int, ...] = (3, 2, 1, 4, 2)) -> None:
        self.copy, self.lengths, self.episode = copy, lengths, -1
        self.observation_space = gym.spaces.Box(-1.0, 1e6, (3,), dtype=np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.episode, self.elapsed = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.elapsed += 1
        over = self.elapsed == self.lengths[(self.episode + self.copy) % len(self.lengths)]
        both = self.episode % 5 == 4
        terminated, truncated = over and (both or self.episode % 2 == 0), over and (both or self.episode % 2 == 1)
        return self._observe(), 100.0 * self.copy + 10 * self.episode + self.elapsed, terminated, truncated, {}

    def _observe(self) -> Any:
        return np.array([self.copy, self.episode, self.elapsed], dtype=np.float32)


def scripted(mode: AutoresetMode, copies: int = 3, **kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda i=i: Scripted(i, **kwargs) for i in range(copies)], autoreset_mode=mode)


class Bad(gym.Env[Any, Any]):
    """A healthy environment until it does `what` at step `at` of its life (0: in its first reset)."""

    observation_space = gym.spaces.Dict({"place": gym.spaces.Box(-9.0, 9.0, (2,)), "room": gym.spaces.Discrete(3)})
    action_space = gym.spaces.Discrete(2)

    def __init__(self, *, what: str = "", at: int = 5, episode_steps: int = 4) -> None:
        self.what, self.at, self.episode_steps, self.lived = what, at, episode_steps, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.elapsed = 0
        now = self.at == self.lived == 0
        observation = self._observe(now)
        if now and self.what == "raises":
            raise ValueError("no such room")
        return observation if now and self.what == "old_interface" else (observation, {})

    def step(self, action: Any) -> Any:
        self.lived, self.elapsed = self.lived + 1, self.elapsed + 1
        now, reward, over = self.lived == self.at, 1.0, self.elapsed == self.episode_steps
        match self.what if now else "":
            case "raises":
                raise ValueError("no such room")
            case "hangs":
                time.sleep(60)
            case "old_interface":
                return self._observe(now), reward, over, {}
            case "nan_reward":
                reward = float("nan")
            case "infinite_reward":
                reward = float("-inf")
            case "text_reward":
                reward = "much"
            case "list_reward":
                reward = [1.0]
        return self._observe(now), reward, over, False, {}

    def _observe(self, now: bool) -> Any:
        place, room = np.array([self.elapsed, 0.5], dtype=np.float32), 1
        match self.what if now else "":
            case "nan_observation":
                place[1] = np.nan
            case "infinite_observation":
                place[0] = np.inf
            case "wrong_shape":
                place = place[:1]
            case "wrong_dtype":
                room = 1.5
            case "missing_part":
                return {"place": place}
        return {"place": place, "room": room}


gym.register("AnySpaces-v0", entry_point=f"{HERE}:AnySpaces")
gym.register("Bad-v0", entry_point=f"{HERE}:Bad")
