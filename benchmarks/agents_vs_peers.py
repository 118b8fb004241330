"""PPO against Stable-Baselines3's and TRPO against sb3-contrib's, at identical hyper-parameters.

    python benchmarks/agents_vs_peers.py --parts throughput           # 8 minutes on an idle machine
    python benchmarks/agents_vs_peers.py --parts returns              # half an hour; a busy machine does no harm
    python benchmarks/agents_vs_peers.py --parts throughput returns --tiny     # tries the harness, measures nothing

Writes `<out>.json` (every iteration of every process) and `<out>.png`; a part that is not named stays as it was, and
finished runs of `returns` are not repeated. Protocol and thresholds: benchmarks/README.md, section `agents_vs_peers`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from agents_vs_peers_arms import Setting
from cells import over_seeds, told
from llm_vs_trl import BUSY, busy_share, cpu_name

from rlalign.training.intervals import interquartile_mean

ARMS = Path(__file__).with_name("agents_vs_peers_arms.py")
DEFAULTS = Setting(
    method="ppo",
    env="CartPole-v1",
    num_envs=8,
    rollout_steps=2048,
    minibatch_size=64,
    epochs=10,
    learning_rate=3e-4,
    gamma=0.99,
    gae_lambda=0.95,
)
SETTINGS = {
    "cartpole_default": DEFAULTS,
    "cartpole_zoo": replace(
        DEFAULTS, rollout_steps=32, minibatch_size=256, epochs=20, learning_rate=1e-3, gamma=0.98, gae_lambda=0.8
    ),
    "halfcheetah": replace(DEFAULTS, env="HalfCheetah-v5", num_envs=1),
    "trpo": replace(DEFAULTS, method="trpo", num_envs=1, minibatch_size=128, learning_rate=1e-3),
}
THRESHOLDS = {"cartpole_default": 3.0, "cartpole_zoo": 3.0, "halfcheetah": 1.5, "trpo": 2.0}
TIMED_ITERATIONS = {"cartpole_default": 1, "cartpole_zoo": 30, "halfcheetah": 2, "trpo": 5}
ORDER = {
    "cartpole_default": ("peer", "eager", "compiled", "compiled", "eager", "peer", "native"),
    "cartpole_zoo": ("peer", "eager", "compiled", "compiled", "eager", "peer", "native"),
    "halfcheetah": ("peer", "eager", "compiled", "compiled", "eager", "peer"),
    "trpo": ("peer", "eager", "eager", "peer"),
}
RETURNS = {"cartpole_zoo": (60_000, 5, 50), "trpo": (60_000, 5, 50), "halfcheetah": (100_000, 5, 10)}
"""Setting -> steps, seeds, evaluation episodes."""
COLOURS = {"peer": "#9aa5ad", "eager": "#7fb2d6", "compiled": "#1b6ca8", "native": "#0d3b5e"}


def main() -> None:
    options = parse_options()
    path = options.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    report = json.loads(path.read_text()) if path.exists() else {}
    report |= about(options)
    for setting in options.settings:
        if "throughput" in options.parts:
            report.setdefault("throughput", {})[setting] = throughput(options, setting)
            path.write_text(json.dumps(report, indent=1) + "\n")
    for setting in [name for name in options.settings if name in RETURNS and "returns" in options.parts]:
        kept = report.setdefault("returns", {}).setdefault(setting, {"runs": []})
        returns(options, setting, kept, lambda: path.write_text(json.dumps(report, indent=1) + "\n"))
    path.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, options.out.with_suffix(".png"))
    print(table(report))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("throughput", "returns"), default=["throughput", "returns"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--core", type=int, default=0, help="where every process is pinned")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, into <out>_tiny")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/agents_vs_peers"))
    options = parser.parse_args()
    if options.tiny:
        options.out = options.out.with_name(f"{options.out.name}_tiny")
    return options


def about(options: argparse.Namespace) -> dict[str, Any]:
    names = ("torch", "gymnasium", "stable-baselines3", "sb3-contrib", "mujoco", "numpy")
    return {
        "benchmark": "agents_vs_peers",
        "protocol": "benchmarks/README.md, section agents_vs_peers",
        "settings": {name: asdict(setting) for name, setting in SETTINGS.items()},
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in names},
        "tiny": options.tiny,
    }


def launch(options: argparse.Namespace, setting: str, arm: str, cache: Path, **more: Any) -> dict[str, Any]:
    """Run one arm in a process of its own, so that memory, caches and thread pools are its own as well."""
    config = SETTINGS[setting]
    if options.tiny:
        config = replace(config, rollout_steps=min(config.rollout_steps, 128), epochs=2)
    spec = {"arm": arm, "setting": asdict(config), "core": options.core, "seed": 0, "iterations": 1} | more
    spec = {"total_steps": 0, "episodes": 0} | spec
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    quiet |= {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # compilers are children of the process, so their time is counted
    result, busy = cache / "result.json", busy_share()
    print(f"{setting:<17} {arm:<9}", end="", flush=True)
    command = [sys.executable, str(ARMS), json.dumps(spec), str(result)]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    outcome = json.loads(result.read_text()) | {"busy_before": busy}
    spent = sum(part["cpu_s"] for part in outcome["iterations"])
    print(f" {spent:6.1f} cpu-s" + (f"  return {np.mean(outcome['returns']):.0f}" if "returns" in outcome else ""))
    return outcome


# ---------------------------------------------------------------------------------------------------------- throughput


def throughput(options: argparse.Namespace, setting: str) -> dict[str, Any]:
    """Measure all arms in their order; the compile cache starts empty."""
    iterations = 1 if options.tiny else TIMED_ITERATIONS[setting]
    with tempfile.TemporaryDirectory() as scratch:
        runs = [
            launch(options, setting, arm, Path(scratch), part="throughput", iterations=iterations)
            for arm in ORDER[setting]
        ]
    arms = {arm: speed([run for run in runs if run["arm"] == arm]) for arm in dict.fromkeys(ORDER[setting])}
    found = {"arms": arms, "runs": runs, "machine_was_quiet": all((run["busy_before"] or 0) < BUSY for run in runs)}
    headline = "compiled" if "compiled" in arms else "eager"
    for arm in arms:
        arms[arm]["speedup"] = {
            key: arms[arm][key] / arms["peer"][key] for key in ("steps_per_cpu_s", "steps_per_wall_s")
        }
    slower = min(arms[headline]["speedup"].values())
    found["verdict"] = {
        "headline": headline,
        "speedup": slower,
        "needed": THRESHOLDS[setting],
        "fast_enough": slower >= THRESHOLDS[setting],
    }
    if "compiled" in arms:
        found["warm_up"] = warm_up(runs, arms)
        found["full_minibatches"] = full_minibatches(setting, runs)
    return found


def full_minibatches(setting: str, runs: list[dict[str, Any]]) -> float:
    """Share of the `compiled` arm's timed minibatches that were of full size: the others run uncompiled."""
    size = SETTINGS[setting].minibatch_size
    steps = [part["steps"] for run in runs if run["arm"] == "compiled" for part in run["iterations"][1:]]
    return sum(count // size for count in steps) / sum(-(-count // size) for count in steps)


def speed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Decisions per second after the first iteration: the median over processes."""
    rates = {}
    for key in ("cpu_s", "wall_s"):
        each = [
            sum(part["steps"] for part in run["iterations"][1:]) / sum(part[key] for part in run["iterations"][1:])
            for run in runs
        ]
        rates[f"steps_per_{key}"] = statistics.median(each)
    return rates | {"peak_rss_mib": max(run["peak_rss_mib"] for run in runs), "processes": len(runs)}


def warm_up(runs: list[dict[str, Any]], arms: dict[str, Any]) -> dict[str, Any]:
    """What compiling costs in seconds, and the steps after which it was worth it, cold and with a filled cache."""
    found: dict[str, Any] = {}
    for name, run in zip(("cold", "cached"), [run for run in runs if run["arm"] == "compiled"], strict=False):
        first = run["iterations"][0]
        cost = {
            key: max(0.0, first[key] - first["steps"] / arms["compiled"][f"steps_per_{key}"])
            for key in ("cpu_s", "wall_s")
        }
        found[name] = cost | {
            f"break_even_steps_against_{other}": break_even(
                cost["cpu_s"], arms["compiled"]["steps_per_cpu_s"], arms[other]["steps_per_cpu_s"]
            )
            for other in ("peer", "eager")
        }
    return found


def break_even(cost: float, ours: float, theirs: float) -> float | None:
    """Steps n with cost + n / ours = n / theirs; None where compiling never pays."""
    gain = 1 / theirs - 1 / ours
    return None if gain <= 0 else cost / gain


# ------------------------------------------------------------------------------------------------------------- returns


def returns(options: argparse.Namespace, setting: str, kept: dict[str, Any], write: Any) -> None:
    """Train each library at the same budget on every seed, and compare what came out; fills `kept`."""
    steps, seeds, episodes = (1000, 2, 10) if options.tiny else RETURNS[setting]
    done = {(run["arm"], run["seed"]) for run in kept["runs"]}
    budget = {"part": "returns", "total_steps": steps, "episodes": episodes}
    with tempfile.TemporaryDirectory() as scratch:
        for arm, seed in [(arm, seed) for seed in range(seeds) for arm in ("peer", "eager")]:
            if (arm, seed) not in done:
                kept["runs"].append(launch(options, setting, arm, Path(scratch), seed=seed, **budget))
                write()
    means = {
        arm: [float(np.mean(run["returns"])) for run in kept["runs"] if run["arm"] == arm] for arm in ("peer", "eager")
    }
    kept |= {"steps": steps, "episodes": episodes, "means": means}
    kept["arms"] = {arm: over_seeds(values) for arm, values in means.items()}
    kept["difference"] = difference(means["eager"], means["peer"])
    kept["not_worse"] = kept["difference"]["high"] >= 0


def difference(ours: list[float], theirs: list[float], *, resamples: int = 10_000) -> dict[str, float]:
    """Difference of the two interquartile means, with seeds resampled on each side."""
    random = np.random.default_rng(0)
    drawn = [
        interquartile_mean(np.asarray(side)[random.integers(0, len(side), (resamples, len(side)))])
        for side in (ours, theirs)
    ]
    low, high = np.quantile(drawn[0] - drawn[1], [0.025, 0.975])
    return {
        "estimate": float(interquartile_mean(ours) - interquartile_mean(theirs)),
        "low": float(low),
        "high": float(high),
    }


# ------------------------------------------------------------------------------------------------------------- showing


def table(report: dict[str, Any]) -> str:
    lines = []
    for setting, found in report.get("throughput", {}).items():
        said = found["verdict"]
        lines.append(
            f"\n{setting}: {said['headline']} {said['speedup']:.2f}x (needed {said['needed']})"
            + ("" if found["machine_was_quiet"] else "  - other work was running: do not trust these times")
        )
        for name, arm in found["arms"].items():
            lines.append(
                f"  {name:<9} {arm['steps_per_cpu_s']:8.0f} steps/cpu-s {arm['steps_per_wall_s']:8.0f} steps/s "
                f"{arm['speedup']['steps_per_cpu_s']:5.2f}x {arm['speedup']['steps_per_wall_s']:5.2f}x"
            )
        if found.get("full_minibatches", 1.0) < 0.9:
            lines.append(f"  only {found['full_minibatches']:.0%} of the minibatches were full and ran compiled")
        for name, cost in found.get("warm_up", {}).items():
            even = [cost[f"break_even_steps_against_{other}"] for other in ("peer", "eager")]
            told_even = ", ".join("never" if value is None else f"{value:,.0f}" for value in even)
            lines.append(
                f"  compile, {name}: {cost['cpu_s']:.1f} cpu-s, {cost['wall_s']:.1f} s; pays after {told_even} steps "
                "(against peer, eager)"
            )
    for setting, found in report.get("returns", {}).items():
        if "arms" not in found:
            continue
        both = ", ".join(f"{name} {told(value)}" for name, value in found["arms"].items())
        gap = found["difference"]
        lines.append(f"\n{setting}: return after {found['steps']:,} steps: {both}")
        lines.append(
            f"  difference {gap['estimate']:.1f} [{gap['low']:.1f}, {gap['high']:.1f}], not worse: {found['not_worse']}"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    speeds = report.get("throughput", {})
    scores = {name: found for name, found in report.get("returns", {}).items() if "arms" in found}
    panels = len(speeds) + len(scores)
    figure, axes = plt.subplots(1, panels, figsize=(2.4 * panels, 3.2), squeeze=False, layout="constrained")
    for axis, (setting, found) in zip(axes[0], speeds.items(), strict=False):
        arms = found["arms"]
        bars = axis.bar(
            list(arms), [arm["steps_per_cpu_s"] for arm in arms.values()], color=[COLOURS[arm] for arm in arms]
        )
        axis.bar_label(bars, [f"{arm['speedup']['steps_per_cpu_s']:.1f}x" for arm in arms.values()], padding=2)
        axis.set_title(setting, fontsize="medium")
        axis.set_ylabel("steps per CPU second")
    for axis, (setting, found) in zip(axes[0][len(speeds) :], scores.items(), strict=True):
        for place, (arm, values) in enumerate(found["means"].items()):
            axis.scatter([place] * len(values), values, color=COLOURS[arm], s=14)
            axis.hlines(found["arms"][arm]["iqm"], place - 0.25, place + 0.25, color=COLOURS[arm])
        axis.set_xticks(range(len(found["means"])), list(found["means"]))
        axis.set_xlim(-0.6, 1.6)
        axis.set_title(f"{setting}, {found['steps']:,} steps", fontsize="medium")
        axis.set_ylabel("return, each seed and IQM")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelrotation=30)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
