"""Errors of value functions; the distributions that stand for values come from `bins`."""

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.functional.bins import (
    bin_centers,
    categorical_mean,
    categorical_projection,
    hl_gauss_targets,
    outside_share,
    two_hot_targets,
)

__all__ = [
    "bin_centers",
    "categorical_mean",
    "categorical_projection",
    "clipped_value",
    "cross_entropy",
    "expectile_error",
    "hl_gauss_targets",
    "outside_share",
    "squared_error",
    "two_hot_targets",
]


def squared_error(values: Float[Tensor, "*dims"], returns: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
    """Square the difference between a value and its target.

        L = (V - R)²        without the factor 1/2

    Args:
        values: Predictions.
        returns: Targets, in the same unit.

    Returns:
        One error per prediction, in the unit squared.

    Example:
        >>> squared_error(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 5.0]))
        tensor([4., 0.])

    Reference:
        Sutton & Barto 2018, Reinforcement Learning, eq. 9.1.
    """
    return (values - returns) ** 2


def clipped_value(
    values: Float[Tensor, "*dims"],
    values_old: Float[Tensor, "*dims"],
    returns: Float[Tensor, "*dims"],
    *,
    clip: float | int,
) -> Float[Tensor, "*dims"]:
    """Square the error of the prediction, or of the prediction held near the old one, whichever is larger.

        L = max((V - R)², (V_old + clamp(V - V_old, -clip, clip) - R)²)

    Args:
        values: Predictions.
        values_old: Predictions when the data were collected, without gradient.
        returns: Targets.
        clip: Largest move that still lowers the error, in the unit of the values.

    Returns:
        One error per prediction; its gradient is zero where V has moved past the clip towards the target.

    Raises:
        ValueError: `clip` is not positive.

    Example:
        >>> clipped_value(torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([4.0]), clip=0.5)  # (0.5 - 4)²
        tensor([12.2500])

    Reference:
        Engstrom et al. 2020 (arXiv:2005.12729), §3, item 1, with the larger of the two errors as in the code of PPO's
        authors (baselines/ppo2/model.py); the text there has the smaller one.
    """
    if not clip > 0:
        raise ValueError(f"`value_clip` must be positive, or null for no clipping, got {clip}.")
    near = values_old + (values - values_old).clamp(-clip, clip)
    return torch.maximum(squared_error(values, returns), squared_error(near, returns))


def cross_entropy(logits: Float[Tensor, "*dims bins"], targets: Float[Tensor, "*dims bins"]) -> Float[Tensor, "*dims"]:
    """Measure how many nats the predicted distribution needs for the target one.

        L = -Σ_i p_i log softmax(l)_i,   dL/dl = softmax(l) - p

    Args:
        logits: Outputs, one per bin.
        targets: Probabilities that sum to 1.

    Returns:
        Nats; at least the entropy of the target, and ln m for equal logits.

    Example:
        >>> cross_entropy(torch.zeros(4), torch.tensor([0.5, 0.5, 0.0, 0.0]))  # ln 4
        tensor(1.3863)

    Reference:
        Farebrother et al. 2024 (arXiv:2403.03950), eq. 4.
    """
    return -(targets * logits.log_softmax(-1)).sum(-1)


def expectile_error(
    values: Float[Tensor, "*dims"], targets: Float[Tensor, "*dims"], *, expectile: float
) -> Float[Tensor, "*dims"]:
    """Weigh squared errors by their side, so that the minimum is an expectile instead of the mean.

        L = |τ - 1(u < 0)| u²,   u = target - V

    Args:
        values: Predictions V.
        targets: Samples.
        expectile: τ in (0, 1): 1/2 gives half the squared error; towards 1 the minimum approaches the largest sample.

    Returns:
        One error per prediction.

    Raises:
        ValueError: `expectile` is not inside (0, 1).

    Example:
        >>> expectile_error(torch.tensor([0.0, 0.0]), torch.tensor([2.0, -2.0]), expectile=0.75)
        tensor([3., 1.])

    Reference:
        Kostrikov, Nair & Levine 2021 (arXiv:2110.06169), eq. 5, implicit Q-learning; Newey & Powell 1987.
    """
    if not 0 < expectile < 1:
        raise ValueError(f"`expectile` must lie between 0 and 1, got {expectile}; 0.7 is usual.")
    difference = targets - values
    return (expectile - (difference < 0).to(difference.dtype)).abs() * difference**2
