"""Play whole episodes with frozen statistics and raw rewards, and say how sure the mean return is."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from rlalign.agents.config import AgentEvalConfig
from rlalign.agents.envs import Array, Environments, require_end
from rlalign.training.intervals import bootstrap_interval, standard_error
from rlalign.training.journal import Journal
from rlalign.training.seeding import generator

Decide = Callable[..., tuple[Array, dict[str, Array]]]
"""(observations, info, *, random) -> (actions, what is known of them)."""
EPISODE_STEP = "rlalign_episode_step"
"""Entry of `info` given to `decide`: decisions each copy's episode has behind it, for policies that act by the step."""


class Evaluator:
    """Evaluates an agent before, during and after training.

    Every evaluation plays the same starts, each copy the same number of them, so that two evaluations are compared
    start by start and short episodes do not count more often than long ones.

    Args:
        environments: Copies of their own; None when there is no environment (offline data alone).
        decide: How the agent acts now.
        seed: Decides the starts.
    """

    def __init__(self, environments: Environments | None, decide: Decide, cfg: AgentEvalConfig, *, seed: int):
        self.environments, self.decide, self.cfg, self.seed = environments, decide, cfg, seed
        self.best, self.stale, self.evaluated_at = -math.inf, 0, -1

    @property
    def out_of_patience(self) -> bool:
        """`eval.patience` evaluations in a row brought nothing better."""
        return self.cfg.patience is not None and self.stale >= self.cfg.patience

    def due(self, before: int, now: int) -> bool:
        """Whether training has crossed a multiple of `eval.every` between two counts."""
        return bool(self.cfg.every) and now // self.cfg.every > before // self.cfg.every

    def record(self, step: int, journal: Journal) -> dict[str, float]:
        """Evaluate and log, unless this step was evaluated already."""
        if self.environments is None or self.evaluated_at == step:
            return {}
        returns, lengths = self.play(self.cfg.episodes)
        metrics = summary(returns, lengths)
        journal.samples(f"eval-{step:09d}", _rows(step, returns, lengths))
        journal.evaluation(step, metrics)
        self.evaluated_at = step
        if metrics["eval/return_mean"] > self.best:
            self.best, self.stale = metrics["eval/return_mean"], 0
        else:
            self.stale += 1
        return metrics

    def play(self, episodes: int) -> tuple[Array, Array]:
        """Returns and lengths of `episodes` whole episodes, in the order of their starts."""
        envs = self.environments
        assert envs is not None
        rounds = math.ceil(episodes / envs.num_envs)
        random = None if self.cfg.deterministic else generator(self.seed, "actions")
        played = [self._round(envs, number, random) for number in range(rounds)]
        returns, lengths = (np.concatenate(parts)[:episodes] for parts in zip(*played, strict=True))
        return returns, lengths

    def _round(self, envs: Environments, number: int, random: torch.Generator | None) -> tuple[Array, Array]:
        """One episode in every copy, all from their starts to their ends."""
        first = self.seed % 2**30 + number * envs.num_envs
        observation = envs.reset(seeds=[first + index for index in range(envs.num_envs)])
        returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=np.int64)
        running = np.ones(envs.num_envs, dtype=bool)
        while running.any():
            require_end(int(lengths.max()), envs.name)
            step = envs.step(self.decide(observation, {**envs.info, EPISODE_STEP: lengths}, random=random)[0])
            returns += np.where(running, step.rewards, 0.0)
            lengths += running
            running &= ~(step.terminated | step.truncated)
            observation = step.observation
        return returns, lengths

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stale": self.stale, "evaluated_at": self.evaluated_at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.stale, self.evaluated_at = state["best"], state["stale"], state["evaluated_at"]


def summary(returns: Array, lengths: Array) -> dict[str, float]:
    """Mean return with its standard error and 95 % bootstrap interval."""
    interval = bootstrap_interval(returns.tolist())
    return {
        "eval/return_mean": float(returns.mean()),
        "eval/return_stderr": standard_error(returns),
        "eval/return_low": interval.low,
        "eval/return_high": interval.high,
        "eval/return_min": float(returns.min()),
        "eval/length_mean": float(lengths.mean()),
        "eval/n": float(len(returns)),
    }


def _rows(step: int, returns: Array, lengths: Array) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "episode": index,
            "reward": float(value),
            "length": int(length),
        }
        for index, (value, length) in enumerate(zip(returns.tolist(), lengths.tolist(), strict=True))
    ]
