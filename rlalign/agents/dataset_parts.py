"""What every dataset format comes down to: checked episodes, and the scores between which policies are placed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlalign.buffers.transitions import Episode, Transitions
from rlalign.config import ConfigError

FIELDS = ("observations", "actions", "rewards", "terminated", "truncated")


class DatasetError(ConfigError):
    """A dataset that cannot be used; the message names the file, the episode and the field."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What a dataset says about its environment and its scores."""

    env_id: str | None = None
    ref_min_score: float | None = None
    """Mean return of a random policy."""
    ref_max_score: float | None = None
    """Mean return of the best policy at hand."""


@dataclass(frozen=True, eq=False, kw_only=True)
class OfflineDataset:
    """Transitions and where they come from."""

    source: str
    transitions: Transitions
    reference: Reference


def checked_episode(arrays: Mapping[str, Any], where: str) -> Episode:
    """One episode from the arrays named in `FIELDS`: floats become float32, discrete actions int64.

    Args:
        arrays: All five fields.
        where: How messages name the episode.

    Raises:
        DatasetError: A field of the wrong kind or length, a number that is not finite, an end inside the episode.
    """
    try:
        return Episode(**{name: _READERS[name](name, np.asarray(arrays[name])) for name in FIELDS})
    except ValueError as error:
        raise DatasetError(f"{where}: {error}") from error


def joined(episodes: Sequence[Episode], source: str) -> Transitions:
    """The steps of all episodes.

    Raises:
        DatasetError: There are none, or they differ in kind.
    """
    try:
        return Transitions.from_episodes(episodes)
    except ValueError as error:
        raise DatasetError(f"{source}: {error}") from error


def _observations(name: str, array: np.ndarray) -> Tensor:
    _check_numbers(name, array)
    if array.dtype.kind == "f":
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array.astype(array.dtype if array.dtype in (np.uint8, np.bool_) else np.int64))


def _actions(name: str, array: np.ndarray) -> Tensor:
    _check_numbers(name, array)
    if array.dtype.kind != "f":
        return torch.from_numpy(array.astype(np.int64))
    floats = torch.from_numpy(array.astype(np.float32))
    return floats[:, None] if floats.ndim == 1 else floats


def _rewards(name: str, array: np.ndarray) -> Tensor:
    _check_numbers(name, array)
    _check_flat(name, array)
    return torch.from_numpy(array.astype(np.float32))


def _flags(name: str, array: np.ndarray) -> Tensor:
    _check_numbers(name, array)
    _check_flat(name, array)
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise ValueError(f"`{name}` must be true or false, got {wrong[0]}.")
    return torch.from_numpy(array.astype(bool))


_READERS = {
    "observations": _observations,
    "actions": _actions,
    "rewards": _rewards,
    "terminated": _flags,
    "truncated": _flags,
}


def _check_numbers(name: str, array: np.ndarray) -> None:
    if array.ndim == 0 or array.dtype.kind not in "fiub":
        raise ValueError(f"`{name}` must be an array of numbers, got {array.dtype} of shape {array.shape}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        step, *entry = np.argwhere(~np.isfinite(array))[0].tolist()
        place = f"step {step}, entry {entry}" if entry else f"step {step}"
        raise ValueError(f"`{name}` is {array[(step, *entry)]} at {place}; every number must be finite.")


def _check_flat(name: str, array: np.ndarray) -> None:
    if array.ndim != 1:
        raise ValueError(f"`{name}` must be one number per step, got shape {array.shape}.")
