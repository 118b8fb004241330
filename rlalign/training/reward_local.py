"""A reward function called in the trainer's own process: for lambdas, closures and objects that cannot be imported."""

import copy
import io
import json
import random
import sys
import time
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from types import SimpleNamespace
from typing import Any

from rlalign.training.reward_call import (
    Reply,
    RewardError,
    RewardLoadError,
    RowResult,
    call,
    failure,
    seed_generators,
)
from rlalign.training.reward_function import RewardFunction, declared_arguments, required_arguments
from rlalign.training.reward_request import Request
from rlalign.training.time_limit import TimeLimitReached, run_limited


class RewardInProcess:
    """One reward function beside the trainer, with a time limit (`limited`) or without.

    It gets copies of its inputs, and the random generators of Python, numpy and torch are put back afterwards, so it
    can neither change the rollout nor the next random number. With the limit it can be interrupted as `run_limited`
    says. What no code in the same process can do: survive a crash or `os._exit`, bound memory, or end C code that
    polls no signals. Give the function a file of its own where that matters.
    """

    def __init__(self, function: RewardFunction, *, limited: bool = True) -> None:
        self.function = function
        self.limited = limited
        self.accepts: frozenset[str] | None = None
        self.required: list[str] = []
        self.load_seconds = 0.0
        self.imports_torch = "torch" in sys.modules
        self._call: Any = None
        self._pending: Request | None = None

    def prepare(self) -> None:
        if self._call is not None:
            return
        started = time.perf_counter()
        try:
            self._call = self.function.load()
        except Exception as error:
            failed = failure(error)
            raise RewardLoadError(self.function, failed.message, failed.detail) from error
        self.load_seconds = time.perf_counter() - started
        self.accepts, self.required = declared_arguments(self._call), required_arguments(self._call)

    def begin(self, request: Request) -> None:
        self._pending = request

    def finish(self, timeout_s: float) -> Reply:
        request, self._pending = self._pending, None
        assert request is not None, "finish() without begin()"
        self.prepare()
        return self._score(request, timeout_s)

    def alone(self, request: Request, timeout_s: float) -> Generator[RowResult, None, None]:
        for row in range(request.rows):
            reply = self._score(request.take([row]), timeout_s)
            yield reply.error if reply.error is not None else reply.results[0]

    def close(self) -> None:
        self._call = None

    def _score(self, request: Request, timeout_s: float) -> Reply:
        started = time.perf_counter()
        columns = request.columns if self.accepts is None else request.only(self.accepts)
        metrics: list[tuple[str, float]] = []
        extras: list[tuple[str, list[Any]]] = []
        offered = {
            "trainer_state": SimpleNamespace(**request.trainer_state),
            "log_metric": lambda name, value: metrics.append((str(name), float(value))),
            "log_extra": lambda name, values: extras.append((str(name), list(values))),
        }
        copies = {name: self._copy(name, values) for name, values in columns.items()}
        arguments = copies | {k: v for k, v in offered.items() if self.accepts is None or k in self.accepts}
        results, error = [], None
        with own_randomness(_seed_of(request.columns.get("completions"))):
            try:
                results = self._limited_call(arguments, request.rows, timeout_s)
            except TimeLimitReached as limit:
                error = RowResult(None, "timeout", str(limit))
            except (Exception, SystemExit) as raised:
                error = failure(raised)
        return Reply(
            results=results,
            error=error,
            seconds=time.perf_counter() - started,
            metrics=metrics,
            extras=extras,
            mutated=request.watch_inputs and repr(copies) != repr(columns),
        )

    def _copy(self, name: str, values: list[Any]) -> list[Any]:
        try:
            return copy.deepcopy(values)
        except Exception as error:
            raise RewardError(
                f"column '{name}' cannot be copied for reward '{self.function.name}' ({error}); drop the column, or "
                "declare the arguments the reward needs instead of `**kwargs`."
            ) from error

    def _limited_call(self, arguments: dict[str, Any], rows: int, timeout_s: float) -> list[RowResult]:
        with redirect_stdout(sys.stderr or io.StringIO()):  # the trainer's stdout may be a table or JSON
            if not self.limited:
                return call(self._call, arguments, rows)
            return run_limited(lambda: call(self._call, arguments, rows), timeout_s)


def _seed_of(completions: Any) -> int:
    """A function of the texts. Images and tensors count by their kind: printing them is slow, and names memory."""
    return zlib.crc32(json.dumps(completions, default=lambda value: type(value).__name__).encode())


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Seeded generators inside, the former states of Python's, numpy's and torch's afterwards."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    torch_state = torch.random.get_rng_state() if torch is not None else None
    cuda_states = torch.cuda.get_rng_state_all() if torch is not None and torch.cuda.is_initialized() else []
    seed_generators(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
        if torch is not None and torch_state is not None:
            torch.random.set_rng_state(torch_state)
            if cuda_states:
                torch.cuda.set_rng_state_all(cuda_states)
