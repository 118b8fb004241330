"""How a hybrid agent acts: by the step of the episode, where each step has a policy of its own."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlalign.agents.agent import Agent
from rlalign.agents.config_hybrid import HNPGConfig
from rlalign.agents.envs import Array
from rlalign.agents.evaluate import EPISODE_STEP
from rlalign.agents.hybrid import PolicyEvaluation
from rlalign.agents.hybrid_forms import Form
from rlalign.agents.hybrid_networks import Policy
from rlalign.agents.hybrid_sources import Seen, state_values
from rlalign.agents.networks import prepare
from rlalign.agents.normalize import ObservationNormalizer
from rlalign.agents.spaces import ActionInterface, Observation, ObservationParts
from rlalign.training.seeding import generator


class HybridActing(Agent):
    """Acts with what `build` has made."""

    config: HNPGConfig
    device: torch.device
    parts: ObservationParts
    actions: ActionInterface
    form: Form
    policy: Policy
    evaluation: PolicyEvaluation
    observations: ObservationNormalizer

    def predict(
        self,
        observation: Observation,
        *,
        deterministic: bool = True,
        info: Mapping[str, Any] | None = None,
        step: int | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Act; see `Agent.predict`.

        Args:
            step: Decisions the episode has behind it, which a policy per step (`horizon`) has to know. Without it calls
                are counted, from 0 again after `horizon` of them: call `begin_episode` where an episode ends early.
        """
        if step is not None:
            self.acting_step = step
        result = super().predict(observation, deterministic=deterministic, info=info)
        self.acting_step = (self.acting_step + 1) % (self.config.horizon or 1)
        return result

    def begin_episode(self) -> None:
        """Say that the next observation given to `predict` is an episode's first."""
        self.acting_step = 0

    @torch.no_grad()
    def decide(
        self, observation: Observation, info: Mapping[str, Any], *, random: torch.Generator | None
    ) -> tuple[Array, dict[str, Array]]:
        seen, allowed = self.prepared(self.parts.tensors(observation)), self.parts.allowed(observation, info)
        count, distribution = len(next(iter(seen.values()))), self.policy.distribution
        steps = torch.as_tensor(np.asarray(info.get(EPISODE_STEP, self.acting_step))).expand(count).to(self.device)
        noise = None if random is None else distribution.noise((count,), random).to(self.device)
        found: dict[str, Tensor] = {}
        for row, here in self.form.by_row(steps):
            part = {name: value[here] for name, value in seen.items()}
            params = self.form.at(row, part, None if allowed is None else allowed.to(self.device)[here])
            decisions = distribution.mode(params) if noise is None else distribution.sample(params, noise[here])
            about = {
                "decisions": decisions,
                "log_prob": distribution.log_prob(params, decisions),
                "value": self._value_at(row, part, params),
            }
            for name, value in about.items():
                found.setdefault(name, value.new_zeros((count, *value.shape[1:])))[here] = value
        actions = self.actions.to_env(found.pop("decisions").cpu())
        return actions, {name: value.cpu().numpy() for name, value in found.items()}

    def _value_at(self, row: int, seen: Seen, params: Tensor) -> Tensor:
        value = state_values(
            lambda around, actions: self.evaluation.q_at(row, around, actions),
            self.policy.distribution,
            params[None],
            {name: part[None] for name, part in seen.items()},
            samples=self.config.value_samples,
            random=generator(self.config.seed, "value"),
        )
        return value[0]

    def prepared(self, observation: Mapping[str, Tensor]) -> Seen:
        """Normalised with the statistics as they are, on the device, as networks take it."""
        prepared = prepare(self.parts, self.observations.apply(observation))
        return {name: value.to(self.device) for name, value in prepared.items()}
