"""PPO on a pole whose sensors and controls are wired anew every so often, with and without Normalize-and-Project.

    python benchmarks/nap_control.py                    # 15 runs; stop it any time, it goes on where it was

Writes `results/nap_control.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from cells import Cells, over_seeds, told
from torch import nn

from rlalign.agents import PPO
from rlalign.nn.nap import dormant_metrics

ARMS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "layer_norm": {"layer_norm": True},
    "nap": {"normalize_and_project": True},
}
SETTINGS = {
    "num_envs": 8,
    "rollout_steps": 128,
    "minibatch_size": 256,
    "update_epochs": 10,
    "learning_rate": 1e-3,
    "activation": "relu",
    "advantage": {"type": "gae", "gamma": 0.98, "gae_lambda": 0.9},
}
COLOURS = {"mlp": "#9aa5ad", "layer_norm": "#d08a2e", "nap": "#1b6ca8"}
TAU = 0.025


class Wiring:
    """Which task it is now; all copies of the environment look here when an episode begins."""

    number = 0


class RewiredPole(gym.Wrapper):
    """Permutes and flips the four observations, and swaps the two actions, as the task's number says."""

    def __init__(self, env: gym.Env, seed: int):
        super().__init__(env)
        self.seed, self.order, self.signs, self.swapped = seed, np.arange(4), np.ones(4, np.float32), False

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        source = np.random.default_rng([self.seed, Wiring.number])
        self.order, self.signs = source.permutation(4), source.choice([-1.0, 1.0], 4).astype(np.float32)
        self.swapped = bool(source.integers(2))
        observation, info = self.env.reset(**options)
        return self._seen(observation), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, *rest = self.env.step(1 - action if self.swapped else action)
        return self._seen(observation), *rest

    def _seen(self, observation: np.ndarray) -> np.ndarray:
        # The sensors' ranges go with them: the space would not fit otherwise.
        return self.signs * observation[self.order]


def rewired_pole(seed: int = 0) -> gym.Env:
    env = RewiredPole(gym.make("CartPole-v1", disable_env_checker=True).unwrapped, seed)
    env.observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    return env


gym.register("RewiredPole-v0", entry_point=rewired_pole, max_episode_steps=500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10_000, help="environment steps per task")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nap_control"))
    args = parser.parse_args()
    cells = Cells(args.out.with_suffix(".json"), {"tasks": args.tasks, "steps_per_task": args.steps, **SETTINGS})
    keys = [{"seed": seed, "arm": arm} for seed in range(args.seeds) for arm in ARMS]
    for key in cells.missing(keys):
        outcome = run(**key, tasks=args.tasks, steps=args.steps)
        cells.keep(key, outcome)
        lengths = " ".join(f"{task['length']:.0f}" for task in outcome["tasks"])
        print(key, lengths, f"{outcome['cpu_s']:.0f} cpu-s", flush=True)
    summary = summarise(cells)
    cells.write({"summary": summary})
    draw(cells, args.out.with_suffix(".png"))
    print(table(summary))


def run(*, arm: str, seed: int, tasks: int, steps: int) -> dict[str, Any]:
    """Train one agent on all tasks, one after the other."""
    started, Wiring.number = time.process_time(), 0
    with tempfile.TemporaryDirectory() as scratch:
        agent = PPO(
            "RewiredPole-v0",
            kwargs={"seed": seed},
            seed=seed,
            run_dir=Path(scratch) / "run",
            video=False,
            episodes=1,
            **ARMS[arm],
            **SETTINGS,
        )
        first = hidden_norms(agent)
        curve = learn(agent, tasks, steps)
        growth = [now / before for now, before in zip(hidden_norms(agent), first, strict=True)]
        dormant = dormant_metrics(agent.model.actor.network, last_observations(agent), tau=TAU)["nap/dormant_frac"]
    return {
        "tasks": [task_summary(curve, k, steps) for k in range(tasks)],
        "norm_growth": sum(growth) / len(growth),
        "dormant": dormant,
        "curve": curve,
        "cpu_s": time.process_time() - started,
    }


