"""How many samples a combination lock costs: HNPG against TRPO (no data) and against the data alone.

    python benchmarks/hnpg_comblock.py                          # H = 5, 10, 15; seeds 0 to 4; all three methods
    python benchmarks/hnpg_comblock.py --horizons 5 --seeds 0   # a part; finished cells are kept and never run again
    python benchmarks/hnpg_comblock.py draw                     # table and figure from the cells there are
    python benchmarks/hnpg_comblock.py data --horizon 5         # only write the data of the preset `hnpg_comblock`

Writes `results/hnpg_comblock.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlalign
from rlalign.agents.datasets import save_npz
from rlalign.agents.hnpg import HNPG
from rlalign.buffers.transitions import Transitions
from rlalign.training.intervals import bootstrap_interval
from rlalign_envs.comblock import comblock_offline

EPISODES = 50_000
WINDOW, SOLVED = 50, 0.5
METHODS: dict[str, dict[str, Any]] = {
    "hnpg": {},
    "trpo": {"offline_weight": 0.0},
    "offline": {"online_weight": 0.0},
}
BUDGETS = {5: 200_000, 10: 400_000, 15: 800_000}
"""Online samples after which a run has failed."""
PAPER = {
    "hidden": [16, 16],
    "critic_hidden": [64, 64],
    "initialization": "uniform",
    "clip_actions": False,
    "recheck_kl": False,
    "advantage": {"type": "gae", "gamma": 1.0, "gae_lambda": 0.97},
    "vectorization": "native",
    "eval": {"episodes": 30, "num_envs": 10, "deterministic": False, "video": False},
    "checkpoint": {"every": 0},
    "log": {"every": 50},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("run", "draw", "data"), default="run")
    parser.add_argument("--horizons", type=int, nargs="+", default=[5, 10, 15])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--horizon", type=int, default=5, help="of `data`")
    parser.add_argument("--anti-shaped", choices=("official", "paper"), default="official")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hnpg_comblock"))
    args = parser.parse_args()
    if args.what == "data":
        target = Path(f"data/comblock_h{args.horizon}.npz")
        save_npz(ordered_by_episode(offline_data(args.horizon, 0, args.anti_shaped)), target)
        print(f"{EPISODES:,} episodes of {args.horizon} steps: {target}")
        return
    torch.set_num_threads(1)
    cells = read(args.out)
    for horizon in args.horizons if args.what == "run" else ():
        for seed in args.seeds:
            for method in args.methods:
                name = f"{method}/h{horizon}/{args.anti_shaped}/seed{seed}"
                if name not in cells:
                    cells[name] = run(method, horizon, seed, args.anti_shaped)
                    write(args.out, cells)
    print(table(cells))
    draw(cells, args.out.with_suffix(".png"))


def run(method: str, horizon: int, seed: int, anti_shaped: str) -> dict[str, Any]:
    """Train until solved or out of budget."""
    data = None if method == "trpo" else offline_data(horizon, seed, anti_shaped)
    with tempfile.TemporaryDirectory() as folder:
        agent = HNPG(
            "rlalign_envs:CombinationLock-v0",
            dataset=data,
            seed=seed,
            run_dir=Path(folder) / "run",
            horizon=horizon,
            num_envs=1000 // horizon,
            kwargs={"horizon": horizon, "lock_seed": seed, "anti_shaped": anti_shaped},
            **PAPER | METHODS[method],
        )
        optimal: list[float] = []
        clock, wall = time.process_time(), time.perf_counter()
        for _ in agent.steps(total_env_steps=BUDGETS.get(horizon, 100_000 * horizon)):
            optimal.append(float((agent.returns > 1 - 1e-6).float().mean()))
            if solved(optimal):
                break
        found = {
            "samples": agent.step,
            "solved": solved(optimal),
            "optimal": [round(share, 4) for share in optimal],
            "iterations": len(optimal),
            "cpu_s": time.process_time() - clock,
            "wall_s": time.perf_counter() - wall,
            "eval_return": agent.evaluate()["eval/return_mean"],
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "rlalign": rlalign.__version__},
            "machine": platform.processor() or platform.machine(),
        }
    print(
        f"{method:8s} H={horizon:2d} seed {seed}: {'solved' if found['solved'] else 'NOT solved'} at "
        f"{found['samples']:,} samples, {found['cpu_s']:.0f} cpu-s, {found['wall_s']:.0f} s",
        flush=True,
    )
    return found


def solved(optimal: list[float]) -> bool:
    """Whether the moving average of P(optimal reward) over the last iterations is above one half."""
    return len(optimal) >= WINDOW and float(np.mean(optimal[-WINDOW:])) > SOLVED


def offline_data(horizon: int, seed: int, anti_shaped: Any) -> Transitions:
    """50,000 episodes of the expert, which errs with probability 1/H, rows in order of steps."""
    arrays = comblock_offline(horizon, EPISODES, seed=seed, lock_seed=seed, anti_shaped=anti_shaped)
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    flat = {name: arrays[name].reshape(horizon * EPISODES, *arrays[name].shape[2:]) for name in names}
    return Transitions(
        **{name: torch.from_numpy(value) for name, value in flat.items()},
        episode=torch.arange(EPISODES).repeat(horizon),
        step=torch.arange(horizon).repeat_interleave(EPISODES),
    )


def ordered_by_episode(transitions: Transitions) -> Transitions:
    """The same rows, each episode's together, as files hold them."""
    return transitions.select(transitions.episode.argsort(stable=True))


