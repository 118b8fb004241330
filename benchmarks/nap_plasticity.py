"""Learning one set of random labels after the other: plain, with norms, and with Normalize-and-Project.

    python benchmarks/nap_plasticity.py                 # 5 seeds x 3 networks, about 8 minutes on one core

Writes `results/nap_plasticity.json` and `.png`. The protocol stands in benchmarks/README.md.
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
from torch import nn

import rlalign
from rlalign.nn.nap import Projector, dormant_metrics, to_normalized
from rlalign.training.intervals import bootstrap_interval, interquartile_mean

SAMPLES, HIDDEN, CLASSES, BATCH, LEARNING_RATE = 1024, 256, 10, 128, 3e-3
NETWORKS = ("mlp", "norm", "norm_and_project")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=120)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps per task")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nap_plasticity"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(name, seed, args.tasks, args.steps) for seed in range(args.seeds) for name in NETWORKS]
    summary = {name: summarise([r for r in runs if r["network"] == name]) for name in NETWORKS}
    result = {
        "tasks": args.tasks,
        "steps_per_task": args.steps,
        "seeds": args.seeds,
        "summary": summary,
        "runs": runs,
        "versions": {name: version(name) for name in ("torch", "scikit-learn")} | {"rlalign": rlalign.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    draw(runs, args.out.with_suffix(".png"))
    print(table(summary))


def run(name: str, seed: int, tasks: int, steps: int) -> dict[str, Any]:
    """Train one network through all tasks; return its accuracy on each batch before the step, averaged per task."""
    data = torch.Generator().manual_seed(seed)
    images = torch.from_numpy(load_digits(return_X_y=True)[0]).float()
    images = images[torch.randperm(len(images), generator=data)[:SAMPLES]]
    images = (images - images.mean(0)) / images.std(0).clamp(min=1)  # some pixels never change
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Linear(images.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
        nn.Linear(HIDDEN, CLASSES),
    )
    weights = [net[i].get_parameter("weight") for i in (0, 2)]
    if name != "mlp":
        to_normalized(net)
    start = torch.stack([weight.norm() for weight in weights])
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=True)
    if name == "norm_and_project":
        Projector(net).attach(optimizer)
    started = time.process_time()
    accuracy = []
    for _ in range(tasks):
        labels = torch.randint(CLASSES, (SAMPLES,), generator=data)
        correct = torch.zeros((), dtype=torch.int64)
        for _ in range(steps):
            rows = torch.randint(SAMPLES, (BATCH,), generator=data)
            logits = net(images[rows])
            correct += (logits.argmax(-1) == labels[rows]).sum()
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
        accuracy.append(float(correct) / (steps * BATCH))
    growth = (torch.stack([weight.norm() for weight in weights]) / start).tolist()
    found = {
        "network": name,
        "seed": seed,
        "accuracy": accuracy,
        "first": sum(accuracy[:3]) / 3,
        "last": sum(accuracy[-3:]) / 3,
        "growth": growth,
        **dormant_metrics(net, images, tau=0.025),
        "cpu_s": time.process_time() - started,
    }
    print(
        f"seed {seed} {name:17s} first {found['first']:.3f} last {found['last']:.3f} "
        f"growth {growth[0]:.1f} {growth[1]:.1f} dormant {found['nap/dormant_frac']:.2f} {found['cpu_s']:.0f} cpu-s",
        flush=True,
    )
    return found


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Interquartile mean over seeds, and its interval."""
    columns = {
        "first three tasks": [r["first"] for r in runs],
        "last three tasks": [r["last"] for r in runs],
        "norm of layer 1 over its start": [r["growth"][0] for r in runs],
        "norm of layer 2 over its start": [r["growth"][1] for r in runs],
        "dormant units": [r["nap/dormant_frac"] for r in runs],
    }
    found = {what: bootstrap_interval(column, statistic=interquartile_mean) for what, column in columns.items()}
    return {what: {"iqm": i.estimate, "low": finite(i.low), "high": finite(i.high)} for what, i in found.items()}


def finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def table(summary: dict[str, dict[str, dict[str, float | None]]]) -> str:
    """Draw the summary as Markdown."""
    names = ["network", *next(iter(summary.values()))]
    rows = [names, ["---"] * len(names)]
    for name, columns in summary.items():
        rows.append([name, *(interval(column) for column in columns.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def interval(column: dict[str, float | None]) -> str:
    if column["low"] is None or column["high"] is None:
        return f"{column['iqm']:.3f}"
    return f"{column['iqm']:.3f} [{column['low']:.3f}, {column['high']:.3f}]"


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name in NETWORKS:
        tasks = zip(*(r["accuracy"] for r in runs if r["network"] == name), strict=True)
        found = [bootstrap_interval(column, statistic=interquartile_mean, resamples=2000) for column in tasks]
        numbers = range(1, len(found) + 1)
        (line,) = axes.plot(numbers, [i.estimate for i in found], label=name.replace("_", " "))
        if all(i.defined for i in found):
            axes.fill_between(
                numbers, [i.low for i in found], [i.high for i in found], alpha=0.2, color=line.get_color()
            )
    axes.axhline(1 / CLASSES, color="gray", linestyle=":", label="chance")
    axes.set(xlabel="task (labels drawn anew)", ylabel="accuracy while learning", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
