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

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if options is not None and REPLAY in options:
            return self._replay(options[REPLAY][self.index])
        self.episode += 1
        self.start = derived_seed(self.seed, self.index, self.episode) % 2**31 if seed is None else seed
        self.taken, self.restart = [], False
        return self._checked("reset", self.env.reset(seed=self.start, options=options), fields=2)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self.restart:  # the vector environment forgot that this episode was over when it was brought back
            observation, info = self.reset()
            return observation, 0.0, False, False, info
        self.taken.append(action)
        return self._checked("step", self.env.step(action), fields=5)

    def replay_log(self) -> dict[str, Any]:
        """What brings this copy back to where it is."""
        taken = torch.from_numpy(np.stack([np.asarray(action) for action in self.taken])) if self.taken else None
        return {"episode": self.episode, "start": self.start, "taken": taken}

    def _replay(self, log: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.episode, self.start = log["episode"], log["start"]
        observation, info = self.env.reset(seed=self.start)
        self.taken, self.restart = [], False
        over = False
        for action in [] if log["taken"] is None else log["taken"].numpy():
            observation, _, terminated, truncated, info = self.step(action)
            over = bool(terminated or truncated)
        self.restart = over
        return observation, info

    def _checked(self, call: str, result: Any, *, fields: int) -> Any:
        if isinstance(result, tuple) and len(result) == fields:
            return result
        got = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
        new = "observation, reward, terminated, truncated, info" if fields == 5 else "observation, info"
        raise EnvironmentFault(
            f"{self.name}, copy {self.index}, step {len(self.taken)}: `{call}` returned {got}, not ({new}). "
            "It follows an old Gym interface; gymnasium's EnvCompatibility or shimmy converts it."
        )
