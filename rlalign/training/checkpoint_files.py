"""A checkpoint folder's files: one JSON tree and one safetensors table per top-level key, hashed and verified."""

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from rlalign.training.files import file_sha256, sync_file
from rlalign.training.manifest import FILE_NAME, CheckpointError, Manifest
from rlalign.training.state_tree import StateTreeError, decode, encode

# For each top-level key: the JSON tree and the tensors it names.
Encoded = dict[str, tuple[bytes, dict[str, Tensor]]]
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


def encode_all(state: Mapping[str, Any]) -> Encoded:
    """Split each top-level value into its tree and tensors; nothing is written yet."""
    encoded: Encoded = {}
    for key, value in state.items():
        if not _KEY.fullmatch(key) or f"{key}.json" == FILE_NAME:
            raise CheckpointError(f"checkpoint key {key!r} cannot be a file name; use letters, digits, - and _.")
        try:
            tree, tensors = encode(value)
        except (StateTreeError, RecursionError) as error:
            raise CheckpointError(f"checkpoint key {key!r}: {error}") from error
        encoded[key] = (json.dumps(tree, allow_nan=False).encode(), tensors)
    return encoded


def stored_bytes(encoded: Encoded) -> int:
    """Size on disk, but for the safetensors headers."""
    tensors = sum(t.numel() * t.element_size() for _, table in encoded.values() for t in table.values())
    return tensors + sum(len(tree) for tree, _ in encoded.values())


def write_files(folder: Path, encoded: Encoded) -> dict[str, dict[str, Any]]:
    """Write every file and return its manifest entry; each is hashed and flushed while the next is written."""
    pending: dict[str, tuple[Future[str], Future[None]]] = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for key, (tree, tensors) in encoded.items():
            paths = [folder / f"{key}.json"]
            paths[0].write_bytes(tree)
            if tensors:
                paths.append(folder / f"{key}.safetensors")
                safetensors.torch.save_file(tensors, paths[1])
            for path in paths:
                pending[path.name] = (pool.submit(file_sha256, path), pool.submit(sync_file, path))
    entries = {}
    for name, (digest, flushed) in pending.items():
        flushed.result()
        entries[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest.result()}
    return entries


def verify(folder: Path, manifest: Manifest, names: list[str]) -> None:
    """Compare each named file with the manifest: a plain file of the right size and hash, or `CheckpointError`."""
    for name in names:
        path, expected = folder / name, manifest.files[name]
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path} is {'a symbolic link' if path.is_symlink() else 'missing'}.")
        if path.stat().st_size != expected["bytes"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}.")
    try:
        with ThreadPoolExecutor(max_workers=2) as pool:
            hashes = dict(zip(names, pool.map(file_sha256, [folder / name for name in names]), strict=True))
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error}.") from error
    for name, digest in hashes.items():
        if digest != manifest.files[name]["sha256"]:
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 differs from the manifest's.")


def read_state(folder: Path, name: str, names: list[str]) -> Any:
    """Rebuild one top-level value from files that `verify` has accepted."""
    table = folder / f"{name.removesuffix('.json')}.safetensors"
    try:
        tree = json.loads((folder / name).read_bytes())
        tensors: dict[str, Tensor] = {}
        if table.name in names:
            with safetensors.safe_open(table, framework="pt") as file:
                # The file is mapped into memory; a copy stays valid whatever happens to the file later.
                tensors = {entry: file.get_tensor(entry).clone() for entry in file.keys()}  # noqa: SIM118  not a mapping
        return decode(tree, tensors)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}.") from error
