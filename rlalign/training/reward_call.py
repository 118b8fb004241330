"""Call a reward function once and judge what it returns. Runs in the trainer and in the worker alike: stdlib only."""

import inspect
import math
import random
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from rlalign.training.reward_function import RewardFunction

LARGEST_REWARD = 1e9
"""Beyond this a float32 variance overflows and one sample would drown every other."""


class RewardError(RuntimeError):
    """Rewards cannot be had. The message names the function, the row, what happened, and what to do."""


class RewardLoadError(RewardError):
    """The function cannot be imported, so no row can be scored."""

    def __init__(self, function: RewardFunction, what: str, detail: str = "") -> None:
        self.what, self.detail = what, detail
        place = function.import_path or repr(function.call)
        tail = f"\n{detail.strip()}" if detail.strip() else ""
        super().__init__(f"reward '{function.name}' ({place}) {what}. Try `rlalign check {place}`.{tail}")


class BadReturn(Exception):
    """The function as a whole returned something that is not one number per completion."""


@dataclass(frozen=True)
class RowResult:
    """One function's verdict on one row. `value` is None when the function does not apply or failed."""

    value: float | None
    status: str
    """`ok`, `not_applicable`, or an error: `raised timeout died bad_type not_finite too_large wrong_shape not_run`."""
    message: str = ""
    detail: str = ""
    """The traceback, or the end of the worker's log."""

    @property
    def failed(self) -> bool:
        return self.status not in ("ok", "not_applicable")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The answer to one call: a result per row, or one `error` when the call as a whole failed."""

    results: list[RowResult] = field(default_factory=list)
    error: RowResult | None = None
    seconds: float = 0.0
    metrics: list[Any] = field(default_factory=list)
    """(name, value) pairs the function gave to `log_metric`."""
    extras: list[Any] = field(default_factory=list)
    """(column, values) pairs the function gave to `log_extra`."""
    mutated: bool = False


def call(function: Callable[..., Any], arguments: dict[str, Any], rows: int) -> list[RowResult]:
    """Call the function once for `rows` completions and judge each returned value.

    Raises:
        BadReturn: The answer is not a list of `rows` items.
        Exception: Whatever the function raises.
    """
    answer = function(**arguments)
    if inspect.isawaitable(answer):
        answer = _run(answer)
    return [check_value(value) for value in as_list(answer, rows)]


def _run(awaitable: Awaitable[Any]) -> Any:
    import asyncio  # 50 ms that most rewards never need

    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # A notebook already runs a loop in this thread; a second loop needs a thread of its own.
    outcome: list[Any] = [None, None]

    def run() -> None:
        try:
            outcome[0] = asyncio.run(wait())
        except BaseException as error:  # carried to the calling thread and raised there
            outcome[1] = error

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def as_list(answer: Any, rows: int, *, row: str = "completion") -> list[Any]:
    """The function's answer as a list of `rows` items, or `BadReturn` with what to change."""
    fix = f"return a list with one number (or None) per {row}, {rows} here"
    if answer is None:
        raise BadReturn(f"returned None for the whole batch (a missing `return`?); {fix}")
    if _is_array(answer):
        if answer.ndim != 1:
            raise BadReturn(f"returned an array of shape {tuple(answer.shape)}; {fix}")
        answer = answer.tolist()
    if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
        lazy = inspect.isgenerator(answer) or isinstance(answer, map | filter | zip)
        raise BadReturn(f"returned a {type(answer).__name__}; {fix}{'. Write `list(...)` around it' if lazy else ''}")
    if len(answer) != rows:
        raise BadReturn(f"returned {len(answer)} rewards for {rows} {row}s; {fix}")
    return list(answer)


def check_value(value: Any) -> RowResult:
    """Judge one returned value: a finite number of sane size, a bool, or None for "not applicable"."""
    if value is None:
        return RowResult(None, "not_applicable")
    number = _as_number(value)
    if number is None:
        shown = f"{type(value).__name__} {repr(value)[:60]}"
        return RowResult(None, "bad_type", f"returned {shown}; return a float, a bool or None")
    if not math.isfinite(number):
        return RowResult(None, "not_finite", f"returned {number}; return None where the reward is undefined")
    if abs(number) > LARGEST_REWARD:
        return RowResult(None, "too_large", f"returned {number:.3g}, beyond +-{LARGEST_REWARD:g}; rescale the reward")
    return RowResult(number, "ok")


def _as_number(value: Any) -> float | None:
    if _is_array(value):
        value = value.item() if value.ndim == 0 else None
    if not isinstance(value, Real):  # bool, int, float, Fraction and numpy's scalars are
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond 1e308
        return math.inf


def _is_array(value: Any) -> bool:
    """A numpy or torch object with `ndim` and `item`. Neither is imported: whoever made one has done that."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    return (numpy is not None and isinstance(value, numpy.ndarray | numpy.bool_)) or (
        torch is not None and isinstance(value, torch.Tensor)
    )


def failure(error: BaseException) -> RowResult:
    """An exception as a row's verdict: one line for people, the traceback for the error file."""
    if isinstance(error, BadReturn):
        return RowResult(None, "wrong_shape", str(error))
    if isinstance(error, MemoryError):  # its frames still hold what filled the memory that the next lines need
        traceback.clear_frames(error.__traceback__)
    text = str(error).strip().splitlines()
    message = f"raised {type(error).__name__}" + (f": {text[0][:200]}" if text else "")
    return RowResult(None, "raised", message + _hint(error), "".join(traceback.format_exception(error)))


def _hint(error: BaseException) -> str:
    text = str(error)
    match error:
        case KeyError():
            return " (a column or key that the data lacks?)"
        case MemoryError():
            return " (the worker may use `memory_limit_gb`)"
        case ImportError():
            return f" (is it installed for {sys.executable}?)"
        case TypeError() if "string indices must be integers" in text:
            return " (written for chat messages but the completions are plain text: use conversational prompts)"
        case TypeError() if "list indices must be integers" in text or "expected string" in text:
            return " (written for plain text but the completions are chat messages: use `completion[0]['content']`)"
        case ValueError() if "main thread" in text or "threaded environment" in text:
            return " (it uses signal.alarm: put it in a module or file, so that it gets a process of its own)"
    return ""


def seed_generators(seed: int) -> None:
    """Seed every generator a reward may draw from, so that the same completions meet the same random numbers."""
    random.seed(seed)
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    if torch is not None:
        torch.manual_seed(seed)
