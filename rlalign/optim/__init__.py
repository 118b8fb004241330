"""Optimizer steps: clip, check, step; natural gradients."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.optim.step import SkipBudget, TrainingDiverged, adamw, finite_step, set_learning_rate

__all__ = ["SkipBudget", "TrainingDiverged", "adamw", "finite_step", "set_learning_rate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.step"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
