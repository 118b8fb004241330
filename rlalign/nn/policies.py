"""Action distributions: what a network's outputs mean, as plain tensor functions without `torch.distributions`.

A distribution is called with a network's outputs `[..., size]` and returns its `params`; everything else is a function
of those. Log-probabilities are summed over a decision's dimensions, in nats. Noise is drawn apart from sampling, for a
whole rollout at once.
"""

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from rlalign.functional.divergence import gaussian_kl

Params = Float[Tensor, "*rows params"]
Actions = Shaped[Tensor, "*rows dims"] | Shaped[Tensor, "*rows"]
PerRow = Float[Tensor, "*rows"]


@runtime_checkable
class ActionDistribution(Protocol):
    """What a policy needs of its actions."""

    size: int
    """Numbers the network must put out."""

    def __call__(self, outputs: Tensor) -> Tensor: ...

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor: ...

    def sample(self, params: Tensor, noise: Tensor) -> Tensor: ...

    def mode(self, params: Tensor) -> Tensor: ...

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor: ...

    def entropy(self, params: Tensor) -> Tensor: ...

    def kl(self, params_old: Tensor, params: Tensor) -> Tensor: ...

    def masked(self, params: Tensor, allowed: Tensor) -> Tensor: ...


class Categorical(nn.Module):
    """One of `count` actions; `params` are logits."""

    def __init__(self, count: int):
        super().__init__()
        self.size = count

    def forward(self, outputs: Params) -> Params:
        return outputs

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Gumbel noise: the largest of logits + noise is a sample."""
        return gumbel((*shape, self.size), generator)

    def sample(self, params: Params, noise: Params) -> Actions:
        return (params + noise).argmax(-1)

    def mode(self, params: Params) -> Actions:
        return params.argmax(-1)

    def log_prob(self, params: Params, actions: Actions) -> PerRow:
        return params.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, params: Params) -> PerRow:
        log_probs = params.log_softmax(-1)
        return -(log_probs.exp() * log_probs).sum(-1)

    def kl(self, params_old: Params, params: Params) -> PerRow:
        """KL(old || new)."""
        old = params_old.log_softmax(-1)
        return (old.exp() * (old - params.log_softmax(-1))).sum(-1)

    def masked(self, params: Params, allowed: Bool[Tensor, "*rows params"]) -> Params:
        """Make forbidden actions impossible. Finite, so that entropies and gradients stay finite too."""
        return params.masked_fill(~allowed, -1e9)


class MultiCategorical(nn.Module):
    """Several independent choices at once (`MultiDiscrete`); logits side by side."""

    def __init__(self, counts: Sequence[int]):
        super().__init__()
        self.parts = [Categorical(count) for count in counts]
        self.counts, self.size = list(counts), sum(counts)

    def forward(self, outputs: Params) -> Params:
        return outputs

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return gumbel((*shape, self.size), generator)

    def sample(self, params: Params, noise: Params) -> Actions:
        return self.mode(params + noise)

    def mode(self, params: Params) -> Actions:
        return torch.stack([logits.argmax(-1) for logits in params.split(self.counts, -1)], -1)

    def log_prob(self, params: Params, actions: Actions) -> PerRow:
        parts = zip(self.parts, params.split(self.counts, -1), actions.unbind(-1), strict=True)
        return torch.stack([part.log_prob(logits, action) for part, logits, action in parts]).sum(0)

    def entropy(self, params: Params) -> PerRow:
        parts = zip(self.parts, params.split(self.counts, -1), strict=True)
        return torch.stack([part.entropy(logits) for part, logits in parts]).sum(0)

    def kl(self, params_old: Params, params: Params) -> PerRow:
        parts = zip(self.parts, params_old.split(self.counts, -1), params.split(self.counts, -1), strict=True)
        return torch.stack([part.kl(old, new) for part, old, new in parts]).sum(0)

    def masked(self, params: Params, allowed: Bool[Tensor, "*rows params"]) -> Params:
        return params.masked_fill(~allowed, -1e9)


class Bernoulli(nn.Module):
    """Independent switches (`MultiBinary`); `params` are logits of 1."""

    def __init__(self, count: int):
        super().__init__()
        self.size = count

    def forward(self, outputs: Params) -> Params:
        return outputs

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.rand((*shape, self.size), generator=generator)

    def sample(self, params: Params, noise: Params) -> Actions:
        return (noise < params.sigmoid()).to(torch.int64)

    def mode(self, params: Params) -> Actions:
        return (params > 0).to(torch.int64)

    def log_prob(self, params: Params, actions: Actions) -> PerRow:
        signed = torch.where(actions > 0, params, -params)
        return nn.functional.logsigmoid(signed).sum(-1)

    def entropy(self, params: Params) -> PerRow:
        return (nn.functional.softplus(-params) + (1 - params.sigmoid()) * params).sum(-1)

    def kl(self, params_old: Params, params: Params) -> PerRow:
        softplus = nn.functional.softplus
        return (softplus(params) - softplus(params_old) + params_old.sigmoid() * (params_old - params)).sum(-1)

    def masked(self, params: Params, allowed: Bool[Tensor, "*rows params"]) -> Params:
        return params.masked_fill(~allowed, -1e9)


class Gaussian(nn.Module):
    """Independent normals with a learned standard deviation that does not depend on the state.

    Its `params` are means and log standard deviations side by side; a network puts out the means alone.

    Args:
        dims: Dimensions of an action.
        log_std: Where the learned log standard deviations begin.
        log_std_range: They are kept inside.
        squash: Pass samples through tanh and correct the log-probability; actions then lie in (-1, 1).
    """

    def __init__(
        self,
        dims: int,
        *,
        log_std: float | int = 0.0,
        log_std_range: tuple[float | int, float | int] = (-20.0, 2.0),
        squash: bool = False,
    ):
        super().__init__()
        self.size, self.squash, self.log_std_range = dims, squash, log_std_range
        self.log_std = nn.Parameter(torch.full((dims,), float(log_std)))

    def forward(self, outputs: Tensor) -> Tensor:
        """Put the log standard deviations beside the means."""
        return torch.cat([outputs, self.log_std.clamp(*self.log_std_range).expand_as(outputs)], -1)

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn((*shape, self.size), generator=generator)

    def sample(self, params: Params, noise: Tensor) -> Actions:
        mean, log_std = params.chunk(2, -1)
        drawn = mean + log_std.exp() * noise
        return drawn.tanh() if self.squash else drawn

    def mode(self, params: Params) -> Actions:
        mean = params.chunk(2, -1)[0]
        return mean.tanh() if self.squash else mean

    def log_prob(self, params: Params, actions: Actions) -> PerRow:
        """Log-density; for a squashed action that of its pre-image less the log of tanh's slope."""
        mean, log_std = params.chunk(2, -1)
        before = actions.clamp(-1 + 1e-6, 1 - 1e-6).atanh() if self.squash else actions
        density = -0.5 * ((before - mean) * (-log_std).exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
        if self.squash:
            density = density - 2 * (math.log(2.0) - before - nn.functional.softplus(-2 * before))
        return density.sum(-1)

    def entropy(self, params: Params) -> PerRow:
        """Of the normal, before any squashing: the squashed one has no closed form."""
        return (params.chunk(2, -1)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, params_old: Params, params: Params) -> PerRow:
        """KL(old || new); squashing changes nothing about it."""
        (mean_old, log_std_old), (mean, log_std) = params_old.chunk(2, -1), params.chunk(2, -1)
        return gaussian_kl(mean_old, log_std_old.exp(), mean, log_std.exp()).sum(-1)

    def masked(self, params: Params, allowed: Bool[Tensor, "*rows params"]) -> Params:
        raise ValueError("action masks need discrete actions; a continuous action has no forbidden choices.")


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel noise, -log(-log u). Exponential draws are -log u without the log of a zero."""
    return -torch.empty(tuple(shape)).exponential_(generator=generator).log()
