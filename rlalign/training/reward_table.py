"""What came of one round of reward calls: values, statuses, errors, and how errors are told."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlalign.training.reward_call import RowResult
from rlalign.training.reward_request import Request


@dataclass(frozen=True)
class SampleError:
    """One row that one function could not score."""

    function: str
    row: int
    result: RowResult


@dataclass(frozen=True, eq=False, kw_only=True)
class RewardTable:
    """What every function said about every row."""

    names: tuple[str, ...]
    values: Tensor
    """[rows, functions] float64; NaN where a function does not apply or failed."""
    status: list[list[str]]
    """The same shape: `ok`, `not_applicable`, or the kind of error."""
    errors: list[SampleError]
    seconds: float
    """Wall time of the whole call; functions with processes of their own run side by side."""

    @property
    def metrics(self) -> dict[str, float]:
        """`reward/error_frac` (rows that at least one function failed on) and `reward/timeout_count`."""
        rows = {error.row for error in self.errors}
        return {
            "reward/error_frac": len(rows) / max(1, len(self.status)),
            "reward/timeout_count": float(sum(error.result.status == "timeout" for error in self.errors)),
        }

    def parts(self) -> dict[str, Tensor]:
        """One column per function, for `Rollout.reward_parts`."""
        return {name: self.values[:, i] for i, name in enumerate(self.names)}


def describe(error: SampleError, request: Request) -> str:
    """One sentence: which function, which row, what happened, on which prompt."""
    excerpt, digest = _excerpt(request.columns["prompts"][error.row])
    return (
        f"reward '{error.function}' failed on row {error.row} of {request.rows} ({error.result.status}): "
        f"{error.result.message}. Prompt {digest}: {excerpt!r}."
    )


def table_of_errors(errors: Sequence[SampleError], request: Request) -> str:
    """Error kinds with counts, then the first three samples."""
    counts = Counter((error.function, error.result.status) for error in errors)
    lines = [f"  {count:4d} x {status:<12} {name}" for (name, status), count in counts.most_common()]
    samples = [error for error in errors if error.result.status != "not_run"][:3]
    return "\n".join([*lines, *("  " + describe(error, request) for error in samples)])


def save_first_of_each_kind(errors: Sequence[SampleError], request: Request, directory: Path) -> list[Path]:
    """Write `reward-<function>-<status>.json` for each kind of error that has no such file yet."""
    written = []
    for error in errors:
        path = directory / f"reward-{file_name(error.function)}-{error.result.status}.json"
        if path.exists() or error.result.status == "not_run":
            continue
        columns = {name: values[error.row] for name, values in request.columns.items()}
        sample = {
            "function": error.function,
            "status": error.result.status,
            "message": error.result.message,
            "row": error.row,
            "detail": error.result.detail,
            "sample": columns,
        }
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(sample, indent=1, default=repr))
        written.append(path)
    return written


def file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name)[:60]


def _excerpt(prompt: Any) -> tuple[str, str]:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, default=repr)
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        text = str(prompt[-1].get("content", text))
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
    return (text if len(text) <= 80 else text[:77] + "..."), digest
