"""`rlalign` on the command line, at a fraction of its start-up time, and a folder with a tiny model to train in."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).with_name("command_server.py")

REWARDS = """
def even_length(completions, **columns):
    return [float(len(text) % 2 == 0) for text in completions]


def stumbles(completions, trainer_state, **columns):
    values = even_length(completions)
    return [float("nan"), *values[1:]] if trainer_state.global_step > 2 else values


def constant(completions, **columns):
    return [1.0 for _ in completions]


def constant_zero(completions, **columns):
    return [0.0 for _ in completions]


def not_a_number(completions, **columns):
    return [float("nan") for _ in completions]


def infinite(completions, **columns):
    return [float("inf") for _ in completions]


def raises(completions, **columns):
    raise RuntimeError("no grader here")


def too_few(completions, **columns):
    return [0.5]
"""
YAML = """# A tiny run.
method: bnpo
seed: 3
total_steps: 6
model: {{name: {checkpoint}, device: cpu}}
data:
  train: {{source: prompts.jsonl}}
  eval: {{source: held_out.jsonl}}
rewards:
  - function: rewards.py:even_length
guard: {{isolation: none}}
rollout: {{prompts_per_step: 4, group_size: 4, max_completion_tokens: 6}}
optim: {{learning_rate: 0.01, warmup_steps: 2, schedule: linear, update_epochs: 2, minibatches: 2}}
eval: {{every: 3, temperature: 1.0}}
checkpoint: {{every: 2}}
log: {{samples_every: 1}}
"""


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code (negative: the signal that ended it) and what it printed."""

    code: int
    out: str
    err: str
    counts: dict[str, int]


def fault(at: str, nth: int, do: str = "SIGKILL", *, after: bool = False) -> dict[str, Any]:
    """Let `do` (a signal, or ENOSPC) strike at the `nth` passing of a point of `command_server.POINTS`."""
    return {"at": at, "nth": nth, "do": do, "after": after}


def prepare(folder: Path, checkpoint: Path) -> Path:
    """Write a config with everything it names into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(YAML.format(checkpoint=checkpoint))
    (folder / "rewards.py").write_text(REWARDS)
    for name, numbers in {"prompts": range(10), "held_out": range(10, 15)}.items():
        rows = [json.dumps({"prompt": f"say {number}", "answer": str(number)}) + "\n" for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


def rlalign(
    folder: Path,
    *argv: str,
    faults: Sequence[dict[str, Any]] = (),
    count: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """Run one command (or a script, named first) in `folder`."""
    stdout, stderr, counts = (folder / f".{name}" for name in ("stdout", "stderr", "counts"))
    request = {
        "argv": argv,
        "cwd": str(folder),
        "environment": dict(environment or {}),
        "stdout": str(stdout),
        "stderr": str(stderr),
        "counts": str(counts) if count else None,
        "faults": list(faults),
    }
    code = _server().ask(request)
    counted = json.loads(counts.read_text()) if count and code == 0 else {}
    return Done(code, stdout.read_text(errors="replace"), stderr.read_text(errors="replace"), counted)


class _Server:
    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        self.errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 - lives as long as the server
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment,
            text=True,
            start_new_session=True,  # signals to the tests are not for the server
        )
        assert self._line() == "ready"

    def ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"the server ended with {self.process.wait()}: {self.errors.read()[-2000:]}")
        return line


@cache
def _server() -> _Server:
    """One for the whole test session; it ends when this process closes its pipe."""
    return _Server()
