"""A call failed as a whole: find the rows that did it, so that only they are lost. Stdlib only."""

import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import replace
from typing import Protocol, runtime_checkable

from rlalign.training.reward_call import Reply, RowResult
from rlalign.training.reward_function import RewardFunction
from rlalign.training.reward_request import Request


@runtime_checkable
class Runner(Protocol):
    """Where one reward function runs: `RewardProcess` or `RewardInProcess`."""

    function: RewardFunction
    accepts: frozenset[str] | None
    required: list[str]
    load_seconds: float
    imports_torch: bool

    def prepare(self) -> None: ...
    def begin(self, request: Request) -> None: ...
    def finish(self, timeout_s: float) -> Reply: ...
    def alone(self, request: Request, timeout_s: float) -> Generator[RowResult, None, None]: ...
    def close(self) -> None: ...


class RewardWarning(UserWarning):
    """Rewards came, but something about them needs attention."""


def finish_or_rescue(
    runner: Runner, request: Request, *, timeout_s: float, row_timeout_s: float, allowed: int
) -> Reply:
    """The answer to `runner.begin(request)`, with a failed call taken apart row by row.

    The rows are scored one at a time to find the culprits; the others are then scored again together, since a
    function may compare the rows of its batch. More than `allowed` culprits end the search: the run stops anyway.
    """
    reply = runner.finish(timeout_s)
    if reply.error is None:
        return reply
    if reply.error.status == "wrong_shape":  # a bug of the function, not of a row; on single rows it may even pass
        return replace(reply, error=None, results=[reply.error] * request.rows)
    alone = _score_alone(runner, request, row_timeout_s, allowed)
    if any(result.status == "not_run" for result in alone):
        return replace(reply, error=None, results=alone)
    return _score_survivors(runner, request, reply, alone, timeout_s)


def _score_alone(runner: Runner, request: Request, row_timeout_s: float, allowed: int) -> list[RowResult]:
    results: list[RowResult] = []
    with closing(runner.alone(request, row_timeout_s)) as scored:
        for result in scored:
            results.append(result)
            if sum(each.failed for each in results) > allowed:
                break
    left = request.rows - len(results)
    return results + [RowResult(None, "not_run", "not scored: too many rows before it failed")] * left


def _score_survivors(runner: Runner, request: Request, first: Reply, alone: list[RowResult], timeout_s: float) -> Reply:
    good = [i for i, result in enumerate(alone) if not result.failed]
    slow = first.error is not None and first.error.status == "timeout" and len(good) == request.rows
    if slow:
        warnings.warn(
            f"reward '{runner.function.name}': {request.rows} rows together took longer than "
            f"`guard.timeout_s`={timeout_s:g} although each alone was fine; raise it, or make the reward faster.",
            RewardWarning,
            stacklevel=2,
        )
    if slow or not good:
        return replace(first, error=None, results=alone)
    runner.begin(request.take(good))
    again = runner.finish(timeout_s)
    results = list(alone)
    if again.error is None:
        for i, result in zip(good, again.results, strict=True):
            results[i] = result
    elif again.error.status != "timeout":  # it fails on a batch of rows that are fine one by one: no row is to blame
        for i in good:
            results[i] = again.error
    return replace(again, error=None, results=results, extras=[], seconds=first.seconds + again.seconds)
