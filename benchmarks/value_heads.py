"""Regression onto targets that move away, by squared error and by classification of the value.

    python benchmarks/value_heads.py                    # 5 seeds x 3 heads, about 5 minutes on one core

Writes `results/value_heads.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import json
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import rlalign
from rlalign.nn.config import MSE, HLGauss, TwoHot
from rlalign.nn.value_heads import ValueHead
from rlalign.training.intervals import bootstrap_interval, interquartile_mean

OFFSETS = (0, 8, 16, 24, 32)
SAMPLES, HIDDEN, BATCH, LEARNING_RATE = 1024, 256, 256, 1e-3
HEADS = {
    "mse": MSE(),
    "two_hot": TwoHot(low=-40.0, high=40.0, num_bins=101),
    "hl_gauss": HLGauss(low=-40.0, high=40.0, num_bins=101),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps per offset")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/value_heads"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(name, seed, args.steps) for seed in range(args.seeds) for name in HEADS]
    summary = {name: summarise([r for r in runs if r["head"] == name]) for name in HEADS}
    result = {
        "offsets": OFFSETS,
        "steps_per_offset": args.steps,
        "seeds": args.seeds,
        "summary": summary,
        "runs": runs,
        "versions": {name: version(name) for name in ("torch", "scikit-learn")} | {"rlalign": rlalign.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(summary, args.out.with_suffix(".png"))
    print(table(summary))


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train one network through all offsets; return its error over all samples at the end of each."""
    inputs, wave = task(seed)
    torch.manual_seed(seed)
    head = ValueHead(HEADS[name])
    net = nn.Sequential(
        *(nn.Linear(inputs.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
        nn.Linear(HIDDEN, head.out_features),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=True)
    order = torch.Generator().manual_seed(seed)
    started = time.process_time()
    errors = []
    for offset in OFFSETS:
        targets = wave + offset
        for _ in range(steps):
            rows = torch.randint(SAMPLES, (BATCH,), generator=order)
            optimizer.zero_grad()
            head.objective(net(inputs[rows]), targets[rows]).mean().backward()
            optimizer.step()
        with torch.no_grad():
            errors.append(float((head.values(net(inputs)) - targets).square().mean()))
    seconds = time.process_time() - started
    print(
        f"seed {seed} {name:9s} " + " ".join(f"{error:.5f}" for error in errors) + f"  {seconds:.0f} cpu-s", flush=True
    )
    return {"head": name, "seed": seed, "errors": errors, "cpu_s": seconds}


def task(seed: int) -> tuple[Tensor, Tensor]:
    """Return images of digits and sin(1e5 f(image)), f a random network: targets to be learned by heart."""
    generator = torch.Generator().manual_seed(1000 + seed)
    images = torch.from_numpy(load_digits(return_X_y=True)[0])
    images = images[torch.randperm(len(images), generator=generator)[:SAMPLES]]
    images = (images - images.mean(0)) / images.std(0).clamp(min=1)  # some pixels never change
    first = torch.randn(64, 64, generator=generator, dtype=torch.float64) / 8
    second = torch.randn(64, generator=generator, dtype=torch.float64) / 8
    return images.float(), torch.sin(1e5 * (images @ first).relu() @ second).float()


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, float | None]]:
    """Interquartile mean over seeds and its interval, at each offset and (last) over the four after the first."""
    columns = [[r["errors"][level] for r in runs] for level in range(len(OFFSETS))]
    columns.append([sum(r["errors"][1:]) / (len(OFFSETS) - 1) for r in runs])
    found = [bootstrap_interval(column, statistic=interquartile_mean) for column in columns]
    return [{"iqm": i.estimate, "low": finite(i.low), "high": finite(i.high)} for i in found]


def finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(summary: dict[str, list[dict[str, float | None]]]) -> str:
    """Draw the summary as Markdown."""
    names = ["head", *(f"b = {offset}" for offset in OFFSETS), "b > 0"]
    rows = [names, ["---"] * len(names)]
    for name, levels in summary.items():
        rows.append([name, *(interval(level) for level in levels)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def interval(level: dict[str, float | None]) -> str:
    if level["low"] is None or level["high"] is None:
        return f"{level['iqm']:.4f}"
    return f"{level['iqm']:.4f} [{level['low']:.4f}, {level['high']:.4f}]"


def draw(summary: dict[str, list[dict[str, float | None]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for shift, (name, levels) in enumerate(summary.items()):
        positions = [offset + 0.5 * (shift - 1) for offset in OFFSETS]
        means = [level["iqm"] or 0.0 for level in levels[:-1]]
        below = [mean - (level["low"] or mean) for mean, level in zip(means, levels, strict=False)]
        above = [(level["high"] or mean) - mean for mean, level in zip(means, levels, strict=False)]
        axes.errorbar(positions, means, yerr=(below, above), marker="o", capsize=3, label=name)
    axes.set(xlabel="offset b of the targets", ylabel="squared error (IQM over seeds)", yscale="log", xticks=OFFSETS)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
