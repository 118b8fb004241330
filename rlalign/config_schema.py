"""Read the types of config dataclasses: which section a mapping stands for, its settings, their defaults."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rlalign.yaml_strict import Key


def dotted(path: Key) -> str:
    """('rewards', 0, 'weight') -> rewards.0.weight, the form that `key=value` takes."""
    return ".".join(map(str, path))


@lru_cache
def hints_of(cls: type) -> dict[str, Any]:
    """Settable fields of a config dataclass with their annotations, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def default_of(cls: type, name: str) -> Any:
    """The default of a field, `dataclasses.MISSING` where it has none."""
    for field in dataclasses.fields(cls):
        if field.name == name:
            return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return dataclasses.MISSING


def plain(value: Any) -> Any:
    """A config object as JSON-able data; fields that are not settable are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in hints_of(type(value))}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a config holds only numbers, text, lists and mappings, got {type(value).__name__}: {value!r:.60}")


def not_finite(value: Any, path: Key = ()) -> Iterator[tuple[Key, str]]:
    """Yield (path, sentence) for NaN, infinity and numbers beyond 64 bits."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from not_finite(item, (*path, key))
    elif isinstance(value, float) and not float("-inf") < value < float("inf"):
        yield path, f"`{dotted(path)}` must be a finite number, got {value}"
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield path, f"`{dotted(path)}` must be a number of at most 63 bits, got {str(value)[:20]}..."


def fill(annotation: Any, value: Any, default: Any = dataclasses.MISSING) -> Any:
    """Complete a section that was given in part with the method's own default for that section.

    Without this, `objective: {clip_high: 0.3}` would reset the rest of `objective` to the defaults of its class,
    which may belong to another method. Unknown keys are dropped: they are reported by `unknown_keys`.
    """
    if isinstance(value, list):
        return [fill(child(annotation, value, index), item) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    cls = section(annotation, value, default)
    if cls is None:
        return {key: fill(child(annotation, value, key), item) for key, item in value.items()}
    result = {}
    for name, hint in hints_of(cls).items():
        inherited = getattr(default, name) if isinstance(default, cls) else default_of(cls, name)
        if name in value:
            result[name] = fill(hint, value[name], inherited)
        elif isinstance(default, cls):
            result[name] = plain(inherited)
    return result


def section(annotation: Any, value: Any, default: Any = dataclasses.MISSING) -> type | None:
    """The dataclass that a mapping stands for: the only one, or the one that its `type` (or the default) names."""
    if not isinstance(value, dict):
        return None
    classes = sections(annotation)
    if len(classes) == 1:
        return classes[0]
    if "type" not in value:
        return next((cls for cls in classes if isinstance(default, cls)), None)
    return next((cls for cls in classes if value["type"] in tags_of(cls)), None)


def child(annotation: Any, value: Any, key: str | int) -> Any:
    """The annotation of one entry of a mapping or list; None where anything goes."""
    if isinstance(value, dict):
        cls = section(annotation, value)
        if cls is not None:
            return hints_of(cls).get(str(key))
        return next((typing.get_args(o)[1] for o in options(annotation) if typing.get_origin(o) is dict), None)
    for option in options(annotation):
        arguments = typing.get_args(option)
        if typing.get_origin(option) is tuple and Ellipsis not in arguments and isinstance(key, int):
            return arguments[key] if key < len(arguments) else None
        if typing.get_origin(option) in (tuple, list, Sequence) and arguments:
            return arguments[0]
    return None


def sections(annotation: Any) -> list[type]:
    """The dataclasses among the alternatives of an annotation."""
    return [option for option in options(annotation) if isinstance(option, type) and dataclasses.is_dataclass(option)]


def options(annotation: Any) -> list[Any]:
    """The alternatives of a union, `Annotated` taken off; [annotation] when it is none."""
    if typing.get_origin(annotation) is typing.Annotated:
        return options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [option for argument in typing.get_args(annotation) for option in options(argument)]
    return [annotation]


def tags_of(cls: type) -> tuple[Any, ...]:
    hint = hints_of(cls).get("type")
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
