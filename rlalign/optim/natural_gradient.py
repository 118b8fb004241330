"""Natural-gradient steps: a direction by conjugate gradient, a trust region, and a line search that re-checks the KL.

Everything works by rows. No leading dimension is one policy; a leading dimension `[H, ...]` is H independent policies
with stacked parameters, stepped together, each with its own coefficients and its own line search.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.optim.curvature import conjugate_gradient, fisher_vector_product, flat_gradient

# A KL that is exactly quadratic in the parameters ends at `max_kl` itself, up to rounding.
_ROUNDING = 1e-4


@dataclass(frozen=True, kw_only=True)
class NaturalGradientResult:
    """What one step did to one policy."""

    accepted: bool
    """False: no trial passed, or there was no usable direction; the parameters are what they were, bit for bit."""
    kl: float
    """KL(old || new) of the step taken; 0 where none was."""
    improvement: float
    """Gain of the surrogate; 0 where no step was taken."""
    expected: float
    """Gain the gradient promises for the step taken; for the full step, where none was."""
    step_size: float
    """Multiple of the natural gradient taken, backtracking included; 0 where none was."""
    backtracks: int
    """Times the step was shrunk: before it was accepted, or in vain."""
    grad_norm: float
    """Norm of the plain gradient of the surrogate."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchedNaturalGradientResult:
    """What one step did to each of the policies stepped together; the fields of `NaturalGradientResult`."""

    accepted: Bool[Tensor, "*rows"]
    kl: Float[Tensor, "*rows"]
    improvement: Float[Tensor, "*rows"]
    expected: Float[Tensor, "*rows"]
    step_size: Float[Tensor, "*rows"]
    backtracks: Int[Tensor, "*rows"]
    grad_norm: Float[Tensor, "*rows"]


def natural_gradient_step(
    parameters: Iterable[Tensor],
    *,
    surrogate: Callable[[], Tensor],
    kl: Callable[[], Tensor],
    max_kl: float | int = 0.01,
    damping: float | int = 0.1,
    cg_iterations: int = 10,
    backtracks: int = 10,
    shrink: float | int = 0.5,
    accept_ratio: float | int = 0.1,
    recheck_kl: bool = True,
) -> NaturalGradientResult:
    """Move one policy uphill along its natural gradient, as far as the trust region and a line search allow.

        g = ∇ surrogate,   x = (F + damping I)⁻¹ g by conjugate gradient,   F = ∇² KL(old || new) at new = old
        step = sqrt(2 max_kl / x'(F + damping I)x) x
        try step, shrink · step, shrink² · step, ...: accept the first with
            gain > 0,   gain > accept_ratio · g'(tried step),   KL <= max_kl

    Args:
        parameters: Those of the policy, and no others; changed in place.
        surrogate: Scalar to maximise at the present parameters, such as mean(Â exp(log π - log π_old)). It must give
            the same number at the same parameters: no dropout, no sampling.
        kl: Mean KL(old || new) between the policy before the step and at the present parameters. The old side must be
            constants recorded before the step: with live ones F and every KL are 0, and with ones computed again and
            detached every KL of the line search is.
        max_kl: Size of the trust region, in nats.
        damping: Added to the diagonal of F.
        cg_iterations: Fisher-vector products spent on x.
        backtracks: Trials of the line search, the full step included.
        shrink: Factor from one trial to the next.
        accept_ratio: Least share of the promised gain.
        recheck_kl: False leaves out the last condition, as HNPG's published code does; the true KL may then exceed
            `max_kl`, since the step only bounds its quadratic model.

    Returns:
        What happened. A non-finite gradient, a zero one or x'Fx <= 0 is a step not accepted.

    Raises:
        ValueError: A setting is out of range, or `surrogate` or `kl` has the wrong shape or no gradient.

    Reference:
        Schulman et al. 2015 (arXiv:1502.05477), appendix C; Kakade 2001. With `recheck_kl=False` the rule of
        YifeiZhou02/HNPG trpo.py; with True that of stable-baselines3-contrib, which asks only for gain > 0.
    """
    result = batched_natural_gradient_step(
        parameters,
        surrogate=surrogate,
        kl=kl,
        max_kl=max_kl,
        damping=damping,
        cg_iterations=cg_iterations,
        backtracks=backtracks,
        shrink=shrink,
        accept_ratio=accept_ratio,
        recheck_kl=recheck_kl,
    )
    if result.accepted.ndim:
        raise ValueError(
            f"`surrogate` must return one number, got shape {tuple(result.accepted.shape)}; "
            "take `batched_natural_gradient_step` for policies with stacked parameters."
        )
    return NaturalGradientResult(**{name: value.item() for name, value in vars(result).items()})


