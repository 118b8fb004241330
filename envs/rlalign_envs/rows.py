"""Base of environments whose copies are rows of numpy arrays, all stepped at once, with the three autoreset modes."""

from abc import ABC, abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray


class RowsVectorEnv(VectorEnv, ABC):
    """Copies of one environment as rows. A subclass says in `start` and `advance` what happens to some of them.

    Args:
        num_envs: Rows.
        single_observation_space: Of one row; a space of arrays, such as `Box`.
        single_action_space: Of one row.
        max_episode_steps: Cut episodes here (`truncated`), as the wrapper `TimeLimit` does. None: never.
        autoreset_mode: What follows the end of a row's episode, as in `gymnasium.vector.SyncVectorEnv`:
            `NextStep`: its next step ignores the action and returns the first observation of the next episode;
            `SameStep`: that observation is returned at once, and `infos["final_obs"]` has the last one;
            `Disabled`: call `reset(options={"reset_mask": mask})` before the next step.
    """

    def __init__(
        self,
        *,
        num_envs: int,
        single_observation_space: gym.Space,
        single_action_space: gym.Space,
        max_episode_steps: int | None,
        autoreset_mode: str | AutoresetMode,
    ) -> None:
        self.num_envs, self.max_episode_steps = num_envs, max_episode_steps
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {"render_modes": [], "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = single_observation_space, single_action_space
        self.observation_space = batch_space(single_observation_space, num_envs)
        self.action_space = batch_space(single_action_space, num_envs)
        self.elapsed = np.zeros(num_envs, dtype=np.int64)
        self._done = np.zeros(num_envs, dtype=bool)
        self._observations: NDArray[Any] | None = None

    @abstractmethod
    def start(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Begin an episode in these rows; return their first observations."""

    @abstractmethod
    def advance(
        self, rows: NDArray[np.int64], actions: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.bool_]]:
        """Step these rows; return their observations, rewards and terminations."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Begin an episode everywhere, or where `options["reset_mask"]` is True."""
        super().reset(seed=seed)
        mask = np.ones(self.num_envs, dtype=bool)
        if options is not None and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"])
            if mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
                raise ValueError(
                    f"`reset_mask` must be {self.num_envs} booleans with one True at least, got {mask.dtype} of shape "
                    f"{mask.shape} with {np.count_nonzero(mask)} set."
                )
        observations = self._current(started=bool(mask.all()))
        observations[mask] = self._restart(np.flatnonzero(mask))
        self._observations = observations
        return observations.copy(), {}

    def step(
        self, actions: Any
    ) -> tuple[NDArray[Any], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        actions = np.asarray(actions)
        if len(actions) != self.num_envs:
            raise ValueError(f"{self.num_envs} environments need {self.num_envs} actions, got {len(actions)}.")
        if self.autoreset_mode is AutoresetMode.DISABLED and self._done.any():
            rows = np.flatnonzero(self._done).tolist()
            raise ValueError(f"the episodes in rows {rows} are over: reset them with `options={{'reset_mask': mask}}`.")
        observations = self._current(started=False)
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)
        # Rows that are done here wait for their reset step; only NEXT_STEP has them.
        live, over = np.flatnonzero(~self._done), np.flatnonzero(self._done)
        if len(live):
            observations[live], rewards[live], terminated[live] = self.advance(live, actions[live])
            self.elapsed[live] += 1
            if self.max_episode_steps is not None:
                truncated[live] = self.elapsed[live] >= self.max_episode_steps
        if len(over):
            observations[over] = self._restart(over)
        self._done = terminated | truncated
        infos = self._reset_now(observations) if self.autoreset_mode is AutoresetMode.SAME_STEP else {}
        self._observations = observations
        return observations.copy(), rewards, terminated, truncated, infos

    def _current(self, *, started: bool) -> NDArray[Any]:
        if self._observations is not None:
            return self._observations.copy()
        if not started:
            raise ValueError("call `reset` for all environments first.")
        shape = self.observation_space.shape
        assert shape is not None
        return np.zeros(shape, dtype=self.observation_space.dtype)

    def _restart(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        self.elapsed[rows] = 0
        self._done[rows] = False
        return self.start(rows)

    def _reset_now(self, observations: NDArray[Any]) -> dict[str, Any]:
        """Start the next episodes in place; keep the last observations in the form `SyncVectorEnv` gives them."""
        over = np.flatnonzero(self._done)
        if not len(over):
            return {}
        final = np.full(self.num_envs, None, dtype=object)
        for row in over:
            final[row] = observations[row].copy()
        here = self._done.copy()
        observations[over] = self._restart(over)
        return {"final_obs": final, "_final_obs": here, "final_info": {}, "_final_info": here.copy()}
