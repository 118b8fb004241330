"""Advantages of whole rollouts against a baseline; the estimators along time and the Beta family are found here too.

Group statistics are taken in double precision and the result is returned in the dtype of the rewards.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.functional._groups import Groups, _check_finite
from rlalign.functional.beta import BetaParameters, beta_normalized, beta_parameters
from rlalign.functional.masked import whiten
from rlalign.functional.temporal import discounted_returns, gae, reinforce_plus_plus

__all__ = [
    "BetaParameters",
    "batch_scaled",
    "beta_normalized",
    "beta_parameters",
    "discounted_returns",
    "gae",
    "greedy_baseline",
    "group_relative",
    "leave_one_out",
    "length_weighted",
    "max_likelihood",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "whiten",
]


def group_relative(
    rewards: Float[Tensor, " batch"],
    group: Int[Tensor, " batch"],
    *,
    scale: bool = True,
    unbiased: bool = True,
    eps: float = 1e-4,
    scored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Centre each reward on its group's mean and divide by the group's standard deviation: GRPO.

        Â_i = (r_i - mean(r_G)) / (std(r_G) + eps)

    Args:
        rewards: Outcome of each rollout, any unit.
        group: Rollouts with equal ids are compared with each other. Order is free.
        scale: False keeps only the centring (Dr. GRPO).
        unbiased: Sample deviation, G - 1; False divides by G.
        eps: Added to the deviation.
        scored: False where a rollout's outcome is unknown: out of mean and deviation, advantage 0.

    Returns:
        Advantages, in deviations. Exactly 0 in a group whose rewards differ by rounding only.

    Raises:
        ValueError: A group holds a single rollout, or a scored reward is not finite.

    Example:
        >>> group_relative(torch.tensor([1.0, 0.0]), torch.tensor([5, 5]), scale=False)
        tensor([ 0.5000, -0.5000])

    Reference:
        Shao et al. 2024 (arXiv:2402.03300), §4.1.2; Liu et al. 2025 (arXiv:2503.20783), §3.2 (no scale). TRL uses the
        same deviation and eps; Flow-GRPO's tracker divides by G, OpenRLHF adds 1e-9, which blows up rounding.
    """
    groups = Groups.of(rewards, group, scored)
    if not scale:
        return groups.finish(groups.centred, rewards.dtype)
    variance = groups.total(groups.centred**2) / (groups.count - int(unbiased)).clamp(min=1)
    return groups.finish(groups.centred / (variance.sqrt()[groups.index] + eps), rewards.dtype)


