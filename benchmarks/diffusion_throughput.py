"""One epoch of Flow-GRPO against flow_grpo's loop: as its script has it, and tuned.

    python benchmarks/diffusion_throughput.py     # minutes on one core of an idle machine

Writes `results/diffusion_throughput.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm_vs_trl import busy_share, cpu_name

ARMS = Path(__file__).with_name("diffusion_throughput_arms.py")
TASKS = ("tiny_sd3", "assemblies")
ORDER = ("literal", "tuned", "rlalign", "rlalign", "tuned", "literal")
THRESHOLDS = {"literal": 2.0, "tuned": 1.3}
MEMORY = 0.6
COLOURS = {"literal": "#9aa5ad", "tuned": "#7fb2d6", "rlalign": "#1b6ca8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epochs", type=int, default=3, help="timed ones, after one to warm up")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/diffusion_throughput"))
    args = parser.parse_args()
    path = args.out.with_suffix(".json")
    report = json.loads(path.read_text()) if path.exists() else {"tasks": {}}
    report |= {
        "benchmark": "diffusion_throughput",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
    }
    for task in args.tasks:
        runs = [launch(task, arm, args.epochs, args.core) for arm in ORDER]
        report["tasks"][task] = {"runs": runs, **verdict(runs)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.out.with_suffix(".png"))
    print(table(report))


def launch(task: str, arm: str, epochs: int, core: int) -> dict[str, Any]:
    """One arm in a process of its own, so that its memory and threads are its own as well."""
    busy = busy_share()
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        spec = {"task": task, "arm": arm, "epochs": epochs, "core": core}
        quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, str(ARMS), json.dumps(spec), str(result)]
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        outcome = json.loads(result.read_text())
    wall = statistics.median(epoch["wall_s"] for epoch in outcome["epochs"])
    print(f"{task:<12} {arm:<8} {wall:6.2f} s an epoch, {outcome['memory_mib']:7.1f} MiB", flush=True)
    return outcome | {"busy_before": busy}


def verdict(runs: list[dict[str, Any]]) -> dict[str, Any]:
    arms: dict[str, dict[str, float]] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        arms[arm] = {
            key: statistics.median(epoch[key] for run in mine for epoch in run["epochs"]) for key in ("wall_s", "cpu_s")
        }
        arms[arm]["memory_mib"] = statistics.median(run["memory_mib"] for run in mine)
    ours = arms["rlalign"]
    speedup = {arm: min(arms[arm][key] / ours[key] for key in ("wall_s", "cpu_s")) for arm in THRESHOLDS}
    gradients = [run["gradient_difference"] for run in runs if run["arm"] != "rlalign"]
    return {
        "arms": arms,
        "speedup": speedup,
        "fast_enough": {arm: speedup[arm] >= needed for arm, needed in THRESHOLDS.items()},
        "memory_ratio": ours["memory_mib"] / arms["literal"]["memory_mib"],
        "memory_small_enough": ours["memory_mib"] <= MEMORY * arms["literal"]["memory_mib"],
        "gradient_difference": max(gradients),
    }


def table(report: dict[str, Any]) -> str:
    lines = []
    for task, found in report["tasks"].items():
        told = ", ".join(f"{s:.2f}x {arm} (needed {THRESHOLDS[arm]})" for arm, s in found["speedup"].items())
        lines.append(f"{task}: {told}; memory {found['memory_ratio']:.2f} of literal (needed {MEMORY})")
        lines.append(f"  gradients differ by at most {found['gradient_difference']:.1e} relative")
        for arm, row in found["arms"].items():
            lines.append(f"  {arm:<9}{row['wall_s']:8.2f} s {row['cpu_s']:8.2f} cpu-s {row['memory_mib']:8.1f} MiB")
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, key, label in zip(
        axes, ("wall_s", "memory_mib"), ("seconds an epoch", "MiB above the model"), strict=True
    ):
        for place, found in enumerate(report["tasks"].values()):
            most = found["arms"]["literal"][key]
            for k, (arm, row) in enumerate(found["arms"].items()):
                label_ = arm if place == 0 else None
                axis.bar(place + 0.25 * (k - 1), row[key] / most, 0.22, color=COLOURS[arm], label=label_)
        axis.set_xticks(range(len(report["tasks"])), list(report["tasks"]))
        axis.set(title=f"{label}, literal = 1")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
