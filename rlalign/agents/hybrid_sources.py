"""What hybrid learning learns from: on-policy decisions and recorded transitions, weighed against each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.agents.hybrid_networks import encoded
from rlalign.nn.policies import ActionDistribution, Categorical

ROWS_AT_ONCE = 65_536
"""State-action pairs per forward pass of a critic outside of its fit; bounds memory, not the result."""

Seen = dict[str, Tensor]
"""Prepared observations by part, `[R, N, ...]` each: R critics, N decisions of each."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """Decisions from one origin."""

    seen: Seen
    actions: Tensor
    """Decisions of the policy's distribution, [R, N, ...]."""
    weights: Float[Tensor, "stack rows"]
    """The origin's weight, shared equally by its decisions; 0 where there is none."""
    allowed: Tensor | None = None

    @property
    def size(self) -> int:
        return self.weights.shape[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class OnlineSource(Source):
    """On-policy decisions and the returns that followed them."""

    returns: Float[Tensor, "stack rows"]


@dataclass(frozen=True, eq=False, kw_only=True)
class OfflineSource(Source):
    """Recorded transitions."""

    rewards: Float[Tensor, "stack rows"]
    next_seen: Seen
    terminated: Bool[Tensor, "stack rows"]


def source_weights(mask: Bool[Tensor, "stack rows"], weight: float | int) -> Float[Tensor, "stack rows"]:
    """Share an origin's weight among its real decisions, so that it does not count more for having more of them."""
    return weight * mask / mask.sum(-1, keepdim=True).clamp(min=1)


def offline_targets(
    rewards: Float[Tensor, "*rows"],
    next_values: Float[Tensor, "*rows"],
    terminated: Bool[Tensor, "*rows"],
    *,
    gamma: float | int,
) -> Float[Tensor, "*rows"]:
    """r + γ (1 - terminated) f(s', a')."""
    return rewards + gamma * next_values.masked_fill(terminated, 0)


@torch.no_grad()
def state_values(
    q: Callable[[Seen, Tensor], Tensor],
    distribution: ActionDistribution,
    params: Float[Tensor, "stack rows params"],
    seen: Mapping[str, Tensor],
    *,
    samples: int,
    random: torch.Generator,
) -> Float[Tensor, "stack rows"]:
    """V(s) = E_{a ~ π} q(s, a): the mean over sampled actions, or over all of them where they can be counted."""
    if isinstance(distribution, Categorical):
        probs = params.softmax(-1)
        actions = torch.arange(distribution.size, device=params.device).expand_as(probs)
    else:
        noise = distribution.noise((*params.shape[:2], samples), random).to(params.device)
        actions = distribution.sample(params.unsqueeze(2).expand(-1, -1, samples, -1), noise)
        probs = params.new_full((*params.shape[:2], samples), 1 / samples)
    count, at_once = probs.shape[2], max(1, ROWS_AT_ONCE // (probs.shape[0] * probs.shape[2]))
    numbers = encoded(distribution, actions)
    pieces = []
    for start in range(0, params.shape[1], at_once):
        piece = slice(start, start + at_once)
        around = {name: value[:, piece].repeat_interleave(count, 1) for name, value in seen.items()}
        found = q(around, numbers[:, piece].flatten(1, 2)).unflatten(1, (-1, count))
        pieces.append((found * probs[:, piece]).sum(-1))
    return torch.cat(pieces, 1)
