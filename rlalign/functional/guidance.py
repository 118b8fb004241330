"""Combining a conditional and an unconditional prediction into a guided one."""

import torch
from jaxtyping import Float
from torch import Tensor


def classifier_free(
    cond: Float[Tensor, "batch *dims"], uncond: Float[Tensor, "batch *dims"], *, scale: float | int
) -> Float[Tensor, "batch *dims"]:
    """Extrapolate from the unconditional through the conditional prediction: classifier-free guidance.

        D = D_u + w (D_c - D_u)

    Args:
        cond: Prediction with the condition.
        uncond: Prediction without it. Any prediction space will do: the rule is linear.
        scale: w; 1 is the conditional prediction, 0 the unconditional one.

    Returns:
        The guided prediction.

    Example:
        >>> classifier_free(torch.tensor([[3.0]]), torch.tensor([[1.0]]), scale=5)
        tensor([[11.]])

    Reference:
        Ho & Salimans 2022 (arXiv:2207.12598), eq. 6; their w is this one less 1.
    """
    return uncond + scale * (cond - uncond)


def adaptive_projected(
    cond: Float[Tensor, "batch *dims"],
    uncond: Float[Tensor, "batch *dims"],
    *,
    scale: float | int,
    eta: float | int,
    norm_threshold: float | int,
    momentum: float | int,
    running: Float[Tensor, "batch *dims"] | None = None,
) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, "batch *dims"]]:
    """Guide a denoised prediction without saturating it: adaptive projected guidance.

        m = (D_c - D_u) + β m_previous,   d = m min(1, r / |m|)
        d∥ = <d, D_c> / |D_c|² D_c,   d⊥ = d - d∥
        D = D_c + (w - 1) (d⊥ + η d∥)

    Norms and products are per sample, over all its dimensions.

    Args:
        cond: Denoised prediction with the condition, D_c (`to_denoised`). In another space r, β and the axis of the
            projection mean something else at every step.
        uncond: The same without it, D_u.
        scale: w, as in `classifier_free`.
        eta: Share of the part parallel to D_c that is kept; 0 removes it, 1 keeps all.
        norm_threshold: r, the largest |m| that is let through; 0 switches the limit off.
        momentum: β of the running difference; negative pushes away from earlier steps, 0 switches it off.
        running: m of the step before in the same image; None at the first.

    Returns:
        The guided denoised prediction, and m to hand to the next step: before the limit, float32 or wider. With
        η = 1, r = 0 and β = 0 the prediction is that of `classifier_free`.

    Raises:
        ValueError: The threshold is negative, or the momentum lies outside (-1, 1).

    Example:
        >>> cond, uncond = torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 2.0, 0.0]])
        >>> guided, _ = adaptive_projected(cond, uncond, scale=5, eta=0.0, norm_threshold=0, momentum=0.0)
        >>> guided  # d = [2, 4, -2, 0], <d, D_c> / |D_c|² = 22 / 25
        tensor([[ 0.4400,  5.9200, -8.0000,  0.0000]])

    Reference:
        Sadat et al. 2025 (arXiv:2410.02416), algorithm 1. diffusers' `AdaptiveProjectedGuidance` takes raw
        predictions, and starts from the unconditional one by default.
    """
    if norm_threshold < 0:
        raise ValueError(f"`norm_threshold` must be >= 0, and 0 switches the limit off; got {norm_threshold}.")
    if not -1 < momentum < 1:
        raise ValueError(f"`momentum` must lie in (-1, 1), or the running difference grows forever; got {momentum}.")
    wide = torch.promote_types(cond.dtype, torch.float32)
    running = _accumulated(cond.to(wide) - uncond.to(wide), running, momentum)
    axis = _exact(cond).reshape(cond.shape[0], -1)
    d = _limited(_exact(running).reshape(axis.shape), norm_threshold)
    # |D_c| = 0 leaves no axis to project on: everything is orthogonal.
    share = (d * axis).sum(1, keepdim=True) / (axis**2).sum(1, keepdim=True).clamp(min=torch.finfo(axis.dtype).tiny)
    update = d + (eta - 1) * share * axis
    guided = axis + (scale - 1) * update
    return guided.reshape(cond.shape).to(wide), running


def _accumulated(difference: Tensor, running: Tensor | None, momentum: float | int) -> Tensor:
    return difference if running is None else difference + momentum * running


def _limited(d: Tensor, threshold: float | int) -> Tensor:
    """Rows no longer than the threshold; a row of length 0 stays, and has a gradient."""
    if threshold == 0:
        return d
    norm = torch.linalg.vector_norm(d, dim=1, keepdim=True)
    return d * (threshold / norm.clamp(min=threshold))


def _exact(x: Tensor) -> Tensor:
    # Projections subtract nearly equal vectors. Apple's GPUs have no float64.
    return x.float() if x.device.type == "mps" else x.double()
