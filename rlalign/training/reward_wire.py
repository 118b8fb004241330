"""What crosses the pipe to a reward worker: JSON lines that keep tuples, bytes and non-text keys. Stdlib only."""

import base64
import json
import sys
from datetime import date, datetime, time
from numbers import Integral, Real
from typing import Any

_PLAIN = frozenset({str, int, float, bool, type(None)})
_TAG = "!"


def dumps(value: Any) -> bytes:
    """Encode one message as a JSON line.

    Unlike plain JSON this keeps tuples apart from lists and integer keys apart from text, because scorers compare
    them (`reasoning_gym`'s ARC tasks store grids as tuples). NaN and infinity pass: the receiver judges them.

    Raises:
        TypeError: Something inside is no data (an image, a tensor, an open file); the text says where and what to do.
    """
    return json.dumps(_pack(value, "")).encode() + b"\n"


def loads(line: bytes) -> Any:
    return json.loads(line, object_hook=_unpack)


def _pack(value: Any, where: str) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        # Columns are mostly long lists of numbers or text: one C-speed pass decides for all items.
        return (
            value if _PLAIN.issuperset(map(type, value)) else [_pack(x, f"{where}[{i}]") for i, x in enumerate(value)]
        )
    if kind is dict:
        if all(type(key) is str and not key.startswith(_TAG) for key in value):
            return {key: _pack(item, f"{where}.{key}" if where else key) for key, item in value.items()}
        return {"!dict": [[_pack(key, where), _pack(item, f"{where}[{key!r}]")] for key, item in value.items()]}
    return _pack_rare(value, where)


def _pack_rare(value: Any, where: str) -> Any:
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        value = value.item()
    match value:
        case None | bool():
            return value
        case str():
            return str(value)
        case tuple():
            return {"!tuple": [_pack(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        case bytes() | bytearray():
            return {"!bytes": base64.b64encode(value).decode()}
        case set() | frozenset():
            return {"!set": [_pack(item, where) for item in sorted(value, key=repr)]}
        case datetime() | date() | time():
            return {f"!{type(value).__name__}": value.isoformat()}
        case dict():
            return _pack(dict(value), where)
        case list():
            return _pack(list(value), where)
        case Integral():
            return int(value)
        case Real():
            return float(value)
    raise TypeError(
        f"`{where or 'the value'}` is a {type(value).__name__}, which cannot be sent to a reward worker process. "
        "Use `guard.isolation=thread`, or keep only text, numbers, lists and dicts in that column."
    )


def _unpack(item: dict[str, Any]) -> Any:
    if len(item) != 1:
        return item
    ((tag, body),) = item.items()
    match tag:
        case "!tuple":
            return tuple(body)
        case "!dict":
            return dict(body)
        case "!bytes":
            return base64.b64decode(body)
        case "!set":
            return set(body)
        case "!datetime" | "!date" | "!time":
            return {"!datetime": datetime, "!date": date, "!time": time}[tag].fromisoformat(body)
    return item
