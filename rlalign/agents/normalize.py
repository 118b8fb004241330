"""Running statistics of observations and of the discounted return, in the agent's one checkpoint."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.agents.config import NormalizeConfig
from rlalign.agents.spaces import ObservationParts, is_number
from rlalign.statistics import RunningMoments


class ObservationNormalizer:
    """Centres and scales the parts of an observation that are numbers.

    Statistics move once per rollout, after it: a rollout is collected and learned from under the same ones.
    Whoever evaluates calls `apply` alone, so evaluation never moves them.
    """

    def __init__(self, parts: ObservationParts, cfg: NormalizeConfig):
        self.clip = cfg.clip
        numbers = {name: space for name, space in parts.spaces.items() if is_number(space)}
        self.moments = {name: RunningMoments(space.shape or ()) for name, space in numbers.items() if cfg.observations}

    def apply(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: self.moments[name].normalize(value.float()).clamp(-self.clip, self.clip)
            if name in self.moments
            else value
            for name, value in parts.items()
        }

    def update(self, parts: Mapping[str, Tensor], mask: Bool[Tensor, "*rows"]) -> None:
        """Take in the raw observations of real decisions."""
        for name, moments in self.moments.items():
            moments.update(parts[name].float(), mask)

    def state_dict(self) -> dict[str, Any]:
        return {name: moments.state_dict() for name, moments in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, moments in self.moments.items():
            moments.load_state_dict(state[name])


class RewardNormalizer:
    """Divides rewards by the running deviation of the discounted return, without moving their mean.

        R_t = γ R_{t-1} + r_t  (R restarts with each episode),   r'_t = r_t / std(R)

    Reference:
        Engstrom et al. 2020 (arXiv:2005.12729), section 3; gymnasium/wrappers/vector/stateful_reward.py.
    """

    def __init__(self, cfg: NormalizeConfig, *, gamma: float, num_envs: int):
        self.enabled, self.clip, self.gamma = cfg.rewards, cfg.clip, gamma
        self.moments = RunningMoments()
        self.running = torch.zeros(num_envs, dtype=torch.float64)

    def __call__(
        self,
        rewards: Float[Tensor, "batch time"],
        boundary: Bool[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
    ) -> Float[Tensor, "batch time"]:
        """Take in a rollout's raw rewards and return the scaled ones."""
        if not self.enabled:
            return rewards
        returns = torch.empty_like(rewards, dtype=torch.float64)
        for t in range(rewards.shape[1]):
            # A masked step only restarted an episode, and the boundary before it has cleared the sum already.
            self.running = torch.where(mask[:, t], self.gamma * self.running + rewards[:, t], self.running)
            returns[:, t] = self.running
            self.running = self.running.masked_fill(boundary[:, t], 0.0)
        self.moments.update(returns, mask)
        scale = self.moments.std(unbiased=False).clamp(min=1e-8)
        return (rewards / scale).clamp(-self.clip, self.clip).to(rewards.dtype)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments.state_dict(), "running": self.running.clone()} if self.enabled else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self.enabled:
            return
        self.moments.load_state_dict(state["moments"])
        self.running = state["running"].clone()
