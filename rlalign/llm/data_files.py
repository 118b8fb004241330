"""Read rows from local files, with the line of whatever is wrong."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlalign.config import ConfigError


def read_file(path: Path, name: str) -> list[dict[str, Any]]:
    """Read `.jsonl`, `.json`, `.csv` or `.parquet` into rows.

    Raises:
        ConfigError: The file is missing, not UTF-8, or not what its ending says, with the line number.
    """
    if not path.is_file():
        near = sorted(file.name for file in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        beside = f" Beside it: {', '.join(near[:5])}." if near else ""
        raise ConfigError(f"`{name}.source`: there is no file {path.absolute()}.{beside}")
    readers: dict[str, Callable[[Path], list[Any]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    rows = readers[path.suffix.lower()](path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: row {number} is a {type(row).__name__}, not an object with columns.")
    return rows


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}). Save the file as UTF-8."
        ) from error


def _jsonl(path: Path) -> list[Any]:
    rows = []
    # Only \n ends a line: JSON strings may hold other characters that str.splitlines would cut at.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            rows.append(_parse(line, f"{path}:{number}"))
    return rows


def _json(path: Path) -> list[Any]:
    data = _parse(_text(path), str(path))
    if isinstance(data, dict):
        columns = {key: value for key, value in data.items() if isinstance(value, list)}
        if len(columns) != len(data) or len({len(value) for value in columns.values()}) != 1:
            raise ConfigError(f"{path}: an object must hold columns, lists of one length; or write a list of objects.")
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(data, list):
        raise ConfigError(f"{path}: expected a list of objects, got {type(data).__name__}.")
    return data


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = " (one object per line belongs in a .jsonl file)" if error.msg == "Extra data" else ""
        raise ConfigError(
            f"{place}: not valid JSON: {error.msg} at line {error.lineno} column {error.colno}{hint}."
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{place}: JSON nested too deep.") from error


def _csv(path: Path) -> list[Any]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: not valid CSV: {error}.") from error
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ConfigError(
                f"{path}: data row {number} does not have the {len(reader.fieldnames or [])} fields of the header."
            )
    return rows


def _parquet(path: Path) -> list[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path}: reading parquet needs pyarrow. Run: pip install 'rlalign[llm]'") from error
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a readable parquet file: {error}.") from error
