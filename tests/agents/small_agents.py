"""Agents small enough for a test of a second, and a look at what one iteration does to them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlalign.agents.agent import Agent
from rlalign.buffers import Rollout
from tests.agents.tiny_environments import ANY

QUIET = {"episodes": 2, "num_envs": 2, "video": False}


def small(cls: type, env: Any = "CartPole-v1", **config: Any) -> Any:
    defaults = {
        "num_envs": 4,
        "rollout_steps": 16,
        "minibatch_size": 16,
        "network": {"hidden": [8, 8]},
        "eval": QUIET,
    }
    known = {name: value for name, value in defaults.items() if name not in config and _takes(cls, name)}
    return cls(env, **known, **config)


def in_spaces(cls: type, *, observation: str = "box", action: str = "discrete", mask: str = "", **config: Any) -> Any:
    kwargs = {"observation": observation, "action": action, "mask": mask}
    return small(cls, ANY, kwargs=kwargs, **config)


def _takes(cls: type, name: str) -> bool:
    return name in ("num_envs", "network", "eval") or name in cls.config_class.__dataclass_fields__


@dataclass(frozen=True)
class Iteration:
    """What an iteration started from, learned from, and said."""

    actor: nn.Module
    critic: nn.Module | None
    rollout: Rollout
    metrics: dict[str, float]


def iterated(agent: Agent) -> Iteration:
    """Carry out one iteration; the networks from before are kept in double precision."""
    holder = agent.model if "model" in vars(agent) else agent
    actor = copy.deepcopy(holder.actor).double()
    critic = copy.deepcopy(holder.critic).double() if "model" in vars(agent) else None
    collected: list[Rollout] = []
    collect = agent.collect

    def keeping() -> Rollout:
        collected.append(collect())
        return collected[-1]

    agent.collect = keeping
    metrics = agent.iterate()
    agent.collect = collect
    agent.iteration += 1
    return Iteration(actor, critic, collected[0], metrics)


def decided(rollout: Rollout, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything about the real decisions, one per row, in double precision."""
    facts = {"log_prob_old": rollout.log_prob_old, **more}
    facts |= {name: entry.value for name, entry in rollout.inputs.items()}
    rows = {name: value[rollout.mask] for name, value in facts.items()}
    return {name: value.double() if value.is_floating_point() else value for name, value in rows.items()}
