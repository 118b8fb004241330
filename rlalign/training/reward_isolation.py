"""Where a reward function runs: in a process of its own, or beside the trainer with or without a time limit."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rlalign.training import reward_wire
from rlalign.training.reward_function import RewardFunction, importable_path
from rlalign.training.reward_local import RewardInProcess
from rlalign.training.reward_process import RewardProcess
from rlalign.training.reward_rescue import Runner

Isolation = Literal["auto", "process", "thread", "none"]


def make_runner(
    function: RewardFunction,
    isolation: Isolation,
    *,
    memory_limit_gb: float | None = None,
    start_timeout_s: float = 300.0,
    log_path: Path | None = None,
) -> Runner:
    """Start the function where `isolation` says. `auto`: a process if a fresh interpreter can import it, else `thread`.

    Raises:
        ValueError: `process` was asked for a function that cannot be imported.
    """
    if isolation in ("thread", "none"):
        return RewardInProcess(function, limited=isolation == "thread")
    path = _process_path(function)
    if path is None:
        if isolation == "process":
            raise ValueError(_cannot_isolate(function))
        return RewardInProcess(function)
    return RewardProcess(
        replace(function, call=None, import_path=path),
        memory_limit_gb=memory_limit_gb,
        start_timeout_s=start_timeout_s,
        log_path=log_path,
    )


def _process_path(function: RewardFunction) -> str | None:
    if sys.platform == "win32":  # no process groups to kill, no descriptors to hand over
        return None
    if function.import_path is not None:
        reward_wire.dumps(dict(function.arguments))  # a TypeError here names the argument that is no data
        return function.import_path
    if function.call is None or not _is_data(function.arguments):
        return None
    return importable_path(function.call)


def _is_data(arguments: Mapping[str, Any]) -> bool:
    try:
        reward_wire.dumps(dict(arguments))
    except TypeError:
        return False
    return True


def _cannot_isolate(function: RewardFunction) -> str:
    return (
        f"`guard.isolation=process` needs reward '{function.name}' to be importable by a fresh Python (on Linux or "
        "macOS), but it is a lambda, a closure, an object, or defined in the script that runs. Move it to the top "
        "level of a file and name it as `file.py:function`, or use `guard.isolation=thread`."
    )
