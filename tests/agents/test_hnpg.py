"""HNPG: its targets, weights and switches by arithmetic, its two fits against solved equations, and its surface."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from rlalign_envs.comblock import comblock_offline

from rlalign.agents.config_hybrid import HNPGConfig
from rlalign.agents.evaluate import EPISODE_STEP
from rlalign.agents.hnpg import HNPG
from rlalign.agents.hybrid_networks import QNetwork
from rlalign.agents.hybrid_sources import OfflineSource, OnlineSource, offline_targets, source_weights, state_values
from rlalign.agents.hybrid_step import Judged, improve, union
from rlalign.buffers.transitions import Transitions
from rlalign.config import ConfigError
from rlalign.nn.mlp import MLP
from rlalign.nn.policies import Categorical, Gaussian
from rlalign.nn.stacked import StackedMLP
from tests.reference import hybrid as reference

LOCK = "rlalign_envs:CombinationLock-v0"
SMALL: dict[str, Any] = {
    "hidden": [8],
    "critic_hidden": [8],
    "critic_steps": 2,
    "offline_decisions": 12,
    "clip_actions": False,
    "video": False,
    "episodes": 2,
    "num_envs": 2,
}


def lock_data(horizon: int, episodes: int, seed: int = 0) -> Transitions:
    arrays = comblock_offline(horizon, episodes, seed=seed)
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    flat = {name: torch.from_numpy(arrays[name].reshape(horizon * episodes, *arrays[name].shape[2:])) for name in names}
    return Transitions(
        **flat,
        episode=torch.arange(episodes).repeat(horizon),
        step=torch.arange(horizon).repeat_interleave(episodes),
    )


def lock_agent(tmp_path: Path, **changes: Any) -> HNPG:
    settings = {**SMALL, "horizon": 3, "kwargs": {"horizon": 3}} | changes
    settings["env"] = {"id": LOCK, "num_envs": settings.pop("num_envs"), "kwargs": settings.pop("kwargs")}
    settings["eval"] = {"episodes": settings.pop("episodes"), "num_envs": 2, "video": settings.pop("video")}
    environment = settings.pop("env")
    config = HNPG_keywords(environment, settings)
    return HNPG(run_dir=tmp_path / "run", dataset=config.pop("dataset", lock_data(3, 20)), **config)


def HNPG_keywords(environment: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    return {"env": environment["id"], "num_envs": environment["num_envs"], "kwargs": environment["kwargs"], **settings}
