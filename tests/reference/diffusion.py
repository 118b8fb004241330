"""Denoising steps and guidance by the papers' own forms, one number at a time, in Python floats."""

import math
from collections.abc import Sequence

Row = Sequence[float]


def flow_grpo_step(x: float, v: float, t: float, t_next: float, a: float, t_second: float) -> tuple[float, float]:
    """arXiv:2505.05470: dx = [v + σ_t²/(2t) (x + (1-t) v)] dt + σ_t dw, one Euler-Maruyama step backwards in time."""
    sigma_t = a * math.sqrt(t / (1 - (t_second if t == 1 else t)))
    dt = t_next - t
    drift = v + sigma_t**2 / (2 * t) * (x + (1 - t) * v)
    return x + drift * dt, sigma_t * math.sqrt(-dt)


def dance_grpo_step(x: float, v: float, t: float, t_next: float, eta: float) -> tuple[float, float]:
    """arXiv:2505.07818: dx = (v - η²/2 score) dt + η dw, with the score of N((1-t) x̂0, t²)."""
    denoised = x - t * v
    score = -(x - (1 - t) * denoised) / t**2
    dt = t_next - t
    return x + v * dt - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)


def cps_step(x: float, v: float, t: float, t_next: float, a: float) -> tuple[float, float]:
    """arXiv:2509.05952: keep (1-t') of the data, and noise of size t' of which sin(aπ/2) is fresh."""
    denoised, noise = x - t * v, x + (1 - t) * v
    fresh = t_next * math.sin(a * math.pi / 2)
    return (1 - t_next) * denoised + math.sqrt(t_next**2 - fresh**2) * noise, fresh


def ddim_step(x: float, epsilon: float, alpha: float, alpha_next: float, eta: float) -> tuple[float, float]:
    """arXiv:2010.02502 eq. 12 and 16."""
    std = eta * math.sqrt((1 - alpha_next) / (1 - alpha)) * math.sqrt(1 - alpha / alpha_next)
    denoised = (x - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
    return math.sqrt(alpha_next) * denoised + math.sqrt(max(1 - alpha_next - std**2, 0)) * epsilon, std


def apg(
    cond: Row, uncond: Row, scale: float, eta: float, limit: float, momentum: float, previous: Row
) -> tuple[list[float], list[float]]:
    """arXiv:2410.02416 algorithm 1, for one sample."""
    running = [c - u + momentum * m for c, u, m in zip(cond, uncond, previous, strict=True)]
    norm = math.sqrt(sum(m * m for m in running))
    shrink = min(1.0, limit / norm) if limit > 0 else 1.0
    diff = [shrink * m for m in running]
    along = sum(d * c for d, c in zip(diff, cond, strict=True)) / sum(c * c for c in cond)
    parallel = [along * c for c in cond]
    guided = [c + (scale - 1) * ((d - p) + eta * p) for c, d, p in zip(cond, diff, parallel, strict=True)]
    return guided, running
