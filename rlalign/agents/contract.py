"""What every kind of agent answers for itself: how it is built, how it learns, how it acts, what it must remember."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from rlalign.agents.config import AgentConfig
from rlalign.agents.envs import Array
from rlalign.agents.spaces import Observation

Metrics = dict[str, float]


class Contract(ABC):
    """The part of an agent that differs from method to method."""

    config_class: ClassVar[type[AgentConfig]]
    needs_env: ClassVar[bool] = True
    config: Any
    step: int
    """Where the clock stands."""

    @abstractmethod
    def build(self) -> None:
        """Make networks, optimizers and buffers."""

    @abstractmethod
    def iterate(self) -> Metrics:
        """One pass of the algorithm: advance `self.step` and return what is worth knowing."""

    @abstractmethod
    def decide(
        self, observation: Observation, info: Mapping[str, Any], *, random: torch.Generator | None
    ) -> tuple[Array, dict[str, Array]]:
        """Actions for a batch of observations (the most probable ones without `random`), and what is known of them."""

    @abstractmethod
    def learned(self) -> dict[str, Any]:
        """Weights and statistics: what acting needs."""

    @abstractmethod
    def load_learned(self, state: Mapping[str, Any]) -> None:
        """Put back what `learned` gave."""

    @abstractmethod
    def optimizers(self) -> dict[str, Any]:
        """Name -> whatever keeps the state of optimization."""

    def described(self) -> dict[str, Any]:
        """What a saved agent must know to be built again, beyond its config."""
        return {}

    def progress(self) -> dict[str, Any]:
        """Name -> object with `state_dict`, beyond weights and optimizers: collector, buffers, schedules."""
        return {}

    @property
    def total(self) -> int:
        """Where the clock ends."""
        return self.config.total_env_steps
