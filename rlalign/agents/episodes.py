"""One environment whose every episode is a function of a seed, its number and the actions taken: it can be replayed."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from rlalign.training.seeding import derived_seed

REPLAY = "rlalign_replay"
"""Reset option: copy -> what `replay_log` returned there."""


class EnvironmentFault(RuntimeError):
    """An environment broke its contract; the message says which copy, when and what."""


class SeededEpisodes(gym.Wrapper):
    """Seeds each episode anew, so that an interrupted one is brought back by playing its actions again.

    Gymnasium carries an environment's random numbers on from episode to episode, where no checkpoint reaches them.
    """

    def __init__(self, env: gym.Env, *, name: str, seed: int, index: int):
        super().__init__(env)
        self.name, self.seed, self.index = name, seed, index
        self.episode, self.start = -1, 0
        self.taken: list[Any] = []
        self.restart = False
        self.expected = _expected(env.observation_space)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if options is not None and REPLAY in options:
            return self._replay(options[REPLAY][self.index])
        self.episode += 1
        self.start = derived_seed(self.seed, self.index, self.episode) % 2**31 if seed is None else seed
        return self._reset(options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self.restart:  # the vector environment forgot that this episode was over when it was brought back
            observation, info = self.reset()
            return observation, 0.0, False, False, info
        self.taken.append(action)
        try:
            result = self.env.step(action)
        except Exception as error:  # whatever an environment's own code raises
            raise self._raised("step", error) from error
        observation, reward, *_ = self._unpackable("step", result, fields=5)
        self._check_observation("step", observation)
        if type(reward) is not float and np.asarray(reward).dtype.kind not in "biuf" or np.ndim(reward):
            raise self._fault("step", f"the reward is {reward!r}, not a number. Return a float.")
        return result

    def replay_log(self) -> dict[str, Any]:
        """What brings this copy back to where it is."""
        taken = torch.from_numpy(np.stack([np.asarray(action) for action in self.taken])) if self.taken else None
        return {"episode": self.episode, "start": self.start, "taken": taken}

    def _reset(self, options: dict[str, Any] | None) -> tuple[Any, dict[str, Any]]:
        self.taken, self.restart = [], False
        try:
            result = self.env.reset(seed=self.start, options=options)
        except Exception as error:  # as above
            raise self._raised("reset", error) from error
        self._check_observation("reset", self._unpackable("reset", result, fields=2)[0])
        return result

    def _replay(self, log: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.episode, self.start = log["episode"], log["start"]
        observation, info = self._reset(None)
        over = False
        for action in [] if log["taken"] is None else log["taken"].numpy():
            observation, _, terminated, truncated, info = self.step(action)
            over = bool(terminated or truncated)
        self.restart = over
        return observation, info

    def _check_observation(self, call: str, observation: Any) -> None:
        for name, shape, dtype in self.expected:
            if name and (not isinstance(observation, Mapping) or name not in observation):
                raise self._fault(call, f"the observation has no part `{name}`, which its space names.")
            part = f" `{name}`" if name else ""
            value = np.asarray(observation[name] if name else observation)
            if value.shape != shape:
                raise self._fault(call, f"the observation{part} is of shape {value.shape}, its space of {shape}.")
            if value.dtype != dtype and not np.can_cast(value.dtype, dtype, "same_kind"):
                raise self._fault(call, f"the observation{part} is of dtype {value.dtype}, its space of {dtype}.")

    def _unpackable(self, call: str, result: Any, *, fields: int) -> Any:
        if isinstance(result, tuple) and len(result) == fields:
            return result
        got = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        raise self._fault(call, f"returned {got}, not ({_RETURNS[call]}). {_OLD}")

    def _raised(self, call: str, error: Exception) -> EnvironmentFault:
        if isinstance(error, EnvironmentFault):
            return error
        # Gymnasium's own wrappers unpack what the environment returned.
        unpacking = isinstance(error, ValueError) and "values to unpack" in str(error)
        hint = f" It must return ({_RETURNS[call]}). {_OLD}" if unpacking else ""
        return self._fault(call, f"{type(error).__name__}: {error}{'.' if unpacking else ''}{hint}")

    def _fault(self, call: str, what: str) -> EnvironmentFault:
        where = f"step {len(self.taken)} of episode {self.episode}"
        return EnvironmentFault(f"{self.name}, copy {self.index}, {where}: `{call}`: {what}")


_RETURNS = {"step": "observation, reward, terminated, truncated, info", "reset": "observation, info"}
_OLD = "Older Gym interfaces differ; gymnasium's EnvCompatibility or shimmy converts them."


def _expected(space: gym.Space) -> list[tuple[str, tuple[int, ...], Any]]:
    """Name (empty when there are no parts), shape and dtype of what an observation consists of."""
    parts = space.spaces.items() if isinstance(space, gym.spaces.Dict) else [("", space)]
    return [(name, part.shape, part.dtype) for name, part in parts if part.shape is not None]
