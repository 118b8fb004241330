"""Advantages by the definitions of the papers, one rollout at a time, in Python floats (double precision)."""

import math
from collections.abc import Callable, Sequence

Row = Sequence[float]
Flags = Sequence[bool]


def gae(
    rewards: Row,
    values: Row,
    next_values: Row,
    terminated: Flags,
    truncated: Flags,
    gamma: float,
    lam: float,
    real: Flags,
) -> list[float]:
    """arXiv:1506.02438 eq. 16 as the sum it is: A_t = Σ_l (γλ)^l δ_{t+l}, up to the end of t's episode."""
    advantages = []
    for start in range(len(rewards)):
        total, factor = 0.0, 1.0
        for t in range(start, len(rewards)):
            if real[t]:
                future = 0.0 if terminated[t] else gamma * next_values[t]
                total += factor * (rewards[t] + future - values[t])
                factor *= gamma * lam
            if terminated[t] or truncated[t]:
                break
        advantages.append(total if real[start] else 0.0)
    return advantages


def returns(
    rewards: Row, terminated: Flags, truncated: Flags, gamma: float, bootstrap: Row, real: Flags
) -> list[float]:
    """Σ_k γ^k r_{t+k} to the end of t's episode, plus the value beyond where it was cut or is unfinished."""
    found = []
    for start in range(len(rewards)):
        total, factor, last, ended = 0.0, 1.0, start, False
        for t in range(start, len(rewards)):
            if real[t]:
                total += factor * rewards[t]
                factor *= gamma
                last = t
                if truncated[t] and not terminated[t]:
                    total += factor * bootstrap[t]
            if terminated[t] or truncated[t]:
                ended = True
                break
        if not ended:
            total += factor * bootstrap[last]
        found.append(total if real[start] else 0.0)
    return found


def per_group(
    rewards: Row, group: Sequence[int], estimate: Callable[[list[float], list[int]], list[float]]
) -> list[float]:
    """Apply `estimate(rewards of a group, their row numbers)` group by group."""
    found = [0.0] * len(rewards)
    for one in dict.fromkeys(group):
        rows = [i for i, g in enumerate(group) if g == one]
        for row, value in zip(rows, estimate([rewards[i] for i in rows], rows), strict=True):
            found[row] = value
    return found


def mean(x: Row) -> float:
    return math.fsum(x) / len(x)


def std(x: Row, *, unbiased: bool) -> float:
    centre = mean(x)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in x) / (len(x) - unbiased))


def group_relative(rewards: Row, group: Sequence[int], *, unbiased: bool, eps: float) -> list[float]:
    """arXiv:2402.03300 §4.1.2."""

    def estimate(r: list[float], _: list[int]) -> list[float]:
        return [0.0 if min(r) == max(r) else (x - mean(r)) / (std(r, unbiased=unbiased) + eps) for x in r]

    return per_group(rewards, group, estimate)


def leave_one_out(rewards: Row, group: Sequence[int]) -> list[float]:
    """arXiv:2402.14740: the mean of all others, found by leaving one out."""
    return per_group(rewards, group, lambda r, _: [x - mean(r[:i] + r[i + 1 :]) for i, x in enumerate(r)])


def max_likelihood(rewards: Row, group: Sequence[int]) -> list[float]:
    """arXiv:2602.02710."""
    return per_group(rewards, group, lambda r, _: [(x - mean(r)) / mean(r) if mean(r) > 0 else 0.0 for x in r])


def length_weighted(rewards: Row, group: Sequence[int], lengths: Row) -> list[float]:
    """arXiv:2505.23585: baseline Σ l r / Σ l; a group of equal rewards has none."""

    def estimate(r: list[float], rows: list[int]) -> list[float]:
        baseline = sum(lengths[i] * x for i, x in zip(rows, r, strict=True)) / sum(lengths[i] for i in rows)
        return [x - baseline for x in r]

    return per_group(rewards, group, estimate)


def batch_scaled(rewards: Row, group: Sequence[int]) -> list[float]:
    """arXiv:2510.13786 §4: centred per prompt, over the deviation of everything centred."""
    centred = per_group(rewards, group, lambda r, _: [x - mean(r) for x in r])
    return [c / std(centred, unbiased=True) for c in centred]


def token_whitened(rewards: Row, group: Sequence[int], lengths: Sequence[int]) -> list[float]:
    """arXiv:2501.03262, baseline variant: repeat each centred reward once per token, then whiten the tokens."""
    centred = per_group(rewards, group, lambda r, _: [x - mean(r) for x in r])
    tokens = [c for c, n in zip(centred, lengths, strict=True) for _ in range(n)]
    return [(c - mean(tokens)) / std(tokens, unbiased=True) for c in centred]
