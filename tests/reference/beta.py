"""BNPO (arXiv:2506.02864) by its formulas, prompt by prompt, without log space and without caps."""

import math
from collections.abc import Sequence


def beta_function(x: float, y: float) -> float:
    return math.gamma(x) * math.gamma(y) / math.gamma(x + y)


def density(p: float, alpha: float, beta: float) -> float:
    return p ** (alpha - 1) * (1 - p) ** (beta - 1) / beta_function(alpha, beta)


def parameters(pass_rates: Sequence[float]) -> tuple[float, float, float, float]:
    """Moments of the batch's pass rates to (a, b), and thirds of them to (alpha, beta)."""
    n = len(pass_rates)
    m = sum(pass_rates) / n
    v = sum((p - m) ** 2 for p in pass_rates) / (n - 1)
    a = (m * (1 - m) / v - 1) * m
    b = (m * (1 - m) / v - 1) * (1 - m)
    return a, b, max(1 + a / 3, 1), max(1 + b / 3, 1)


def advantages(
    prompts: Sequence[Sequence[float]], alpha: float | None = None, beta: float | None = None
) -> list[float]:
    """(R - p) / f(p), flat; 0 where all rewards of a prompt are equal, since R - p is."""
    rates = [sum(rewards) / len(rewards) for rewards in prompts]
    if alpha is None or beta is None:
        _, _, alpha, beta = parameters(rates)
    found = []
    for rewards, p in zip(prompts, rates, strict=True):
        live = min(rewards) < max(rewards)
        found += [(r - p) / density(p, alpha, beta) if live else 0.0 for r in rewards]
    return found


def gradient_variance(a: float, b: float, alpha: float, beta: float) -> float:
    """E[p (1 - p) / f(p; alpha, beta)²] for p ~ Beta(a, b), in closed form; finite for alpha < (a+3)/2."""
    return beta_function(alpha, beta) ** 2 * beta_function(a + 3 - 2 * alpha, b + 3 - 2 * beta) / beta_function(a, b)
