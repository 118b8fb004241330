"""How sure a handful of numbers lets us be: standard errors, bootstrap intervals, robust means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt
from statistics import NormalDist

import numpy as np

Statistic = Callable[[np.ndarray], np.ndarray | np.float64]
"""Reduces the last axis: [..., n] -> [...]."""

_MAX_DRAWN = 2_000_000  # indices held at once; bounds memory, not the result


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate and the interval around it. The ends are NaN when the data cannot support one."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    @property
    def defined(self) -> bool:
        """False when there were too few values to say anything about spread."""
        return not (isnan(self.low) or isnan(self.high))

    @property
    def sign(self) -> int:
        """+1 or -1 when the whole interval lies on one side of zero, else 0."""
        if not self.defined:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Estimate how far the mean of `values` is from the true mean: sample std / sqrt(n).

    Returns: NaN for fewer than two values.

    Example:
        >>> round(standard_error([0.0, 1.0, 0.0, 1.0]), 4)  # std = sqrt(1/3), n = 4
        0.2887
    """
    data = _finite(values)
    return nan if data.size < 2 else float(data.std(ddof=1) / sqrt(data.size))


def interquartile_mean(values: Sequence[float] | np.ndarray) -> np.ndarray | np.float64:
    """Average the middle half of the values along the last axis.

    A value that straddles a quartile counts for the part of it inside, so the result does not jump with n.

    Example:
        >>> float(interquartile_mean([0.0, 1.0, 3.0, 100.0]))
        2.0

    Reference:
        Agarwal et al. 2021 (arXiv:2108.13264), section 4. rliable trims whole values instead (scipy's trim_mean).
    """
    data = np.sort(_finite(values), axis=-1)
    count = data.shape[-1]
    if count == 0:
        raise ValueError("interquartile_mean needs at least one value, got none.")
    left = np.arange(count)
    inside = np.clip(np.minimum(left + 1, 0.75 * count) - np.maximum(left, 0.25 * count), 0, None)
    return data @ (inside / inside.sum())


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    *,
    statistic: Statistic | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a statistic (the mean unless told) of independent values.

    Args:
        values: One number per independent unit (problem, episode, seed).
        statistic: Reduces the last axis, for example `interquartile_mean`.
        seed: The same seed gives the same interval on every machine.

    Returns: The ends are NaN for fewer than two values.

    Raises:
        ValueError: A value is not finite, there is none, or `level` is not inside (0, 1).

    Reference:
        Efron 1979, "Bootstrap methods: another look at the jackknife"; percentile form.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, for example 0.95.")
    data = _finite(values)
    if data.size == 0:
        raise ValueError("a bootstrap interval needs at least one value, got none.")
    reduce = statistic or _mean
    estimate = float(reduce(data))
    if data.size < 2:
        return Interval(estimate=estimate, low=nan, high=nan, level=level)
    rng = np.random.default_rng(seed)
    rows = max(1, _MAX_DRAWN // data.size)
    parts = [
        reduce(data[rng.integers(0, data.size, size=(min(rows, resamples - start), data.size))])
        for start in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=estimate, low=float(low), high=float(high), level=level)


def paired_bootstrap(
    before: Sequence[float] | np.ndarray,
    after: Sequence[float] | np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Interval of mean(after - before) over the same problems, resampling problems.

    Pairing removes the part of the noise that is "some problems are harder", which an interval per side keeps.

    Raises:
        ValueError: The two do not have the same length: they are not the same problems.
    """
    first, second = _finite(before), _finite(after)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_bootstrap compares the same problems, got {first.size} before and {second.size} after. "
            "Match the rows by problem first."
        )
    return bootstrap_interval(second - first, level=level, resamples=resamples, seed=seed)


def difference_interval(
    before: float, before_stderr: float, after: float, after_stderr: float, *, level: float = 0.95
) -> Interval:
    """Interval of `after - before` from two means and their standard errors, taken as independent and normal.

    For when the rows themselves are gone; with the rows at hand `paired_bootstrap` is tighter.
    """
    half = NormalDist().inv_cdf((1 + level) / 2) * sqrt(before_stderr**2 + after_stderr**2)
    change = after - before
    return Interval(estimate=change, low=change - half, high=change + half, level=level)


def wilson_interval(successes: int, count: int, *, level: float = 0.95) -> Interval:
    """Interval of a proportion that stays honest at 0 % and 100 %, where a bootstrap has zero width.

    Example:
        >>> round(wilson_interval(0, 10).high, 4)
        0.2775

    Reference:
        Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(f"wilson_interval needs 0 <= successes <= count and count >= 1, got {successes} of {count}.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Interval(estimate=share, low=max(0.0, centre - half), high=min(1.0, centre + half), level=level)


def _mean(values: np.ndarray) -> np.ndarray | np.float64:
    return values.mean(axis=-1)


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if not np.isfinite(data).all():
        bad = int((~np.isfinite(data)).sum())
        raise ValueError(f"{bad} of {data.size} values are NaN or infinite; drop or explain them before averaging.")
    return data