def read(out: Path) -> dict[str, dict[str, Any]]:
    path = out.with_suffix(".json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(out: Path, cells: dict[str, dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def grouped(cells: dict[str, dict[str, Any]]) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """(method, H, decoy) -> its seeds."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for name, cell in sorted(cells.items()):
        method, horizon, anti_shaped, _ = name.split("/")
        groups.setdefault((method, int(horizon.removeprefix("h")), anti_shaped), []).append(cell)
    return groups


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Draw the cells as Markdown; a mean over solved seeds says how many those were."""
    rows = [["H", "method", "decoy", "solved", "samples to solve", "last P(optimal)", "cpu-s"]]
    rows.append(["---"] * len(rows[0]))
    for (method, horizon, anti_shaped), found in sorted(grouped(cells).items(), key=lambda item: (item[0][1], item[0])):
        good = [cell["samples"] for cell in found if cell["solved"]]
        last = np.mean([np.mean(cell["optimal"][-10:]) for cell in found])
        cpu = np.mean([cell["cpu_s"] for cell in found])
        samples = f"> {max(cell['samples'] for cell in found):,}" if not good else interval(good)
        count = f"{len(good)}/{len(found)}"
        rows.append([str(horizon), method, anti_shaped, count, samples, f"{last:.2f}", f"{cpu:.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def interval(samples: list[int]) -> str:
    """Mean over seeds and its 95 % bootstrap interval."""
    found = bootstrap_interval([float(value) for value in samples])
    return f"{found.estimate:,.0f}" + (f" [{found.low:,.0f}, {found.high:,.0f}]" if found.defined else "")


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {key: found for key, found in grouped(cells).items() if key[2] == "official"}
    horizons = sorted({horizon for _, horizon, _ in groups})
    if not horizons:
        return
    figure, axes = plt.subplots(
        1, len(horizons), figsize=(3.6 * len(horizons), 3.2), layout="constrained", squeeze=False
    )
    for axis, horizon in zip(axes[0], horizons, strict=True):
        for color, method in enumerate(METHODS):
            for number, cell in enumerate(groups.get((method, horizon, "official"), [])):
                steps = np.arange(1, len(cell["optimal"]) + 1) * cell["samples"] / len(cell["optimal"]) / 1000
                label = method if number == 0 else None
                axis.plot(steps, list(moving(cell["optimal"])), color=f"C{color}", alpha=0.8, label=label)
        axis.axhline(SOLVED, color="gray", linestyle=":")
        axis.set(title=f"H = {horizon}", xlabel="online samples (thousands)", ylim=(-0.02, 1.02))
    axes[0][0].set_ylabel(f"P(optimal), moving average of {WINDOW}")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def moving(optimal: list[float]) -> Iterable[float]:
    """Mean of the last `WINDOW` iterations, of fewer at the beginning as if zeros went before."""
    return (sum(optimal[max(0, k - WINDOW) : k]) / WINDOW for k in range(1, len(optimal) + 1))


if __name__ == "__main__":
    main()
