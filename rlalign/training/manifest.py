"""The list of a checkpoint's files with their hashes: written last, it says the checkpoint is complete."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
FILE_NAME = "manifest.json"
_MEMBER = re.compile(r"[A-Za-z0-9_-]{1,80}\.(json|safetensors)")
_LARGEST_BYTES = 1 << 22
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".zip", ".joblib")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or must not be read; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int

    sequence: int
    """Counts saves of a run, so the newest is known even after training went back to an earlier step."""

    files: dict[str, dict[str, Any]]
    """For each file its `bytes` and `sha256`."""

    versions: dict[str, str]
    schema: int = SCHEMA

    def to_json(self) -> str:
        body = asdict(self)
        return json.dumps({"sha256": _body_hash(body), "manifest": body}, indent=1) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read and check a checkpoint's manifest.

        Raises:
            CheckpointError: It is missing, damaged, from a newer release, or names anything but plain JSON and
                safetensors files inside the folder.
        """
        path = folder / FILE_NAME
        if folder.is_symlink() or path.is_symlink():
            raise CheckpointError(f"{path} is reached through a symbolic link, which checkpoints never contain.")
        try:
            with path.open("rb") as file:
                document = json.loads(file.read(_LARGEST_BYTES))
            body = document["manifest"]
            if document["sha256"] != _body_hash(body):
                raise ValueError("its checksum does not match")
        except FileNotFoundError:
            raise CheckpointError(_missing(folder)) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}.") from error
        return cls._checked(path, body)

    @classmethod
    def _checked(cls, path: Path, body: Mapping[str, Any]) -> "Manifest":
        try:
            if body["schema"] != SCHEMA:
                raise NewerSchemaError(
                    f"{path} has schema {body['schema']!r}, written by rlalign {body['versions'].get('rlalign')}; this "
                    f"release reads schema {SCHEMA}. Use the release that wrote it."
                )
            manifest = cls(**body)
            if not all(set(entry) == {"bytes", "sha256"} for entry in manifest.files.values()):
                raise ValueError("a file entry needs its size and hash")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is malformed: {error!r}.") from error
        if not (isinstance(manifest.step, int) and isinstance(manifest.sequence, int)):
            raise CheckpointError(f"{path} is malformed: its step or sequence is not an integer.")
        for name in manifest.files:
            if Path(name).suffix in PICKLE_SUFFIXES:
                raise CheckpointError(pickle_refusal(path.parent / name))
            if not _MEMBER.fullmatch(name) or name == FILE_NAME:
                raise CheckpointError(f"{path} names the file {name!r}, which cannot be part of a checkpoint.")
        return manifest


class NewerSchemaError(CheckpointError):
    """The checkpoint is whole, but this release cannot read it; falling back to an older one would lose work."""


def pickle_refusal(path: Path) -> str:
    """Say why a pickle-based file is refused and how to convert one that is trusted."""
    return (
        f"{path} is a pickle-based file: loading it can run any code hidden in it, so rlalign reads only safetensors "
        "and JSON. If you trust its origin, convert it once in a sandbox: "
        "`safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')`."
    )


def _missing(folder: Path) -> str:
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES) if folder.is_dir() else []
    if pickles:
        return pickle_refusal(pickles[0])
    return f"{folder} is not a complete checkpoint: it has no {FILE_NAME}."


def _body_hash(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
