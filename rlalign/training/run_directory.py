"""The run directory: where a run keeps its files, who holds it, and how it stands."""

import json
import os
import re
import socket
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import filelock

from rlalign.training.files import write_atomic
from rlalign.training.versions import library_versions

Status = Literal["running", "done", "failed", "interrupted"]
_NAME = re.compile(r"[A-Za-z0-9._-]{1,80}")
_MAX_DEPTH = 8
_FOLDERS = ("samples", "checkpoints", "errors", "media")


class RunDirectoryError(ValueError):
    """The run directory cannot be used as asked; a matter of usage, so exit code 2."""

    exit_code = 2


class RunLocked(RunDirectoryError):
    """Another process is writing into the run directory."""


class RunDirectory:
    """Paths, lock and status of one run.

    Use `create` for a new run and `open` for one that exists. The lock goes with the process, however it ends.
    """

    def __init__(self, path: Path, lock: filelock.BaseFileLock | None) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls, path: Path | str, config_text: str, resolved: dict[str, Any]) -> "RunDirectory":
        """Make the directory of a new run, lock it and write its configuration and versions.

        Args:
            config_text: The configuration as the user wrote it, kept as `config.yaml`.
            resolved: Every setting with defaults filled in, kept as `config.resolved.json`.

        Raises:
            RunDirectoryError: The name is not allowed, the place is taken, or it cannot be written.
            RunLocked: Another process holds the directory.
        """
        path = Path(path)
        check_run_name(path.name)
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise RunDirectoryError(f"{path} is a link or a file; name a new directory with `--run-dir`.")
        run = cls(path, _make_and_lock(path))
        try:
            run._refuse_used()
            run._write_start(config_text, resolved)
        except OSError as error:
            run.close()
            raise RunDirectoryError(f"cannot write the run directory {path}: {error.strerror}.") from error
        except RunDirectoryError:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path | str, *, lock: bool = True) -> "RunDirectory":
        """Open the directory of an existing run.

        Args:
            lock: False only reads (report, eval, sample), which is safe beside a running training.

        Raises:
            RunDirectoryError: There is no run at `path`.
            RunLocked: `lock` is True and another process holds the directory.
        """
        path = Path(path)
        if not (path / "config.resolved.json").is_file():
            raise RunDirectoryError(f"{path} is not a run directory: it has no config.resolved.json.")
        return cls(path, _make_and_lock(path) if lock else None)

    def change_config(self, resolved: dict[str, Any]) -> list[str]:
        """Write the settings that a resumed run was given, where they differ; the earlier ones are kept beside.

        Returns:
            A line for each setting that differs: `key: before -> now`.
        """
        before, now = (
            dict(flatten(json.loads(self.resolved_config.read_text()))),
            dict(flatten(json.loads(_json(resolved)))),
        )
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if changed:
            number = 1 + len(list(self.path.glob("config.resolved.*.json")))
            write_atomic(self.path / f"config.resolved.{number}.json", self.resolved_config.read_text())
            write_atomic(self.resolved_config, _json(resolved))
        return [f"{key}: {before.get(key, 'not set')} -> {now.get(key, 'not set')}" for key in changed]

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def resolved_config(self) -> Path:
        return self.path / "config.resolved.json"

    @property
    def versions(self) -> Path:
        return self.path / "versions.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def errors(self) -> Path:
        return self.path / "errors"

    @property
    def media(self) -> Path:
        return self.path / "media"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def set_status(self, status: Status, **details: str | int | float | None) -> None:
        """Record how the run stands, with the process that says so, in `status.json`."""
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        write_atomic(self.path / "status.json", _json({"status": status} | owner | details))

    def status(self) -> dict[str, Any]:
        """Return the last recorded status. A "running" run whose lock is free died without saying so."""
        return json.loads((self.path / "status.json").read_text(encoding="utf-8"))

    def record_error(self, error: BaseException) -> Path:
        """Write the full traceback of `error` to `errors/` and return the file."""
        number = 1 + len(list(self.errors.glob("error-*.txt")))
        path = self.errors / f"error-{number:04d}.txt"
        write_atomic(path, "".join(traceback.format_exception(error)))
        return path

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_used(self) -> None:
        if self.resolved_config.exists():
            raise RunDirectoryError(
                f"{self.path} already holds a run. Continue it with `rlalign resume {self.path}`, "
                "or start a new one with another `--run-dir`."
            )
        # A creation that was killed half-way leaves only our own folders and files.
        ours = {*_FOLDERS, "config.yaml", "versions.json", "status.json"}
        for entry in sorted(self.path.iterdir()):
            if entry.name not in ours and not entry.name.startswith("."):
                raise RunDirectoryError(
                    f"{self.path} is not empty (it holds {entry.name!r}) and is not a run; choose another `--run-dir`."
                )

    def _write_start(self, config_text: str, resolved: dict[str, Any]) -> None:
        for folder in _FOLDERS:
            (self.path / folder).mkdir(exist_ok=True)
        write_atomic(self.config, config_text)
        write_atomic(self.versions, _json(library_versions()))
        self.set_status("running")
        # Last: its presence says that the directory is complete.
        write_atomic(self.resolved_config, _json(resolved))


def free_run_path(name: str, *, parent: Path = Path("runs"), taken: Iterable[Path] = ()) -> Path:
    """`parent/name`, or the first of `name-2`, `name-3` ... that does not exist and is not in `taken`.

    Args:
        name: Anything; what a run may not be called becomes hyphens.

    Raises:
        RunDirectoryError: Several processes train together: each would find a name of its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunDirectoryError(
            "with several processes name the run's directory (`--run-dir`, in Python `run_dir=`), so that all of them "
            "use the same."
        )
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-")[:70] or "run"
    promised = {path.absolute() for path in taken}
    path, number = parent / stem, 1
    while path.exists() or path.absolute() in promised:
        number += 1
        path = parent / f"{stem}-{number}"
    return path


def check_run_name(name: str) -> None:
    """Refuse a run name that is not 1 to 80 letters, digits, dots, underscores or hyphens.

    Raises:
        RunDirectoryError: The name could leave its parent directory or confuse a shell.
    """
    if not _NAME.fullmatch(name) or set(name) <= {"."} or name.startswith("-"):
        raise RunDirectoryError(
            f"run name {name!r} is not allowed: use 1 to 80 of A-Z a-z 0-9 . _ - (no path separators, "
            "not only dots, no leading hyphen)."
        )


def _make_and_lock(path: Path) -> filelock.BaseFileLock:
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Not a singleton, and not thread-local: a second opening in this process must fail like any other.
        lock = filelock.FileLock(path / ".lock", timeout=0, thread_local=False, is_singleton=False)
        lock.acquire()
        # The lock file itself is emptied by every attempt to take it, so the owner's name stands beside it.
        write_atomic(path / ".lock.json", _json({"pid": os.getpid(), "host": socket.gethostname()}))
    except filelock.Timeout:
        raise RunLocked(f"run {path} is locked by {_owner(path)}; wait for it, or stop that process.") from None
    except OSError as error:
        raise RunDirectoryError(f"cannot use {path} as run directory: {error.strerror}.") from error
    return lock


def _owner(path: Path) -> str:
    try:
        owner = json.loads((path / ".lock.json").read_text(encoding="utf-8"))
        return f"pid {owner['pid']} on host {owner['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested objects with dotted names."""
    for key, value in content.items():
        if isinstance(value, dict) and value and prefix.count(".") < _MAX_DEPTH:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
