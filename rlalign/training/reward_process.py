"""The trainer's end of a reward worker: start it, send it rows, kill it when it hangs, start the next one."""

import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Generator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlalign.training import reward_wire
from rlalign.training.reward_call import Reply, RewardLoadError, RowResult
from rlalign.training.reward_function import RewardFunction
from rlalign.training.reward_log import WorkerLog
from rlalign.training.reward_request import Request

_SLICE_S = 0.25
"""How often to look whether the worker still lives while something it forked keeps its pipe open."""


class _Hung(Exception):
    pass


class _Died(Exception):
    pass


class RewardProcess:
    """One reward function in a process of its own.

    Whatever the function does, it can be stopped: SIGKILL to its whole process group ends sleeps, Python and C loops,
    catastrophic regular expressions, and what it forked. A crash (segmentation fault, `os._exit`, out of memory) costs
    the one row that caused it. Not covered: a child that calls `setsid` itself, and this is no sandbox, the function
    has the user's rights.

    On Linux the worker dies with the thread that started it (that is how the kernel ties it to the trainer); one that
    died idle is replaced without a word.

    Starting does not wait: the constructor returns at once and the first request waits for what is left of the import.
    """

    def __init__(
        self,
        function: RewardFunction,
        *,
        memory_limit_gb: float | None = None,
        start_timeout_s: float = 300.0,
        log_path: Path | None = None,
    ) -> None:
        self.function = function
        self.start_timeout_s = start_timeout_s
        self.accepts: frozenset[str] | None = None
        self.required: list[str] = []
        self.load_seconds = 0.0
        self.imports_torch = False
        self._log = WorkerLog(log_path)
        self._order = reward_wire.dumps(
            {
                "name": function.name,
                "import_path": function.import_path,
                "arguments": dict(function.arguments),
                "memory_limit_gb": memory_limit_gb or half_of_memory_gb(),
            }
        )
        self._pending: Request | None = None
        self._start()

    def prepare(self) -> None:
        """Wait until the function is imported.

        Raises:
            RewardLoadError: It cannot be imported, or not within `start_timeout_s`.
        """
        if self._ready:
            return
        try:
            message = self._receive(time.perf_counter() + self.start_timeout_s)
        except _Hung:
            self.close()
            raise RewardLoadError(self.function, f"was not imported within {self.start_timeout_s:g} s") from None
        except _Died as death:
            raise RewardLoadError(self.function, f"{death} while it was imported", self._log.tail()) from None
        if "failed" in message:
            failed = RowResult(*message["failed"])
            self.close()
            raise RewardLoadError(self.function, failed.message, failed.detail)
        self.accepts = None if message["accepts"] is None else frozenset(message["accepts"])
        self.required = message["required"]
        self.load_seconds, self.imports_torch = message["seconds"], message["imports_torch"]
        self._ready = True

    def begin(self, request: Request) -> None:
        """Send the rows without waiting for the answer, so that several functions work at the same time."""
        self._submit(request, alone=False)

    def finish(self, timeout_s: float) -> Reply:
        """The answer to `begin`. A hang or a death comes back as `Reply.error`, and a new worker is on its way."""
        request = self._pending
        assert request is not None, "finish() without begin()"
        try:
            message = self._receive(max(request.started + timeout_s, time.perf_counter() + min(1.0, timeout_s)))
        except _Hung:
            error = RowResult(None, "timeout", f"took longer than {timeout_s:g} s and was killed")
        except _Died as death:
            error = RowResult(None, "died", str(death), self._log.tail())
        except BaseException:  # Ctrl-C: the answer that is still coming must not meet the next request
            self._restart()
            raise
        else:
            self._pending = None
            self._log.keep()
            return _reply(message)
        self._log.keep()
        self._restart()
        return Reply(error=error, seconds=time.perf_counter() - request.started)

    def alone(self, request: Request, timeout_s: float) -> Generator[RowResult, None, None]:
        """Score the rows one at a time, each with its own time limit; a killed worker resumes after the culprit."""
        done = 0
        try:
            while done < request.rows:
                self._submit(request.take(range(done, request.rows)), alone=True)
                while done < request.rows:
                    result = self._one(timeout_s)
                    done += 1
                    yield result
                    if result.status in ("timeout", "died"):
                        break
            self._pending = None
        finally:
            if self._pending is not None:
                self._restart()

    def _one(self, timeout_s: float) -> RowResult:
        try:
            reply = _reply(self._receive(time.perf_counter() + timeout_s))
        except _Hung:
            self._restart()
            return RowResult(None, "timeout", f"took longer than {timeout_s:g} s on this row alone and was killed")
        except _Died as death:
            tail = self._log.tail()
            self._log.keep()
            self._restart()
            return RowResult(None, "died", str(death), tail)
        return reply.error if reply.error is not None else reply.results[0]

    def close(self) -> None:
        self._stop()
        self._pending = None

    def _start(self) -> None:
        request_read, self._request_fd = os.pipe()
        self._response_fd, response_write = os.pipe()
        self._ready, self._buffer = False, b""
        command = [sys.executable, "-P", "-m", "rlalign.training.reward_worker"]
        try:
            self._process = subprocess.Popen(
                [*command, str(request_read), str(response_write), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stderr=self._log.stderr,
                pass_fds=(request_read, response_write),
                start_new_session=True,
                env=_environment(),
            )
        finally:
            os.close(request_read)
            os.close(response_write)
        os.set_blocking(self._request_fd, False)
        os.set_blocking(self._response_fd, False)
        self._stop = weakref.finalize(self, _kill, self._process, os.getpid(), self._request_fd, self._response_fd)
        with suppress(_Died):  # `prepare` meets the body and says why
            self._write_all(self._order)

    def _restart(self) -> None:
        self._stop()
        self._pending = None
        self._start()

    def _submit(self, request: Request, *, alone: bool) -> None:
        if self._pending is not None:  # an answer nobody fetched, after an error elsewhere: it must not meet these rows
            self._restart()
        try:
            self._write(request, alone=alone)
        except _Died:  # it died while idle, before it saw these rows: that is no row's fault
            self._restart()
            self._write(request, alone=alone)

    def _write(self, request: Request, *, alone: bool) -> None:
        self.prepare()
        header = {
            "alone": alone,
            "rows": request.rows,
            "trainer_state": request.trainer_state,
            "watch_inputs": request.watch_inputs,
        }
        columns = request.columns if self.accepts is None else request.only(self.accepts)
        self._pending = replace(request, started=time.perf_counter())
        self._write_all(reward_wire.dumps(header) + reward_wire.dumps(columns))

    def _write_all(self, data: bytes) -> None:
        left = memoryview(data)
        with selectors.DefaultSelector() as selector:
            selector.register(self._request_fd, selectors.EVENT_WRITE)
            while left:
                try:
                    left = left[os.write(self._request_fd, left) :]
                except BlockingIOError:
                    if not selector.select(_SLICE_S) and self._process.poll() is not None:
                        raise _Died(self._obituary()) from None
                except BrokenPipeError:
                    raise _Died(self._obituary()) from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._response_fd, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.perf_counter()
                if selector.select(max(0.0, min(left, _SLICE_S))):
                    chunk = os.read(self._response_fd, 2**20)
                    if not chunk:
                        raise _Died(self._obituary())
                    self._buffer += chunk
                elif left <= 0:
                    raise _Hung
                elif self._process.poll() is not None:
                    raise _Died(self._obituary())
        line, _, self._buffer = self._buffer.partition(b"\n")
        return reward_wire.loads(line)

    def _obituary(self) -> str:
        # A closed pipe comes a moment before the exit status; a worker that closed it and lives is ended.
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code >= 0:
            return f"ended its process with status {code} (os._exit, or a fatal error in C code)"
        name = signal.Signals(-code).name
        cause = {"SIGSEGV": ": a crash in C code", "SIGKILL": ": out of memory?"}.get(name, "")
        return f"killed its process ({name}{cause})"


def half_of_memory_gb() -> float:
    """Half of what this machine or container has: a runaway reward gets a MemoryError before the trainer suffers."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total / 2**31


def _reply(message: dict[str, Any]) -> Reply:
    return Reply(
        results=[RowResult(*fields) for fields in message.get("results", [])],
        error=RowResult(*message["error"]) if "error" in message else None,
        seconds=message["seconds"],
        metrics=message["metrics"],
        extras=message["extras"],
        mutated=message["mutated"],
    )


def _environment() -> dict[str, str]:
    """The trainer's environment and import path; a fixed hash seed, so that set order repeats."""
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}


def _kill(process: subprocess.Popen[bytes], owner: int, *descriptors: int) -> None:
    if os.getpid() != owner:  # a fork of the trainer is ending, not the trainer
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # the group: what the reward forked goes too
    process.wait()
    for descriptor in descriptors:
        os.close(descriptor)