def leave_one_out(
    rewards: Float[Tensor, " batch"], group: Int[Tensor, " batch"], *, scored: Bool[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """Compare each reward with the mean of the others in its group: RLOO.

        Â_i = r_i - mean_{j != i}(r_j) = (r_i - mean(r_G)) G / (G - 1)

    Args:
        rewards: Outcome of each rollout, any unit.
        group: Rollouts with equal ids are compared with each other.
        scored: False where a rollout's outcome is unknown: not among the others, advantage 0.

    Returns:
        Advantages in the unit of the rewards, unbiased since the baseline does not know the rollout.

    Raises:
        ValueError: A group holds a single rollout, or a scored reward is not finite.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0, 0, 0]))
        tensor([ 1.0000, -0.5000, -0.5000])

    Reference:
        Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024 (arXiv:2402.14740).
    """
    groups = Groups.of(rewards, group, scored)
    count = groups.count[groups.index]
    return groups.finish(groups.centred * count / (count - 1).clamp(min=1), rewards.dtype)


def max_likelihood(
    rewards: Float[Tensor, " batch"], group: Int[Tensor, " batch"], *, scored: Bool[Tensor, " batch"] | None = None
) -> Float[Tensor, " batch"]:
    """Centre each reward and divide by the group's mean, so that rare successes count most: MaxRL.

        Â_i = (r_i - m_G) / m_G,   0 where m_G = 0

    Args:
        rewards: Outcome of each rollout, >= 0; successes and failures are 1 and 0.
        group: Rollouts with equal ids are compared with each other.
        scored: False where a rollout's outcome is unknown: out of the mean, advantage 0.

    Returns:
        Advantages relative to the group's mean.

    Raises:
        ValueError: A group holds a single rollout, or a scored reward is negative or not finite.

    Example:
        >>> max_likelihood(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 0]))
        tensor([ 3., -1., -1., -1.])

    Reference:
        Tajwar et al. 2026 (arXiv:2602.02710). No eps in the divisor, unlike SkyRL (1e-6): m_G is 0 or at least 1/G of a
        reward.
    """
    groups = Groups.of(rewards, group, scored)
    if bool((groups.rewards < 0).any()):
        raise ValueError(
            f"maximum likelihood needs rewards >= 0, got {float(groups.rewards.min())}: a mean near or below 0 would "
            "blow advantages up or turn them round. Shift the reward, or choose another `advantage.type`."
        )
    divisor = torch.where(groups.mean > 0, groups.mean, 1)
    return groups.finish(groups.centred / divisor[groups.index], rewards.dtype)


def length_weighted(
    rewards: Float[Tensor, " batch"],
    group: Int[Tensor, " batch"],
    lengths: Float[Tensor, " batch"] | Int[Tensor, " batch"],
    *,
    scored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Subtract the length-weighted mean reward of the group, the baseline of least variance: OPO.

        Â_i = r_i - Σ_G l_j r_j / Σ_G l_j

    The best constant baseline weighs rewards by squared score norms, which grow like the number of decisions.

    Args:
        rewards: Outcome of each rollout, any unit.
        group: Rollouts with equal ids are compared with each other.
        lengths: Real decisions of each rollout.
        scored: False where a rollout's outcome is unknown: out of the baseline, advantage 0.

    Returns:
        Advantages in the unit of the rewards.

    Raises:
        ValueError: A group holds a single rollout, or a scored reward is not finite.

    Example:
        >>> length_weighted(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.tensor([1, 3]))
        tensor([ 0.7500, -0.2500])

    Reference:
        Hao et al. 2025 (arXiv:2505.23585), eq. 6.
    """
    groups = Groups.of(rewards, group, scored)
    length = lengths.to(groups.rewards.dtype)
    baseline = groups.total(length * groups.rewards) / groups.total(length).clamp(min=1)
    return groups.finish(groups.rewards - baseline[groups.index], rewards.dtype)


def greedy_baseline(
    rewards: Float[Tensor, " batch"],
    baseline_reward: Float[Tensor, " batch"],
    *,
    scored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Subtract the reward of the greedy rollout from the same prompt: ReMax.

        Â_i = r_i - r(greedy rollout of the prompt)

    Args:
        rewards: Outcome of each rollout, any unit.
        baseline_reward: Outcome of the greedy rollout of each rollout's prompt.
        scored: False where a rollout's outcome is unknown: advantage 0.

    Returns:
        Advantages in the unit of the rewards. A group of one is fine here, and a group of equal rewards has signal.

    Raises:
        ValueError: A scored reward, or the baseline of a scored rollout, is not finite.

    Example:
        >>> greedy_baseline(torch.tensor([1.0, 0.0]), torch.tensor([0.25, 0.25]))
        tensor([ 0.7500, -0.2500])

    Reference:
        Li et al. 2024 (arXiv:2310.10505), algorithm 1.
    """
    counted = torch.ones_like(rewards, dtype=torch.bool) if scored is None else scored
    _check_finite(rewards, counted)
    _check_finite(baseline_reward, counted)
    return torch.where(counted, rewards - baseline_reward, 0)


def batch_scaled(
    rewards: Float[Tensor, " batch"],
    group: Int[Tensor, " batch"],
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
    scored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Centre each reward on its group's mean and divide by the deviation of all centred rewards: ScaleRL.

        Â_i = c_i / (std(c) + eps),   c_i = r_i - mean(r_G),   std over all scored rollouts of the batch

    Args:
        rewards: Outcome of each rollout, any unit.
        group: Rollouts with equal ids are compared with each other.
        unbiased: Sample deviation; False divides by the number of rollouts.
        eps: Added to the deviation.
        scored: False where a rollout's outcome is unknown: out of all statistics, advantage 0.

    Returns:
        Advantages, in deviations of the batch. Groups without signal get 0 but count in the deviation.

    Raises:
        ValueError: A group holds a single rollout, or a scored reward is not finite.

    Example:
        >>> rewards, group = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1])
        >>> batch_scaled(rewards, group, unbiased=False)  # std = sqrt((1/4 + 1/4) / 4)
        tensor([ 1.4142, -1.4142,  0.0000,  0.0000])

    Reference:
        Khatri et al. 2025 (arXiv:2510.13786), §4. Differs from TRL's `scale_rewards="batch"`, which divides by the
        deviation of the rewards themselves: that also counts how much the prompts differ in difficulty.
    """
    groups = Groups.of(rewards, group, scored)
    centred = groups.finish(groups.centred, groups.rewards.dtype)
    count = _compared(groups).sum() - int(unbiased)
    deviation = ((centred**2).sum() / count.clamp(min=1)).sqrt()
    return groups.finish(centred / (deviation + eps), rewards.dtype)


def reinforce_plus_plus_baseline(
    rewards: Float[Tensor, " batch"],
    group: Int[Tensor, " batch"],
    *,
    lengths: Float[Tensor, " batch"] | Int[Tensor, " batch"] | None = None,
    unbiased: bool = True,
    eps: float = 1e-8,
    scored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Centre each reward on its group's mean, then whiten over the batch: REINFORCE++ with baseline.

        c_i = r_i - mean(r_G),   Â_i = (c_i - μ) / sqrt(σ² + eps)
        μ, σ² = mean and variance of c over the rollouts, or over their decisions when `lengths` are given

    Args:
        rewards: Outcome of each rollout, any unit.
        group: Rollouts with equal ids are compared with each other.
        lengths: Real decisions of each rollout: long rollouts then count for as many.
        unbiased: Use the sample variance.
        eps: Added to the variance.
        scored: False where a rollout's outcome is unknown: out of all statistics, advantage 0.

    Returns:
        Advantages, in deviations of the batch. Groups without signal count in μ and σ but get exactly 0.

    Raises:
        ValueError: A group holds a single rollout, or a scored reward is not finite.

    Example:
        >>> reinforce_plus_plus_baseline(torch.tensor([3.0, 1.0]), torch.tensor([0, 0]), unbiased=False)
        tensor([ 1., -1.])

    Reference:
        Hu et al. 2025 (arXiv:2501.03262), §3.2. verl/trainer/ppo/core_algos.py whitens over tokens (`lengths`) and
        gives groups without signal -μ/σ rather than 0.
    """
    groups = Groups.of(rewards, group, scored)
    centred = groups.finish(groups.centred, groups.rewards.dtype)
    weight = torch.ones_like(centred) if lengths is None else lengths.to(centred.dtype)
    weight = torch.where(_compared(groups), weight, 0)
    mean = (weight * centred).sum() / weight.sum().clamp(min=1)
    variance = (weight * (centred - mean) ** 2).sum() / (weight.sum() - int(unbiased)).clamp(min=1)
    return groups.finish((centred - mean) * torch.rsqrt(variance + eps), rewards.dtype)


def _compared(groups: Groups) -> Bool[Tensor, " batch"]:
    return groups.scored & groups.comparable[groups.index]
