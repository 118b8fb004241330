"""Parts every training loop shares: seeds, checkpoints, metrics, the run directory, signals, schedules, EMA."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.training.checkpoint import Checkpoint, CheckpointError, Checkpoints, CheckpointWarning
    from rlalign.training.ema import EMA
    from rlalign.training.metrics import MetricsLog, metrics_hash
    from rlalign.training.run_directory import RunDirectory, RunDirectoryError, RunLocked
    from rlalign.training.schedules import lr_scale
    from rlalign.training.seeding import derived_seed, generator, rng_state, seed_everything, set_rng_state
    from rlalign.training.signals import GracefulStop, Interrupted

__all__ = [
    "EMA",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "Checkpoints",
    "GracefulStop",
    "Interrupted",
    "MetricsLog",
    "RunDirectory",
    "RunDirectoryError",
    "RunLocked",
    "derived_seed",
    "generator",
    "lr_scale",
    "metrics_hash",
    "rng_state",
    "seed_everything",
    "set_rng_state",
]

_MODULES = {
    "EMA": "ema",
    "Checkpoint": "checkpoint",
    "CheckpointError": "checkpoint",
    "CheckpointWarning": "checkpoint",
    "Checkpoints": "checkpoint",
    "GracefulStop": "signals",
    "Interrupted": "signals",
    "MetricsLog": "metrics",
    "RunDirectory": "run_directory",
    "RunDirectoryError": "run_directory",
    "RunLocked": "run_directory",
    "derived_seed": "seeding",
    "generator": "seeding",
    "lr_scale": "schedules",
    "metrics_hash": "metrics",
    "rng_state": "seeding",
    "seed_everything": "seeding",
    "set_rng_state": "seeding",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
