"""One config under several seeds: a process for each, at most as many at a time as there are cores, then one aggregate.

The folder holds `seeds.json` (the plan), `seed-N/` (an ordinary run directory each), `seed-N.log` (what its process
printed), and at the end `aggregate.json` and `report.html`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlalign.training.board_panel import evaluation_words
from rlalign.training.files import write_atomic
from rlalign.training.report_data import as_number
from rlalign.training.run_directory import RunDirectoryError, check_run_name
from rlalign.training.signals import GracefulStop, Interrupted
from rlalign.training.untrusted_text import one_line

PLAN = "seeds.json"
_POLL_S = 0.1
_TELL_S = 10.0
_TOTALS = ("total_steps", "total_updates", "total_env_steps")
_LAST_WORDS_S = 30.0
"""How long a second Ctrl-C waits for the processes before it ends them."""


class SeedsFailed(RuntimeError):
    """Some seeds failed; the others ran to their end."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was asked for."""

    seeds: list[int]
    settings: list[str]
    """Changes of the config on the command line, as `key=value`."""


def create(folder: Path, *, seeds: Sequence[int], config_text: str, settings: Sequence[str]) -> Plan:
    """Make the folder of several seeds.

    Raises:
        RunDirectoryError: The name is not allowed, or something is there already.
    """
    check_run_name(folder.name)
    if (folder / PLAN).is_file():
        raise RunDirectoryError(
            f"{folder} already holds several seeds. Continue them with `rlalign resume {folder}`, or start anew with "
            "another `--run-dir`."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunDirectoryError(f"{folder} is not an empty directory; name a new one with `--run-dir`.")
    plan = Plan(seeds=list(seeds), settings=list(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", config_text)
        write_atomic(folder / PLAN, json.dumps(vars(plan), indent=2) + "\n")
    except OSError as error:
        raise RunDirectoryError(f"cannot write {folder}: {error.strerror}.") from error
    return plan


def holds_seeds(folder: Path) -> bool:
    """Whether `folder` was made by `create`."""
    return (folder / PLAN).is_file()


def read_plan(folder: Path) -> Plan:
    """What `create` wrote.

    Raises:
        RunDirectoryError: It is missing or damaged.
    """
    try:
        data = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return Plan(seeds=[int(seed) for seed in data["seeds"]], settings=[str(text) for text in data["settings"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{folder / PLAN} cannot be read ({type(error).__name__}).") from error


def seed_directory(folder: Path, seed: int) -> Path:
    """The run directory of one seed."""
    return folder / f"seed-{seed}"


def status_of(folder: Path, seed: int) -> str:
    """done, running, failed, interrupted, or waiting for a seed that never began."""
    try:
        found = json.loads((seed_directory(folder, seed) / "status.json").read_text(encoding="utf-8"))
        return str(found["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return "waiting"


def run_seeds(folder: Path, *, at_once: int | None = None, tell: Callable[[str], object] = print) -> None:
    """Train all seeds that are not done, then write the aggregate over those that are.

    Args:
        at_once: Processes at a time; the cores this process may use unless given.
        tell: Receives lines for the user.

    Raises:
        Interrupted: SIGINT or SIGTERM came; every seed was told, and saved.
        SeedsFailed: A seed failed; the others went on to their end.
    """
    plan = read_plan(folder)
    runner = _Runner(folder, plan, at_once or _cores(), tell)
    with GracefulStop() as stop:
        try:
            runner.run(stop)
        except KeyboardInterrupt:
            runner.end_at_once()
    from rlalign.training.seeds_report import write_aggregate

    done = [seed for seed in plan.seeds if status_of(folder, seed) == "done"]
    tell(f"Report: {write_aggregate(folder)}")
    if stop.requested and len(done) < len(plan.seeds):
        raise Interrupted(f"{len(done)} of {len(plan.seeds)} seeds are done. Continue: rlalign resume {folder}")
    if runner.failures:
        names = ", ".join(str(seed) for seed in sorted(runner.failures))
        raise SeedsFailed(
            f"{len(runner.failures)} of {len(plan.seeds)} seeds failed ({names}); the aggregate is over the other "
            f"{len(done)}. Try them again: rlalign resume {folder}"
        )


def command(folder: Path, plan: Plan, seed: int) -> list[str]:
    """What trains one seed: from the start, or from where its run directory stands."""
    run = seed_directory(folder, seed)
    base = [sys.executable, "-m", "rlalign"]
    if (run / "config.resolved.json").is_file():
        return [*base, "resume", str(run)]
    return [*base, "train", str(folder / "config.yaml"), *plan.settings, f"seed={seed}", "--run-dir", str(run)]


class _Runner:
    """Starts, watches and stops the processes."""

    def __init__(self, folder: Path, plan: Plan, at_once: int, tell: Callable[[str], object]):
        self.folder, self.plan, self.at_once, self.tell = folder, plan, at_once, tell
        self.waiting = [seed for seed in plan.seeds if status_of(folder, seed) != "done"]
        self.running: dict[int, _Child] = {}
        self.failures: set[int] = set()
        self.told = time.monotonic()

    def run(self, stop: GracefulStop) -> None:
        forwarded = False
        together = min(self.at_once, len(self.waiting))
        self.tell(
            f"{len(self.waiting)} of {len(self.plan.seeds)} seeds to train, {together} at a time; "
            f"what each prints is in {self.folder}/seed-N.log"
        )
        while self.running or (self.waiting and not stop.requested):
            while self.waiting and not stop.requested and len(self.running) < self.at_once:
                seed = self.waiting.pop(0)
                self.running[seed] = _Child.start(self.folder, self.plan, seed)
            if stop.requested and not forwarded:
                forwarded = True
                for child in self.running.values():
                    child.process.send_signal(signal.SIGTERM)
            time.sleep(_POLL_S)
            self._look(stopping=stop.requested)

    def end_at_once(self) -> None:
        """A second Ctrl-C: no more saving."""
        for child in self.running.values():
            child.process.send_signal(signal.SIGINT)  # its second signal
        until = time.monotonic() + _LAST_WORDS_S
        for child in self.running.values():
            try:
                child.process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    def _look(self, *, stopping: bool) -> None:
        for seed, child in list(self.running.items()):
            for line in child.news():
                self.tell(line)
            code = child.process.poll()
            if code is not None:
                del self.running[seed]
                self._ended(child, code, stopping=stopping)
        if self.running and time.monotonic() - self.told >= _TELL_S:
            self.told = time.monotonic()
            places = ", ".join(f"seed {seed} {child.share():.0%}" for seed, child in self.running.items())
            self.tell(f"running: {places}" + (f"; {len(self.waiting)} waiting" if self.waiting else ""))

    def _ended(self, child: "_Child", code: int, *, stopping: bool) -> None:
        if code == 0:
            self.tell(f"seed {child.seed}  done")
        elif code == 75 or (stopping and status_of(self.folder, child.seed) != "failed"):
            self.tell(f"seed {child.seed}  stopped")
        else:
            self.failures.add(child.seed)
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            self.tell(f"seed {child.seed}  FAILED ({how}): {_last_words(child.log)}  (all of it: {child.log})")


@dataclass(kw_only=True)
class _Child:
    """The process of one seed, and how far its metrics were read."""

    seed: int
    process: subprocess.Popen[bytes]
    log: Path
    run: Path
    read: int
    step: float = 0.0
    total: float = field(default=0.0)

    @classmethod
    def start(cls, folder: Path, plan: Plan, seed: int) -> "_Child":
        run, log = seed_directory(folder, seed), folder / f"seed-{seed}.log"
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with log.open("ab") as output:
            process = subprocess.Popen(
                command(folder, plan, seed),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | one_thread | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C on the terminal reaches it through us, once
            )
        metrics = run / "metrics.jsonl"
        return cls(
            seed=seed, process=process, log=log, run=run, read=metrics.stat().st_size if metrics.is_file() else 0
        )

    def news(self) -> list[str]:
        """A line for each evaluation since the last call."""
        return [
            f"seed {self.seed}  eval  {row['step']:,}  {evaluation_words(_numbers(row))}"
            for row in self._new_rows()
            if row.get("kind") == "eval"
        ]

    def share(self) -> float:
        """How much of the run is done."""
        return min(self.step / self.total, 1.0) if self.total else 0.0

    def _new_rows(self) -> list[dict[str, Any]]:
        try:
            with (self.run / "metrics.jsonl").open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(min(self.read, size))  # a resumed run cuts its file back
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            rows = [json.loads(line) for line in whole.splitlines()]
        except (OSError, ValueError):
            return []
        self.read = min(self.read, size) + len(whole)
        if rows:
            self.step, self.total = float(rows[-1]["step"]), self.total or self._total()
        return rows

    def _total(self) -> float:
        try:
            config = json.loads((self.run / "config.resolved.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0.0
        return float(next((config[name] for name in _TOTALS if config.get(name)), 0.0))


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    found = {name: as_number(value) for name, value in row.items() if name not in ("kind", "step")}
    return {name: value for name, value in found.items() if value is not None}


def _last_words(log: Path) -> str:
    """The message a process ended with: its `Failed:` line, or the last one."""
    try:
        lines = [
            line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
    except OSError:
        return "no log"
    said = [line for line in lines if line.startswith("Failed: ")] or lines or ["nothing was printed"]
    return one_line(said[-1].removeprefix("Failed: "), limit=300)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
