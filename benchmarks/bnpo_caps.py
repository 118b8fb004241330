"""Choose the two caps of BNPO's Beta normaliser: what they cost where the fit is good, and save where it is not.

    python benchmarks/bnpo_caps.py [--out benchmarks/results/bnpo_caps]      # ten seconds, one core

Prompts have true pass rates drawn from a law (a regime), and G rewards each, from which BNPO works. Most of a rollout's
score has nothing to do with its reward, so a batch's gradient has signal S = mean A (r - rate) and noise in proportion
to mean A². Measured for each pair of caps, over many batches:

    noise       E[mean A²] / E[S]², relative to centred rewards without weights (1 = as good, smaller is better)
    top_share   99th percentile of the largest share of sum A² that one prompt has
    effective   prompts that carry the update, as a share of those with signal: (Σ s)² / Σ s² / n, s = a prompt's sum A²
    weight_max  99th percentile of the largest weight of a prompt with signal
    rms         median over batches of the root mean square of A over prompts with signal; rms_low its 1st percentile
    binding     share of batches in which a cap changes anything

The rule: a pair may change at most 1 % of the batches in which the theory holds (`ordinary` regimes), and `max_weight`
must leave the fixed member (2, 1), half of MaxRL, as it is at the paper's group size of 16, whose largest weight is 8.
Of those pairs it takes the one whose worst noise in all other regimes is least.
"""

import argparse
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor

from rlalign.functional.beta import MAX_CONCENTRATION, MAX_WEIGHT, beta_normalized

BATCHES = 300
GROUP_SIZES = (8, 16)
PROMPTS = (8, 16, 32, 64)
PAPER_GROUP_SIZE = 16
MAX_WEIGHTS = (2.0, 3.0, 5.0, 10.0, 30.0, 1e6)
MAX_CONCENTRATIONS = (6.0, 9.0, 12.0, 15.0, 20.0, 30.0, 60.0, None)


@dataclass(frozen=True, kw_only=True)
class Regime:
    """A law of true pass rates, Beta(a, b), and of the rewards around them."""

    a: float
    b: float
    odd: float | None = None
    """Rate of one prompt that is no part of the law."""
    graded: float | None = None
    """None: rewards are 0 or 1. Else they are Beta variates of this concentration around the rate."""
    ordinary: bool = False
    """The fit is what its theory says it is: the caps should leave it alone."""


REGIMES = {
    "hard": Regime(a=0.3, b=3.0, ordinary=True),
    "bimodal": Regime(a=0.25, b=0.25, ordinary=True),
    "uniform": Regime(a=1.0, b=1.0, ordinary=True),
    "middle": Regime(a=2.0, b=2.0, ordinary=True),
    "easy": Regime(a=4.0, b=0.8, ordinary=True),
    "narrow": Regime(a=20.0, b=20.0),
    "narrow_easy": Regime(a=36.0, b=4.0),
    "narrow_odd": Regime(a=20.0, b=20.0, odd=0.06),
    "spike": Regime(a=300.0, b=300.0),
    "spike_odd": Regime(a=300.0, b=300.0, odd=0.06),
    "graded": Regime(a=20.0, b=20.0, graded=10.0),
    "graded_odd": Regime(a=60.0, b=60.0, odd=0.1, graded=30.0),
}


def simulate(regime: Regime, prompts: int, group_size: int, generator: torch.Generator) -> Tensor:
    """Return rewards, [batches, prompts, rollouts]."""
    rate = beta_variates(torch.tensor(regime.a), torch.tensor(regime.b), (BATCHES, prompts), generator)
    if regime.odd is not None:
        rate[:, 0] = regime.odd
    rate = rate[..., None].expand(-1, -1, group_size)
    if regime.graded is None:
        return (torch.rand(rate.shape, generator=generator, dtype=torch.float64) < rate).double()
    return beta_variates(regime.graded * rate, regime.graded * (1 - rate), tuple(rate.shape), generator)