def batched_natural_gradient_step(
    parameters: Iterable[Tensor],
    *,
    surrogate: Callable[[], Tensor],
    kl: Callable[[], Tensor],
    max_kl: float | int = 0.01,
    damping: float | int = 0.1,
    cg_iterations: int = 10,
    backtracks: int = 10,
    shrink: float | int = 0.5,
    accept_ratio: float | int = 0.1,
    recheck_kl: bool = True,
) -> BatchedNaturalGradientResult:
    """Take `natural_gradient_step` for H independent policies at once: the same as H calls, one for each.

    Args:
        parameters: Stacked, `[H, ...]` each: row h belongs to policy h alone.
        surrogate: One number per policy, `[H]`; row h may depend on row h of the parameters only.
        kl: Likewise, `[H]`.

    The other arguments are those of `natural_gradient_step`. A policy whose trial was accepted rests there while others
    go on shrinking theirs; one that accepts none keeps its parameters bit for bit.
    """
    _check_settings(max_kl, damping, cg_iterations, backtracks, shrink, accept_ratio)
    parameters = list(parameters)
    before = surrogate()
    _check_rows(parameters, before)
    gradient = flat_gradient(before, parameters)
    fisher = fisher_vector_product(kl, parameters, damping)
    direction = conjugate_gradient(fisher, gradient, iterations=cg_iterations)
    curvature = (direction * fisher(direction)).sum(-1)
    promised = (direction * gradient).sum(-1)
    usable = (curvature > 0) & curvature.isfinite() & (promised > 0) & promised.isfinite()
    scale = (2 * max_kl / curvature.where(usable, 1.0)).sqrt().where(usable, 0.0)
    search = _LineSearch(
        parameters=parameters,
        step=(scale[..., None] * direction).where(usable[..., None], 0.0),
        before=before.detach(),
        expected=(scale * promised).where(usable, 0.0),
        usable=usable,
        surrogate=surrogate,
        kl=kl,
    )
    found = search.run(
        fractions=[shrink**trial for trial in range(backtracks)],
        accept_ratio=accept_ratio,
        largest_kl=max_kl * (1 + _ROUNDING) if recheck_kl else None,
    )
    return BatchedNaturalGradientResult(
        accepted=found.accepted,
        kl=found.kl,
        improvement=found.gain,
        expected=search.expected * found.fraction.where(found.accepted, 1.0),
        step_size=scale * found.fraction,
        backtracks=found.shrunk,
        grad_norm=gradient.norm(dim=-1),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    accepted: Tensor
    fraction: Tensor
    gain: Tensor
    kl: Tensor
    shrunk: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class _LineSearch:
    """Trials along one step per row; rows that have found theirs rest there."""

    parameters: list[Tensor]
    step: Tensor
    before: Tensor
    expected: Tensor
    usable: Tensor
    surrogate: Callable[[], Tensor]
    kl: Callable[[], Tensor]

    @torch.no_grad()
    def run(self, *, fractions: list[float | int], accept_ratio: float | int, largest_kl: float | int | None) -> _Found:
        saved = [parameter.clone() for parameter in self.parameters]
        zero = torch.zeros_like(self.before)
        found = _Found(
            accepted=torch.zeros_like(self.usable), fraction=zero, gain=zero, kl=zero, shrunk=zero.to(torch.int64)
        )
        try:
            for shrunk, fraction in enumerate(fractions):
                if not bool((self.usable & ~found.accepted).any()):
                    break
                found = self._trial(found, saved, shrunk, fraction, accept_ratio, largest_kl)
        finally:
            # Also when a callable raises: what was accepted stays, the rest is restored.
            self._place(saved, found.fraction, found.accepted)
        return found

    def _trial(
        self,
        found: _Found,
        saved: list[Tensor],
        shrunk: int,
        fraction: float | int,
        accept_ratio: float | int,
        largest_kl: float | int | None,
    ) -> _Found:
        trying = self.usable & ~found.accepted
        tried = found.fraction.masked_fill(trying, fraction)
        self._place(saved, tried, self.usable)
        gain, divergence = self.surrogate() - self.before, self.kl()
        good = trying & (gain > 0) & gain.isfinite() & (gain > accept_ratio * fraction * self.expected)
        if largest_kl is not None:
            good = good & (divergence <= largest_kl)
        return _Found(
            accepted=found.accepted | good,
            fraction=tried.where(good, found.fraction),
            gain=gain.where(good, found.gain),
            kl=divergence.where(good, found.kl),
            shrunk=found.shrunk.masked_fill(trying, shrunk),
        )

    def _place(self, saved: list[Tensor], fraction: Tensor, moved: Tensor) -> None:
        """Set each parameter to its saved value plus the fraction of its step, in the rows that moved."""
        rows = fraction.shape
        size = [before[(0,) * len(rows)].numel() for before in saved]
        for parameter, before, step in zip(self.parameters, saved, self.step.split(size, -1), strict=True):
            ones = [1] * (before.ndim - len(rows))
            moves = (fraction[..., None] * step).reshape(before.shape)
            parameter.copy_((before + moves).where(moved.reshape(*rows, *ones), before))


def _check_settings(
    max_kl: float | int,
    damping: float | int,
    cg_iterations: int,
    backtracks: int,
    shrink: float | int,
    accept_ratio: float | int,
) -> None:
    rules = {
        f"`max_kl` must be positive, got {max_kl}": max_kl > 0,
        f"`damping` must not be negative, got {damping}": damping >= 0,
        f"`cg_iterations` must be at least 1, got {cg_iterations}": cg_iterations >= 1,
        f"`backtracks` must be at least 1 (the full step), got {backtracks}": backtracks >= 1,
        f"`shrink` must lie between 0 and 1, got {shrink}": 0 < shrink < 1,
        f"`accept_ratio` must lie in [0, 1), got {accept_ratio}": 0 <= accept_ratio < 1,
    }
    broken = [message for message, holds in rules.items() if not holds]
    if broken:
        raise ValueError("; ".join(broken) + ".")


def _check_rows(parameters: list[Tensor], value: Tensor) -> None:
    if not value.requires_grad:
        raise ValueError("`surrogate` carries no gradient: compute the new log-probabilities with gradients enabled.")
    for parameter in parameters:
        if parameter.shape[: value.ndim] != value.shape:
            raise ValueError(
                f"`surrogate` returned shape {tuple(value.shape)}, but a parameter has shape {tuple(parameter.shape)}; "
                "return one number for one policy, or [H] for parameters stacked as [H, ...]."
            )
