"""Policy objectives, per decision and to minimise; the ratios and corrections they take are found here too."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.functional.masked import masked_mean
from rlalign.functional.ratios import (
    _check_cap,
    bounded_ratio,
    guarded_log_ratio,
    masked_correction,
    sequence_ratio,
    sequence_token_ratio,
    step_clip,
    truncated_correction,
)

__all__ = [
    "cispo",
    "clip_fractions",
    "clipped_surrogate",
    "guarded_log_ratio",
    "masked_correction",
    "reinforce",
    "sapo",
    "sequence_ratio",
    "sequence_token_ratio",
    "step_clip",
    "truncated_correction",
    "weighted_bc",
]


def reinforce(log_prob: Float[Tensor, "*#shape"], advantages: Float[Tensor, "*#shape"]) -> Float[Tensor, "*#shape"]:
    """Weigh the log-probability of each decision by its advantage: the policy gradient.

        L_t = -Â_t log π(a_t)

    Args:
        log_prob: Log-probability under the policy being trained, in nats.
        advantages: One per decision.

    Returns:
        Objective per decision.

    Raises:
        ValueError: The advantages have other dimensions than the log-probabilities.

    Example:
        >>> reinforce(torch.tensor([[-0.5]]), torch.tensor([[2.0]]))
        tensor([[1.]])

    Reference:
        Williams 1992, "Simple statistical gradient-following algorithms", eq. 4.
    """
    _check_dimensions(log_prob, advantages)
    return -advantages * log_prob


def clipped_surrogate(
    log_ratio: Float[Tensor, "*#shape"],
    advantages: Float[Tensor, "*#shape"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Tensor, "*#shape"]:
    """Reward moving towards good decisions only while the ratio stays near 1: PPO's objective.

        L = max(-ρ Â, -clip(ρ, 1 - clip_low, 1 + clip_high) Â),   ρ = exp(clamp(log_ratio, ±20))
        Â < 0 and dual_clip = c:   min(L, -c Â)

    Args:
        log_ratio: log π - log π_old per decision, or [B, 1] for one ratio per rollout (GSPO).
        advantages: One per decision.
        clip_low: The ratio counts as at least 1 - clip_low.
        clip_high: The ratio counts as at most 1 + clip_high; above `clip_low` is DAPO's clip-higher.
        dual_clip: Largest ratio, > 1, that a bad decision is punished with; None has no limit.

    Returns:
        Objective per decision. At ratio 1 its gradient is the policy gradient.

    Raises:
        ValueError: A clip is negative, `dual_clip` is not above 1, or the dimensions differ.

    Example:
        >>> log_ratio = torch.tensor([[1.5, 0.5]]).log()
        >>> clipped_surrogate(log_ratio, torch.tensor([[1.0, 1.0]]), clip_low=0.2, clip_high=0.2)
        tensor([[-1.2000, -0.5000]])

    Reference:
        Schulman et al. 2017 (arXiv:1707.06347), eq. 7; Ye et al. 2020 (arXiv:1912.09729), eq. 5 (dual clip); Yu et al.
        2025 (arXiv:2503.14476), eq. 10 (two clips).
    """
    _check_dimensions(log_ratio, advantages)
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clips are distances from ratio 1 and >= 0, got {clip_low=} and {clip_high=}.")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"`dual_clip` bounds ratios above 1, got {dual_clip}; use 3 to 10, or None.")
    ratio = bounded_ratio(log_ratio)
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def cispo(
    log_prob: Float[Tensor, "*#shape"],
    log_ratio: Float[Tensor, "*#shape"],
    advantages: Float[Tensor, "*#shape"],
    *,
    cap: float,
) -> Float[Tensor, "*#shape"]:
    """Weigh the policy gradient by a capped, detached importance ratio: no decision loses its gradient.

        L_t = -sg(min(ρ_t, cap)) Â_t log π(a_t),   ρ = exp(clamp(log_ratio, ±20))

    Args:
        log_prob: Log-probability under the policy being trained, in nats.
        log_ratio: log π - log π_behaviour; detached here.
        advantages: One per decision.
        cap: Largest ratio itself, >= 1 (ScaleRL: 4 to 8), not its distance from 1.

    Returns:
        Objective per decision. At ratio 1 it is `reinforce`.

    Raises:
        ValueError: The cap is below 1, or the dimensions differ.

    Example:
        >>> log_ratio = torch.tensor([[10.0, 2.0]]).log()
        >>> cispo(torch.tensor([[-1.0, -1.0]]), log_ratio, torch.tensor([[1.0, 1.0]]), cap=5.0)
        tensor([[5., 2.]])

    Reference:
        MiniMax 2025 (arXiv:2506.13585), eq. 4; Khatri et al. 2025 (arXiv:2510.13786), eq. 4. Differs from
        trl/trainer/grpo_trainer.py, where an unset `epsilon_high` becomes a cap of 0.2, and from the repositories that
        read the cap as 1 + epsilon.
    """
    _check_dimensions(log_prob, advantages)
    _check_dimensions(log_ratio, advantages)
    _check_cap(cap)
    return -bounded_ratio(log_ratio).clamp(max=cap).detach() * advantages * log_prob


def sapo(
    log_ratio: Float[Tensor, "*#shape"],
    advantages: Float[Tensor, "*#shape"],
    *,
    tau_positive: float = 1.0,
    tau_negative: float = 1.05,
) -> Float[Tensor, "*#shape"]:
    """Fade a decision's gradient out smoothly as its ratio leaves 1, instead of clipping it.

        L = -(4 / τ) sigmoid(τ (ρ - 1)) Â,   τ = tau_positive where Â > 0, else tau_negative

    Args:
        log_ratio: log π - log π_old per decision.
        advantages: One per decision.
        tau_positive: Steepness of the gate for good decisions, > 0.
        tau_negative: Steepness for bad ones; a little larger damps them sooner.

    Returns:
        Objective per decision. At ratio 1 its gradient is the policy gradient.

    Raises:
        ValueError: A temperature is not positive, or the dimensions differ.

    Example:
        >>> sapo(torch.tensor([[0.0]]), torch.tensor([[1.0]]))  # 4 x sigmoid(0)
        tensor([[-2.]])

    Reference:
        Gao et al. 2025 (arXiv:2511.20347), soft adaptive policy optimization; same gate as trl/trainer/grpo_trainer.py.
    """
    _check_dimensions(log_ratio, advantages)
    if tau_positive <= 0 or tau_negative <= 0:
        raise ValueError(f"gate temperatures must be > 0, got {tau_positive=} and {tau_negative=}.")
    tau = torch.where(advantages > 0, log_ratio.new_tensor(tau_positive), log_ratio.new_tensor(tau_negative))
    return -advantages * torch.sigmoid(tau * (bounded_ratio(log_ratio) - 1)) * 4 / tau


def weighted_bc(log_prob: Float[Tensor, "*#shape"], weights: Float[Tensor, "*#shape"]) -> Float[Tensor, "*#shape"]:
    """Imitate recorded decisions, each as much as its weight says: weighted behaviour cloning.

        L = -w log π(a|s),   w >= 0 and held fixed

    Args:
        log_prob: Log-probability of the recorded decision under the policy being trained, in nats.
        weights: 1 is plain behaviour cloning; detached here.

    Returns:
        Objective per decision.

    Raises:
        ValueError: The weights have other dimensions than the log-probabilities.

    Example:
        >>> weighted_bc(torch.tensor([-0.5, -2.0]), torch.tensor([3.0, 0.0]))
        tensor([1.5000, 0.0000])

    Reference:
        Peng et al. 2019 (arXiv:1910.00177), eq. 9, with exponentiated advantages; Mao et al. 2024 (arXiv:2402.00348)
        with ratios of distributions.
    """
    _check_dimensions(log_prob, weights, "weights")
    return -weights.detach() * log_prob


def clip_fractions(
    log_ratio: Float[Tensor, "batch #time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Count how often `clipped_surrogate` takes a decision's gradient away.

        low = mean_m [ρ < 1 - clip_low and Â < 0],   high = mean_m [ρ > 1 + clip_high and Â > 0]

    Args:
        log_ratio: log π - log π_old per decision, or [B, 1].
        advantages: One per decision.
        mask: True at real decisions.
        clip_low: As in `clipped_surrogate`.
        clip_high: As in `clipped_surrogate`.

    Returns:
        The two fractions of the real decisions, detached.

    Example:
        >>> log_ratio, advantages = torch.tensor([[2.0, 0.5, 0.5]]).log(), torch.tensor([[1.0, 1.0, -1.0]])
        >>> clip_fractions(log_ratio, advantages, torch.ones(1, 3).bool(), clip_low=0.2, clip_high=0.2)
        (tensor(0.3333), tensor(0.3333))

    Reference:
        Schulman et al. 2017 (arXiv:1707.06347), eq. 7: where its clipped branch is the active one.
    """
    ratio = bounded_ratio(log_ratio.detach())
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return masked_mean(low.to(ratio.dtype), mask), masked_mean(high.to(ratio.dtype), mask)


def _check_dimensions(per_decision: Tensor, advantages: Tensor, name: str = "advantages") -> None:
    # [T] advantages would broadcast over [B, T] without an error whenever B = T.
    if per_decision.ndim != advantages.ndim:
        raise ValueError(
            f"{name} {list(advantages.shape)} do not line up with log-probabilities {list(per_decision.shape)}; "
            f"give every decision its rollout's own with `masked.spread({name}, mask)`."
        )
