"""How much `make train` teaches: held-out accuracy before and after, on several seeds, one run after the other.

    python benchmarks/llm_arithmetic.py                 # three runs of the preset, about 10 minutes each on 2 cores

Writes `results/llm_arithmetic.json` and `.png`. The protocol and the thresholds stand in benchmarks/README.md.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import commit, versions

from rlalign.training.intervals import Interval, paired_bootstrap
from rlalign.training.metrics import read

LEAST_GAIN, LEAST_LOW, LEAST_PROBLEMS = 0.20, 0.10, 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/llm/bnpo_arithmetic.yaml")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/llm_arithmetic"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = [train(args.config, seed, args.overrides, Path(scratch) / f"seed-{seed}") for seed in range(args.seeds)]
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    result = {
        "config": args.config,
        "overrides": args.overrides,
        "commit": commit(),
        "versions": versions("torch", "transformers"),
        "machine": machine,
        "runs": runs,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(runs, args.out.with_suffix(".png"))
    for run in runs:
        print(
            f"seed {run['seed']}: {run['before']:.1%} (best of {len(run['phrasings'])} phrasings) -> "
            f"{run['after']:.1%}, gain {run['gain']:+.1%} [{run['gain_low']:+.1%}, {run['gain_high']:+.1%}] "
            f"on {run['problems']} problems, "
            f"{run['seconds'] / 60:.1f} min: {'passed' if run['passed'] else 'MISSED'}"
        )
    sys.exit(0 if all(run["passed"] for run in runs) else 1)


def train(config: str, seed: int, overrides: list[str], run_dir: Path) -> dict[str, Any]:
    """One run in a process of its own, and what it did to held-out accuracy."""
    command = [sys.executable, "-m", "rlalign", "train", config, f"seed={seed}", *overrides, "--run-dir", str(run_dir)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    phrasings = {path.stem: rewards(path) for path in sorted((run_dir / "samples").glob("baseline-*.jsonl"))}
    evaluations = sorted((run_dir / "samples").glob("eval-*.jsonl"))
    phrasings["training prompt"] = rewards(evaluations[0])
    best = max(phrasings, key=lambda name: sum(phrasings[name].values()))
    before, after = phrasings[best], rewards(evaluations[-1])
    gain: Interval = paired_bootstrap([before[key] for key in sorted(before)], [after[key] for key in sorted(after)])
    records = read(run_dir / "metrics.jsonl")
    steps = [record["time/step_s"] for record in records if record["kind"] == "train"]
    return {
        "seed": seed,
        "problems": len(after),
        "phrasings": {name: sum(found.values()) / len(found) for name, found in phrasings.items()},
        "before": sum(before.values()) / len(before),
        "after": sum(after.values()) / len(after),
        "gain": gain.estimate,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "curve": [[r["step"], r["eval/reward_mean"], r["eval/reward_stderr"]] for r in records if r["kind"] == "eval"],
        "seconds": seconds,
        "training_seconds": sum(steps),
        "passed": len(after) >= LEAST_PROBLEMS and gain.estimate >= LEAST_GAIN and gain.low > LEAST_LOW,
    }


def rewards(path: Path) -> dict[int, float]:
    """Reward of each problem of a samples file, by the problem's row number."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["prompt_id"]: row["reward"] or 0.0 for row in rows}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for run in runs:
        steps, means, errors = zip(*run["curve"], strict=True)
        axes.errorbar(steps, means, yerr=errors, marker="o", capsize=3, label=f"seed {run['seed']}")
    axes.axhline(max(run["before"] for run in runs), color="gray", linestyle=":", label="untouched, best phrasing")
    axes.set(xlabel="step", ylabel="held-out exact match", ylim=(0, 1))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
