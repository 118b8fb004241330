"""The process a reward function lives in: `python -m rlalign.training.reward_worker`. Stdlib only: it starts in 0.1 s.

It reads JSON lines from one pipe and answers on another (`reward_wire`), never on stdout: what a reward prints goes to
stderr. It dies with its parent: by signal on Linux even in the middle of a C loop, elsewhere by watching its parent.
The function runs in the main thread, so graders that use `signal.alarm` (math-verify) work.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from rlalign.training import reward_wire
from rlalign.training.reward_call import RowResult, call, failure, seed_generators
from rlalign.training.reward_function import RewardFunction, declared_arguments, required_arguments

PR_SET_PDEATHSIG = 1


def main(request_fd: int, response_fd: int, parent: int) -> None:
    _die_with(parent)
    os.dup2(2, 1)
    faulthandler.enable()
    # Reads are line by line and writes are whole lines; nothing else may touch these two descriptors.
    requests, responses = os.fdopen(request_fd, "rb"), os.fdopen(response_fd, "wb")
    order = reward_wire.loads(requests.readline())
    _limit_memory(order["memory_limit_gb"])
    started = time.perf_counter()
    try:
        function = RewardFunction(
            name=order["name"], import_path=order["import_path"], arguments=order["arguments"]
        ).load()
    except BaseException as error:  # SystemExit included: a script that exits on import is a failure to report
        _send(responses, {"failed": _fields(failure(error))})
        return
    accepts = declared_arguments(function)
    ready = {
        "accepts": None if accepts is None else sorted(accepts),
        "required": required_arguments(function),
        "seconds": time.perf_counter() - started,
        "imports_torch": "torch" in sys.modules,
    }
    _send(responses, ready)
    while header := requests.readline():
        columns = requests.readline()
        _serve(function, accepts, reward_wire.loads(header), columns, responses)


def _serve(
    function: Callable[..., Any],
    accepts: frozenset[str] | None,
    header: dict[str, Any],
    line: bytes,
    responses: BinaryIO,
) -> None:
    columns: dict[str, list[Any]] = reward_wire.loads(line)
    parts = [columns]
    if header["alone"]:
        parts = [{name: [values[i]] for name, values in columns.items()} for i in range(header["rows"])]
    for part in parts:
        metrics: list[tuple[str, float]] = []
        extras: list[tuple[str, list[Any]]] = []
        offered = {
            "trainer_state": SimpleNamespace(**header["trainer_state"]),
            "log_metric": lambda name, value, sink=metrics: sink.append((str(name), float(value))),
            "log_extra": lambda name, values, sink=extras: sink.append((str(name), list(values))),
        }
        arguments = part | {name: item for name, item in offered.items() if accepts is None or name in accepts}
        before = reward_wire.dumps(part) if header["watch_inputs"] else b""
        seed_generators(zlib.crc32(reward_wire.dumps(part) if header["alone"] else line))
        answer = _score(function, arguments, 1 if header["alone"] else header["rows"])
        answer |= {"metrics": metrics, "extras": extras}
        answer["mutated"] = header["watch_inputs"] and reward_wire.dumps(part) != before
        _send(responses, answer)


def _score(function: Callable[..., Any], arguments: dict[str, Any], rows: int) -> dict[str, Any]:
    pid = os.getpid()
    started = time.perf_counter()
    try:
        answer: dict[str, Any] = {"results": [_fields(result) for result in call(function, arguments, rows)]}
    except BaseException as error:  # sys.exit() and KeyboardInterrupt from a reward are its failures, not ours
        answer = {"error": _fields(failure(error))}
    if os.getpid() != pid:  # the reward forked and both copies came back: only the original may answer
        os._exit(0)
    with suppress(ValueError, OSError):  # it may have closed them
        sys.stdout.flush()
        sys.stderr.flush()
    return answer | {"seconds": time.perf_counter() - started}


def _fields(result: RowResult) -> list[Any]:
    return [result.value, result.status, result.message, result.detail]


def _send(responses: BinaryIO, message: dict[str, Any]) -> None:
    try:
        responses.write(reward_wire.dumps(message))
        responses.flush()
    except BrokenPipeError:
        os._exit(0)  # the trainer is gone; there is nobody to tell


def _limit_memory(gigabytes: float) -> None:
    import resource

    limit = int(gigabytes * 2**30)
    # RLIMIT_DATA counts memory that is written to; RLIMIT_AS would also count what CUDA merely reserves.
    kind = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    if sys.platform == "linux":
        with suppress(OSError):  # if memory runs out all the same, the kernel should take us, not the trainer
            Path("/proc/self/oom_score_adj").write_text("1000")


def _die_with(parent: int) -> None:
    if sys.platform != "linux":
        threading.Thread(target=_watch_parent, args=(parent,), daemon=True).start()
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
    # The signal is not inherited. It follows threads, so a fork from a short-lived thread must do without.
    forks_from_main: list[bool] = []
    os.register_at_fork(
        before=lambda: forks_from_main.append(threading.current_thread() is threading.main_thread()),
        after_in_parent=forks_from_main.clear,
        after_in_child=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL) if forks_from_main.pop() else None,
    )


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]))
