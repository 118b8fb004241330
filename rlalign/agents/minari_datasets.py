"""Minari datasets in and out, without a network: https://minari.farama.org."""

import re
import warnings
from typing import Any

import numpy as np
import torch

from rlalign.agents.dataset_parts import DatasetError, OfflineDataset, Reference, checked_episode, joined
from rlalign.buffers.transitions import Episode, Transitions


def load_minari(dataset_id: str) -> OfflineDataset:
    """Read a Minari dataset that is on this machine.

    Raises:
        DatasetError: It is not there, or not made of plain arrays; otherwise as `load_dataset`.
    """
    minari = _minari()
    try:
        dataset = minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise DatasetError(
            f"{dataset_id}: no such file, folder, or Minari dataset on this machine; `minari download {dataset_id}` "
            "fetches a published one."
        ) from error
    episodes = []
    for number, data in enumerate(dataset.iterate_episodes()):
        where = f"{dataset_id}, episode {number}"
        for name, value in (("observations", data.observations), ("actions", data.actions)):
            if not isinstance(value, np.ndarray):
                raise DatasetError(f"{where}: `{name}` is a {type(value).__name__}; only plain arrays are supported.")
        arrays = {"observations": data.observations, "actions": data.actions, "rewards": data.rewards}
        arrays |= {"terminated": data.terminations, "truncated": data.truncations}
        episodes.append(checked_episode(arrays, where))
    metadata, spec = dataset.storage.metadata, dataset.spec.env_spec
    reference = Reference(
        env_id=None if spec is None else spec.id,
        ref_min_score=metadata.get("ref_min_score"),
        ref_max_score=metadata.get("ref_max_score"),
    )
    return OfflineDataset(source=dataset_id, transitions=joined(episodes, dataset_id), reference=reference)


def save_minari(
    transitions: Transitions,
    dataset_id: str,
    *,
    observation_space: Any,
    action_space: Any,
    reference: Reference | None = None,
    algorithm: str = "unknown",
    description: str = "",
) -> None:
    """Write whole episodes as a local Minari dataset, under `MINARI_DATASETS_PATH` or `~/.minari/datasets`.

    Args:
        transitions: Whole episodes in order.
        dataset_id: Such as `pendulum/medium-v0`; must not exist yet.
        observation_space: Gymnasium space of one observation.
        action_space: Gymnasium space of one action.
        reference: Its scores are stored, and its `env_id`, so that Minari can recover the environment.
        algorithm: Who acted.
        description: One sentence for the reader of the dataset.

    Raises:
        DatasetError: The id is taken or malformed, or observations are images, which Minari stores as lossy JPEG.
    """
    minari = _minari()
    if not re.fullmatch(r"[-\w/]+-v\d+", dataset_id):
        raise DatasetError(
            f"{dataset_id}: a Minari id is letters, digits, `-`, `_` and `/`, and ends in a version: `-v0`."
        )
    if transitions.observations.dtype == torch.uint8 and transitions.observations.ndim == 4:
        raise DatasetError(f"{dataset_id}: Minari stores images as lossy JPEG; save them to a `.npz` path instead.")
    reference = reference or Reference()
    buffers = [_episode_buffer(number, episode) for number, episode in enumerate(transitions.episodes())]
    with warnings.catch_warnings():
        # It asks for author, e-mail and permalink, which only a publisher can give.
        warnings.filterwarnings("ignore", category=UserWarning)
        try:
            dataset = minari.create_dataset_from_buffers(
                dataset_id,
                buffers,
                env=reference.env_id,
                observation_space=observation_space,
                action_space=action_space,
                algorithm_name=algorithm,
                description=description,
            )
        except ValueError as error:
            raise DatasetError(f"{dataset_id}: {error}") from error
    # Given to the call above they would be dropped without an environment, and completed by playing in it with one.
    scores = {"ref_min_score": reference.ref_min_score, "ref_max_score": reference.ref_max_score}
    dataset.storage.update_metadata({name: score for name, score in scores.items() if score is not None})


def _episode_buffer(number: int, episode: Episode) -> Any:
    from minari.data_collector import EpisodeBuffer

    return EpisodeBuffer(
        id=number,
        observations=episode.observations.cpu().numpy(),  # pyright: ignore[reportArgumentType]  # says list
        actions=episode.actions.cpu().numpy(),  # pyright: ignore[reportArgumentType]
        rewards=episode.rewards.tolist(),
        terminations=episode.terminated.tolist(),
        truncations=episode.truncated.tolist(),
        infos={},
    )


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise DatasetError("Minari datasets need the package: pip install 'rlalign[agents]' 'minari[hdf5]'.") from error
    return minari
