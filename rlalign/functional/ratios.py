"""Ratios between the policy that is trained and the one that acted, and corrections for the engine that sampled."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.functional.masked import masked_mean

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ± this before exp, as in verl and OpenRLHF."""


def sequence_ratio(
    log_ratio: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch 1"]:
    """Average the log-ratio of a rollout over its decisions: GSPO's sequence-level ratio, in log.

        log s_i = (1 / n_i) Σ_t m_it (log π - log π_old)_it

    Args:
        log_ratio: log π - log π_old per decision.
        mask: True at real decisions.

    Returns:
        log s, [B, 1], ready for `clipped_surrogate`; 0 for a rollout without real decisions. Aggregate with
        `sequence_mean`: with a token sum or mean, long rollouts weigh more.

    Example:
        >>> sequence_ratio(torch.tensor([[0.2, 0.4, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.3000]])

    Reference:
        Zheng et al. 2025 (arXiv:2507.18071), eq. 7. Some RLOO implementations sum instead, which grows with length.
    """
    return masked_mean(log_ratio, mask, dim=1)[:, None]


def sequence_token_ratio(
    log_ratio: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """Take the sequence-level ratio's value and each decision's own gradient: GSPO-token, in log.

        log s_it = sg(log s_i) + log π_it - sg(log π_it)

    Args:
        log_ratio: log π - log π_old per decision.
        mask: True at real decisions.

    Returns:
        log s per decision, for `clipped_surrogate` with advantages that differ within a rollout; 0 where masked.

    Example:
        >>> sequence_token_ratio(torch.tensor([[0.25, 0.75, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([[0.5000, 0.5000, 0.0000]])

    Reference:
        Zheng et al. 2025 (arXiv:2507.18071), eq. 14.
    """
    sequence = sequence_ratio(log_ratio, mask).detach()
    return (sequence + (log_ratio - log_ratio.detach())).masked_fill(~mask, 0)


def guarded_log_ratio(
    log_prob: Float[Tensor, " batch"],
    log_prob_old: Float[Tensor, " batch"],
    mean: Float[Tensor, "batch *dims"],
    mean_old: Float[Tensor, "batch *dims"],
    std: Float[Tensor, " batch"],
    *,
    drift_over: Literal["sample", "batch"] = "sample",
) -> Float[Tensor, " batch"]:
    """Take the drift and the noise level out of a denoising step's log-ratio, so that one clip fits every step.

        log ρ̂ = s (log π - log π_old + mean_d (μ - μ_old)² / (2 s²))   =   mean_d (μ - μ_old) ε

    The plain log-ratio of a step has mean -mean_d(μ - μ_old)²/(2s²) < 0 and a spread that grows as s shrinks; this one
    has mean 0 and the spread of the mean's movement. GRPO-Guard also weighs each step's objective by 1/Δt, which is a
    weight for `aggregate`.

    Args:
        log_prob: Log-probability of the step under the policy being trained, in nats per dimension (a mean).
        log_prob_old: The same at collection.
        mean: Mean of the step's Gaussian under the policy being trained.
        mean_old: The same at collection.
        std: s = σ_t sqrt(Δt) > 0 of the step.
        drift_over: `batch` averages the drift over the whole batch, as the authors' code does.

    Returns:
        One log-ratio per step. The drift is each sample's own mean over its dimensions.

    Raises:
        ValueError: A deviation is not positive: a step without noise has no probability and must be masked.

    Example:
        >>> old, new, std = torch.zeros(1, 2), torch.tensor([[0.5, 0.5]]), torch.tensor([0.5])
        >>> guarded_log_ratio(torch.tensor([-1.5]), torch.tensor([-1.0]), new, old, std)  # 0.5 (-0.5 + 0.25 / 0.5)
        tensor([0.])

    Reference:
        Wang et al. 2025 (arXiv:2510.22319), eq. 8. Differs from yifan123/flow_grpo scripts/train_sd3_GRPO_Guard.py,
        which averages the drift over the whole batch; its first author confirmed that this is a slip (issue 244).
    """
    if bool((std <= 0).any()):
        raise ValueError(
            f"`std` must be > 0 at every step, got {float(std.min())}; mask the steps that add no noise (the last one)."
        )
    drift = ((mean - mean_old) ** 2).reshape(mean.shape[0], -1).mean(1)
    drift = drift.mean().expand_as(drift) if drift_over == "batch" else drift
    return std * (log_prob - log_prob_old + drift / (2 * std**2))


STEP_CLIP = {"plain": 2.6e-2, "normalized": 5.1e-4}
"""κ of `step_clip`: the clips that Flow-GRPO (1e-4) and GRPO-Guard (2e-6) use on 65,536 dimensions, times 256."""


def step_clip(dimensions: int, *, normalized: bool) -> float:
    """Scale the clip of a denoising step's ratio with the size of the latents.

        ε = κ / sqrt(D),   κ = 2.6e-2 for the plain ratio, 5.1e-4 for the normalised one

    The log-ratio of a step is a mean over its D dimensions, whose spread falls as 1 / sqrt(D) at equal movement of the
    model, so a clip found at one size is far too wide or too narrow at another.

    Args:
        dimensions: D, entries of one sample's latents.
        normalized: Whether the ratio is `guarded_log_ratio`'s.

    Returns:
        Distance from ratio 1, for `clip_low` and `clip_high`.

    Raises:
        ValueError: There are no dimensions.

    Example:
        >>> step_clip(65536, normalized=False), step_clip(65536, normalized=True)
        (0.0001015625, 1.9921875e-06)

    Reference:
        The clips of Liu et al. 2025 (arXiv:2505.05470) and Wang et al. 2025 (arXiv:2510.22319) at 512 x 512 pixels;
        the scaling follows from log ρ̂ = mean_d (μ - μ_old) ε.
    """
    if dimensions < 1:
        raise ValueError(f"`dimensions` must be >= 1, got {dimensions}.")
    return STEP_CLIP["normalized" if normalized else "plain"] / math.sqrt(dimensions)


def truncated_correction(
    log_prob_old: Float[Tensor, "batch time"],
    log_prob_engine: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    cap: float,
) -> Float[Tensor, "batch time"]:
    """Correct for an engine that samples from slightly other probabilities than the trainer computes, up to a cap.

        w = min(exp(log π_old - log π_engine), cap)

    Args:
        log_prob_old: The trainer's log-probability at collection, in nats.
        log_prob_engine: The engine's own, in nats; NaN where it reported none.
        mask: True at real decisions.
        cap: Largest weight, >= 1.

    Returns:
        Weights for `aggregate`, detached; 1 where the engine reported nothing, 0 where masked.

    Raises:
        ValueError: The cap is below 1.

    Example:
        >>> engine = torch.tensor([[-3.0, -1.0, float("nan")]])
        >>> truncated_correction(torch.tensor([[-1.0, -1.0, -1.0]]), engine, torch.ones(1, 3).bool(), cap=2.0)
        tensor([[2., 1., 1.]])

    Reference:
        Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncated
        importance sampling); Ionides 2008, "Truncated importance sampling".
    """
    _check_cap(cap)
    return _engine_ratio(log_prob_old, log_prob_engine, mask).clamp(max=cap)


def masked_correction(
    log_prob_old: Float[Tensor, "batch time"],
    log_prob_engine: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "batch time"]:
    """Correct for the engine's other probabilities, and drop decisions on which the two disagree too much.

        w = ρ where low <= ρ <= high, else 0,   ρ = exp(log π_old - log π_engine)

    Args:
        log_prob_old: The trainer's log-probability at collection, in nats.
        log_prob_engine: The engine's own, in nats; NaN where it reported none.
        mask: True at real decisions.
        low: Smallest ratio kept, in [0, 1].
        high: Largest ratio kept, >= 1.

    Returns:
        Weights for `aggregate`, detached; 1 where the engine reported nothing, 0 where masked or dropped.

    Raises:
        ValueError: Not 0 <= low <= 1 <= high.

    Example:
        >>> engine = torch.tensor([[-3.0, -1.0, -1.5]])
        >>> masked_correction(torch.tensor([[-1.0, -1.0, -1.5]]), engine, torch.ones(1, 3).bool(), low=0.5, high=5.0)
        tensor([[0., 1., 1.]])

    Reference:
        Ling Team 2025 (arXiv:2510.18855), IcePOP.
    """
    if not 0 <= low <= 1 <= high:
        raise ValueError(f"the band of kept ratios must hold 1: 0 <= low <= 1 <= high, got {low=} and {high=}.")
    ratio = _engine_ratio(log_prob_old, log_prob_engine, mask)
    return torch.where((ratio >= low) & (ratio <= high), ratio, torch.zeros_like(ratio))


def bounded_ratio(log_ratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Turn a log-ratio into a ratio that cannot overflow.

        ρ = exp(clamp(log_ratio, ±20))

    Args:
        log_ratio: log π - log π_old, in nats.

    Returns:
        The ratio, between 2e-9 and 5e8, without gradient where the clamp acts.

    Example:
        >>> bounded_ratio(torch.tensor([0.0, 1000.0])).log()
        tensor([ 0., 20.])

    Reference:
        Schulman et al. 2017 (arXiv:1707.06347), §3; the same clamp as verl/trainer/ppo/core_algos.py.
    """
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def _check_cap(cap: float) -> None:
    if cap < 1:
        raise ValueError(
            f"`cap` is the largest ratio itself and must be >= 1, got {cap}. "
            "A cap written as 1 + epsilon elsewhere is given here as the sum."
        )


def _engine_ratio(
    log_prob_old: Float[Tensor, "batch time"],
    log_prob_engine: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    difference = (log_prob_old - log_prob_engine).detach()
    return bounded_ratio(difference.masked_fill(log_prob_engine.isnan() | ~mask, 0)).masked_fill(~mask, 0)
