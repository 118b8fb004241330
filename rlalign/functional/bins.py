"""Values as distributions over bins: the targets that stand for a scalar or a return, and their means."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Number = float | int | Shaped[Tensor, ""]
"""An end of a support. A tensor is taken as it is; numbers are checked."""

Edges = Literal["range", "centers"]


def hl_gauss_targets(
    values: Float[Tensor, "*dims"],
    *,
    low: Number,
    high: Number,
    num_bins: int,
    sigma_ratio: float | int = 0.75,
    edges: Edges = "range",
) -> Float[Tensor, "*dims bins"]:
    """Spread each value over the bins as a Gaussian would: the histogram that HL-Gauss learns.

        p_i = [Φ((e_{i+1} - y) / σ) - Φ((e_i - y) / σ)] / [Φ((e_m - y) / σ) - Φ((e_0 - y) / σ)],   σ = ratio · width

    Computed from logarithms, so it is finite everywhere: towards ±∞ all mass goes to the outer bin, where the quotient
    as written is 0/0 from a few σ outside on. Values are not moved into the support: one that lies outside favours the
    outer bin more strongly than one on its edge.

    Args:
        values: Scalars y.
        low: Lower end of the support.
        high: Upper end.
        num_bins: m.
        sigma_ratio: σ in bins. Decoding is exact to 1e-5 of a bin for 0.75, but for values within 3 σ of an end.
        edges: `range`: `low` and `high` are the outer edges e_0 and e_m, as in the paper. `centers`: they are the
            centers of the outer bins, so the outer edges lie half a bin further out.

    Returns:
        Probabilities, in the dtype of the values.

    Raises:
        ValueError: The support is empty, there are fewer than two bins, or `sigma_ratio` is not positive.

    Example:
        >>> hl_gauss_targets(torch.tensor(0.0), low=-1, high=1, num_bins=5)
        tensor([0.0223, 0.2299, 0.4954, 0.2299, 0.0223])

    Reference:
        Farebrother et al. 2024 (arXiv:2403.03950), §3.1 and appendix A, where the listing returns NaN far outside;
        after Imani & White 2018 (arXiv:1806.04613).
    """
    width = _width(low, high, num_bins, edges)
    if not sigma_ratio > 0:
        raise ValueError(f"`sigma_ratio` must be positive, got {sigma_ratio}; the paper uses 0.75.")
    outer = low if edges == "range" else low - width / 2
    # There is no log-cdf of half precision, and bins need more than its 8 or 11 bits.
    precise = values.to(torch.promote_types(values.dtype, torch.float32))
    # In bins from the outer edge the edges are whole numbers. Beyond `far` the outer bin already has all the mass that
    # double precision can tell from 1, and squares of larger numbers would overflow.
    far = 40 * sigma_ratio * max(1, sigma_ratio)
    position = ((precise - outer) / width).clamp(-far, num_bins + far)
    edge = torch.arange(num_bins + 1, dtype=precise.dtype, device=values.device)
    z = (edge - position.unsqueeze(-1)) / sigma_ratio
    return _log_normal_mass(z).softmax(-1).to(values.dtype)


def two_hot_targets(
    values: Float[Tensor, "*dims"], *, low: Number, high: Number, num_bins: int
) -> Float[Tensor, "*dims bins"]:
    """Share each value between the two nearest of `num_bins` locations from `low` to `high`.

        p_i = max(0, 1 - |y - z_i| / Δ),   z_i = low + i Δ,   Δ = (high - low) / (m - 1)      y cut to [low, high]

    Args:
        values: Scalars y.
        low: The first location.
        high: The last one.
        num_bins: m.

    Returns:
        Probabilities, in the dtype of the values; their mean (`edges="centers"`) is y exactly, inside the support.

    Raises:
        ValueError: The support is empty, or there are fewer than two bins.

    Example:
        >>> two_hot_targets(torch.tensor([0.25, 9.0]), low=-1, high=1, num_bins=5)
        tensor([[0.0000, 0.0000, 0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000, 1.0000]])

    Reference:
        Schrittwieser et al. 2020 (arXiv:1911.08265), appendix F; Farebrother et al. 2024 (arXiv:2403.03950), §3.1.
    """
    position = ((values - low) / _width(low, high, num_bins, "centers")).clamp(0, num_bins - 1)
    location = torch.arange(num_bins, dtype=values.dtype, device=values.device)
    return (1 - (position.unsqueeze(-1) - location).abs()).clamp(min=0)


def categorical_mean(
    probs: Float[Tensor, "*dims bins"], *, low: Number, high: Number, edges: Edges = "range"
) -> Float[Tensor, "*dims"]:
    """Decode a distribution over bins to the value it stands for.

        V = Σ_i p_i c_i,   c_i = low + (i + 1/2) (high - low) / m          edges = "range"
                           c_i = low + i (high - low) / (m - 1)            edges = "centers"

    Args:
        probs: Probabilities over m bins.
        low: Lower end of the support the targets were made with.
        high: Upper end.
        edges: As for `hl_gauss_targets`; two-hot and C51 are `centers`.

    Returns:
        Values. With `range` they cannot reach `low` and `high`.

    Raises:
        ValueError: `low` lies above `high`, or there are fewer than two bins.

    Example:
        >>> categorical_mean(torch.tensor([0.5, 0.25, 0.25]), low=-1, high=1, edges="centers")
        tensor(-0.2500)

    Reference:
        Farebrother et al. 2024 (arXiv:2403.03950), eq. 3.
    """
    centers = bin_centers(probs, low=low, high=high, edges=edges)
    return (probs * centers).sum(-1)


def bin_centers(
    probs: Float[Tensor, "*dims bins"], *, low: Number, high: Number, edges: Edges = "range"
) -> Float[Tensor, " bins"]:
    """Locate the bins.

        c_i = low + (i + 1/2) (high - low) / m     or     c_i = low + i (high - low) / (m - 1)

    Args:
        probs: Anything over m bins, for m, dtype and device.
        low: Lower end of the support.
        high: Upper end; the same as `low` puts all centers there.
        edges: As for `hl_gauss_targets`.

    Returns:
        One center per bin.

    Raises:
        ValueError: `low` lies above `high`, or there are fewer than two bins.

    Example:
        >>> bin_centers(torch.zeros(4), low=0, high=8)
        tensor([1., 3., 5., 7.])

    Reference:
        Farebrother et al. 2024 (arXiv:2403.03950), appendix A.
    """
    count = probs.shape[-1]
    width = _width(low, high, count, edges, empty=True)
    index = torch.arange(count, dtype=probs.dtype, device=probs.device)
    return low + (index + (0.5 if edges == "range" else 0)) * width


def categorical_projection(
    next_probs: Float[Tensor, "*dims bins"],
    rewards: Float[Tensor, "*dims"],
    discounts: Float[Tensor, "*dims"],
    *,
    low: Number,
    high: Number,
) -> Float[Tensor, "*dims bins"]:
    """Shift and shrink the next state's distribution of returns, and project it back onto the locations: C51.

        p_i = Σ_j p'_j max(0, 1 - |clamp(r + γ z_j, low, high) - z_i| / Δ),   z_i = low + i Δ

    Args:
        next_probs: The distribution at the next state and its action.
        rewards: r.
        discounts: γ (1 - terminated).
        low: The first location.
        high: The last one.

    Returns:
        The target distribution; it keeps the mean r + γ V' unless a location was cut at an end.

    Raises:
        ValueError: The support is empty, or there are fewer than two locations.

    Example:
        >>> probs = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1])
        >>> categorical_projection(probs, torch.tensor(0.3), torch.tensor(0.9), low=-1, high=1)
        tensor([0.0200, 0.1400, 0.3000, 0.3400, 0.2000])

    Reference:
        Bellemare, Dabney & Munos 2017 (arXiv:1707.06887), eq. 7 and algorithm 1.
    """
    count = next_probs.shape[-1]
    spacing = _width(low, high, count, "centers")
    moved = rewards.unsqueeze(-1) + discounts.unsqueeze(-1) * bin_centers(
        next_probs, low=low, high=high, edges="centers"
    )
    position = ((moved - low) / spacing).clamp(0, count - 1)
    lower = position.floor().clamp(max=count - 2)
    share = position - lower
    index = lower.to(torch.int64)
    target = torch.zeros_like(next_probs).scatter_add(-1, index, next_probs * (1 - share))
    return target.scatter_add(-1, index + 1, next_probs * share)


def outside_share(
    values: Float[Tensor, "*dims"],
    *,
    low: Number,
    high: Number,
    mask: Bool[Tensor, "*dims"] | None = None,
) -> Float[Tensor, ""]:
    """Count the values that a support does not reach.

        share = mean(y < low or y > high)

    Args:
        values: Targets y; NaN counts as outside.
        low: Lower end of the support.
        high: Upper end.
        mask: True at values that count.

    Returns:
        A share in [0, 1]; 0 when there are no values.

    Example:
        >>> outside_share(torch.tensor([-2.0, 0.0, 1.0, 3.0]), low=-1, high=1)
        tensor(0.5000)

    Reference:
        A diagnostic of Farebrother et al. 2024 (arXiv:2403.03950): values outside collapse to the outer bin.
    """
    outside = ~((values >= low) & (values <= high))
    real = torch.ones_like(outside) if mask is None else mask
    return (outside & real).to(values.dtype).sum() / real.sum().clamp(min=1)


def _width(low: Number, high: Number, num_bins: int, edges: Edges, *, empty: bool = False) -> Number:
    """Distance between two neighbouring bins. `empty` lets both ends coincide."""
    if num_bins < 2:
        raise ValueError(f"a distribution over values needs `num_bins` >= 2, got {num_bins}.")
    given = not (isinstance(low, Tensor) or isinstance(high, Tensor))
    if given and not (low < high or (empty and low == high)):
        raise ValueError(f"`low` must be below `high`, got low={low}, high={high}.")
    return (high - low) / (num_bins if edges == "range" else num_bins - 1)


def _log_normal_mass(z: Float[Tensor, "*dims edges"]) -> Float[Tensor, "*dims bins"]:
    """Return log(Φ(z_{i+1}) - Φ(z_i)) between neighbouring edges, exact in both tails."""
    # On one side of 0 the mass is a difference of tails, near - far; across 0 it is 1 less both tails.
    tail = torch.special.log_ndtr(-z.abs())
    left, right = tail[..., :-1], tail[..., 1:]
    across = (z[..., :-1] < 0) & (z[..., 1:] > 0)
    gap = torch.where(across, -1.0, -(left - right).abs())
    beside = torch.maximum(left, right) + torch.log(-torch.expm1(gap))
    # Tails below e^-80 are nothing beside 1, and numbers that small are slow.
    outer = tail.clamp(min=-80).exp()
    return torch.where(across, torch.log1p(-(outer[..., :-1] + outer[..., 1:])), beside)
