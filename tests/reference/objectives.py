"""Objectives, divergences and reductions by their definitions, one decision at a time, in Python floats."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def clipped(ratio: float, advantage: float, low: float, high: float, dual: float | None = None) -> float:
    """arXiv:1707.06347 eq. 7 and arXiv:1912.09729 eq. 5, to minimise: minus the objective they maximise."""
    kept = min(max(ratio, 1 - low), 1 + high)
    objective = min(ratio * advantage, kept * advantage)
    if dual is not None and advantage < 0:
        objective = max(objective, dual * advantage)
    return -objective


def cispo(log_prob: float, ratio: float, advantage: float, cap: float) -> float:
    """arXiv:2506.13585 eq. 4."""
    return -min(ratio, cap) * advantage * log_prob


def sapo(ratio: float, advantage: float, tau_positive: float, tau_negative: float) -> float:
    """arXiv:2511.20347."""
    tau = tau_positive if advantage > 0 else tau_negative
    return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage


def guarded(x: Sequence[float], new: Sequence[float], old: Sequence[float], std: float) -> float:
    """arXiv:2510.22319 eq. 8 by its meaning: mean over dimensions of (μ - μ_old) ε, with x = μ_old + s ε."""
    return sum((n - o) * (v - o) / std for v, n, o in zip(x, new, old, strict=True)) / len(x)


def gaussian_log_prob(x: Sequence[float], centre: Sequence[float], std: float) -> float:
    """Nats per dimension."""
    terms = [
        -((v - c) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        for v, c in zip(x, centre, strict=True)
    ]
    return sum(terms) / len(terms)  # fmt: skip


def aggregate(objective: Rows, mask: Rows, weights: Rows, mode: str, group: Sequence[int], constant: float) -> float:
    """The five reductions, by loops over what each averages."""
    rows, columns = range(len(objective)), range(len(objective[0]))

    def total(i: int) -> float:
        return sum(objective[i][t] * weights[i][t] for t in columns if mask[i][t])

    def count(i: int) -> int:
        return sum(1 for t in columns if mask[i][t])

    match mode:
        case "token":
            return sum(total(i) for i in rows) / max(1, sum(count(i) for i in rows))
        case "sequence_mean":
            return sum(total(i) / max(1, count(i)) for i in rows) / len(objective)
        case "sequence_sum":
            return sum(total(i) for i in rows) / len(objective)
        case "group":
            means = []
            for one in set(group):
                members = [i for i in rows if group[i] == one]
                means.append(sum(total(i) for i in members) / max(1, sum(count(i) for i in members)))
            return sum(means) / len(means)
        case _:
            return sum(total(i) for i in rows) / constant
