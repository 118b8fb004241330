"""O-DICE: offline learning from distribution corrections, with forward and backward gradients kept orthogonal."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Divergence = Literal["chi_square", "reverse_kl"]


def f_conjugate(residual: Float[Tensor, "*shape"], *, divergence: Divergence = "chi_square") -> Float[Tensor, "*shape"]:
    """Take the convex conjugate of the divergence that keeps the learned distribution near the data's.

        chi_square:   f(x) = (x - 1)²,   f*(y) = y w - (w - 1)²,  w = max(y/2 + 1, 0)    (y + y²/4 above -2, else -1)
        reverse_kl:   f(x) = x log x,    f*(y) = exp(y - 1)

    Args:
        residual: Bellman residual y, in the unit of the rewards.
        divergence: Which f.

    Returns:
        f*(y); its slope is the ratio x at which the divergence is traded for y, so it is never negative.

    Example:
        >>> f_conjugate(torch.tensor([-3.0, -1.0, 0.0, 2.0]))
        tensor([-1.0000, -0.7500,  0.0000,  3.0000])

    Reference:
        Mao et al. 2024 (arXiv:2402.00348), O-DICE; `f_star` of ODICE-Pytorch/odice.py gives the same numbers.
    """
    if divergence == "reverse_kl":
        return torch.exp(residual - 1)
    ratio = (residual / 2 + 1).clamp(min=0)
    return residual * ratio - (ratio - 1) ** 2


def dice_weight(
    residual: Float[Tensor, "*shape"],
    *,
    divergence: Divergence = "chi_square",
    rule: Literal["relu", "exact"] = "relu",
    max_weight: float | int = 100.0,
) -> Float[Tensor, "*shape"]:
    """Turn a forward residual into the weight with which the policy imitates the decision.

        exact:   w = min((f')⁻¹(e), cap),   (f')⁻¹(e) = max(e/2 + 1, 0) for chi_square, exp(e - 1) for reverse_kl
        relu:    w = min(max(e, 0), cap)    for chi_square; reverse_kl as above

    Args:
        residual: Forward residual e: how much better than V the decision turned out.
        divergence: The one V is trained with.
        rule: `relu` is what the authors run: decisions no better than V are dropped. `exact` follows the derivation and
            keeps residuals between -2 and 0.
        max_weight: The cap.

    Returns:
        Weights >= 0, detached.

    Example:
        >>> residual = torch.tensor([-3.0, -1.0, 0.0, 2.0])
        >>> dice_weight(residual), dice_weight(residual, rule="exact")
        (tensor([0., 0., 0., 2.]), tensor([0.0000, 0.5000, 1.0000, 2.0000]))

    Reference:
        Mao et al. 2024 (arXiv:2402.00348); `relu` and the cap of 100 as `f_prime_inverse` of ODICE-Pytorch/odice.py,
        which differs there from the inverse of f' that the paper derives.
    """
    residual = residual.detach()
    if divergence == "reverse_kl":
        weight = torch.exp(residual - 1)
    else:
        weight = residual if rule == "relu" else residual / 2 + 1
    return weight.clamp(min=0, max=max_weight)


def bellman_residual(
    rewards: Float[Tensor, " batch"],
    values: Float[Tensor, "*#critics batch"],
    next_values: Float[Tensor, "*#critics batch"],
    terminated: Bool[Tensor, " batch"],
    *,
    gamma: float | int,
) -> Float[Tensor, "*#critics batch"]:
    """Compare a value with the reward and the value that followed.

        e = r + γ (1 - terminated) V(s') - V(s)

    Args:
        rewards: Reward of each transition.
        values: V(s), of one critic or of several along a first dimension.
        next_values: V(s') likewise. It may be anything, NaN included, where `terminated`.
        terminated: True where nothing comes after; a truncation is not one.
        gamma: Discount per step.

    Returns:
        The residual, in the unit of the rewards. Gradients flow wherever the arguments carry them.

    Example:
        >>> no, one = torch.tensor([False]), torch.tensor([1.0])
        >>> bellman_residual(one, 2 * one, 4 * one, no, gamma=0.5)
        tensor([1.])

    Reference:
        Sutton & Barto 2018, Reinforcement Learning, eq. 6.5.
    """
    return rewards + gamma * next_values.masked_fill(terminated, 0) - values


def odice_residuals(
    rewards: Float[Tensor, " batch"],
    values: Float[Tensor, "*critics batch"],
    next_values: Float[Tensor, "*critics batch"],
    target_values: Float[Tensor, " batch"],
    target_next_values: Float[Tensor, " batch"],
    terminated: Bool[Tensor, " batch"],
    *,
    gamma: float | int,
) -> tuple[Float[Tensor, "*critics batch"], Float[Tensor, "*critics batch"]]:
    """Take the Bellman residual twice: once only V(s) learns from it, once only V(s').

        forward:    e_f = r + γ (1 - terminated) V̄(s') - V(s)
        backward:   e_b = r + γ (1 - terminated) V(s') - V̄(s)

    Args:
        rewards: Reward of each transition.
        values: V(s) of one critic, or of several along a first dimension; carries the gradient.
        next_values: V(s') likewise. It may be anything, NaN included, where `terminated`.
        target_values: V̄(s): the slow copy, its smallest critic; detached here.
        target_next_values: V̄(s') likewise.
        terminated: True where nothing comes after; a truncation is not one.
        gamma: Discount per step.

    Returns:
        Forward and backward residual, in the unit of the rewards.

    Example:
        >>> no, one = torch.tensor([False]), torch.tensor([1.0])
        >>> odice_residuals(one, 2 * one, 4 * one, 6 * one, 8 * one, no, gamma=0.5)  # 1 + 4 - 2, 1 + 2 - 6
        (tensor([3.]), tensor([-3.]))

    Reference:
        Mao et al. 2024 (arXiv:2402.00348), bidirectional targets; ODICE-Pytorch/odice.py, `orthogonal_true_g_update`.
    """
    forward = bellman_residual(rewards, values, target_next_values.detach(), terminated, gamma=gamma)
    backward = bellman_residual(rewards, target_values.detach(), next_values, terminated, gamma=gamma)
    return forward, backward


def odice_value_terms(
    values: Float[Tensor, "*shape"],
    forward_residual: Float[Tensor, "*shape"],
    backward_residual: Float[Tensor, "*shape"],
    *,
    conjugate_weight: float | int,
    backward_weight: float | int,
    divergence: Divergence = "chi_square",
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Split the dual objective of V into its three terms, which the update treats differently.

        linear = (1 - L) V(s),   forward = L f*(e_f),   backward = L η f*(e_b)

    Args:
        values: V(s).
        forward_residual: From `odice_residuals`.
        backward_residual: From `odice_residuals`.
        conjugate_weight: L (λ in the paper), in (0, 1): large values trust the best of the data more.
        backward_weight: η, >= 0; 0 leaves the semi-gradient.
        divergence: Which f.

    Returns:
        The three terms per transition, to be averaged each on its own.

    Example:
        >>> value, forward, backward = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
        >>> odice_value_terms(value, forward, backward, conjugate_weight=0.75, backward_weight=0.5)
        (tensor([0.2500]), tensor([2.2500]), tensor([3.]))

    Reference:
        Mao et al. 2024 (arXiv:2402.00348), the dual of V-DICE; weights as `Lambda` and `eta` of ODICE-Pytorch/odice.py.
    """
    linear = (1 - conjugate_weight) * values
    forward = conjugate_weight * f_conjugate(forward_residual, divergence=divergence)
    backward = conjugate_weight * backward_weight * f_conjugate(backward_residual, divergence=divergence)
    return linear, forward, backward


def orthogonal_combine(
    forward_grads: Sequence[Float[Tensor, "..."]], backward_grads: Sequence[Float[Tensor, "..."]], *, eps: float = 1e-10
) -> list[Float[Tensor, "..."]]:
    """Add to the forward gradient the part of the backward gradient that is orthogonal to it.

        g = g_f + (g_b - k g_f),   k = <g_f, g_b> / max(<g_f, g_f>, eps)

    Both products run over the whole parameter vector, of all critics together: not layer by layer.

    Args:
        forward_grads: One gradient per parameter: of the mean of the batch's forward terms.
        backward_grads: Likewise of the backward terms, its weight already in it.
        eps: Smallest squared length taken for real, so that a batch without forward gradient divides by no zero.

    Returns:
        One combined gradient per parameter. With <g_f, g_b> = 0 it is their sum; with g_b parallel to g_f, g_f alone.

    Raises:
        ValueError: The two lists do not hold the same parameters.

    Example:
        >>> orthogonal_combine([torch.tensor([1.0, 2.0, -1.0])], [torch.tensor([-3.0, 1.0, 2.0])])
        [tensor([-1.5000,  4.0000,  0.5000])]

    Reference:
        Mao et al. 2024 (arXiv:2402.00348), orthogonal-gradient update; ODICE-Pytorch/odice.py takes the same
        products of batch means from three `backward` calls. The paper's theorems are per pair of states.
    """
    shapes = [[list(grad.shape) for grad in grads] for grads in (forward_grads, backward_grads)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            "forward and backward gradients must be of the same parameters, in the same order; got shapes "
            f"{shapes[0]} and {shapes[1]}."
        )
    product = _dot(forward_grads, backward_grads) / _dot(forward_grads, forward_grads).clamp(min=eps)
    pairs = zip(forward_grads, backward_grads, strict=True)
    return [forward + (backward - product * forward) for forward, backward in pairs]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(left, right, strict=True)]).sum()
