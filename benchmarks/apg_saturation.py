"""Guidance scale against saturation and fidelity: classifier-free guidance and APG on a generator of 8 x 8 digits.

    python benchmarks/apg_saturation.py           # 3 seeds, minutes on one core

Writes `results/apg_saturation.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells
from diffusers.guiders import AdaptiveProjectedGuidance
from grpo_guard import GENERATOR

from rlalign.diffusion import adaptive_projected_guidance
from rlalign.diffusion.pretrain import cached_generator
from rlalign.functional.guidance import adaptive_projected
from rlalign_envs.digits import CLASSES, measure, training_set

ARMS: dict[str, float | None] = {"cfg": None, "apg": 0.0, "apg_momentum": -0.5}
"""Momentum of APG; None is the pipeline's own guidance."""
SCALES = (1.0, 2.0, 4.0, 8.0, 12.0, 16.0)
SAMPLES, STEPS = 500, 20
MEASURED = ("saturation", "frechet_distance", "gold_accuracy")
COLOURS = {"cfg": "#9aa5ad", "apg": "#1b6ca8", "apg_momentum": "#d08a2e"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/apg_saturation"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = cached_generator(GENERATOR)
    pipeline.set_progress_bar_config(disable=True)
    threshold = typical_norm(pipeline)
    cells = Cells(args.out.with_suffix(".json"), {"samples": SAMPLES, "steps": STEPS, "norm_threshold": threshold})
    keys = [{"seed": s, "arm": arm, "scale": w} for s in range(args.seeds) for arm in ARMS for w in SCALES]
    for key in cells.missing(keys):
        cells.keep(key, run(pipeline, threshold, **key))
    agreement = agreement_with_diffusers()
    cells.write({"norm_threshold": threshold, "difference_to_diffusers": agreement, "summary": summarise(cells)})
    draw(cells, args.out.with_suffix(".png"))
    print(f"norm_threshold {threshold:.2f}; largest difference to diffusers' guider {agreement:.1e}")
    print(table(cells))


def typical_norm(pipeline: Any) -> float:
    """Median over steps of |D_c - D_u| in denoised space, on noise of its own: what the limit is chosen by."""
    labels = [k % len(CLASSES) for k in range(100)]
    with adaptive_projected_guidance(pipeline, eta=1.0, norm_threshold=0.0, momentum=0.0) as log:
        pipeline(labels, num_inference_steps=STEPS, guidance_scale=4.0, generator=generators(10**6, 100))
        return float(np.median([step.difference_norm for step in log.steps]))


def run(pipeline: Any, threshold: float, *, seed: int, arm: str, scale: float) -> dict[str, float]:
    labels = [k % len(CLASSES) for k in range(SAMPLES)]
    with guided(pipeline, ARMS[arm] if scale > 1 else None, threshold):
        samples = pipeline(
            labels, num_inference_steps=STEPS, guidance_scale=scale, generator=generators(seed * SAMPLES, SAMPLES)
        ).samples
    found = measure(samples, labels)
    low, high = training_set()[0].min(), training_set()[0].max()
    beyond = np.maximum(samples - high, low - samples)
    return {
        "saturation": float((beyond > 0.05).mean()),
        "overshoot": float(np.maximum(beyond, 0).mean()),
        "frechet_distance": float(found["frechet_distance"]),
        "gold_accuracy": float(found["gold_accuracy"]),
        "diversity": float(found["diversity"]),
    }


@contextmanager
def guided(pipeline: Any, momentum: float | None, threshold: float) -> Iterator[None]:
    if momentum is None:
        yield
        return
    with adaptive_projected_guidance(pipeline, eta=0.0, norm_threshold=threshold, momentum=momentum):
        yield


def generators(first: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + k) for k in range(count)]


def agreement_with_diffusers() -> float:
    """Largest difference on random predictions where both mean the same: original form, w - 1, no momentum."""
    worst = 0.0
    for seed, (scale, eta, limit) in enumerate([(5.0, 0.0, 2.5), (7.5, 0.5, 15.0), (3.0, 1.0, 1.0)]):
        source = torch.Generator().manual_seed(seed)
        cond, uncond = (torch.randn(4, 3, 8, 8, generator=source, dtype=torch.float64) for _ in range(2))
        theirs = AdaptiveProjectedGuidance(
            guidance_scale=scale - 1,
            adaptive_projected_guidance_rescale=limit,
            eta=eta,
            use_original_formulation=True,
        )
        theirs.set_state(step=0, num_inference_steps=10, timestep=torch.tensor(900))
        ours, _ = adaptive_projected(cond, uncond, scale=scale, eta=eta, norm_threshold=limit, momentum=0.0)
        worst = max(worst, float((theirs.forward(cond, uncond).pred - ours).abs().max()))
    return worst


def summarise(cells: Cells) -> dict[str, Any]:
    """Arm -> scale -> measure -> mean and range over seeds."""
    return {
        arm: {
            str(scale): {
                name: [
                    float(f([run[name] for run in cells.where(arm=arm, scale=scale)]))
                    for f in (np.mean, np.min, np.max)
                ]
                for name in MEASURED
            }
            for scale in SCALES
        }
        for arm in ARMS
    }


def table(cells: Cells) -> str:
    lines = [f"{'arm':<13}{'scale':>6}" + "".join(f"{name:>28}" for name in MEASURED)]
    for arm, scales in summarise(cells).items():
        for scale, row in scales.items():
            told = "".join(f"{f'{m:.3f} [{a:.3f}, {b:.3f}]':>28}" for m, a, b in row.values())
            lines.append(f"{arm:<13}{scale:>6}{told}")
    return "\n".join(lines)


def draw(cells: Cells, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, name in zip(axes, MEASURED, strict=True):
        for arm, scales in summarise(cells).items():
            mean, low, high = np.transpose([scales[str(w)][name] for w in SCALES])
            axis.plot(SCALES, mean, "o-", ms=4, color=COLOURS[arm], label=arm.replace("_", ", "))
            axis.fill_between(SCALES, low, high, color=COLOURS[arm], alpha=0.2, lw=0)
        axis.set(xlabel="guidance scale", title=name.replace("_", " "))
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
