"""What the tests of hybrid learning share: small locks, their data, and agents on them."""

from pathlib import Path
from typing import Any

import torch

from rlalign.agents.hnpg import HNPG
from rlalign.buffers.transitions import Transitions
from rlalign_envs.comblock import comblock_offline

LOCK = "rlalign_envs:CombinationLock-v0"
SMALL: dict[str, Any] = {
    "hidden": [8],
    "critic_hidden": [8],
    "critic_steps": 2,
    "offline_decisions": 12,
    "clip_actions": False,
    "num_envs": 4,
    "eval": {"episodes": 2, "num_envs": 2, "video": False},
}


def lock_data(horizon: int, episodes: int, *, seed: int = 0) -> Transitions:
    """Whole episodes of the lock's expert, step by step."""
    arrays = comblock_offline(horizon, episodes, seed=seed)
    names = ("observations", "actions", "rewards", "next_observations", "terminated", "truncated")
    flat = {name: arrays[name].reshape(horizon * episodes, *arrays[name].shape[2:]) for name in names}
    return Transitions(
        **{name: torch.from_numpy(value) for name, value in flat.items()},
        episode=torch.arange(episodes).repeat(horizon),
        step=torch.arange(horizon).repeat_interleave(episodes),
    )


def lock_agent(folder: Path, **changes: Any) -> HNPG:
    """An agent with a policy and a critic for each of three steps."""
    settings = {**SMALL, "horizon": 3, "dataset": lock_data(3, 30), "seed": 1} | changes
    return HNPG(LOCK, run_dir=folder, kwargs={"horizon": 3}, **settings)


def chain_data(length: int = 4) -> Transitions:
    """Every state and action of a chain once, as episodes of one step that go on."""
    states = torch.arange(length - 1).repeat_interleave(2)
    actions = torch.tensor([0, 1]).repeat(length - 1)
    following = torch.where(actions == 1, states + 1, (states - 1).clamp(min=0))
    there = following == length - 1
    return Transitions(
        observations=torch.nn.functional.one_hot(states, length).float(),
        actions=actions,
        rewards=there.float(),
        next_observations=torch.nn.functional.one_hot(following, length).float(),
        terminated=there,
        truncated=torch.zeros_like(there),
        episode=torch.arange(len(states)),
        step=torch.zeros_like(states),
    )


def chain_agent(folder: Path, **changes: Any) -> HNPG:
    """An agent with one policy and one critic, whose episodes are cut after three steps."""
    settings = {**SMALL, "rollout_steps": 8, "dataset": chain_data(), "max_episode_steps": 3} | changes
    return HNPG("rlalign_envs:Chain-v0", run_dir=folder, kwargs={"length": 4}, **settings)
