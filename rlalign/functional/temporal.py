"""Advantages and returns along time: what a decision changed in the rewards that followed it."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.functional.masked import whiten


def gae(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    next_values: Float[Tensor, "batch time"],
    terminated: Bool[Tensor, "batch time"],
    truncated: Bool[Tensor, "batch time"],
    *,
    gamma: float | int,
    gae_lambda: float | int,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time"]:
    """Estimate advantages by an exponentially weighted sum of TD errors: generalised advantage estimation.

        Â_t = δ_t + γλ c_t Â_{t+1},   δ_t = r_t + γ (1 - terminated_t) V(s'_t) - V(s_t)
        c_t = 0 at a termination or truncation, else 1

    Args:
        rewards: Reward after each decision.
        values: V of the state each decision was made in.
        next_values: V of the true next state, also where an episode was truncated: not of the state after a reset. It
            may be anything, NaN included, where `terminated`.
        terminated: The episode ended here: no value beyond, and the trace stops.
        truncated: The episode was cut here: bootstrap, and the trace stops.
        gamma: Discount per decision, in [0, 1].
        gae_lambda: 0 is the TD error, 1 the Monte-Carlo return minus V.
        mask: True at real decisions. A masked row gives 0 and passes the trace through without discount, so its own
            reward is lost; a boundary on it still stops the trace.

    Returns:
        Advantages in the unit of the rewards; `advantages + values` are the lambda-returns.

    Example:
        >>> no = torch.zeros(1, 2, dtype=torch.bool)
        >>> rewards, zeros = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
        >>> gae(rewards, zeros, zeros, no, no, gamma=0.5, gae_lambda=1.0)  # 1 + 0.5 x 2, 2
        tensor([[2., 2.]])

    Reference:
        Schulman et al. 2016 (arXiv:1506.02438), eq. 16; truncation as in Pardo et al. 2018 (arXiv:1712.00378), §2.
    """
    boundary = terminated | truncated
    real = torch.ones_like(boundary) if mask is None else mask
    delta = rewards + gamma * next_values.masked_fill(terminated, 0) - values
    decay = torch.full_like(delta, gamma * gae_lambda).masked_fill(~real, 1).masked_fill(boundary, 0)
    return _accumulate(delta.masked_fill(~real, 0), decay).masked_fill(~real, 0)


def discounted_returns(
    rewards: Float[Tensor, "batch time"],
    terminated: Bool[Tensor, "batch time"],
    truncated: Bool[Tensor, "batch time"],
    *,
    gamma: float | int,
    bootstrap: Float[Tensor, "batch time"] | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time"]:
    """Sum the rewards that follow each decision, discounted: the return-to-go.

        R_t = r_t                       at a termination
        R_t = r_t + γ V(s'_t)           at a truncation, and at the last real decision of an unfinished row
        R_t = r_t + γ R_{t+1}           elsewhere

    Args:
        rewards: Reward after each decision.
        terminated: The episode ended here.
        truncated: The episode was cut here.
        gamma: Discount per decision, in [0, 1].
        bootstrap: V of the true next state; None stands for 0, which underrates whatever was cut.
        mask: True at real decisions. A masked row gives 0 and is passed over, its reward included; a boundary on it
            still separates episodes.

    Returns:
        Returns in the unit of the rewards.

    Example:
        >>> no = torch.zeros(1, 3, dtype=torch.bool)
        >>> discounted_returns(torch.tensor([[0.0, 0.0, 4.0]]), no, no, gamma=0.5)
        tensor([[1., 2., 4.]])

    Reference:
        Sutton & Barto 2018, Reinforcement Learning, eq. 3.8; truncation as in Pardo et al. 2018 (arXiv:1712.00378).
    """
    boundary = terminated | truncated
    real = torch.ones_like(boundary) if mask is None else mask
    step = rewards
    if bootstrap is not None:
        cut = (truncated & ~terminated) | _unfinished_end(real, boundary)
        step = step + gamma * bootstrap.masked_fill(~cut, 0)
    decay = torch.full_like(step, gamma).masked_fill(~real, 1).masked_fill(boundary, 0)
    return _accumulate(step.masked_fill(~real, 0), decay).masked_fill(~real, 0)


def reinforce_plus_plus(
    rewards: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    *,
    gamma: float | int = 1.0,
    unbiased: bool = True,
    eps: float = 1e-8,
    scored: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch time"]:
    """Whiten the return-to-go of every token over all tokens of the batch.

        R_it = Σ_{k>=t} γ^(k-t) r_ik,   Â_it = (R_it - mean(R)) / sqrt(var(R) + eps)     over all real tokens

    Args:
        rewards: Reward after each token; a KL penalty belongs in here.
        mask: True at real tokens.
        gamma: Discount per token.
        unbiased: Use the sample variance.
        eps: Added to the variance.
        scored: False where a rollout's outcome is unknown: out of the statistics, advantage 0.

    Returns:
        Advantages, 0 where masked, unscored, or when all returns are equal.

    Raises:
        ValueError: A counted reward is not finite.

    Example:
        >>> rewards = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
        >>> reinforce_plus_plus(rewards, torch.ones(2, 2).bool(), unbiased=False)
        tensor([[ 1.,  1.],
                [-1., -1.]])

    Reference:
        Hu et al. 2025 (arXiv:2501.03262), REINFORCE++, §3; same order of steps as verl/trainer/ppo/core_algos.py.
    """
    real = mask if scored is None else mask & scored[:, None]
    if not bool(rewards.masked_fill(~real, 0).isfinite().all()):
        raise ValueError("rewards of real tokens must be finite; mark rollouts without one with `scored` = False.")
    nowhere = torch.zeros_like(real)
    returns = discounted_returns(rewards, nowhere, nowhere, gamma=gamma, mask=real)
    return whiten(returns, real, unbiased=unbiased, eps=eps)


def _accumulate(step: Float[Tensor, "batch time"], decay: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """Run y_t = step_t + decay_t y_{t+1} backwards from y_T = 0."""
    total = torch.zeros_like(step[:, :1].sum(1))
    columns = []
    for step_t, decay_t in zip(reversed(step.unbind(1)), reversed(decay.unbind(1)), strict=True):
        total = step_t + decay_t * total
        columns.append(total)
    return torch.stack(columns[::-1], 1) if columns else step


def _unfinished_end(
    real: Bool[Tensor, "batch time"], boundary: Bool[Tensor, "batch time"]
) -> Bool[Tensor, "batch time"]:
    """Mark the last real decision of each row whose last episode has no boundary."""
    real_from_here = real.flip(1).cumsum(1).flip(1)
    boundaries_from_here = boundary.flip(1).cumsum(1).flip(1)
    return real & (real_from_here == 1) & (boundaries_from_here == 0)
