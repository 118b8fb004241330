"""Recorded transitions as a hybrid learner draws them: of all steps together, or as many of each step."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlalign.agents.dataset_parts import OfflineDataset
from rlalign.agents.datasets import load_dataset
from rlalign.agents.spaces import PLAIN, ActionInterface, ObservationParts
from rlalign.buffers.transitions import TransitionBuffer, Transitions
from rlalign.config import ConfigError


class OfflineDecisions:
    """Draws uniformly, with replacement.

    Args:
        horizon: Draw the same number from each of the first `horizon` steps; None draws from all alike.

    Raises:
        ConfigError: The data does not fit the environment, or has no episode of `horizon` steps.
    """

    def __init__(
        self, transitions: Transitions, parts: ObservationParts, actions: ActionInterface, *, horizon: int | None
    ):
        _check(transitions, parts, actions)
        held = TransitionBuffer(replace(transitions, actions=actions.from_env(transitions.actions.numpy())))
        self.size = len(held)
        if horizon is not None and int(transitions.step.max()) + 1 < horizon:
            longest = int(transitions.step.max()) + 1
            raise ConfigError(f"`horizon`={horizon}, but the dataset's longest episode has {longest} steps.")
        self.buffers = [held] if horizon is None else [held.by_step(step) for step in range(horizon)]

    def draw(self, size: int, random: torch.Generator) -> dict[str, Tensor]:
        """Name -> [R, size // R, ...] of observations, decisions, rewards, next observations and terminations."""
        drawn = [buffer.sample(size // len(self.buffers), random) for buffer in self.buffers]
        names = ("observations", "actions", "rewards", "next_observations", "terminated")
        return {name: torch.stack([vars(part)[name] for part in drawn]) for name in names}


def transitions_of(dataset: Any, path: str) -> Transitions:
    """What an agent was given as `dataset=`, or what stands at the config's `dataset`.

    Raises:
        ConfigError: Neither.
    """
    match dataset:
        case Transitions():
            return dataset
        case OfflineDataset():
            return dataset.transitions
    if not path:
        raise ConfigError("HNPG learns from recorded data too: set `dataset`, or `offline_weight` to 0.")
    return load_dataset(path).transitions


def _check(transitions: Transitions, parts: ObservationParts, actions: ActionInterface) -> None:
    if parts.composed:
        raise ConfigError(
            "recorded observations are plain arrays, and the environment's are a Dict; wrap it with "
            "gymnasium.wrappers.FlattenObservation, or set `offline_weight` to 0."
        )
    given, expected = tuple(transitions.observations.shape[1:]), tuple(parts.spaces[PLAIN].shape or ())
    if given != expected:
        raise ConfigError(f"the dataset's observations have shape {list(given)}, the environment's {list(expected)}.")
    numbers, wanted = transitions.actions[0].numel(), actions.space.sample().size
    if numbers != wanted:
        raise ConfigError(f"the dataset's actions have {numbers} numbers each, the environment's {wanted}.")