def beta_variates(a: Tensor, b: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw X / (X + Y) from Gamma variates X and Y: `torch.distributions` takes no generator."""
    x, y = (torch._standard_gamma(v.double().expand(shape).contiguous(), generator=generator) for v in (a, b))
    return (x / (x + y)).clamp(1e-6, 1 - 1e-6)


def weigh(observed: Tensor, max_weight: float, max_concentration: float | None) -> Tensor:
    """Work out every batch's weights at once: written apart from the library, and checked against it below."""
    mean, variance = observed.mean(1, keepdim=True), observed.var(1, keepdim=True)
    same = variance < 1e-12
    concentration = torch.where(same, 0.0, mean * (1 - mean) / torch.where(same, 1.0, variance) - 1)
    if max_concentration is not None:
        concentration = concentration.clamp(max=max_concentration)
    alpha = (1 + concentration * mean / 3).clamp(min=1)
    beta = (1 + concentration * (1 - mean) / 3).clamp(min=1)
    log_weight = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    log_weight = log_weight - torch.xlogy(alpha - 1, observed) - torch.special.xlog1py(beta - 1, -observed)
    return log_weight.clamp(max=math.log(max_weight)).exp()


def measure(observed: Tensor, spread: Tensor, weight: Tensor, uncapped: Tensor) -> dict[str, float]:
    """Compare one set of weights with weights of 1 on the same batches.

    A = w (r - observed) sums to 0 over a group, so mean A (r - true rate) = w spread and mean A² = w² spread.
    """
    live = spread > 1e-9
    usable = live.any(1)
    weight = torch.where(live, weight, 0.0)
    share = (weight**2 * spread)[usable]
    rms = (share.sum(1) / live.sum(1)[usable]).sqrt()
    share = share / share.sum(1, keepdim=True)

    def noise(w: Tensor) -> float:
        return float((w**2 * spread).mean() / (w * spread).mean() ** 2)

    return {
        "noise": noise(weight) / noise(live.double()),
        "top_share": float(share.amax(1).quantile(0.99)),
        "effective": float((1 / (share**2).sum(1) / live.sum(1)[usable]).mean()),
        "weight_max": float(weight.amax(1).quantile(0.99)),
        "rms": float(rms.median()),
        "rms_low": float(rms.quantile(0.01)),
        "binding": float(((weight - uncapped).abs() > 1e-9).logical_and(live).any(1).double().mean()),
    }


def agree_with_library(rewards: Tensor, generator: torch.Generator) -> None:
    """Raise when this script's weights are not those of `beta_normalized`."""
    one = rewards[int(torch.randint(BATCHES, (), generator=generator))]
    group = torch.arange(one.shape[0]).repeat_interleave(one.shape[1])
    for max_weight, max_concentration in itertools.product((10.0, 1e6), (20.0, None)):
        found = beta_normalized(one.flatten(), group, max_weight=max_weight, max_concentration=max_concentration)
        weight = weigh(one.mean(1)[None], max_weight, max_concentration)[0]
        live = one.amax(1) > one.amin(1)
        expected = torch.where(live, weight, 0.0)[:, None] * (one - one.mean(1, keepdim=True))
        torch.testing.assert_close(found.view_as(one), expected)


def run() -> list[dict[str, Any]]:
    """Measure every pair of caps, and GRPO's fixed normaliser for comparison, in every regime and batch size."""
    rows: list[dict[str, Any]] = []
    for (name, regime), group_size, prompts in itertools.product(REGIMES.items(), GROUP_SIZES, PROMPTS):
        generator = torch.Generator().manual_seed(1000 * prompts + group_size)
        rewards = simulate(regime, prompts, group_size, generator)
        agree_with_library(rewards, generator)
        observed, spread = rewards.mean(2), rewards.var(2, unbiased=False)
        cell = {"regime": name, "group_size": group_size, "prompts": prompts}
        uncapped = weigh(observed, 1e6, None)
        for max_weight, max_concentration in itertools.product(MAX_WEIGHTS, MAX_CONCENTRATIONS):
            found = measure(observed, spread, weigh(observed, max_weight, max_concentration), uncapped)
            rows.append({**cell, "max_weight": max_weight, "max_concentration": max_concentration, **found})
        grpo = math.pi / 8 / spread.clamp(min=1e-12).sqrt()
        rows.append({**cell, "max_weight": "grpo", "max_concentration": None, **measure(observed, spread, grpo, grpo)})
    return rows


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Bring each pair of caps to one line."""
    pairs = dict.fromkeys((row["max_weight"], row["max_concentration"]) for row in rows)
    lines = []
    for max_weight, max_concentration in pairs:
        own = [r for r in rows if (r["max_weight"], r["max_concentration"]) == (max_weight, max_concentration)]
        ordinary = [row for row in own if REGIMES[row["regime"]].ordinary]
        others = [row for row in own if not REGIMES[row["regime"]].ordinary]
        lines.append(
            {
                "max_weight": max_weight,
                "max_concentration": max_concentration,
                "ordinary_binding": mean(row["binding"] for row in ordinary),
                "ordinary_noise": mean(row["noise"] for row in ordinary),
                "noise": mean(row["noise"] for row in others),
                "worst_noise": max(row["noise"] for row in others),
                "top_share": mean(row["top_share"] for row in others),
                "effective": mean(row["effective"] for row in others),
                "worst_weight": max(row["weight_max"] for row in others),
                "rms_low": min(row["rms_low"] for row in others),
            }
        )
    return lines


def choose(lines: list[dict[str, Any]]) -> tuple[float, float | None]:
    """Apply the rule of the first paragraph."""
    allowed = [line for line in lines if line["max_weight"] != "grpo" and line["max_weight"] >= PAPER_GROUP_SIZE / 2]
    allowed = [line for line in allowed if line["ordinary_binding"] <= 0.01]
    best = min(allowed, key=lambda line: line["worst_noise"])
    return best["max_weight"], best["max_concentration"]


def table(lines: list[dict[str, Any]]) -> str:
    """Draw the summary as Markdown."""
    names = list(lines[0])
    rows = [names, ["---"] * len(names)]
    for line in lines:
        rows.append([f"{v:.3g}" if isinstance(v, float) else "none" if v is None else v for v in line.values()])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bnpo_caps"))
    out = parser.parse_args().out.with_suffix(".json")
    torch.set_num_threads(1)
    start = time.perf_counter()
    rows = run()
    lines = summarise(rows)
    max_weight, max_concentration = choose(lines)
    shown = [(max_weight, max_concentration), (1e6, None), ("grpo", None)]
    report = {
        "chosen": {"max_weight": max_weight, "max_concentration": max_concentration},
        "defaults": {"max_weight": MAX_WEIGHT, "max_concentration": MAX_CONCENTRATION},
        "batches": BATCHES,
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        "regimes": {name: asdict(regime) for name, regime in REGIMES.items()},
        "summary": lines,
        "rows": [row for row in rows if (row["max_weight"], row["max_concentration"]) in shown],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(lines))
    print(f"\nchosen: {max_weight=}, {max_concentration=}; {len(rows)} settings in {report['seconds']} s -> {out}")


if __name__ == "__main__":
    main()
