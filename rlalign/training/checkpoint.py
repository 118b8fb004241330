"""Checkpoints that survive a crash at any instant, and refuse to load when a single bit is wrong."""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from rlalign.training.checkpoint_files import Encoded, encode_all, read_state, stored_bytes, verify, write_files
from rlalign.training.files import process_is_alive, sync_directory, write_atomic, write_durable
from rlalign.training.manifest import (
    FILE_NAME,
    PICKLE_SUFFIXES,
    CheckpointError,
    Manifest,
    NewerSchemaError,
    pickle_refusal,
)
from rlalign.training.versions import library_versions

__all__ = ["Checkpoint", "CheckpointError", "CheckpointWarning", "Checkpoints"]

# `.old-<pid>` is a complete checkpoint that was being replaced when its process died.
_FOLDER = re.compile(r"ckpt-(\d{6,18})(\.old-\d+)?")
_LEFT_BEHIND = re.compile(r"ckpt-\d{6,18}\.(?:tmp|old)-(\d+)")
_MARGIN_BYTES = 1 << 20


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Checkpoint:
    """A loaded state; tensors are on the CPU and own their memory."""

    step: int
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints of one run: `root/ckpt-000120/` with `<key>.json` and `<key>.safetensors` per top-level key.

    One process writes (the run directory's lock sees to it); any number may read meanwhile.

    Args:
        root: Folder that holds the checkpoints; created by the first save.
        keep: How many of the newest to keep.
    """

    def __init__(self, root: Path, *, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"`checkpoint.keep` must be at least 1, got {keep}.")
        self.root = Path(root)
        self.keep = keep

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint, then prune older ones.

        The files go to a temporary folder, are flushed, listed with their SHA-256 in a manifest and moved into place
        by one rename. Tensors are written straight from their memory.

        Args:
            step: Completed steps; names the checkpoint. Saving a step again replaces it.
            state: Top-level keys name the files; values are nested dicts, lists and tuples of tensors and JSON scalars.

        Raises:
            CheckpointError: The disk is full or refuses, or a value cannot be stored. Older checkpoints are intact and
                nothing half-written is left.
        """
        encoded = encode_all(state)
        temporary = self.root / f"{_folder_name(step)}.tmp-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._require_space(encoded)
            temporary.mkdir()
            files = write_files(temporary, encoded)
            manifest = Manifest(
                step=step,
                sequence=1 + max((m.sequence for _, m in self._readable()), default=0),
                files=files,
                versions=library_versions(),
            )
            write_durable(temporary / FILE_NAME, manifest.to_json())
            sync_directory(temporary)
            final = self._move_into_place(temporary, self.root / _folder_name(step))
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(_save_failure(self.root, step, error)) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._tidy(final)
        return final

    def load(
        self, path: Path | None = None, *, require: Iterable[str] = (), only: Iterable[str] | None = None
    ) -> Checkpoint:
        """Load one checkpoint after checking every file it reads against the manifest.

        Args:
            path: A checkpoint of this run. None takes the newest intact one and warns about each damaged one that it
                passes over.
            require: Top-level keys without which the run cannot continue, such as "optimizer" and "rng".
            only: Read just these keys, for instance ("model",) to evaluate.

        Raises:
            CheckpointError: Nothing can be loaded; a required key is missing; the file is a pickle.
        """
        if path is not None:
            return self._load(self._inside(Path(path)), tuple(require), only)
        reasons: list[str] = []
        for folder in self._newest_first(reasons):
            try:
                return self._load(folder, tuple(require), only)
            except (_MissingKeys, NewerSchemaError):
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                warnings.warn(f"passing over a damaged checkpoint: {error}", CheckpointWarning, stacklevel=2)
        if reasons:
            raise CheckpointError(f"no checkpoint in {self.root} is intact:\n- " + "\n- ".join(reasons))
        raise CheckpointError(f"there is no checkpoint in {self.root}.")

    @property
    def empty(self) -> bool:
        """Nothing was ever saved here: there is no checkpoint, not even one that `load` refuses."""
        return not self._folders()

    def latest(self) -> Path | None:
        """Newest checkpoint whose manifest is intact; hashes are checked by `load`."""
        return max(self._readable(), key=_age, default=(None, None))[0]

    def steps(self) -> list[int]:
        """Steps that have a checkpoint with an intact manifest, ascending."""
        return sorted({manifest.step for _, manifest in self._readable()})

    def _load(self, folder: Path, require: tuple[str, ...], only: Iterable[str] | None) -> Checkpoint:
        manifest = Manifest.read(folder)
        if _folder_step(folder) != manifest.step:
            raise CheckpointError(f"{folder} holds step {manifest.step}; it was renamed or copied over.")
        present = {Path(name).stem for name in manifest.files}
        wanted = present if only is None else set(only)
        if missing := (wanted | set(require)) - present:
            raise _MissingKeys(
                f"{folder} holds no {', '.join(sorted(missing))}, so the run cannot continue exactly from it. Its "
                f"{', '.join(sorted(present))} can start a new run, which will differ from an uninterrupted one."
            )
        names = [name for name in manifest.files if Path(name).stem in wanted]
        verify(folder, manifest, names)
        state = {
            name.removesuffix(".json"): read_state(folder, name, names) for name in names if name.endswith(".json")
        }
        return Checkpoint(step=manifest.step, state=state, path=folder)

    def _inside(self, path: Path) -> Path:
        if path.suffix in PICKLE_SUFFIXES:
            raise CheckpointError(pickle_refusal(path))
        folder = path if path.is_absolute() or path.parent != Path() else self.root / path
        if not _FOLDER.fullmatch(folder.name) or folder.parent.resolve() != self.root.resolve():
            raise CheckpointError(f"{path} is not a checkpoint of this run; choose one of {self.root}/ckpt-*.")
        return folder

    def _folders(self) -> list[Path]:
        if not self.root.is_dir():
            return []
        names = {entry.name for entry in self.root.iterdir() if _FOLDER.fullmatch(entry.name)}
        # Once the replacement stands, the replaced one is only waiting for its removal.
        return [self.root / name for name in sorted(names) if ".old-" not in name or name.split(".")[0] not in names]

    def _readable(self) -> list[tuple[Path, Manifest]]:
        pairs = []
        for folder in self._folders():
            try:
                pairs.append((folder, Manifest.read(folder)))
            except CheckpointError:
                continue
        return pairs

    def _newest_first(self, reasons: list[str]) -> list[Path]:
        """Readable ones by age; unreadable ones are reported and a newer release's stops the search."""
        readable: list[tuple[Path, Manifest]] = []
        for folder in reversed(self._folders()):
            try:
                readable.append((folder, Manifest.read(folder)))
            except NewerSchemaError:
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                warnings.warn(f"passing over a damaged checkpoint: {error}", CheckpointWarning, stacklevel=3)
        return [folder for folder, _ in sorted(readable, key=_age, reverse=True)]

    def _require_space(self, encoded: Encoded) -> None:
        needed = stored_bytes(encoded) + _MARGIN_BYTES
        free = shutil.disk_usage(self.root).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"the checkpoint needs {_mib(needed)} and {_mib(free)} are free")

    def _move_into_place(self, temporary: Path, final: Path) -> Path:
        old = final.with_name(f"{final.name}.old-{os.getpid()}")
        if final.is_symlink():
            final.unlink()
        elif final.exists():
            os.rename(final, old)
        os.rename(temporary, final)
        sync_directory(self.root)
        shutil.rmtree(old, ignore_errors=True)
        return final

    def _sweep(self) -> None:
        """Remove what dead processes left half-written, and restore what they were replacing."""
        for entry in self.root.iterdir():
            left = _LEFT_BEHIND.fullmatch(entry.name)
            if left is None or (int(left[1]) != os.getpid() and process_is_alive(int(left[1]))):
                continue
            final = entry.with_name(entry.name.split(".")[0])
            if ".old-" in entry.name and not final.exists():
                os.rename(entry, final)
            else:
                shutil.rmtree(entry, ignore_errors=True)

    def _tidy(self, final: Path) -> None:
        """Prune, and point `latest` at the new one for people and scripts. The save itself stands already."""
        try:
            self._prune()
            write_atomic(self.root / "latest", final.name + "\n")
        except OSError as error:
            warnings.warn(f"{final} is saved, but tidying up failed: {error}", CheckpointWarning, stacklevel=3)

    def _prune(self) -> None:
        for folder, _ in sorted(self._readable(), key=_age)[: -self.keep]:
            # Renamed first, so that a half-removed checkpoint is never taken for a damaged one.
            doomed = folder.with_name(f"{folder.name.split('.')[0]}.tmp-{os.getpid()}")
            os.rename(folder, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


class _MissingKeys(CheckpointError):
    """The checkpoint is whole but lacks state; an older one of the same run would lack it too."""


def _save_failure(root: Path, step: int, error: Exception) -> str:
    message = f"could not save step {step} in {root}: {error}. Older checkpoints are intact"
    # The safetensors writer reports the system's error only in its text.
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or "os error 28" in str(error):
        return f"{message}. Free disk space, or lower `checkpoint.keep` or save less often, then resume the run."
    return f"{message}. Check the directory's permissions and the disk, then resume the run."


def _age(pair: tuple[Path, Manifest]) -> tuple[int, int]:
    return pair[1].sequence, pair[1].step


def _folder_name(step: int) -> str:
    if step < 0:
        raise ValueError(f"`step` must not be negative, got {step}.")
    return f"ckpt-{step:06d}"


def _folder_step(folder: Path) -> int | None:
    match = _FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