def learn(agent: PPO, tasks: int, steps: int) -> list[tuple[int, float]]:
    """Switch the task every `steps`; return (step, mean length of the episodes that ended in each iteration)."""
    curve: list[tuple[int, float]] = []
    count = 0
    for metrics in agent.steps(total_env_steps=tasks * steps):
        episodes = agent.collector.episodes
        ended = min(episodes.count - count, len(episodes.lengths))
        count = episodes.count
        # No episode ends in an iteration in which the pole stood throughout, or nearly.
        length = float(np.mean(list(episodes.lengths)[-ended:])) if ended else metrics["episode/length_mean"]
        curve.append((agent.step, length))
        Wiring.number = min(agent.step // steps, tasks - 1)
    return curve


def task_summary(curve: list[tuple[int, float]], number: int, steps: int) -> dict[str, float]:
    """Mean length of episodes over the whole task, and over its last third."""
    inside = [length for step, length in curve if number * steps < step <= (number + 1) * steps]
    late = inside[-max(1, len(inside) // 3) :]
    return {"length": sum(inside) / len(inside), "late": sum(late) / len(late)}


def hidden_norms(agent: PPO) -> list[float]:
    """Norms of the hidden weights of policy and critic."""
    weights = [
        part.weight for network in (agent.model.actor, agent.model.critic) for part in linear_layers(network)[:-1]
    ]
    return [float(weight.detach().norm()) for weight in weights]


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [part for part in network.modules() if isinstance(part, nn.Linear)]


def last_observations(agent: PPO) -> torch.Tensor:
    """What the policy sees in one more rollout."""
    found = agent.collect()
    return found.inputs["vector"].value.flatten(0, 1)


def summarise(cells: Cells) -> dict[str, Any]:
    """Arm -> the first two tasks, the last two, and the state of the networks."""
    return {
        arm: {
            "first_two": over_seeds([mean_of(run["tasks"][:2], "length") for run in runs]),
            "last_two": over_seeds([mean_of(run["tasks"][-2:], "length") for run in runs]),
            "last_two_late": over_seeds([mean_of(run["tasks"][-2:], "late") for run in runs]),
            "all": over_seeds([mean_of(run["tasks"], "length") for run in runs]),
            "norm_growth": over_seeds([run["norm_growth"] for run in runs]),
            "dormant": over_seeds([run["dormant"] for run in runs]),
        }
        for arm in ARMS
        if (runs := cells.where(arm=arm))
    }


def mean_of(tasks: list[dict[str, float]], name: str) -> float:
    return sum(task[name] for task in tasks) / len(tasks)


def table(summary: dict[str, Any]) -> str:
    """Draw the summary as Markdown."""
    names = ["first_two", "last_two", "last_two_late", "all", "norm_growth", "dormant"]
    lines = ["| arm | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for arm, found in summary.items():
        values = [told(found[name], 2 if name in ("norm_growth", "dormant") else 0) for name in names]
        lines.append("| " + " | ".join([arm, str(found["all"]["seeds"]), *values]) + " |")
    return "\n".join(lines)


def draw(cells: Cells, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for arm in ARMS:
        runs = [run["tasks"] for run in cells.where(arm=arm)]
        if not runs:
            continue
        found = [over_seeds([task["length"] for task in column]) for column in zip(*runs, strict=True)]
        numbers = range(1, len(found) + 1)
        axis.plot(numbers, [f["iqm"] for f in found], color=COLOURS[arm], marker="o", ms=3, label=arm)
        if len(runs) > 1:
            low, high = [f["low"] for f in found], [f["high"] for f in found]
            axis.fill_between(numbers, low, high, color=COLOURS[arm], alpha=0.2, lw=0)
    axis.set(xlabel="task", ylabel="episode length, mean over the task", ylim=(0, None))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
