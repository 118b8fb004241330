"""Eight ways of teaching a generator of five-box objects, with one simulator, that what it makes should stand.

    python benchmarks/dso_stability.py            # 3 seeds, half an hour on one core; stop it any time, it goes on

Writes `results/dso_stability.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells

from rlalign.diffusion import DSOTrainer, FlowGRPOTrainer
from rlalign.diffusion.config_pretrain import PretrainConfig
from rlalign.diffusion.pretrain import cached_generator
from rlalign.training.metrics import read
from rlalign_envs.assemblies import CLASSES
from rlalign_envs.stability import StabilitySimulator

GENERATOR = PretrainConfig(data="rlalign_envs.assemblies:training_set", seed=0)
ROLLOUT = {"prompts_per_step": 20, "group_size": 16, "num_inference_steps": 10, "batch_size": 320}
OPTIM = {"learning_rate": 1e-4, "minibatches": 2, "micro_batch": 720}
PLAIN = {"ratio_norm": False, "reweight": False, "clip_low": 1e-2, "clip_high": 1e-2}
GUARD = {"clip_low": 2e-3, "clip_high": 2e-3}
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"objective": {"kind": "sft"}, "optim": {"learning_rate": 1e-4}, "total_updates": 400},
    "dpo": {"objective": {"kind": "dpo", "beta": 50}, "optim": {"learning_rate": 1e-4}, "total_updates": 400},
    "dro": {"objective": {"kind": "dro"}, "optim": {"learning_rate": 5e-5}, "total_updates": 150},
    "anchored_dro": {
        "objective": {"kind": "anchored_dro", "beta": 50},
        "optim": {"learning_rate": 1e-4},
        "total_updates": 400,
    },
    "floored_dro": {
        "objective": {"kind": "floored_dro", "floor": 1.5},
        "optim": {"learning_rate": 5e-5},
        "total_updates": 400,
    },
    "flow_grpo": {"objective": PLAIN, "optim": OPTIM, "rollout": ROLLOUT, "total_steps": 20},
    "guard": {"objective": GUARD, "optim": OPTIM, "rollout": ROLLOUT, "total_steps": 20},
    "bnpo": {
        "objective": GUARD,
        "optim": OPTIM,
        "rollout": ROLLOUT,
        "total_steps": 20,
        "advantage": {"type": "beta_normalized"},
    },
}
SHARED: dict[str, Any] = {"lora": None, "average": None, "checkpoint": {"every": 0}}
MEASURED = ("stable", "robust", "rotation_deg", "distance_to_data", "diversity", "base_area_ratio")
PAPER = {"base": 85.1, "sft": 89.5, "dpo": 95.1, "dro": 99.0}
"""Stable in percent, table 1 of arXiv:2503.22677."""
COLOURS = dict(
    zip(
        ARMS,
        ("#9aa5ad", "#1b6ca8", "#c0392b", "#7fb2d6", "#e08e79", "#d8b365", "#7a9e46", "#35602d"),
        strict=True,
    )
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dso_stability"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(args.out.with_suffix(".json"), {"arms": ARMS, **SHARED, "generator": GENERATOR.data})
    keys = [{"seed": seed, "arm": arm} for seed in range(args.seeds) for arm in args.arms]
    for key in cells.missing(keys):
        outcome = run(**key)
        cells.keep(key, outcome)
        last = outcome["curve"][-1]
        print(key, {name: round(last[name], 3) for name in MEASURED}, f"{outcome['cpu_s']:.0f} cpu-s", flush=True)
    summary = summarise(cells)
    cells.write({"summary": summary, "paper": PAPER})
    draw(cells, args.out.with_suffix(".png"))
    print(table(summary))


def run(*, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm; evaluation stands at a quarter, half, three quarters and the end."""
    settings = {**SHARED, **ARMS[arm], "seed": seed}
    total = settings.get("total_updates") or settings["total_steps"]
    watch = {"watch": "rlalign_envs.assemblies:measure", "samples": 400, "pictures": 0}
    simulator, spent = StabilitySimulator(), Spent()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = (DSOTrainer if "total_updates" in settings else FlowGRPOTrainer)(
            cached_generator(GENERATOR),
            list(CLASSES),
            simulator,
            run_dir=Path(scratch) / "run",
            eval={"every": -(-total // 4), **watch},
            **settings,
        )
        spent.leave_out(trainer.evaluator)
        trainer.fit()
        records = read(Path(scratch) / "run" / "metrics.jsonl")
    simulator.close()
    curve = [
        {"step": r["step"], **{name: r[f"eval/{name}_mean"] for name in MEASURED}}
        for r in records
        if r["kind"] == "eval"
    ]
    return {"curve": curve, "cpu_s": spent.seconds()}


class Spent:
    """CPU seconds since now, without those of evaluations."""

    def __init__(self) -> None:
        self.started, self.outside = time.process_time(), 0.0

    def leave_out(self, evaluator: Any) -> None:
        run = evaluator.run

        def timed() -> Any:
            began = time.process_time()
            found = run()
            self.outside += time.process_time() - began
            return found

        evaluator.run = timed

    def seconds(self) -> float:
        return time.process_time() - self.started - self.outside


def summarise(cells: Cells) -> dict[str, Any]:
    """Arm -> measure -> mean and range over seeds, at the end; `base` is every run's first evaluation."""
    found: dict[str, Any] = {}
    arms = list(dict.fromkeys(run["key"]["arm"] for run in cells.runs))
    for arm in ["base", *arms]:
        runs = cells.where(arm=arm) if arm != "base" else cells.runs
        points = [run["curve"][0 if arm == "base" else -1] for run in runs]
        found[arm] = {name: spread([point[name] for point in points]) for name in MEASURED}
        found[arm]["cpu_s"] = spread([run["cpu_s"] for run in runs]) if arm != "base" else [0.0, 0.0, 0.0]
    return found


def spread(values: list[float]) -> list[float]:
    return [float(np.mean(values)), float(np.min(values)), float(np.max(values))]


def table(summary: dict[str, Any]) -> str:
    lines = [f"{'arm':<13} " + " ".join(f"{name:>22}" for name in (*MEASURED, "cpu_s"))]
    for arm, row in summary.items():
        cells = (f"{m:.3g} [{a:.3g}, {b:.3g}]" for m, a, b in row.values())
        lines.append(f"{arm:<13} " + " ".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def draw(cells: Cells, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    shown = (("robust", "share robust"), ("distance_to_data", "distance to data"), ("diversity", "diversity"))
    for axis, (name, label) in zip(axes[1:], shown[1:], strict=True):
        for run in cells.runs:
            arm = run["key"]["arm"]
            points = [(point["robust"], point[name]) for point in run["curve"]]
            axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, alpha=0.8, color=COLOURS[arm])
        axis.set(xlabel="share robust", title=label)
    arms = list(dict.fromkeys(run["key"]["arm"] for run in cells.runs))
    for place, arm in enumerate(arms):
        ends = [run["curve"][-1] for run in cells.where(arm=arm)]
        axes[0].bar(place, np.mean([end["robust"] for end in ends]), color=COLOURS[arm])
        axes[0].plot([place] * len(ends), [end["robust"] for end in ends], "k.", ms=4)
        axes[0].plot([place - 0.3, place + 0.3], [np.mean([end["stable"] for end in ends])] * 2, "k-", lw=1)
    axes[0].set_xticks(range(len(arms)), arms, rotation=30, ha="right")
    axes[0].set(title="robust (bars, seeds as dots) and stable (lines)", ylim=(0, 1.02))
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
