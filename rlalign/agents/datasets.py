"""Recorded episodes in and out: `.npz` files, folders of them, and Minari datasets.

A `.npz` file holds arrays under these names, and is never unpickled:

    observations     [T + 1, ...]   float, integer or uint8; the last row is what followed the last action
    actions          [T] or [T, k]  integers (discrete) or [T, dims] floats (continuous)
    rewards          [T]
    terminated       [T] bool       true at most at the last step: the episode ended
    truncated        [T] bool       true at most at the last step: the episode was cut, as by a time limit
    lengths          [E] int        optional: the file holds E episodes one after another, of that many steps each
                                    (`observations` then has T + E rows)
    env_id, ref_min_score, ref_max_score    optional, one value each
"""

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.agents.dataset_parts import FIELDS, DatasetError, OfflineDataset, Reference, checked_episode, joined
from rlalign.agents.minari_datasets import load_minari, save_minari
from rlalign.buffers.transitions import Episode, Transitions

__all__ = [
    "DatasetError",
    "OfflineDataset",
    "Reference",
    "load_dataset",
    "rlalign_score",
    "save_minari",
    "save_npz",
    "scaled_rewards",
]


def load_dataset(source: str | Path) -> OfflineDataset:
    """Read a `.npz` file, a folder of them (in order of their names), a set that an installed package carries, or a
    Minari dataset that is on this machine.

    Args:
        source: A path; `package:name`, which is `data/name.npz` in that package; or a Minari id such as
            `pendulum/medium-v0`. What exists as a path is read as one.

    Raises:
        DatasetError: What is wrong, with file or id, episode and field.
    """
    path = Path(source)
    if path.is_dir():
        return _from_files(sorted(path.glob("*.npz")), path)
    if path.is_file() or path.suffix == ".npz":
        return _from_files([path], path)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[\w.-]+", str(source)):
        return _from_package(str(source))
    return load_minari(str(source))


def save_npz(transitions: Transitions, target: str | Path, *, reference: Reference | None = None) -> None:
    """Write whole episodes: into one file where `target` ends in `.npz`, else into a folder with a file for each.

    Raises:
        DatasetError: The folder holds `.npz` files already, which would mix with the new ones.
    """
    target, extra = Path(target), _reference_arrays(reference or Reference())
    if target.suffix == ".npz":
        _write(target, _stacked(list(transitions.episodes())) | extra)
        return
    if any(target.glob("*.npz")):
        raise DatasetError(f"{target}: holds .npz files already; choose an empty folder.")
    for number, episode in enumerate(transitions.episodes()):
        arrays = {name: vars(episode)[name].cpu().numpy() for name in FIELDS}
        _write(target / f"episode_{number:06d}.npz", arrays | extra)


def rlalign_score(returns: Float[Tensor, "*shape"], reference: Reference) -> Float[Tensor, "*shape"]:
    """Place returns between a random policy (0) and the best one at hand (100).

        score = 100 (return - ref_min_score) / (ref_max_score - ref_min_score)

    The reference scores are the dataset's own. It is called the rlalign score: D4RL's has other references, other
    versions of the environments and other data, so the two must not be compared.

    Raises:
        DatasetError: The dataset has no reference scores, or they are equal.
    """
    low, high = reference.ref_min_score, reference.ref_max_score
    if low is None or high is None:
        raise DatasetError("this dataset stores no `ref_min_score` and `ref_max_score`, so returns have no score.")
    if low == high:
        raise DatasetError(f"`ref_min_score` and `ref_max_score` are both {low:g}, so returns have no score.")
    return 100 * (returns - low) / (high - low)


def scaled_rewards(transitions: Transitions, rewards: Literal["raw", "return_range", "none"]) -> Transitions:
    """The transitions with the rewards a config asks for (`rewards`); `none` sets them to 0, for imitation.

    Raises:
        ValueError: `return_range` and all episodes have the same return.
    """
    match rewards:
        case "raw":
            return transitions
        case "return_range":
            return transitions.with_rewards(transitions.rewards * transitions.reward_scale())
        case "none":
            return transitions.with_rewards(torch.zeros_like(transitions.rewards))


