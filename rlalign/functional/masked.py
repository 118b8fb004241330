"""Means, whitening and the one reduction from per-decision objectives to a loss, all blind to masked positions."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int, Num, Shaped
from torch import Tensor

Aggregation = Literal["token", "sequence_mean", "sequence_sum", "group", "constant"]
Dim = int | tuple[int, ...] | None

CONSTANT_SPREAD = 1e-6
"""Values whose spread is below this share of max(1, largest magnitude) differ by rounding only."""


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, dim: Dim = None) -> Float[Tensor, "..."]:
    """Average the values whose mask is True.

        mean = Σ m x / max(Σ m, 1)

    Args:
        x: Values; anything may stand where the mask is False, NaN included.
        mask: True where a value counts.
        dim: Dimensions to average over; None averages over all.

    Returns:
        The mean, 0 where nothing counts.

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
        tensor(2.)

    Reference:
        The masked mean of Schulman et al. 2017 (arXiv:1707.06347), §3, over a padded batch.
    """
    return x.masked_fill(~mask, 0).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, dim: Dim = None, unbiased: bool = True
) -> Float[Tensor, "..."]:
    """Take the variance of the values whose mask is True.

        var = Σ m (x - mean)² / max(n - 1, 1),   n = Σ m;   divided by max(n, 1) when `unbiased` is False

    Args:
        x: Values; anything may stand where the mask is False.
        mask: True where a value counts.
        dim: Dimensions to reduce; None reduces all.
        unbiased: Divide by n - 1 rather than n.

    Returns:
        The variance, 0 where fewer than two values count.

    Example:
        >>> masked_var(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
        tensor(2.)

    Reference:
        Schulman et al. 2017 (arXiv:1707.06347), normalisation of advantages. Two passes, so an offset costs no digits.
    """
    mean = x.masked_fill(~mask, 0).sum(dim, keepdim=True) / mask.sum(dim, keepdim=True).clamp(min=1)
    squares = (x.masked_fill(~mask, 0) - mean).masked_fill(~mask, 0) ** 2
    return squares.sum(dim) / (mask.sum(dim) - int(unbiased)).clamp(min=1)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
    shift_mean: bool = True,
) -> Float[Tensor, "*shape"]:
    """Give the values whose mask is True mean 0 and variance 1.

        y = (x - mean) / sqrt(var + eps)   (+ mean when `shift_mean` is False)

    Args:
        x: Values; anything may stand where the mask is False.
        mask: True where a value counts; None counts all.
        unbiased: Use the sample variance (n - 1).
        eps: Added to the variance.
        shift_mean: False scales the deviations but leaves the mean where it was.

    Returns:
        Whitened values, exactly 0 where masked. Values that are equal up to rounding have no deviation: 0, not noise
        blown up.

    Example:
        >>> whiten(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]), unbiased=False)
        tensor([-1.,  1.,  0.])

    Reference:
        Hu et al. 2025 (arXiv:2501.03262), REINFORCE++, §3. verl's `masked_whiten` divides equal values by sqrt(eps).
    """
    if x.numel() == 0:
        return x
    if mask is None and x.numel() > 1:
        kept = x
        variance, mean = torch.var_mean(x, correction=int(unbiased))
        deviation = x - mean
    else:
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        kept = x.masked_fill(~mask, 0)
        variance, mean = masked_var(kept, mask, unbiased=unbiased), masked_mean(kept, mask)
        deviation = (kept - mean).masked_fill(~mask, 0)
    spread_out = deviation.abs().amax() > 0.5 * CONSTANT_SPREAD * kept.abs().amax().clamp(min=1)
    # A product with the flag would keep the NaN of a broken batch; so does this, and equal values give exact zeros.
    scaled = deviation * torch.where(spread_out, torch.rsqrt(variance + eps), 0.0)
    shifted = scaled if shift_mean else scaled + mean
    return shifted if mask is None else shifted.masked_fill(~mask, 0)


def spread(values: Shaped[Tensor, " batch"], mask: Bool[Tensor, "batch time"]) -> Shaped[Tensor, "batch time"]:
    """Give every real decision of a rollout the rollout's value.

        y_it = m_it v_i

    Args:
        values: One value per rollout.
        mask: True at real decisions.

    Returns:
        One value per decision, exactly 0 where masked.

    Example:
        >>> spread(torch.tensor([2.0]), torch.tensor([[True, True, False]]))
        tensor([[2., 2., 0.]])

    Reference:
        Shao et al. 2024 (arXiv:2402.03300), §4.1.2: every token has its output's advantage.
    """
    return values[:, None].expand(mask.shape).masked_fill(~mask, 0)


def aggregate_denominator(
    mask: Bool[Tensor, "batch time"], *, mode: Aggregation, group: Int[Tensor, " batch"] | None = None
) -> int:
    """Count what a mean divides by, so that the micro-batches of one optimizer step can share the count.

        D = Σ_it m_it (token)   D = B (sequence_mean, sequence_sum)   D = number of distinct groups (group)

    Args:
        mask: True at real decisions, of the whole optimizer step.
        mode: The aggregation that will be used.
        group: Group of each rollout, needed by `group` alone.

    Returns:
        The count, at least 1. Rollouts and groups count even when all their decisions are masked.

    Raises:
        ValueError: The mode is `constant`, whose divisor is a choice and no count, or unknown.

    Example:
        >>> aggregate_denominator(torch.tensor([[True, True], [True, False]]), mode="token")
        3

    Reference:
        Yu et al. 2025 (arXiv:2503.14476), DAPO, eq. 8 (`token`); Shao et al. 2024 (arXiv:2402.03300), eq. 3
        (`sequence_mean`); Khatri et al. 2025 (arXiv:2510.13786), §4 (`group`).
    """
    match mode:
        case "token":
            count = int(mask.sum())
        case "sequence_mean" | "sequence_sum":
            count = mask.shape[0]
        case "group":
            count = _required_group(group).unique().numel()
        case "constant":
            raise ValueError(
                "the `constant` aggregation divides by a number of your choice: pass `denominator`, "
                "for example rollouts x longest completion (Dr. GRPO)."
            )
        case _:
            raise ValueError(f"unknown aggregation {mode!r}; choose one of {list(get_args(Aggregation))}.")
    return max(count, 1)


def aggregate(
    objective: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    weights: Float[Tensor, "batch time"] | None = None,
    mode: Aggregation,
    group: Int[Tensor, " batch"] | None = None,
    denominator: float | int | Num[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Reduce a per-decision objective to the loss.

        token           Σ_it m w o / D                         D = Σ m         (mean over all real decisions, DAPO)
        sequence_mean   Σ_i (Σ_t m w o / n_i) / D              D = B           (mean of per-rollout means, GRPO)
        sequence_sum    Σ_i Σ_t m w o / D                      D = B           (mean of per-rollout sums, BNPO)
        group           Σ_g (Σ_{i in g, t} m w o / n_g) / D    D = #groups     (prompt mean, ScaleRL)
        constant        Σ_it m w o / D                         D is yours      (Dr. GRPO)

    n_i and n_g count the real decisions of rollout i and group g. Weights touch the numerator only, so a weight can
    never be normalised away. All counts are clamped at 1: with every decision masked the loss is 0 and still has a
    graph.

    Args:
        objective: Quantity to minimise at each decision; anything may stand where masked.
        mask: True at real decisions.
        weights: Factor >= 0 of each decision.
        mode: One of the five above. `sequence_mean` and `group` correct for length; `sequence_sum` lets long rollouts
            weigh more.
        group: Group of each rollout; `group` needs it, and needs whole groups.
        denominator: D of the whole optimizer step, when this is one of its micro-batches: the losses of the
            micro-batches then add up to that of the step. `aggregate_denominator` counts it.

    Returns:
        The loss; half-precision objectives are summed in float32.

    Raises:
        ValueError: Shapes differ, the mode is unknown, or it lacks its `group` or `denominator`.

    Example:
        >>> objective = torch.tensor([[1.0, 3.0], [6.0, 99.0]])
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> aggregate(objective, mask, mode="sequence_mean")  # (2 + 6) / 2
        tensor(4.)

    Reference:
        Shao et al. 2024 (arXiv:2402.03300), eq. 3; Yu et al. 2025 (DAPO, arXiv:2503.14476), eq. 8; Liu et al. 2025
        (Dr. GRPO, arXiv:2503.20783); Khatri et al. 2025 (ScaleRL, arXiv:2510.13786), §4. Differs from
        trl/trainer/grpo_trainer.py: a token mean over micro-batches divides by the tokens of the step, not by each
        micro-batch's own.
    """
    if objective.shape != mask.shape:
        raise ValueError(f"objective {list(objective.shape)} and mask {list(mask.shape)} must have one shape.")
    if denominator is None:
        denominator = aggregate_denominator(mask, mode=mode, group=group)
    kept = objective.masked_fill(~mask, 0)
    if weights is not None:
        kept = kept * weights.masked_fill(~mask, 0)
    per_rollout = kept.sum(1, dtype=torch.promote_types(kept.dtype, torch.float32))
    if mode == "sequence_mean":
        per_rollout = per_rollout / mask.sum(1).clamp(min=1)
    elif mode == "group":
        per_rollout = per_rollout / _decisions_per_group(mask, _required_group(group))
    elif mode not in get_args(Aggregation):
        raise ValueError(f"unknown aggregation {mode!r}; choose one of {list(get_args(Aggregation))}.")
    divisor = denominator.clamp(min=1) if isinstance(denominator, Tensor) else max(denominator, 1)
    return per_rollout.sum() / divisor


def _required_group(group: Int[Tensor, " batch"] | None) -> Int[Tensor, " batch"]:
    if group is None:
        raise ValueError("the `group` aggregation averages over prompts: pass `group`, one id per rollout.")
    return group


def _decisions_per_group(mask: Bool[Tensor, "batch time"], group: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    ids, index = group.unique(return_inverse=True)
    count = torch.zeros_like(ids).index_add(0, index, mask.sum(1).to(ids.dtype))
    return count.clamp(min=1)[index]
