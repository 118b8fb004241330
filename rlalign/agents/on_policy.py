"""What agents share that learn from rollouts of their current policy with a critic."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.advantages import build_estimator
from rlalign.advantages.config import GAE
from rlalign.agents.actor_critic import ActorCritic
from rlalign.agents.agent import Agent
from rlalign.agents.collect import Collector
from rlalign.agents.config import OnPolicyConfig
from rlalign.agents.envs import Array
from rlalign.agents.spaces import Observation
from rlalign.buffers import Rollout, RolloutBuffer
from rlalign.functional.masked import whiten


class OnPolicyAgent(Agent):
    """Collects with actor and critic; a subclass updates them."""

    config: OnPolicyConfig

    def build(self) -> None:
        cfg = self.config
        assert self.environments is not None
        assert isinstance(cfg.advantage, GAE)
        self.model = ActorCritic(self.environments, cfg, gamma=cfg.advantage.gamma)
        self.collector = Collector(
            self.environments, self.model.parts, self.model.actions, seed=cfg.seed, device=cfg.device
        )
        self.estimator, self.buffer = build_estimator(cfg.advantage), RolloutBuffer()

    def collect(self) -> Rollout:
        """Let the current policy make `rollout_steps` decisions in every copy."""
        with self.clock_watch("collect"):
            found = self.collector.collect(
                self.model.actor, self.model.observations, steps=self.config.rollout_steps, iteration=self.iteration
            )
            self.step = self.collector.env_steps
            return self.model.rollout(found, first_group=self.iteration * self.collector.environments.num_envs)

    def decide(
        self, observation: Observation, info: Mapping[str, Any], *, random: torch.Generator | None
    ) -> tuple[Array, dict[str, Array]]:
        return self.model.decide(observation, info, random=random)

    def learned(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_learned(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state)

    def progress(self) -> dict[str, Any]:
        return {"collector": self.collector, "buffer": self.buffer}


def normalized(advantages: Float[Tensor, " decisions"]) -> Float[Tensor, " decisions"]:
    """Centre and scale over a batch without masked decisions; equal advantages give zeros."""
    return whiten(advantages)
