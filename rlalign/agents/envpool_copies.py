"""EnvPool's environments as a Gymnasium vector environment that can be seeded again."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gymnasium.vector import VectorEnv, VectorWrapper

from rlalign.config import ConfigError


class SeededPool(VectorWrapper):
    """EnvPool takes a seed when a pool is made, and never again: a reset with another seed makes a new pool.

    Args:
        env_id: One of EnvPool's ids.
        count: Copies.
        settings: Keyword arguments of the pool.

    Raises:
        ConfigError: EnvPool is not installed.
    """

    def __init__(self, env_id: str, count: int, settings: Mapping[str, Any], *, seed: int):
        self.make = {"task_id": env_id, "env_type": "gymnasium", "num_envs": count, **settings}
        self.seed, self.begun = seed, False
        super().__init__(self._pool())
        with _rounding():
            self.single_observation_space = self.env.single_observation_space
            self.observation_space = self.env.observation_space
            self.single_action_space = self.env.single_action_space
            self.action_space = self.env.action_space

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None and (self.begun or seed != self.seed):
            self.env.close()
            self.seed = seed
            self.env = self._pool()
        self.begun = True
        with _rounding():
            return self.env.reset(options=options)

    def _pool(self) -> VectorEnv:
        try:
            import envpool
        except ImportError as error:
            raise ConfigError("`env.vectorization: envpool` needs it: pip install envpool.") from error
        with _rounding():
            return envpool.make(seed=self.seed, **self.make)


@contextmanager
def _rounding() -> Iterator[None]:
    """EnvPool's bounds are doubles, and Gymnasium warns each time that it rounds them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*precision lowered by casting")
        yield
