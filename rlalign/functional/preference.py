"""Preference objectives on denoising errors: from pairs (DPO) and from single labelled samples (DRO)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

Label = Float[Tensor, " batch"] | Int[Tensor, " batch"]
"""+1 for samples to make likelier (stable), -1 for samples to avoid."""


def flow_dpo(
    err_win: Float[Tensor, " batch"],
    err_lose: Float[Tensor, " batch"],
    err_win_ref: Float[Tensor, " batch"],
    err_lose_ref: Float[Tensor, " batch"],
    *,
    beta: float | int,
) -> Float[Tensor, " batch"]:
    """Lower the winner's denoising error relative to the loser's, against a reference: direct preference optimisation.

        L = -log sigmoid(-β/2 [(ℓ_w - ℓ_l) - (ℓ_w_ref - ℓ_l_ref)])

    Args:
        err_win: Denoising error of each pair's winner (`flow_matching_error`), a mean over dimensions.
        err_lose: That of its loser, at the same noise level and with the same noise: the pair then differs in nothing
            else, and the variance is far lower.
        err_win_ref: The winner's error under the frozen reference, same noise.
        err_lose_ref: The loser's.
        beta: Strength of the pull to the reference. It belongs to errors that are means over D dimensions; with sums
            divide it by D.

    Returns:
        One objective per pair, log 2 = 0.693 where the policy is the reference.

    Raises:
        ValueError: `beta` is not positive.

    Example:
        >>> e = lambda value: torch.tensor([value])
        >>> flow_dpo(e(0.10), e(0.12), e(0.11), e(0.11), beta=500)  # -log sigmoid(5)
        tensor([0.0067])

    Reference:
        Wallace et al. 2024 (arXiv:2311.12908), eq. 14, with T ω in β; Li et al. 2025 (arXiv:2503.22677), DSO, β = 500.
    """
    if beta <= 0:
        raise ValueError(
            f"`beta` must be > 0, got {beta}; papers use 100 to 5000 with errors averaged over dimensions."
        )
    return -logsigmoid(-0.5 * beta * _margin(err_win, err_lose, err_win_ref, err_lose_ref))


def flow_dro(err: Float[Tensor, " batch"], label: Label) -> Float[Tensor, " batch"]:
    """Lower the denoising error of good samples and raise that of bad ones: direct reward optimisation.

        L = y ℓ

    Nothing bounds it from below: the error of bad samples grows for as long as training goes on, and takes fidelity
    with it. Stop on an independent metric, or use `anchored_dro` or `floored_dro`.

    Args:
        err: Denoising error of each sample (`flow_matching_error`).
        label: +1 or -1. Balance them within a batch: what the labels do not cancel moves the model as a whole.

    Returns:
        One objective per sample. For a batch of pairs, the published loss mean(ℓ_w - ℓ_l) is twice its mean.

    Raises:
        ValueError: A label is neither 1 nor -1.

    Example:
        >>> flow_dro(torch.tensor([0.10, 0.12]), torch.tensor([1, -1]))
        tensor([ 0.1000, -0.1200])

    Reference:
        Li et al. 2025 (arXiv:2503.22677), DSO: y = -(1 - 2 o) of outcomes o, w(t) and T left out as in
        RuiningLi/dso finetune.py.
    """
    _check_labels(label)
    return label * err


def anchored_dro(
    err: Float[Tensor, " batch"], err_ref: Float[Tensor, " batch"], label: Label, *, beta: float | int
) -> Float[Tensor, " batch"]:
    """Bound `flow_dro` by the reference: its gradient fades as the error leaves the reference's.

        L = (4 / β) [sigmoid(β y (ℓ - ℓ_ref)) - 1/2],   between -2 / β and 2 / β

    The gradient is that of `flow_dro` where the policy is the reference, and half of it at |ℓ - ℓ_ref| = 1.76 / β, for
    good samples and bad ones alike.

    Args:
        err: Denoising error of each sample.
        err_ref: The same under the frozen reference, same noise.
        label: +1 or -1.
        beta: How soon the gradient fades, in 1 / error. As `beta` goes to 0 this is `flow_dro` less a constant.

    Returns:
        One objective per sample, 0 where the policy is the reference.

    Raises:
        ValueError: `beta` is not positive, or a label is neither 1 nor -1.

    Example:
        >>> anchored_dro(torch.tensor([0.5]), torch.tensor([0.1]), torch.tensor([-1]), beta=5)  # .8 (sigmoid(-2) - .5)
        tensor([-0.3046])

    Reference:
        The value function of Ethayarajh et al. 2024 (arXiv:2402.01306), KTO, with the sample's own reference error as
        its reference point, and scaled to the slope of DRO; not part of the DSO paper. Diffusion-KTO, Li et al. 2024
        (arXiv:2404.04465), has the same bound.
    """
    if beta <= 0:
        raise ValueError(f"`beta` must be > 0, got {beta}; near 1 / (a typical error) the bound acts early.")
    _check_labels(label)
    return 4 / beta * (torch.sigmoid(beta * label * (err - err_ref.detach())) - 0.5)


def floored_dro(
    err: Float[Tensor, " batch"], err_ref: Float[Tensor, " batch"], label: Label, *, floor: float | int
) -> Float[Tensor, " batch"]:
    """Stop `flow_dro` from pushing bad samples further once they are bad enough.

        L = ℓ  where y = +1,   L = -min(ℓ, floor ℓ_ref)  where y = -1

    Args:
        err: Denoising error of each sample.
        err_ref: The same under the frozen reference, same noise.
        label: +1 or -1.
        floor: Times the reference's error at which a bad sample's gradient ends; above 1.

    Returns:
        One objective per sample, bounded from below by -floor ℓ_ref.

    Raises:
        ValueError: The floor is not above 1, or a label is neither 1 nor -1.

    Example:
        >>> err, ref = torch.tensor([0.3, 0.3]), torch.tensor([0.1, 0.1])
        >>> floored_dro(err, ref, torch.tensor([1, -1]), floor=2)
        tensor([ 0.3000, -0.2000])

    Reference:
        A bound on the DRO of Li et al. 2025 (arXiv:2503.22677); not part of the paper.
    """
    if floor <= 1:
        raise ValueError(f"`floor` must be above 1, got {floor}: at 1 no bad sample would be pushed at all.")
    _check_labels(label)
    return torch.where(label > 0, err, -torch.minimum(err, floor * err_ref.detach()))


def pair_accuracy(
    err_win: Float[Tensor, " batch"],
    err_lose: Float[Tensor, " batch"],
    err_win_ref: Float[Tensor, " batch"],
    err_lose_ref: Float[Tensor, " batch"],
) -> Float[Tensor, ""]:
    """Measure how often the policy prefers the winner more than the reference does: DPO's implicit accuracy.

        accuracy = mean 1[(ℓ_w - ℓ_l) < (ℓ_w_ref - ℓ_l_ref)],   ties count one half

    Args:
        err_win: As in `flow_dpo`.
        err_lose: As in `flow_dpo`.
        err_win_ref: As in `flow_dpo`.
        err_lose_ref: As in `flow_dpo`.

    Returns:
        A share in [0, 1], detached; 0.5 where the policy is the reference. Watch `err_win` beside it: a rising accuracy
        with a rising winner's error means that both samples are being unlearned.

    Example:
        >>> e = lambda *values: torch.tensor(values)
        >>> pair_accuracy(e(0.1, 0.3), e(0.2, 0.2), e(0.2, 0.2), e(0.2, 0.2))
        tensor(0.5000)

    Reference:
        Rafailov et al. 2023 (arXiv:2305.18290), §5; Wallace et al. 2024 (arXiv:2311.12908).
    """
    return 0.5 - 0.5 * _margin(err_win, err_lose, err_win_ref, err_lose_ref).detach().sign().mean()


def _margin(win: Tensor, lose: Tensor, win_ref: Tensor, lose_ref: Tensor) -> Tensor:
    """How much worse the winner fares than under the reference, compared with the loser; negative is right."""
    return (win - lose) - (win_ref - lose_ref)


def _check_labels(label: Tensor) -> None:
    if not bool((label.abs() == 1).all()):
        raise ValueError(f"labels must be 1 or -1, got {label.unique().tolist()}; outcomes o of 0 and 1 are 2 o - 1.")
