"""`rlalign train dso_stability` as a user runs it, from an empty cache: how much more stands, at what cost, how soon.

    python benchmarks/dso_preset.py     # minutes on two idle cores

Writes `results/dso_preset.json`. The protocol stands in benchmarks/README.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from cells import Cells
from llm_vs_trl import busy_share

from rlalign import config
from rlalign.training.metrics import read

MEASURED = ("robust", "stable", "distance_to_data", "diversity", "base_area_ratio")
RISE, DISTANCE, DIVERSITY, SECONDS = 0.30, 1.2, 0.75, 480


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dso_preset"))
    args = parser.parse_args()
    cells = Cells(args.out.with_suffix(".json"), {"preset": config.dump(config.load("dso_stability"))})
    for key in cells.missing([{"seed": seed} for seed in range(args.seeds)]):
        cells.keep(key, run(**key))
        print(line(cells.runs[-1]), flush=True)
    cells.write({"holds": all(verdict(one) for one in cells.runs), "cores": os.cpu_count()})
    print("\n".join(line(one) for one in cells.runs))


def run(*, seed: int) -> dict[str, Any]:
    busy = busy_share()
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "rlalign", "train", "dso_stability", f"seed={seed}", "--run-dir"]
        began, before = time.perf_counter(), cpu_of_children()
        done = subprocess.run(
            [*command, f"{scratch}/run"],
            env=os.environ | {"RLALIGN_CACHE": f"{scratch}/cache"},
            capture_output=True,
            text=True,
            check=False,
        )
        wall, spent = time.perf_counter() - began, cpu_of_children() - before
        if done.returncode != 0:
            raise SystemExit(f"failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        evals = [record for record in read(Path(scratch) / "run" / "metrics.jsonl") if record["kind"] == "eval"]
    ends = {name: [evals[k][f"eval/{name}_mean"] for k in (0, -1)] for name in MEASURED}
    return {"wall_s": wall, "cpu_s": spent, "busy_before": busy, "before_after": ends}


def cpu_of_children() -> float:
    times = psutil.Process().cpu_times()
    return float(times.children_user + times.children_system)


def verdict(one: dict[str, Any]) -> bool:
    ends = one["before_after"]
    return (
        ends["robust"][1] - ends["robust"][0] >= RISE
        and ends["distance_to_data"][1] <= DISTANCE * ends["distance_to_data"][0]
        and ends["diversity"][1] >= DIVERSITY * ends["diversity"][0]
        and one["wall_s"] <= SECONDS
    )


def line(one: dict[str, Any]) -> str:
    ends = one["before_after"]
    ratios = {name: ends[name][1] / ends[name][0] for name in MEASURED}
    return (
        f"seed {one['key']['seed']}: robust {ends['robust'][0]:.1%} -> {ends['robust'][1]:.1%}, stable "
        f"{ends['stable'][0]:.1%} -> {ends['stable'][1]:.1%}, distance {ratios['distance_to_data']:.2f}x, diversity "
        f"{ratios['diversity']:.2f}x, footprint {ratios['base_area_ratio']:.2f}x, {one['wall_s']:.0f} s wall, "
        f"{one['cpu_s']:.0f} cpu-s: {'holds' if verdict(one) else 'DOES NOT HOLD'}"
    )


if __name__ == "__main__":
    main()
