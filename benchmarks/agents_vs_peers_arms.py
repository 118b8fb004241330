"""What one process of `agents_vs_peers` does: train with one library, and say how fast it went or how well it did.

python benchmarks/agents_vs_peers_arms.py SPEC_JSON RESULT_FILE        (started by agents_vs_peers.py)
"""

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import SyncVectorEnv

EVALUATION_COPIES = 10
FIRST_START = 1_000_000
"""Seed of the first evaluation episode; training's are smaller or drawn."""

Act = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Mark:
    """When an iteration began or ended, and how many decisions had been made."""

    wall: float
    cpu: float
    steps: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Hyper-parameters of one comparison, in one vocabulary for both libraries."""

    method: str
    env: str
    num_envs: int
    rollout_steps: int
    minibatch_size: int
    epochs: int
    learning_rate: float
    gamma: float
    gae_lambda: float

    @property
    def decisions(self) -> int:
        return self.num_envs * self.rollout_steps


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One process: which arm at which setting, for how long."""

    arm: str
    part: str
    setting: Setting
    seed: int
    core: int
    iterations: int
    """Timed ones, after one to warm up."""
    total_steps: int
    """For returns."""
    episodes: int


def main() -> None:
    given = json.loads(sys.argv[1])
    spec = Spec(**given | {"setting": Setting(**given["setting"])})
    if hasattr(os, "sched_setaffinity"):  # Linux alone can pin
        os.sched_setaffinity(0, {spec.core})
    torch.set_num_threads(1)
    train = train_peer if spec.arm == "peer" else train_rlalign
    with tempfile.TemporaryDirectory() as scratch:
        marks, act = train(spec, Path(scratch))
    outcome = {
        "arm": spec.arm,
        "seed": spec.seed,
        "iterations": [interval(a, b) for a, b in zip(marks, marks[1:], strict=False)],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    if spec.part == "returns":
        outcome["returns"] = evaluate(spec, act)
    Path(sys.argv[2]).write_text(json.dumps(outcome))


def interval(start: Mark, end: Mark) -> dict[str, float]:
    return {"wall_s": end.wall - start.wall, "cpu_s": end.cpu - start.cpu, "steps": end.steps - start.steps}


def mark(steps: int) -> Mark:
    """Now. A compiler is a process of its own, and its CPU time counts."""
    children = os.times()
    return Mark(time.perf_counter(), time.process_time() + children.children_user + children.children_system, steps)


def train_peer(spec: Spec, scratch: Path) -> tuple[list[Mark], Act]:
    """Stable-Baselines3 and sb3-contrib; an iteration ends where the next rollout starts, or learning is over."""
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Marks(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[Mark] = []

        def _on_rollout_start(self) -> None:
            self.found.append(mark(self.num_timesteps))

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.found.append(mark(self.num_timesteps))

    setting = spec.setting
    shared: dict[str, Any] = {
        "n_steps": setting.rollout_steps,
        "batch_size": setting.minibatch_size,
        "learning_rate": setting.learning_rate,
        "gamma": setting.gamma,
        "gae_lambda": setting.gae_lambda,
        "policy_kwargs": {"net_arch": {"pi": [64, 64], "vf": [64, 64]}},
        "seed": spec.seed,
        "device": "cpu",
        "verbose": 0,
    }
    envs = make_vec_env(setting.env, n_envs=setting.num_envs, seed=spec.seed)
    if setting.method == "ppo":
        model = PPO("MlpPolicy", envs, n_epochs=setting.epochs, **shared)
    else:
        model = TRPO("MlpPolicy", envs, n_critic_updates=setting.epochs, **shared)
    marks = Marks()
    model.learn(total_steps(spec), callback=marks)
    return marks.found, lambda observations: model.predict(observations, deterministic=True)[0]


def train_rlalign(spec: Spec, scratch: Path) -> tuple[list[Mark], Act]:
    from rlalign.agents import PPO, TRPO

    setting = spec.setting
    shared: dict[str, Any] = {
        "num_envs": setting.num_envs,
        "vectorization": "native" if spec.arm == "native" else "sync",
        "rollout_steps": setting.rollout_steps,
        "minibatch_size": setting.minibatch_size,
        "learning_rate": setting.learning_rate,
        "advantage": {"type": "gae", "gamma": setting.gamma, "gae_lambda": setting.gae_lambda},
        "checkpoint": {"every": 0},
        "eval": {"video": False, "episodes": 1, "num_envs": 1},
        "seed": spec.seed,
        "run_dir": scratch / "run",
    }
    if setting.method == "ppo":
        compiled = spec.arm in ("compiled", "native")
        agent = PPO(setting.env, update_epochs=setting.epochs, compile=compiled, **shared)
    else:
        agent = TRPO(setting.env, critic_epochs=setting.epochs, max_grad_norm=None, **shared)
    marks = [mark(0)]
    # The last iteration to be timed is followed by no other, and the evaluation at the end comes after it.
    for _ in agent.steps(total_env_steps=total_steps(spec)):
        marks.append(mark(agent.step))
        if spec.part == "throughput" and len(marks) == spec.iterations + 2:
            break
    return marks, lambda observations: agent.predict(observations, deterministic=True)[0]


def total_steps(spec: Spec) -> int:
    return spec.total_steps if spec.part == "returns" else (spec.iterations + 1) * spec.setting.decisions


def evaluate(spec: Spec, act: Act) -> list[float]:
    """Returns of whole episodes from the same starts, the same for all: one episode in each copy, round by round."""
    env = spec.setting.env
    envs = SyncVectorEnv([lambda: gym.make(env, disable_env_checker=True)] * EVALUATION_COPIES)
    box = envs.single_action_space if isinstance(envs.single_action_space, gym.spaces.Box) else None
    found: list[float] = []
    while len(found) < spec.episodes:
        first = FIRST_START + len(found)
        observations, _ = envs.reset(seed=[first + index for index in range(EVALUATION_COPIES)])
        totals, running = np.zeros(EVALUATION_COPIES), np.ones(EVALUATION_COPIES, dtype=bool)
        while running.any():
            actions = act(observations)
            actions = actions if box is None else np.clip(actions, box.low, box.high)
            observations, rewards, terminated, truncated, _ = envs.step(actions)
            totals += np.where(running, rewards, 0.0)
            running &= ~(terminated | truncated)
        found += totals.tolist()
    envs.close()
    return found[: spec.episodes]


if __name__ == "__main__":
    main()
