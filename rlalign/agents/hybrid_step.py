"""The policy's step of hybrid learning: one trust region around the union of on-policy and recorded states."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.agents.config_hybrid import HNPGConfig
from rlalign.agents.hybrid_networks import Policy
from rlalign.agents.hybrid_sources import Seen, Source
from rlalign.functional.policy import clipped_surrogate
from rlalign.optim.natural_gradient import BatchedNaturalGradientResult, batched_natural_gradient_step

UNCLIPPED = {"clip_low": 1.0, "clip_high": float("inf")}
"""Bounds at which the clipped surrogate is the plain importance-weighted one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Judged:
    """Decisions of all sources side by side, [R, N, ...], with advantages."""

    seen: Seen
    actions: Tensor
    allowed: Tensor | None
    weights: Float[Tensor, "stack rows"]
    """Sum to 1 for each policy."""
    advantages: Float[Tensor, "stack rows"]
    count_online: int
    """How many of the N are on-policy; they come first."""

    def metrics(self) -> dict[str, float]:
        """Size of the advantages by source."""
        parts = {
            "online": self.advantages[:, : self.count_online],
            "offline": self.advantages[:, self.count_online :],
        }
        return {
            f"policy/{name}_advantage_rms": float(part.square().mean().sqrt())
            for name, part in parts.items()
            if part.numel()
        }


def union(sources: Sequence[tuple[Source, Tensor]], *, normalize: bool, count_online: int) -> Judged:
    """Put sources side by side, each with its advantages.

    Args:
        normalize: Centre and scale the advantages of each policy, by their weighted mean and deviation.
    """
    advantages = torch.cat([part for _, part in sources], 1)
    weights = torch.cat([source.weights for source, _ in sources], 1)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
    if normalize:
        advantages = advantages - (weights * advantages).sum(-1, keepdim=True)
        advantages = advantages / ((weights * advantages.square()).sum(-1, keepdim=True).sqrt() + 1e-8)
    first = sources[0][0]
    return Judged(
        seen={name: torch.cat([source.seen[name] for source, _ in sources], 1) for name in first.seen},
        actions=torch.cat([source.actions for source, _ in sources], 1),
        allowed=_allowed([source for source, _ in sources]),
        weights=weights,
        advantages=advantages,
        count_online=count_online,
    )


def improve(policy: Policy, judged: Judged, cfg: HNPGConfig) -> BatchedNaturalGradientResult:
    """Step along the natural gradient whose gradient and Fisher matrix are both taken over all sources.

    With one policy per step all of them step at once, each inside its own trust region.
    """
    distribution = policy.distribution
    with torch.no_grad():
        params_old = policy(judged.seen, judged.allowed)
        log_prob_old = distribution.log_prob(params_old, judged.actions)

    def total(per_decision: Tensor) -> Tensor:
        sums = (per_decision * judged.weights).sum(-1)
        return sums if cfg.horizon is not None else sums.squeeze(0)

    def surrogate() -> Tensor:
        log_ratio = distribution.log_prob(policy(judged.seen, judged.allowed), judged.actions) - log_prob_old
        return -total(clipped_surrogate(log_ratio, judged.advantages, **UNCLIPPED))

    def kl() -> Tensor:
        return total(distribution.kl(params_old, policy(judged.seen, judged.allowed)))

    return batched_natural_gradient_step(
        [p for p in policy.parameters() if p.requires_grad],
        surrogate=surrogate,
        kl=kl,
        max_kl=cfg.max_kl,
        damping=cfg.damping,
        cg_iterations=cfg.cg_iterations,
        backtracks=cfg.backtracks,
        shrink=cfg.shrink,
        accept_ratio=cfg.accept_ratio,
        recheck_kl=cfg.recheck_kl,
    )


def step_metrics(result: BatchedNaturalGradientResult) -> dict[str, float]:
    """What the step did; means over policies, where each step of an episode has its own."""
    return {
        "policy/kl": float(result.kl.mean()),
        "policy/kl_max": float(result.kl.max()),
        "policy/improvement": float(result.improvement.mean()),
        "policy/step_accepted": float(result.accepted.float().mean()),
        "policy/backtracks_count": float(result.backtracks.float().mean()),
        "optim/policy_grad_norm": float(result.grad_norm.mean()),
    }


def _allowed(sources: Sequence[Source]) -> Tensor | None:
    """Masks of all sources; one without any allows everything."""
    known = next((source.allowed for source in sources if source.allowed is not None), None)
    if known is None:
        return None
    masks = [
        known.new_ones((known.shape[0], source.size, known.shape[2])) if source.allowed is None else source.allowed
        for source in sources
    ]
    return torch.cat(masks, 1)