def _from_package(source: str) -> OfflineDataset:
    package, _, name = source.partition(":")
    try:
        folder = resources.files(package) / "data"
    except ModuleNotFoundError as error:
        raise DatasetError(f"{source}: the package `{package}` is not installed.") from error
    file = folder / f"{name}.npz"
    if not file.is_file():
        held = [one.name[:-4] for one in folder.iterdir() if one.name.endswith(".npz")] if folder.is_dir() else []
        raise DatasetError(
            f"{source}: `{package}` carries no such dataset; it has {', '.join(sorted(held)) or 'none'}."
        )
    with resources.as_file(file) as path:
        return replace(_from_files([path], path), source=source)


def _from_files(files: Sequence[Path], source: Path) -> OfflineDataset:
    if not files:
        raise DatasetError(f"{source}: the folder holds no .npz file.")
    episodes: list[Episode] = []
    references: dict[Reference, Path] = {}
    for file in files:
        arrays = _read(file)
        episodes += [checked_episode(part, where) for part, where in _split(arrays, file)]
        references.setdefault(_reference(arrays, file), file)
    if len(references) > 1:
        one, two, *_ = references.values()
        raise DatasetError(f"{one} and {two} disagree about `env_id`, `ref_min_score` or `ref_max_score`.")
    return OfflineDataset(
        source=str(source), transitions=joined(episodes, str(source)), reference=next(iter(references))
    )


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DatasetError(f"{file}: is a single array; an episode is a .npz with {', '.join(FIELDS)}.")
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"{file}: no such file.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DatasetError(f"{file}: cannot be read as .npz without pickle ({error}).") from error


def _split(arrays: Mapping[str, np.ndarray], file: Path) -> Iterator[tuple[dict[str, np.ndarray], str]]:
    """The episodes of one file, each with the words that name it."""
    missing = [name for name in FIELDS if name not in arrays]
    if missing:
        raise DatasetError(f"{file}: `{missing[0]}` is missing; it has {', '.join(sorted(arrays)) or 'nothing'}.")
    if "lengths" not in arrays:
        yield {name: arrays[name] for name in FIELDS}, str(file)
        return
    lengths = arrays["lengths"]
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not lengths.size or (lengths < 1).any():
        raise DatasetError(f"{file}: `lengths` must be a row of positive integers, got {lengths.dtype} {lengths}.")
    steps, count = int(lengths.sum()), len(lengths)
    for name in FIELDS:
        expected = steps + count if name == "observations" else steps
        if arrays[name].shape[:1] != (expected,):
            raise DatasetError(
                f"{file}: `{name}` has shape {arrays[name].shape}, but `lengths` asks for {expected} rows: {count} "
                f"episodes, {steps} steps{', one observation more for each episode' if expected != steps else ''}."
            )
    begin = 0
    for number, length in enumerate(lengths.tolist()):
        part = {name: arrays[name][begin : begin + length] for name in FIELDS}
        part["observations"] = arrays["observations"][begin + number : begin + number + length + 1]
        yield part, f"{file}, episode {number}"
        begin += length


def _reference(arrays: Mapping[str, np.ndarray], file: Path) -> Reference:
    values: dict[str, Any] = {}
    for name in ("env_id", "ref_min_score", "ref_max_score"):
        if name not in arrays:
            continue
        array = arrays[name]
        if array.ndim or array.dtype.kind not in ("U" if name == "env_id" else "fiu"):
            raise DatasetError(f"{file}: `{name}` must be one value, got {array.dtype} of shape {array.shape}.")
        values[name] = str(array) if name == "env_id" else float(array)
    return Reference(**values)


def _reference_arrays(reference: Reference) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in vars(reference).items() if value is not None}


def _stacked(episodes: Sequence[Episode]) -> dict[str, np.ndarray]:
    arrays = {name: torch.cat([vars(episode)[name] for episode in episodes]).cpu().numpy() for name in FIELDS}
    return arrays | {"lengths": np.array([len(episode.rewards) for episode in episodes])}


def _write(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # pyright: ignore[reportArgumentType]  # a field is not `allow_pickle`
    os.replace(temporary, file)
