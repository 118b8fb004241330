"""Forks one process per `rlalign` command, so that many commands cost the imports of one; kills and disturbs on order.

Requests are JSON lines on stdin: `argv` (of `rlalign`, or of a Python script that comes first), `cwd`, `environment`,
`stdout` and `stderr` (files), `counts` (a file or null) and `faults`, a list of `{"at": point, "nth": n, "do": what,
"after": bool}`. The answer is a line with the exit code, negative for a signal. The children are processes like any
other: they hold the run's lock, get signals and die of SIGKILL.
"""

import errno
import importlib
import json
import os
import runpy
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

POINTS = {
    "token": ("rlalign.llm.generate", "", "sample_tokens"),
    "reward": ("rlalign.training.guard", "RewardGuard", "score"),
    "rollout": ("rlalign.llm.trainer", "PolicyGradientTrainer", "collect"),
    "loss": ("rlalign.llm.trainer", "PolicyGradientTrainer", "loss"),
    "update": ("rlalign.llm.trainer", "PolicyGradientTrainer", "take_step"),
    "eval": ("rlalign.llm.evaluation", "Evaluator", "_complete"),
    "record": ("rlalign.training.metrics", "MetricsLog", "write"),
    "samples": ("rlalign.training.journal", "Journal", "samples"),
    "save": ("rlalign.training.checkpoint", "Checkpoints", "save"),
    "prune": ("rlalign.training.checkpoint", "Checkpoints", "_prune"),
    "model": ("rlalign.llm.policy", "Policy", "save"),
    "report": ("rlalign.training.session", "", "write_report"),
    "env": ("rlalign.agents.envs", "Environments", "step"),
    "learn": ("rlalign.agents.optimizer", "AgentOptimizer", "take_step"),
    "play": ("rlalign.agents.evaluate", "Evaluator", "play"),
}
"""Where a fault can strike: module, class or nothing, function. `file` besides: file operations inside a save."""
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}
LONGEST_SECONDS = 240


def main() -> None:
    importlib.import_module("rlalign.llm.run")
    for module, _, _ in POINTS.values():
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def become(request: dict[str, Any]) -> None:
    """Be the command until it ends; never returns."""
    code = 99
    try:
        signal.alarm(LONGEST_SECONDS)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        redirect(request)
        os.environ.update(request["environment"])
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        counts = arrange(request["faults"])
        code = command(request["argv"])
        if request["counts"]:
            with open(request["counts"], "w") as file:
                json.dump(counts, file)
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing may unwind into the server's loop from here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def redirect(request: dict[str, Any]) -> None:
    os.chdir(request["cwd"])
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags, 0o644), descriptor)


def command(argv: list[str]) -> int:
    """The `rlalign` command with these arguments, or a Python script with its own."""
    from rlalign import cli

    warnings.resetwarnings()
    script = argv[0].endswith(".py")
    sys.argv = argv if script else ["rlalign", *argv]
    try:
        runpy.run_path(argv[0], run_name="__main__") if script else cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def arrange(faults: list[dict[str, Any]]) -> Counter[str]:
    """Count every point, and let the faults strike at theirs."""
    counts: Counter[str] = Counter()

    def passing(point: str, after: bool) -> None:
        for fault in faults:
            if (fault["at"], fault["after"]) == (point, after) and fault["nth"] == counts[point]:
                strike(fault["do"])

    for point, (module, owner, name) in POINTS.items():
        home = importlib.import_module(module)
        holder = vars(home)[owner] if owner else home
        setattr(holder, name, watched(vars(holder)[name], point, counts, passing))
    saving = [0]
    watch_files(saving, counts, passing)
    from rlalign.training.checkpoint import Checkpoints

    setattr(Checkpoints, "save", marked(Checkpoints.save, saving))  # noqa: B010 - pyright knows no such attribute
    return counts


def watched(function: Callable, point: str, counts: Counter[str], passing: Callable[[str, bool], None]) -> Callable:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        counts[point] += 1
        passing(point, False)
        result = function(*args, **kwargs)
        passing(point, True)
        return result

    return wrapper


def marked(save: Callable, saving: list[int]) -> Callable:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        saving[0] += 1
        try:
            return save(*args, **kwargs)
        finally:
            saving[0] -= 1

    return wrapper


def watch_files(saving: list[int], counts: Counter[str], passing: Callable[[str, bool], None]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if saving[0] and event in FILE_EVENTS:
            counts["file"] += 1
            passing("file", False)

    sys.addaudithook(hook)


def strike(what: str) -> None:
    if what == "ENOSPC":
        raise OSError(errno.ENOSPC, "No space left on device")
    os.kill(os.getpid(), signal.Signals[what])


if __name__ == "__main__":
    main()
