"""Optional experiment trackers. The run directory is complete without them, and their outage never stops a run."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None: ...

    def close(self) -> None: ...


class MissingTracker(ModuleNotFoundError):
    """A tracker was asked for whose package is not installed."""


def require_trackers(names: Sequence[str]) -> None:
    """Look for the packages of the named trackers, importing none.

    Raises:
        MissingTracker: A package is missing. Better now than after a night without curves.
    """
    for name in names:
        if find_spec(name) is None:
            raise _missing(name)


def open_trackers(names: Sequence[str], run_dir: Path, *, project: str) -> list[Tracker]:
    """Start the named trackers: `tensorboard`, `trackio`, `wandb`.

    Raises:
        MissingTracker: A package cannot be imported.
    """
    return [_Tolerant(name, lambda name=name: _OPEN[name](run_dir, project)) for name in names]


class _Tolerant:
    """Turns a tracker's failures, the first connection included, into one warning."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self.name, self.started, self.failed = name, list[Tracker](), False
        self._try(lambda: self.started.append(start()))

    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        for tracker in self.started:
            self._try(partial(tracker.log, step, metrics))

    def close(self) -> None:
        for tracker in self.started:
            self._try(tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except MissingTracker:
            raise
        except Exception as error:  # whatever a tracker's network client raises
            if not self.failed:
                warnings.warn(
                    f"{self.name} failed ({error}); the run goes on, metrics.jsonl is complete.", stacklevel=3
                )
            self.failed = True


class _Tensorboard:
    def __init__(self, run_dir: Path, project: str) -> None:
        self.writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        for name, value in metrics.items():
            if not isinstance(value, str):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _WandbLike:
    """wandb, and trackio, which has the same three calls."""

    def __init__(self, module: Any, run_dir: Path, project: str) -> None:
        self.module = module
        module.init(project=project, name=run_dir.name)

    def log(self, step: int, metrics: Mapping[str, float | int | str]) -> None:
        self.module.log(dict(metrics), step=step)

    def close(self) -> None:
        self.module.finish()


def _module(path: str, package: str) -> Any:
    try:
        return import_module(path)
    except ImportError as error:
        raise _missing(package) from error


def _missing(package: str) -> MissingTracker:
    text = f"`log.trackers` names {package}, which is not installed: pip install {package}."
    return MissingTracker(text, name=package)


_OPEN: dict[str, Callable[[Path, str], Tracker]] = {
    "tensorboard": _Tensorboard,
    "trackio": lambda run_dir, project: _WandbLike(_module("trackio", "trackio"), run_dir, project),
    "wandb": lambda run_dir, project: _WandbLike(_module("wandb", "wandb"), run_dir, project),
}
