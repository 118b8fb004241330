"""The metrics file: one JSON line per record, safe against crashes, cut back to a step on resume."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rlalign.training.files import write_atomic

Kind = Literal["train", "eval"]
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_WALL_CLOCK = ("time/", "throughput/")


class MetricsLog:
    """Append records to a JSON-lines file.

    Opening drops what a crash left behind the last whole record. Names under `time/` and `throughput/` hold everything
    that depends on the clock; all else is a function of config and seed.

    Args:
        path: Usually `metrics.jsonl` of the run directory; created when missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = sum(len(line) for line in _whole_lines(content))
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        if whole < len(content):
            os.ftruncate(self._descriptor, whole)

    def write(self, step: int, metrics: Mapping[str, float | int | str], *, kind: Kind = "train") -> None:
        """Append one record `{"kind", "step", ...}`; NaN and infinities become the strings "nan", "inf", "-inf".

        Raises:
            TypeError: A value is neither a number nor a string.
            OSError: The disk refuses; the file then ends with the last whole record.
        """
        record = {"kind": kind, "step": step} | {name: _json_value(name, value) for name, value in metrics.items()}
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        end = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise OSError(error.errno, f"cannot append to {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Flush to the disk; call before saving a checkpoint, so that the log reaches at least as far."""
        os.fsync(self._descriptor)

    def truncate_after(self, step: int, *, records: int | None = None) -> None:
        """Drop records past `step`, so that a resumed run's file equals that of an uninterrupted one.

        Args:
            records: Keep at most this many, the `len(log)` stored with the checkpoint. It also drops records of the
                same step written after the checkpoint, such as an evaluation that will run again.
        """
        lines = _whole_lines(self.path.read_bytes())
        kept = [line for line in lines[:records] if json.loads(line)["step"] <= step]
        if len(kept) == len(lines):
            return
        os.close(self._descriptor)
        write_atomic(self.path, b"".join(kept))
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def __len__(self) -> int:
        """Number of records in the file."""
        return len(_whole_lines(self.path.read_bytes()))

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Return every whole record of a metrics file; "nan", "inf" and "-inf" are floats again."""
    return [
        {name: _NON_FINITE.get(value, value) if isinstance(value, str) else value for name, value in record.items()}
        for record in _records(path)
    ]


def metrics_hash(path: Path) -> str:
    """SHA-256 over all records without the wall-clock names: equal for two runs of the same config and seed."""
    digest = hashlib.sha256()
    for record in _records(path):
        kept = {name: value for name, value in record.items() if not name.startswith(_WALL_CLOCK)}
        digest.update(json.dumps(kept, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in _whole_lines(Path(path).read_bytes()))


def _whole_lines(content: bytes) -> list[bytes]:
    """Lines that end in a newline, without an unreadable tail such as the zeros some file systems leave."""
    lines = content.splitlines(keepends=True)
    while lines and not _is_whole(lines[-1]):
        lines.pop()
    return lines


def _is_whole(line: bytes) -> bool:
    if not line.endswith(b"\n"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json_value(name: str, value: float | int | str) -> float | int | str:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(float(value))
    if isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"metric `{name}` is a {type(value).__name__}; log a number or a string (a tensor: `.item()`).")
