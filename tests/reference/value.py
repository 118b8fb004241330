"""Distributions over bins by the definitions of the papers, one bin at a time, in Python floats (double precision)."""

import math
from collections.abc import Sequence


def hl_gauss(y: float, low: float, high: float, num_bins: int, ratio: float, centers: bool) -> list[float]:
    """arXiv:2403.03950, §3.1: mass of N(y, σ²) in each bin over the mass in all; by tail areas, which do not cancel."""
    width = (high - low) / (num_bins - 1 if centers else num_bins)
    start = low - width / 2 if centers else low
    edges = [start + i * width for i in range(num_bins + 1)]
    sigma = ratio * width
    masses = [_mass((edges[i] - y) / sigma, (edges[i + 1] - y) / sigma) for i in range(num_bins)]
    return [mass / sum(masses) for mass in masses]


def two_hot(y: float, low: float, high: float, num_bins: int) -> list[float]:
    """Linear interpolation between the two locations around y, cut to the support."""
    y = min(max(y, low), high)
    spacing = (high - low) / (num_bins - 1)
    probs = [0.0] * num_bins
    for i in range(num_bins - 1):
        left = low + i * spacing
        if left <= y <= left + spacing or i == num_bins - 2:
            probs[i + 1] = min(1.0, (y - left) / spacing)
            probs[i] = 1 - probs[i + 1]
            break
    return probs


def c51(next_probs: Sequence[float], reward: float, discount: float, low: float, high: float) -> list[float]:
    """arXiv:1707.06887 eq. 7: the sum over the next distribution's locations of two-hot masses."""
    count = len(next_probs)
    target = [0.0] * count
    for j, mass in enumerate(next_probs):
        location = low + j * (high - low) / (count - 1)
        for i, share in enumerate(two_hot(reward + discount * location, low, high, count)):
            target[i] += mass * share
    return target


def _mass(a: float, b: float) -> float:
    """Standard normal mass between a and b."""
    if a > 0:
        return (math.erfc(a / math.sqrt(2)) - math.erfc(b / math.sqrt(2))) / 2
    if b < 0:
        return _mass(-b, -a)
    return (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2
