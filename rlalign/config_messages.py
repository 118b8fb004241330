"""Validate config data with pydantic and say in plain words what does not fit."""

import difflib
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rlalign.config_schema import child, dotted, sections, tags_of
from rlalign.yaml_strict import Key

_NUMBER = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?")


def validate(cls: type, data: dict[str, Any]) -> tuple[Any, list[tuple[Key, str]]]:
    """Build `cls` from plain data with pydantic: (object, []) or (None, [(path, sentence), ...])."""
    import pydantic

    try:
        # JSON mode is strict about types ("1e-5" is no number, 1 is no bool) and still takes a list for a tuple.
        (result,) = _adapter(cls).validate_json(json.dumps([data]), strict=True)
    except pydantic.ValidationError as error:
        found: dict[Key, list[Any]] = {}
        for item in error.errors(include_url=False):
            found.setdefault(_path_in(data, item), []).append(item)
        return None, [(path, _sentence(cls, data, path, items)) for path, items in found.items()]
    return result, []


@lru_cache
def _adapter(cls: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # A dataclass may not be given a config of its own here; wrapped, it and all that it nests inherit this one.
    return TypeAdapter(tuple[cls], config=ConfigDict(extra="forbid", allow_inf_nan=False))


def _path_in(data: Any, item: Any) -> Key:
    """pydantic's `loc` less the names of union members, which are no keys of the file."""
    path: Key = ()
    steps = item["loc"][1:]
    for position, step in enumerate(steps):
        here = isinstance(data, dict) and step in data
        if here or (isinstance(data, list) and isinstance(step, int) and step < len(data)):
            data, path = data[step], (*path, step)
        elif item["type"] == "missing" and position == len(steps) - 1:
            path = (*path, step)
    return path


def _sentence(cls: type, data: Any, path: Key, items: list[Any]) -> str:
    name, first = dotted(path), items[0]
    match first["type"]:
        case "missing" if isinstance(path[-1], int):
            return f"`{dotted(path[:-1])}` is too short: entry {path[-1]} is missing"
        case "missing":
            return f"`{name}` is missing and has no default"
        case "union_tag_not_found":
            return f"`{name}` needs a `type`, one of {_listed(_known_tags(cls, data, path))}"
        case "union_tag_invalid":
            return _choice(f"{name}.type", first["ctx"]["tag"], re.findall(r"'([^']*)'", first["ctx"]["expected_tags"]))
        case "literal_error" if isinstance(first["input"], str):
            return _choice(name, first["input"], re.findall(r"'([^']*)'", first["ctx"]["expected"]))
        case "value_error" | "assertion_error":
            text = str(first["ctx"]["error"])
            return f"`{name}`: {text}" if path else text
    wanted = " or ".join(dict.fromkeys(_wanted(item) for item in items))
    return f"`{name}` must be {wanted}, got {_got(first['input'])}{_hint(first)}"


def _wanted(item: Any) -> str:
    limits = {"greater_than": ">", "greater_than_equal": ">=", "less_than": "<", "less_than_equal": "<="}
    kinds = {
        "float": "a number",
        "int": "a whole number",
        "bool": "true or false",
        "string": "text",
        "list": "a list",
        "tuple": "a list",
        "dict": "a mapping (`key: value`)",
        "dataclass": "a mapping (`key: value`)",
        "none": "null",
        "path": "a path",
    }
    kind = item["type"]
    if kind in limits:
        return f"{limits[kind]} {next(iter(item['ctx'].values())):g}"
    word = kinds.get(kind.split("_")[0]) if kind.endswith(("_type", "_parsing", "_from_float", "_required")) else None
    return word or item["msg"].removeprefix("Input should be ").removeprefix("a valid ")


def _got(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value!r:.50}"
        case dict():
            return "a mapping" if value else "an empty mapping"
        case list():
            return "a list" if value else "an empty list"
    return f"{value!r:.50}"


def _hint(item: Any) -> str:
    value, kind = item["input"], item["type"]
    if kind.startswith(("float", "int_")) and isinstance(value, str) and _NUMBER.fullmatch(value):
        return "; write it without quotes"
    if kind.startswith("int_") and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("true", "false", "yes", "no", "on", "off"):
        return f"; write {'true' if value.lower() in ('true', 'yes', 'on') else 'false'}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f'; put it in quotes: "{_got(value)}"'
    return ""


def _choice(name: str, got: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(got).lower(), allowed, n=1, cutoff=0.6)
    question = f"; did you mean {near[0]!r}?" if near else ""
    return f"`{name}` must be one of {_listed(allowed)}, got {_got(got)}{question}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _known_tags(cls: type, data: Any, path: Key) -> list[str]:
    annotation: Any = cls
    for key in path:
        annotation, data = child(annotation, data, key), data[key]
    return [tag for option in sections(annotation) for tag in tags_of(option)]
