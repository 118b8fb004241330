"""Beta-normalised advantages: BNPO, and the family of estimators that differ in a Beta density only."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.functional._groups import Groups, _wide_dtype
from rlalign.functional.masked import CONSTANT_SPREAD

MAX_WEIGHT = 10.0
"""Default cap on 1 / density; benchmarks/bnpo_caps.py measures the choice."""
MAX_CONCENTRATION = 12.0
"""Default cap on a + b of the fit; same benchmark. Equal prompts look like a + b = G - 1: more than that is luck."""

RANGE_TOLERANCE = 1e-6
"""Rewards may leave their range by this share of it: rounding of an affine map."""


class BetaParameters(NamedTuple):
    """The Beta distribution fitted to a batch's pass rates, and the normaliser made from it."""

    a: float
    """First parameter of the fit; 0 where no fit was possible, negative where rates vary more than any Beta allows."""
    b: float
    alpha: float
    """First parameter of the normaliser, >= 1."""
    beta: float


def beta_normalized(
    rewards: Float[Tensor, " batch"],
    group: Int[Tensor, " batch"],
    *,
    alpha: float | int | None = None,
    beta: float | int | None = None,
    reward_range: tuple[float | int, float | int] = (0.0, 1.0),
    max_weight: float | int = MAX_WEIGHT,
    max_concentration: float | int | None = MAX_CONCENTRATION,
    normalize_weights: bool = False,
    scored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Centre each reward on its prompt's pass rate and divide by a Beta density at that rate: BNPO.

        Â_i = w(p_g) (r_i - p_g),   p_g = mean(r_G),   w(p) = min(1 / f(p; α, β), max_weight)
        f(p; α, β) = p^(α-1) (1-p)^(β-1) / B(α, β)

    α and β are given, or follow the batch as `beta_parameters` says. Fixed members of the family: (1, 1) is the centred
    reward (REINFORCE with baseline, Dr. GRPO), (3/2, 3/2) is π/8 times GRPO with the population deviation, (2, 1) is
    half of MaxRL where the weight cap does not bind.

    Args:
        rewards: Outcome of each rollout, within `reward_range`.
        group: Rollouts of one prompt share an id. Order is free. Pass all prompts of all ranks: α and β depend on them.
        alpha: First parameter of the density, > 0; None (with `beta`) adapts.
        beta: Second parameter.
        reward_range: Lowest and highest possible reward, mapped to 0 and 1 before anything else.
        max_weight: Cap on the inverse density, so that a rare pass rate cannot dominate a batch.
        max_concentration: Cap on a + b of the fit, so that nearly equal rates cannot make the density a spike.
        normalize_weights: Divide the weights by their mean over the groups with signal: their scale then stays the same
            while pass rates drift.
        scored: False where a rollout's outcome is unknown: out of every pass rate, advantage 0.

    Returns:
        Advantages in units of the mapped reward, computed in log space and double precision. Exactly 0 for a group
        whose rewards are all equal.

    Raises:
        ValueError: A group holds a single rollout, a reward is not finite or outside its range, or an option is out of
            its own.

    Example:
        >>> rewards, group = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 0])
        >>> beta_normalized(rewards, group, alpha=1, beta=1)
        tensor([ 0.7500, -0.2500, -0.2500, -0.2500])

    Reference:
        Xiao et al. 2025 (arXiv:2506.02864), eq. 10 and 13. Differs from changyi7231/BNPO
        recipe/bnpo/src/bnpo_ray_trainer.py, which is `max_weight=1e6, max_concentration=None`: that returns NaN when
        all pass rates are equal, stops when all are 0 or all 1, and takes a single rollout for a group.
    """
    if (alpha is None) != (beta is None):
        raise ValueError(f"give both `alpha` and `beta`, or neither for the adaptive rule, got {alpha=} and {beta=}.")
    if not max_weight > 0:
        raise ValueError(f"`max_weight` must be > 0, got {max_weight}; 1e6 is the authors' value.")
    groups = Groups.of(_mapped(rewards, reward_range, scored), group, scored)
    if alpha is None or beta is None:
        _, _, alpha, beta = _fit(groups, max_concentration)
    weight = _inverse_density(groups.mean.clamp(0, 1), alpha, beta, max_weight)
    if normalize_weights and bool(groups.live.any()):
        weight = weight / weight[groups.live].mean()
    return groups.finish(weight[groups.index] * groups.centred, rewards.dtype)


def beta_parameters(
    rewards: Float[Tensor, " batch"],
    group: Int[Tensor, " batch"],
    *,
    reward_range: tuple[float | int, float | int] = (0.0, 1.0),
    max_concentration: float | int | None = MAX_CONCENTRATION,
    scored: Bool[Tensor, " batch"] | None = None,
) -> BetaParameters:
    """Fit a Beta distribution to the prompts' pass rates by moments, and derive BNPO's normaliser from it.

        m = mean(p),  v = var(p) (unbiased),  k = min(m (1 - m) / v - 1, max_concentration),  a = k m,  b = k (1 - m)
        α = max(1 + a / 3, 1),  β = max(1 + b / 3, 1)

    The thirds minimise E[p (1 - p) / f(p; α, β)²] over p ~ Beta(a, b), the variance of the gradient when scores and
    advantages are uncorrelated.

    Args:
        rewards: Outcome of each rollout, within `reward_range`.
        group: Rollouts of one prompt share an id.
        reward_range: Lowest and highest possible reward.
        max_concentration: Cap on a + b; None has none.
        scored: False where a rollout's outcome is unknown. A group with fewer than two scored rollouts has no pass
            rate and is left out.

    Returns:
        (a, b, alpha, beta), after the cap. With fewer than two pass rates, or all of them equal, a = b = 0 and
        α = β = 1. Rates that vary more than any Beta distribution allows give negative a and b, and α = β = 1.

    Raises:
        ValueError: As `beta_normalized`.

    Example:
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
        >>> beta_parameters(rewards, torch.arange(3).repeat_interleave(4))  # pass rates 1/4, 1/2, 3/4
        BetaParameters(a=1.5, b=1.5, alpha=1.5, beta=1.5)

    Reference:
        Xiao et al. 2025 (arXiv:2506.02864), theorem 2 and eq. 12.
    """
    return _fit(Groups.of(_mapped(rewards, reward_range, scored), group, scored), max_concentration)


def _fit(groups: Groups, max_concentration: float | int | None) -> BetaParameters:
    if max_concentration is not None and not max_concentration > 0:
        raise ValueError(f"`max_concentration` must be > 0, or None for no cap, got {max_concentration}.")
    rates = groups.mean[groups.comparable]
    if rates.numel() < 2 or float(rates.max() - rates.min()) <= CONSTANT_SPREAD:
        return BetaParameters(0.0, 0.0, 1.0, 1.0)
    mean, variance = float(rates.mean()), float(rates.var())
    concentration = mean * (1 - mean) / variance - 1
    if max_concentration is not None:
        concentration = min(concentration, float(max_concentration))
    a, b = concentration * mean, concentration * (1 - mean)
    return BetaParameters(a, b, max(1 + a / 3, 1.0), max(1 + b / 3, 1.0))


def _inverse_density(
    rate: Float[Tensor, " groups"], alpha: float | int, beta: float | int, max_weight: float | int
) -> Float[Tensor, " groups"]:
    if not (alpha > 0 and beta > 0):
        raise ValueError(f"a Beta density needs `alpha` > 0 and `beta` > 0, got {alpha} and {beta}.")
    log_normaliser = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    log_kernel = torch.xlogy(alpha - 1, rate) + torch.special.xlog1py(beta - 1, -rate)
    return (log_normaliser - log_kernel).clamp(max=math.log(max_weight)).exp()


def _mapped(
    rewards: Float[Tensor, " batch"],
    reward_range: tuple[float | int, float | int],
    scored: Bool[Tensor, " batch"] | None,
) -> Float[Tensor, " batch"]:
    low, high = reward_range
    if not low < high:
        raise ValueError(f"`reward_range` must be (lowest, highest), got {reward_range}.")
    mapped = (rewards.to(_wide_dtype(rewards)) - low) / (high - low)
    outside = (mapped < -RANGE_TOLERANCE) | (mapped > 1 + RANGE_TOLERANCE)
    if scored is not None:
        outside = outside & scored
    if bool((outside & rewards.isfinite()).any()):
        worst = rewards[outside & rewards.isfinite()][0]
        raise ValueError(
            f"pass rates need rewards within `reward_range` = [{low}, {high}], got {float(worst)}. "
            "Set `advantage.reward_range` to what they can reach, or `advantage.decompose: true` to treat each alone."
        )
    return mapped
