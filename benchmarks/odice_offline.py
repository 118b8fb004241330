"""O-DICE's three gradients, BC, IQL and TD3+BC on two shipped datasets, and the values they give to unseen rooms.

    python benchmarks/odice_offline.py                  # 5 seeds, about 45 minutes on one core; resumes

Writes `results/odice_offline.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import hashlib
import json
import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rlalign
from rlalign.agents import BC, IQL, ODICE, TD3BC
from rlalign.agents.datasets import Reference, load_dataset, rlalign_score
from rlalign.training.intervals import bootstrap_interval, interquartile_mean
from rlalign_envs.four_room import GOAL, START, UPPER_RIGHT, observe, optimal_values, reachable_cells, walls

ADAM = {"learning_rate": 1e-3, "eps": 1e-8, "max_grad_norm": None}
RELU = {"hidden": [64, 64], "activation": "relu"}
SHARED: dict[str, Any] = {"batch_size": 256, "network": RELU, "optim": ADAM}
CRITIC: dict[str, Any] = {"critic_network": RELU, "critic_optim": ADAM}
DICE: dict[str, Any] = {**CRITIC, "critic_network": {**RELU, "layer_norm": True}}
METHODS: dict[str, tuple[type, dict[str, Any]]] = {
    "orthogonal": (ODICE, {**DICE, "gradient": "orthogonal"}),
    "true": (ODICE, {**DICE, "gradient": "true"}),
    "semi": (ODICE, {**DICE, "gradient": "semi"}),
    "bc": (BC, {}),
    "iql": (IQL, CRITIC),
    "td3_bc": (TD3BC, {**CRITIC, "network": {**RELU, "squash": True}}),
}
TASKS: dict[str, dict[str, Any]] = {
    "cartpole_mixed": {"env": "CartPole-v1", "gamma": 0.99},
    "pendulum_mixed": {"env": "Pendulum-v1", "gamma": 0.95},
    "four_room": {"env": "rlalign_envs:FourRoom-v0", "gamma": 0.9, "rewards": "return_range"},
}
CONTINUOUS = ("pendulum_mixed",)
EPISODES = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/odice_offline"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cache = args.out.parent / "tmp" / f"{args.out.name}.jsonl"
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    wanted = [cell for seed in seeds for cell in cells(args.tasks, args.methods, seed, args.updates)]
    known = finished(cache)
    for cell in wanted:
        if key(cell) not in known:
            known[key(cell)] = run(cell)
            cache.parent.mkdir(parents=True, exist_ok=True)
            with cache.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key(cell), "result": known[key(cell)]}) + "\n")
    runs = [known[key(cell)] for cell in wanted]
    result = summarise(runs) | {
        "updates": args.updates,
        "seeds": list(seeds),
        "episodes": EPISODES,
        "settings": {
            "tasks": TASKS,
            "shared": SHARED,
            "methods": {name: given for name, (_, given) in METHODS.items()},
        },
        "runs": runs,
        "versions": {name: version(name) for name in ("torch", "gymnasium")} | {"rlalign": rlalign.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
    }
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, args.out.with_suffix(".png"))
    print(table(result))


def cells(tasks: list[str], methods: list[str], seed: int, updates: int) -> Iterator[dict[str, Any]]:
    """Everything that decides one run."""
    for task in tasks:
        for method in methods:
            if method == "td3_bc" and task not in CONTINUOUS:
                continue
            given = {**SHARED, **METHODS[method][1]}
            # Behaviour cloning knows neither discount nor rewards.
            asked = {} if method == "bc" else {name: value for name, value in TASKS[task].items() if name != "env"}
            yield {
                "task": task,
                "method": method,
                "seed": seed,
                "settings": {**given, **asked, "total_updates": updates},
            }


def key(cell: Mapping[str, Any]) -> str:
    settings = json.dumps(cell["settings"], sort_keys=True)
    return f"{cell['task']}/{cell['method']}/{cell['seed']}/{hashlib.sha256(settings.encode()).hexdigest()[:12]}"


def finished(cache: Path) -> dict[str, dict[str, Any]]:
    if not cache.is_file():
        return {}
    lines = [json.loads(line) for line in cache.read_text(encoding="utf-8").splitlines()]
    return {line["key"]: line["result"] for line in lines}


def run(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Train one agent, play, and place its mean return between the dataset's reference scores."""
    task, method, seed = cell["task"], cell["method"], cell["seed"]
    data = load_dataset(f"rlalign_envs:{task}")
    playing = {"eval": {"episodes": EPISODES, "num_envs": 25, "video": False}}
    agent = METHODS[method][0](TASKS[task]["env"], dataset=data, seed=seed, **playing, **cell["settings"])
    started, metrics = time.process_time(), {}
    while agent.step < agent.total:
        metrics = agent.iterate()
        agent.iteration += 1
    seconds = time.process_time() - started
    mean = agent.evaluate(EPISODES)["eval/return_mean"]
    found = {"task": task, "method": method, "seed": seed, "cpu_s": round(seconds, 1), "return_mean": mean}
    found["score"] = score(mean, data.reference)
    found["metrics"] = {name: value for name, value in metrics.items() if name.startswith("value/")}
    if task == "four_room":
        found |= rooms(agent)
    shown = {name: round(found[name], 4) for name in ("return_mean", "score", "value_unseen", "path") if name in found}
    print(f"seed {seed} {task:15s} {method:10s} {shown} {seconds:.0f} cpu-s", flush=True)
    return found


