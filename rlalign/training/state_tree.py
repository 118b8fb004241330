"""Nested state <-> a JSON tree and a flat table of tensors, exactly."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# A dict with this key in the tree is one of ours; a user's dict that has it is stored as a list of pairs.
_MARK = "$"


class StateTreeError(ValueError):
    """A value that cannot be stored, or a tree that does not describe a state."""


def encode(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into JSON values and tensors.

    Takes None, bool, int, float (also NaN and infinities), str, list, tuple, mappings with any of those scalars as
    keys, tensors and NumPy arrays. Two tensors that are the same memory seen the same way (tied weights) are stored
    once. Nothing is copied except tensors on accelerators, non-contiguous ones and views into another's memory.

    Returns:
        The tree, and the tensors it names. A flat dict of tensors keeps its keys as tensor names.

    Raises:
        StateTreeError: A value of another type; the message says where it is.
    """
    encoder = _Encoder()
    return encoder.encode(state, ()), encoder.tensors


def decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the state; the inverse of `encode`. Tied tensors come back as one object.

    Raises:
        StateTreeError: The tree names a missing tensor or is not something `encode` writes.
    """
    return _decode(tree, dict(tensors))


class _Encoder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        self._storages: set[int] = set()
        # Ids of tensors stay unique only while the tensors live; temporaries must not be freed during the walk.
        self._alive: list[Tensor] = []

    def encode(self, value: Any, path: tuple[str, ...]) -> Any:
        match value:
            case None | bool() | str():
                return value
            case int():
                return int(value)
            case float():
                return float(value) if math.isfinite(value) else {_MARK: "float", "value": repr(float(value))}
            case Tensor():
                return self._tensor(value, path)
            case np.ndarray():
                return {_MARK: "array", "tensor": self._tensor(_array_to_tensor(value, path), path)}
            case list():
                return [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]
            case tuple():
                return {_MARK: "tuple", "items": [self.encode(item, (*path, str(i))) for i, item in enumerate(value)]}
            case Mapping():
                return self._mapping(value, path)
        raise StateTreeError(
            f"cannot store {_where(path)}: it is a {type(value).__module__}.{type(value).__qualname__}. State may hold "
            "tensors, NumPy arrays, numbers, strings, booleans, None, and lists, tuples and dicts of those "
            "(a NumPy scalar: `.item()`)."
        )

    def _mapping(self, value: Mapping[Any, Any], path: tuple[str, ...]) -> Any:
        for key in value:
            if not (key is None or isinstance(key, (bool, int, float, str))):
                raise StateTreeError(f"cannot store {_where(path)}: it has a key of type {type(key).__name__}.")
        items = [(key, self.encode(item, (*path, str(key)))) for key, item in value.items()]
        if all(isinstance(key, str) for key in value) and _MARK not in value:
            return dict(items)
        return {_MARK: "dict", "items": [[self.encode(key, path), item] for key, item in items]}

    def _tensor(self, value: Tensor, path: tuple[str, ...]) -> dict[str, Any]:
        if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta":
            raise StateTreeError(f"cannot store {_where(path)}: it is a {value.layout} tensor on {value.device}.")
        value = value.detach()
        flags = (value.is_conj(), value.is_neg())
        key = (value.data_ptr(), value.dtype, value.device, tuple(value.shape), value.stride(), *flags)
        if value.numel() == 0 or key not in self._names:
            name = self._free_name(".".join(path) or "value")
            self.tensors[name] = self._storable(value)
            self._names[key] = name
        node: dict[str, Any] = {_MARK: "tensor", "name": self._names[key]}
        # Some kernels sum in memory order, so an exact resume needs the strides of transposed tensors too.
        if not value.is_contiguous() and _is_dense(value.shape, value.stride()):
            node["stride"] = list(value.stride())
        return node

    def _storable(self, value: Tensor) -> Tensor:
        """The values in row-major order, in memory that no other stored tensor uses."""
        storage = value.untyped_storage().data_ptr()
        stored = value.contiguous()
        if stored is value and value.numel() and storage in self._storages:
            stored = value.clone(memory_format=torch.contiguous_format)
        self._storages.add(storage)
        # Conjugate and negative views are flags on the tensor, not in its bytes.
        stored = stored.resolve_conj().resolve_neg()
        self._alive += [value, stored]
        return stored

    def _free_name(self, wanted: str) -> str:
        # "__metadata__" is reserved by the file format.
        name, number = ("value.__metadata__" if wanted == "__metadata__" else wanted), 1
        while name in self.tensors:
            number += 1
            name = f"{wanted}#{number}"
        return name


def _decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _MARK not in tree:
        return {key: _decode(value, tensors) for key, value in tree.items()}
    try:
        return _decode_marked(tree, tensors)
    except StateTreeError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise StateTreeError(f"the state tree is malformed at {tree[_MARK]!r}: {error}") from error


def _decode_marked(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    match tree[_MARK]:
        case "float":
            return float(tree["value"])
        case "tuple":
            return tuple(_decode(item, tensors) for item in tree["items"])
        case "dict":
            return {_decode(key, tensors): _decode(item, tensors) for key, item in tree["items"]}
        case "array":
            return _decode(tree["tensor"], tensors).numpy()
        case "tensor":
            stored, stride = tensors[tree["name"]], tree.get("stride")
            if stride is not None and list(stored.stride()) != stride:
                if not _is_dense(stored.shape, stride):
                    raise ValueError(f"strides {stride} do not fit shape {list(stored.shape)}")
                stored = torch.empty_strided(stored.shape, stride, dtype=stored.dtype).copy_(stored)
                # Tied tensors find this one, not another copy.
                tensors[tree["name"]] = stored
            return stored
    raise ValueError("unknown mark")


def _array_to_tensor(value: np.ndarray, path: tuple[str, ...]) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
    except TypeError as error:
        raise StateTreeError(f"cannot store {_where(path)}: NumPy dtype {value.dtype} has no tensor form.") from error


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """True when the elements fill their memory without gaps or overlaps, in some order of the dimensions."""
    expected = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


def _where(path: tuple[str, ...]) -> str:
    return "the state's entry " + " > ".join(repr(part) for part in path) if path else "the state"
