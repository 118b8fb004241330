"""How wide the clip of a denoising step should be: a sweep of the constant of `clip_low: auto` on two generators.

    python benchmarks/step_clip.py                  # 40 minutes on one core; stop it any time, it goes on
    python benchmarks/step_clip.py --tasks digits   # one of the two

Writes `results/step_clip.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells
from grpo_guard import GENERATOR as DIGITS
from grpo_guard import at_levels

from rlalign.diffusion import FlowGRPOTrainer
from rlalign.diffusion.config_pretrain import PretrainConfig
from rlalign.diffusion.pretrain import cached_generator
from rlalign.functional.policy import step_clip
from rlalign.training.metrics import read
from rlalign_envs.digits import margin
from rlalign_envs.stability import StabilitySimulator

BOXES = PretrainConfig(data="rlalign_envs.assemblies:training_set", seed=0)
FACTORS = (0.25, 1.0, 4.0, 16.0)
"""Of κ in `rlalign.functional.ratios.step_clip`."""
FORMS: dict[str, dict[str, Any]] = {"plain": {"ratio_norm": False, "reweight": False}, "guard": {}}
TASKS: dict[str, dict[str, Any]] = {
    "digits": {"generator": DIGITS, "classes": 10, "dimensions": 64, "watch": "rlalign_envs.digits:measure"},
    "boxes": {"generator": BOXES, "classes": 5, "dimensions": 30, "watch": "rlalign_envs.assemblies:measure"},
}
GOLD = ("distance_to_data", "diversity")
EVAL = {"every": 4, "samples": 400, "pictures": 0}
SHARED: dict[str, Any] = {
    "total_steps": 24,
    "rollout": {"prompts_per_step": 10, "group_size": 16, "num_inference_steps": 10, "batch_size": 160},
    "optim": {"learning_rate": 3e-4, "update_epochs": 2, "minibatches": 2, "micro_batch": 720},
    "lora": None,
    "average": None,
    "checkpoint": {"every": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_clip"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {name: {**task, "generator": asdict(task["generator"])} for name, task in TASKS.items()}
    cells = Cells(args.out.with_suffix(".json"), {"forms": FORMS, "tasks": tasks, "eval": EVAL, **SHARED})
    keys = [
        {"task": task, "form": form, "factor": factor, "seed": seed}
        for task in args.tasks
        for seed in range(args.seeds)
        for form in FORMS
        for factor in FACTORS
    ]
    for key in cells.missing(keys):
        outcome = run(**key)
        cells.keep(key, outcome)
        last = outcome["curve"][-1]
        told = {name: round(last[name], 3) for name in ("proxy", *GOLD)}
        print(key, told, f"clipped {outcome['clipped']:.3f}", f"{outcome['cpu_s']:.0f} cpu-s", flush=True)
    cells.write({"summary": summarise(cells)})
    draw(cells, args.out.with_suffix(".png"))
    print(table(cells))


def run(*, task: str, form: str, factor: float, seed: int) -> dict[str, Any]:
    started, given = time.process_time(), TASKS[task]
    clip = factor * step_clip(given["dimensions"], normalized=form == "guard")
    reward: Any = margin if task == "digits" else StabilitySimulator()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = FlowGRPOTrainer(
            cached_generator(given["generator"]),
            list(range(given["classes"])),
            reward,
            objective={**FORMS[form], "clip_low": clip, "clip_high": clip},
            eval={**EVAL, "watch": given["watch"]},
            seed=seed,
            run_dir=Path(scratch) / "run",
            **SHARED,
        )
        trainer.fit()
        records = read(Path(scratch) / "run" / "metrics.jsonl")
    proxy = "eval/reward_mean" if task == "digits" else "eval/stable_mean"
    curve = [
        {"step": r["step"], "proxy": r[proxy], **{name: r[f"eval/{name}_mean"] for name in GOLD}}
        for r in records
        if r["kind"] == "eval"
    ]
    train = [r for r in records if r["kind"] == "train"]
    return {
        "clip": clip,
        "curve": curve,
        "clipped": float(np.mean([r["policy/clip_low_frac"] + r["policy/clip_high_frac"] for r in train])),
        "cpu_s": time.process_time() - started,
    }


def summarise(cells: Cells) -> dict[str, Any]:
    """Mean and range over seeds, at the end and at the proxy that every run of the task reaches."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(one["key"]["task"] for one in cells.runs):
        runs = cells.where(task=task)
        common = min(max(point["proxy"] for point in one["curve"]) for one in runs)
        rows: dict[str, Any] = {}
        for form in FORMS:
            for factor in FACTORS:
                mine = cells.where(task=task, form=form, factor=factor)
                if mine:
                    rows[f"{form} x{factor:g}"] = _row(mine, common)
        found[task] = {"common_proxy": common, "arms": rows}
    return found


def _row(runs: list[dict[str, Any]], common: float) -> dict[str, list[float]]:
    matched = [at_levels(one["curve"], [common], GOLD) for one in runs]
    values = {
        "proxy": [one["curve"][-1]["proxy"] for one in runs],
        "clipped": [one["clipped"] for one in runs],
        **{name: [row[name][0] for row in matched] for name in GOLD},
    }
    return {name: [float(np.mean(v)), min(v), max(v)] for name, v in values.items()}


def table(cells: Cells) -> str:
    lines = []
    for task, found in summarise(cells).items():
        lines.append(
            f"{task}: proxy at the end, clipped share; gold where the proxy first is {found['common_proxy']:.2f}"
        )
        for arm, row in found["arms"].items():
            told = "  ".join(f"{name} {m:.3g} [{a:.3g}, {b:.3g}]" for name, (m, a, b) in row.items())
            lines.append(f"  {arm:<12} {told}")
    return "\n".join(lines)


def draw(cells: Cells, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained", sharex=True)
    for line, (task, found) in zip(axes, summarise(cells).items(), strict=False):
        for axis, name in zip(line, ("proxy", "clipped", "distance_to_data"), strict=True):
            for form, colour in (("plain", "#9aa5ad"), ("guard", "#1b6ca8")):
                rows = [found["arms"].get(f"{form} x{factor:g}") for factor in FACTORS]
                points = [(factor, *row[name]) for factor, row in zip(FACTORS, rows, strict=True) if row]
                x, mean, low, high = zip(*points, strict=True)
                axis.semilogx(x, mean, "o-", base=2, color=colour, label=form)
                axis.fill_between(x, low, high, color=colour, alpha=0.2)
            axis.set(title=f"{task}: {name.replace('_', ' ')}")
    for axis in axes[1]:
        axis.set(xlabel="clip, times auto")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