def score(mean: float, reference: Reference) -> float:
    return float(rlalign_score(torch.tensor(mean, dtype=torch.float64), reference))


def rooms(agent: Any) -> dict[str, Any]:
    """V of every cell, its mean over cells with and without data, and the length of the path from the start."""
    cells_ = [cell for cell in reachable_cells() if cell != GOAL]
    returns, lengths = agent.evaluator.play(1)
    path = {"path": int(lengths[0]) if returns[0] else -1}
    value = vars(agent.learner).get("value")
    if value is None:
        return path
    with torch.no_grad():
        values = value.smallest(torch.from_numpy(observe(cells_))).tolist()
    picture: list[list[float | None]] = [[None] * len(walls()) for _ in walls()]
    for (row, column), one in zip(cells_, values, strict=True):
        picture[row][column] = one
    seen = [one for cell, one in zip(cells_, values, strict=True) if cell not in UPPER_RIGHT]
    unseen = [one for cell, one in zip(cells_, values, strict=True) if cell in UPPER_RIGHT]
    return path | {"values": picture, "value_seen": float(np.mean(seen)), "value_unseen": float(np.mean(unseen))}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Interquartile means over seeds with their intervals, by task and method; differences are paired by seed."""
    found: dict[str, Any] = {}
    for task in dict.fromkeys(run_["task"] for run_ in runs):
        of_task = [run_ for run_ in runs if run_["task"] == task]
        by_method = {name: [r for r in of_task if r["method"] == name] for name in METHODS}
        found[task] = {name: measured(mine) for name, mine in by_method.items() if mine}
        best = {r["seed"]: r["score"] for r in by_method["orthogonal"]}
        for name, mine in by_method.items():
            pairs = [best[r["seed"]] - r["score"] for r in mine if r["seed"] in best]
            if pairs and name != "orthogonal":
                found[task][name]["orthogonal_minus_this"] = interval(pairs)
    return {"summary": found}


def measured(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("score", "return_mean", "cpu_s", "value_seen", "value_unseen")
    found: dict[str, Any] = {name: interval([r[name] for r in runs]) for name in names if name in runs[0]}
    if "path" in runs[0]:
        found["shortest_path"] = sum(r["path"] == 14 for r in runs)
    return found | {"seeds": len(runs)}


def interval(values: list[float]) -> dict[str, float | None]:
    found = bootstrap_interval(values, statistic=interquartile_mean)
    low, high = (found.low, found.high) if found.defined else (None, None)
    return {"iqm": found.estimate, "low": low, "high": high}


def table(result: Mapping[str, Any]) -> str:
    """Draw the summary as Markdown."""
    lines = ["| data | method | rlalign score | V unseen / seen | shortest path | cpu-s |", "|" + "---|" * 6]
    for task, methods in result["summary"].items():
        for name, one in methods.items():
            values = f"{one['value_unseen']['iqm']:.3f} / {one['value_seen']['iqm']:.3f}" if "value_seen" in one else ""
            paths = f"{one['shortest_path']} of {one['seeds']}" if "shortest_path" in one else ""
            lines.append(
                f"| {task} | {name} | {shown(one['score'])} | {values} | {paths} | {one['cpu_s']['iqm']:.0f} |"
            )
    return "\n".join(lines)


def shown(one: Mapping[str, float | None]) -> str:
    return f"{one['iqm']:.1f}" + ("" if one["low"] is None else f" [{one['low']:.1f}, {one['high']:.1f}]")


def draw(result: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in result["summary"] if task != "four_room"]
    maps = [r for r in result["runs"] if "values" in r and r["method"] in ("orthogonal", "true", "semi")]
    first = {r["method"]: r for r in reversed(maps)}
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.6), layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=False):
        bars(axis, result["summary"][task])
        axis.set(title=task, xlabel="rlalign score")
    for axis in axes[0][len(tasks) :]:
        axis.axis("off")
    best = optimal_values(gamma=TASKS["four_room"]["gamma"], closed=UPPER_RIGHT)
    best[GOAL] = np.nan
    pictures = {"best value in the data": best} | {
        name: np.array(first[name]["values"], dtype=float) for name in ("orthogonal", "true", "semi") if name in first
    }
    for axis in axes[1]:
        axis.axis("off")
    for axis, (name, picture) in zip(axes[1], pictures.items(), strict=False):
        shown_ = axis.imshow(picture, cmap="viridis")
        figure.colorbar(shown_, ax=axis, shrink=0.8)
        for row, column in UPPER_RIGHT:
            axis.text(column, row, "×", color="white", ha="center", va="center")
        axis.text(START[1], START[0], "S", color="white", ha="center", va="center")
        axis.text(GOAL[1], GOAL[0], "G", ha="center", va="center")
        axis.set_title(name)
    figure.savefig(path, dpi=150)


def bars(axis: Any, methods: Mapping[str, Any]) -> None:
    for place, one in enumerate(methods.values()):
        middle, low, high = (one["score"][end] for end in ("iqm", "low", "high"))
        below, above = (middle - low, high - middle) if low is not None else (0.0, 0.0)
        axis.errorbar([middle], [place], xerr=([below], [above]), marker="o", capsize=3)
    axis.set_yticks(range(len(methods)), list(methods))
    axis.invert_yaxis()


if __name__ == "__main__":
    main()
