"""One optimizer step's loss of Flow-GRPO and GRPO-Guard, decision by decision in float64, as the papers write it."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tests.reference.diffusion import cps_step, dance_grpo_step, ddim_step, flow_grpo_step


def advantages(rewards: Sequence[float], groups: Sequence[int]) -> list[float]:
    """arXiv:2505.05470 §3: rewards against their group's mean, in its standard deviations; bounded at 5."""
    found = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        scaled = (reward - statistics.fmean(members)) / (statistics.stdev(members) + 1e-4)
        found.append(max(-5.0, min(5.0, scaled)))
    return found


def gaussian(kind: str, x: Tensor, prediction: Tensor, levels: Sequence[float], step: int, a: float) -> Any:
    """Mean and deviation of a step; x and the prediction are tensors, so that gradients flow."""
    now, after = levels[step], levels[step + 1]
    x_any: Any = x
    v_any: Any = prediction
    match kind:
        case "flow_sde":
            return flow_grpo_step(x_any, v_any, now, after, a, levels[1])
        case "dance_sde":
            return dance_grpo_step(x_any, v_any, now, after, a)
        case "cps":
            return cps_step(x_any, v_any, now, after, a)
        case _:
            return ddim_step(x_any, v_any, now, after, a)


def weight(kind: str, levels: Sequence[float], step: int, a: float) -> float:
    """arXiv:2510.22319 eq. 12: 1/h, or beta/h for DanceGRPO; else one over the slope of the mean in the prediction."""
    now, after = levels[step], levels[step + 1]
    match kind:
        case "flow_sde":
            return 1 / (now - after)
        case "dance_sde":
            return (1 + a * a * (1 - now) / (2 * now)) / (now - after)
        case "cps":
            slope = math.cos(a * math.pi / 2) * after * (1 - now) - now * (1 - after)
        case _:
            std2 = a * a * (1 - after) / (1 - now) * (1 - now / after)
            slope = math.sqrt(max(1 - after - std2, 0)) - math.sqrt(after * (1 - now) / now)
    return 1 / abs(slope)


def log_density(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """Of a Gaussian, per dimension."""
    return (-((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2).mean()


def loss(
    predict: Callable[[int, int, Tensor], Tensor],
    predict_reference: Callable[[int, int, Tensor], Tensor],
    *,
    latents: Tensor,
    means: Tensor,
    levels: Sequence[float],
    trained: Sequence[int],
    kind: str,
    noise_level: float,
    advantage: Sequence[float],
    settings: Mapping[str, Any],
) -> Tensor:
    """Mean over all trained decisions of what each wants minimised.

    Args:
        latents: [B, T + 1, *], float64; `means` [B, T, *] are those at collection.
        settings: `ratio_norm`, `reweight`, `authors_bias`, `clip`, `kl_coef`.
    """
    rows = range(len(latents))
    deltas = {t: weight(kind, levels, t, noise_level) if settings["reweight"] else 1.0 for t in trained}
    average = statistics.fmean(deltas.values())
    total: Any = 0.0
    for t in trained:
        steps = [gaussian(kind, latents[i, t], predict(i, t, latents[i, t]), levels, t, noise_level) for i in rows]
        drifts = [((mean - means[i, t]) ** 2).mean() for i, (mean, _) in zip(rows, steps, strict=True)]
        for i, (mean, std) in zip(rows, steps, strict=True):
            new, old = (log_density(latents[i, t + 1], m, std) for m in (mean, means[i, t]))
            log_ratio = new - old
            if settings["ratio_norm"]:
                drift = sum(drifts) / len(drifts) if settings["authors_bias"] else drifts[i]
                log_ratio = std * (log_ratio + drift / (2 * std**2))
            ratio, clip = log_ratio.exp(), settings["clip"]
            gain = min(ratio * advantage[i], ratio.clamp(1 - clip, 1 + clip) * advantage[i])
            total = total - deltas[t] / average * gain
            if settings["kl_coef"]:
                other, _ = gaussian(kind, latents[i, t], predict_reference(i, t, latents[i, t]), levels, t, noise_level)
                total = total + settings["kl_coef"] * (((mean - other) ** 2) / (2 * std**2)).mean()
    return total / (len(latents) * len(trained))
