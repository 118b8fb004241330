"""Reward calls that cannot hurt the run: isolated, limited in time, checked, counted. One `RewardGuard` per trainer."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from rlalign.training.reward_call import Reply, RewardError, RewardLoadError, RowResult
from rlalign.training.reward_function import RewardFunction
from rlalign.training.reward_isolation import Isolation, make_runner
from rlalign.training.reward_request import Request, check_columns, make_request
from rlalign.training.reward_rescue import RewardWarning, finish_or_rescue
from rlalign.training.reward_table import (
    RewardTable,
    SampleError,
    describe,
    file_name,
    save_first_of_each_kind,
    table_of_errors,
)

__all__ = [
    "RewardError",
    "RewardFunction",
    "RewardGuard",
    "RewardLoadError",
    "RewardTable",
    "RewardWarning",
    "SampleError",
    "Wording",
]

WINDOW = 200
"""Rows the error budget looks back on; a larger batch is looked at whole."""


@dataclass(frozen=True, kw_only=True)
class Wording:
    """What differs in the messages between kinds of trainers."""

    section: str = "guard"
    """Of the config, where the settings stand."""
    probe: str = " and try it with `rlalign check`"
    """How a function is tried out."""
    silent: str = "Does the gold column hold what they can parse? Try `rlalign check`."
    """Advice where a reward says nothing about the first batch."""


class RewardGuard:
    """Calls reward functions with TRL's signature and survives what they do.

    Isolation, and what each kind can stop:

    | kind | hang | C loop, regex | crash, `os._exit` | memory | prints, RNG, inputs | for |
    |---|---|---|---|---|---|---|
    | `process` | killed | killed | that row is lost | limited | separate | anything importable |
    | `thread` | interrupted | if it polls signals | ends the run | no | copied, restored | lambdas, notebooks |
    | `none` | no | no | ends the run | no | copied, restored | debuggers |

    `auto` takes `process` for a function that a fresh interpreter can import (module level, not in `__main__`) and
    `thread` for the rest. `thread` calls stay in the main thread when the trainer runs there and are interrupted by a
    signal, so graders built on `signal.alarm` (math-verify) work under every kind; only a trainer in another thread
    with a reward that cannot be imported leaves them without.

    Args:
        functions: Names must differ.
        timeout_s: Longest one call for a whole batch may take.
        row_timeout_s: Longest a single row may take when a failed call is taken apart; a quarter of `timeout_s`.
        on_error: `abstain` leaves failed rows out of every baseline, `penalty` gives them `penalty`, `raise` stops.
            `abstain` and `penalty` begin after the first batch: an error there is most likely a bug, and costs nothing.
        error_budget: The run stops when more than this share of the last 200 rows failed.
        errors_dir: Gets the first failing sample of each kind as JSON and what the workers print; made when needed.
        start_timeout_s: Longest an import of the function may take.
        memory_limit_gb: Of each worker process; half of the machine.
        wording: For trainers whose settings stand elsewhere.

    Example:
        >>> def length(completions):
        ...     return [float(len(text)) for text in completions]
        >>> with RewardGuard([RewardFunction(name="length", call=length)]) as guard:
        ...     table = guard.score(prompts=["a", "b"], completions=["12", "1234"])
        ...     outcome, scored = guard.total(table)
        >>> outcome.tolist(), scored.tolist()
        ([2.0, 4.0], [True, True])
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        *,
        isolation: Isolation = "auto",
        timeout_s: float = 60.0,
        on_error: Literal["raise", "abstain", "penalty"] = "abstain",
        penalty: float = 0.0,
        error_budget: float = 0.05,
        errors_dir: Path | None = None,
        row_timeout_s: float | None = None,
        start_timeout_s: float = 300.0,
        memory_limit_gb: float | None = None,
        wording: Wording | None = None,
    ) -> None:
        names = Counter(function.name for function in functions)
        if not names or max(names.values()) > 1:
            shown = sorted(name for name, count in names.items() if count > 1)
            raise ValueError(f"rewards need distinct names, at least one; got {shown or 'none'}. Change `rewards`.")
        self.functions = tuple(functions)
        self.timeout_s, self.row_timeout_s = timeout_s, row_timeout_s or timeout_s / 4
        self.on_error, self.penalty, self.error_budget = on_error, penalty, error_budget
        self.errors_dir = errors_dir
        self.wording = wording or Wording()
        self._batches = 0
        self._recent: list[int] = []
        self._runners = [
            make_runner(
                function,
                isolation,
                memory_limit_gb=memory_limit_gb,
                start_timeout_s=start_timeout_s,
                log_path=None if errors_dir is None else errors_dir / f"reward-{file_name(function.name)}.log",
            )
            for function in functions
        ]

    def prepare(self, columns: Iterable[str] = ()) -> None:
        """Wait until every function is imported and check that the data has the columns it needs.

        Optional: `score` does it too. Calling it before the first generation saves the time of a generation.

        Args:
            columns: Names of the data set's columns; `prompts`, `completions` and `completion_ids` are always there.

        Raises:
            RewardError: A function cannot be imported, or a column is missing.
        """
        for runner in self._runners:
            runner.prepare()
            check_columns(runner.function, runner.required, {*columns, "prompts", "completions", "completion_ids"})

    def score(
        self,
        *,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        trainer_state: Any = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
    ) -> RewardTable:
        """Ask every function about every row.

        Args:
            prompts, completions: Text or lists of chat messages, one entry per row.
            columns: The data set's other columns, repeated to one entry per row.
            trainer_state: A mapping or object whose plain fields (step, epoch ...) functions may ask for.
            log_metric, log_extra: Called with what functions log through the arguments of the same names.

        Raises:
            RewardError: A function cannot be loaded, needs a column that is not there, failed in the first batch (or
                ever, with `on_error=raise`), or the error budget is used up.
        """
        started = time.perf_counter()
        request = make_request(prompts, completions, completion_ids, columns, trainer_state)
        replies = self._ask(request) if request.rows else []
        for reply in replies:
            if log_metric is not None:
                for name, value in reply.metrics:
                    log_metric(name, value)
            if log_extra is not None:
                for name, values in reply.extras:
                    log_extra(name, values)
        table = self._table(replies, request.rows, time.perf_counter() - started)
        self._judge(table, request)
        return table

    def total(self, table: RewardTable) -> tuple[Tensor, Tensor]:
        """Weighted sum of each row's rewards, and which rows have one.

        A function that does not apply (None) is left out of the sum, as in TRL. A row that a function failed on is
        not scored at all: a sum without that part would be compared with sums that have it.
        """
        weights = torch.tensor([function.weight for function in self.functions], dtype=torch.float64)
        outcome = (table.values * weights).nansum(1)
        scored = ~table.values.isnan().all(1)
        if self.on_error != "penalty":
            for error in table.errors:
                scored[error.row] = False
        return outcome, scored

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches, "recent": list(self._recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._batches = int(state["batches"])
        self._recent = [int(flag) for flag in state["recent"]]

    def close(self) -> None:
        """End the worker processes. They also end by themselves with this process, however it ends."""
        for runner in self._runners:
            runner.close()

    def __enter__(self) -> "RewardGuard":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, request: Request) -> list[Reply]:
        for runner in self._runners:
            runner.prepare()
            check_columns(runner.function, runner.required, request.columns)
        for runner in self._runners:
            runner.begin(request)
        return [
            finish_or_rescue(
                runner,
                request,
                timeout_s=self.timeout_s,
                row_timeout_s=self.row_timeout_s,
                allowed=self._failures_left(request.rows),
            )
            for runner in self._runners
        ]

    def _failures_left(self, rows: int) -> int:
        if self.on_error == "raise" or self._batches == 0:
            return 0
        window = max(WINDOW, rows)
        past = (
            self._recent[len(self._recent) - (window - rows) :] if window - rows < len(self._recent) else self._recent
        )
        return max(0, int(self.error_budget * window + 1e-9) - sum(past))

    def _table(self, replies: list[Reply], rows: int, seconds: float) -> RewardTable:
        names = tuple(function.name for function in self.functions)
        by_row = list(zip(*(reply.results for reply in replies), strict=True))
        numbers = [[self._value(result) for result in row] for row in by_row]
        return RewardTable(
            names=names,
            values=torch.tensor(numbers, dtype=torch.float64).reshape(rows, len(names)),
            status=[[result.status for result in row] for row in by_row],
            errors=[
                SampleError(name, i, result)
                for i, row in enumerate(by_row)
                for name, result in zip(names, row, strict=True)
                if result.failed
            ],
            seconds=seconds,
        )

    def _value(self, result: RowResult) -> float:
        if result.failed and self.on_error == "penalty":
            return self.penalty
        return float("nan") if result.value is None else result.value

    def _judge(self, table: RewardTable, request: Request) -> None:
        """Count, save, and stop where it must be."""
        first_batch = self._batches == 0
        failed = {error.row for error in table.errors if error.result.status != "not_run"}
        flags = self._recent + [int(row in failed) for row in range(request.rows)]
        self._recent = flags[-max(WINDOW, request.rows) :]
        if table.errors:
            self._stop_if_needed(table, request, first_batch)
        _warn_of_silence(table, first_batch, self.wording)
        self._batches += 1 if request.rows else 0

    def _stop_if_needed(self, table: RewardTable, request: Request, first_batch: bool) -> None:
        saved = save_first_of_each_kind(table.errors, request, self.errors_dir) if self.errors_dir is not None else []
        where = f" Saved: {', '.join(str(path) for path in saved)}." if saved else ""
        if first_batch or self.on_error == "raise":
            why = f"`{self.wording.section}.on_error=raise`" if not first_batch else "the first batch"
            raise RewardError(
                f"{describe(table.errors[0], request)} An error in {why} stops the run.{where} "
                f"Fix the function{self.wording.probe}, or return None for rows it cannot judge."
            )
        window = max(WINDOW, request.rows)
        if sum(self._recent) > self.error_budget * window + 1e-9:
            raise RewardError(
                f"{sum(self._recent)} of the last {len(self._recent)} rows could not be scored, more than "
                f"`{self.wording.section}.error_budget`={self.error_budget:g} of {window} allows. This batch:\n"
                f"{table_of_errors(table.errors, request)}\n{where.strip()} Fix the function, or raise the budget."
            )


def _warn_of_silence(table: RewardTable, first_batch: bool, wording: Wording) -> None:
    """Functions that said nothing about a whole batch: legal in TRL, and most often a mistake."""
    silent = [
        name
        for i, name in enumerate(table.names)
        if table.status and all(row[i] == "not_applicable" for row in table.status)
    ]
    if silent and len(silent) == len(table.names) and first_batch:
        raise RewardError(
            f"every reward ({', '.join(silent)}) returned None for all {len(table.status)} rows of the first batch, so "
            f"there is nothing to learn from. {wording.silent}"
        )
    for name in silent if first_batch else []:
        warnings.warn(
            f"reward '{name}' returned None for all {len(table.status)} rows of the first batch; check its columns.",
            RewardWarning,
            stacklevel=4,
        )
