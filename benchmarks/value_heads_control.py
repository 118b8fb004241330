"""PPO on the pole with noise in the rewards: squared error, two-hot and HL-Gauss critics.

    python benchmarks/value_heads_control.py                    # 40 runs; stop it any time, it goes on where it was

Writes `results/value_heads_control.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
from cells import Cells, over_seeds, told

from rlalign.agents import PPO

HEADS: dict[str, dict[str, Any]] = {
    "mse": {"value_head": "mse"},
    "mse_scaled": {"value_head": "mse", "normalize": {"rewards": True}},
    "two_hot": {"value_head": "two_hot"},
    "hl_gauss": {"value_head": "hl_gauss"},
}
NOISES = (0.0, 8.0)
SETTINGS = {
    "num_envs": 8,
    "rollout_steps": 128,
    "minibatch_size": 256,
    "update_epochs": 10,
    "learning_rate": 1e-3,
    "advantage": {"type": "gae", "gamma": 0.98, "gae_lambda": 0.9},
}
EPISODES = 20
COLOURS = {"mse": "#9aa5ad", "mse_scaled": "#55606a", "two_hot": "#d08a2e", "hl_gauss": "#1b6ca8"}


class NoisyReward(gym.RewardWrapper):
    """Adds `noise` times a uniform number in [0, 1] to each reward."""

    def __init__(self, env: gym.Env, noise: float):
        super().__init__(env)
        self.noise = noise

    def reward(self, reward: Any) -> float:
        return float(reward) + self.noise * float(self.np_random.uniform())


def noisy_pole(noise: float = 0.0) -> gym.Env:
    return NoisyReward(gym.make("CartPole-v1", disable_env_checker=True).unwrapped, noise)


gym.register("NoisyPole-v0", entry_point=noisy_pole, max_episode_steps=500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40_000, help="environment steps per run")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/value_heads_control"))
    args = parser.parse_args()
    cells = Cells(args.out.with_suffix(".json"), {"steps": args.steps, "episodes": EPISODES, **SETTINGS})
    # The noisy task first: an interrupted benchmark has that one.
    keys = [
        {"noise": noise, "seed": seed, "head": head}
        for noise in reversed(NOISES)
        for seed in range(args.seeds)
        for head in HEADS
    ]
    for key in cells.missing(keys):
        outcome = run(**key, steps=args.steps)
        cells.keep(key, outcome)
        print(key, f"{outcome['curve_mean']:.0f} {outcome['final']:.0f} {outcome['cpu_s']:.0f} cpu-s", flush=True)
    summary = summarise(cells)
    cells.write({"summary": summary})
    draw(cells, summary, args.out.with_suffix(".png"))
    print(table(summary))


def run(*, head: str, noise: float, seed: int, steps: int) -> dict[str, Any]:
    """Train one agent; episode lengths are the pole's own returns, without noise."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        agent = PPO(
            "NoisyPole-v0",
            kwargs={"noise": noise},
            seed=seed,
            run_dir=Path(scratch) / "run",
            video=False,
            episodes=EPISODES,
            **HEADS[head],
            **SETTINGS,
        )
        curve: list[dict[str, float]] = []
        for metrics in agent.steps(total_env_steps=steps):
            point = {"step": agent.step, "length": metrics.get("episode/length_mean", 0.0)}
            curve.append(point | {"explained": metrics["value/explained_variance"]})
        final = agent.evaluate()["eval/length_mean"]
    return {
        "curve": curve,
        "curve_mean": sum(point["length"] for point in curve) / len(curve),
        "explained_mean": sum(point["explained"] for point in curve) / len(curve),
        "final": final,
        "cpu_s": time.process_time() - started,
    }


def summarise(cells: Cells) -> dict[str, Any]:
    """(noise, head) -> what is reported, over the seeds there are."""
    return {
        f"{noise:g}": {
            head: {name: over_seeds([run[name] for run in runs]) for name in ("curve_mean", "final", "explained_mean")}
            for head in HEADS
            if (runs := cells.where(noise=noise, head=head))
        }
        for noise in NOISES
        if cells.where(noise=noise)
    }


def table(summary: dict[str, Any]) -> str:
    """Draw the summary as Markdown."""
    lines = [
        "| noise | head | seeds | mean of the learning curve | after training | explained variance |",
        "|---" * 6 + "|",
    ]
    for noise, heads in summary.items():
        for head, found in heads.items():
            cells = [told(found["curve_mean"]), told(found["final"]), told(found["explained_mean"], 2)]
            lines.append("| " + " | ".join([noise, head, str(found["final"]["seeds"]), *cells]) + " |")
    return "\n".join(lines)


def draw(cells: Cells, summary: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(summary), figsize=(4.2 * len(summary), 3.2), sharey=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for axis, (noise, heads) in zip(axes[0], summary.items(), strict=True):
        for head in heads:
            runs = [run["curve"] for run in cells.where(noise=float(noise), head=head)]
            points = list(zip(*runs, strict=False))
            found = [over_seeds([point["length"] for point in column]) for column in points]
            steps = [column[0]["step"] / 1000 for column in points]
            axis.plot(steps, [f["iqm"] for f in found], color=COLOURS[head], label=head)
            if len(runs) > 1:
                axis.fill_between(
                    steps, [f["low"] for f in found], [f["high"] for f in found], color=COLOURS[head], alpha=0.2, lw=0
                )
        axis.set_title(f"reward 1 + {noise} U(0, 1)" if float(noise) else "reward 1", fontsize="medium")
        axis.set_xlabel("environment steps / 1000")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("length of the last 100 episodes")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
