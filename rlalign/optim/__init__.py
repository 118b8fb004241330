"""Optimizer steps: clip, check, step; natural gradients."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.optim.curvature import conjugate_gradient, fisher_vector_product, flat_gradient
    from rlalign.optim.natural_gradient import (
        BatchedNaturalGradientResult,
        NaturalGradientResult,
        batched_natural_gradient_step,
        natural_gradient_step,
    )
    from rlalign.optim.step import (
        SkipBudget,
        TrainingDiverged,
        adamw,
        bring_moments,
        finite_step,
        load_optimizer,
        set_learning_rate,
    )

__all__ = [
    "BatchedNaturalGradientResult",
    "NaturalGradientResult",
    "SkipBudget",
    "TrainingDiverged",
    "adamw",
    "batched_natural_gradient_step",
    "bring_moments",
    "conjugate_gradient",
    "finite_step",
    "fisher_vector_product",
    "flat_gradient",
    "load_optimizer",
    "natural_gradient_step",
    "set_learning_rate",
]

_MODULES = {
    "BatchedNaturalGradientResult": "natural_gradient",
    "NaturalGradientResult": "natural_gradient",
    "SkipBudget": "step",
    "TrainingDiverged": "step",
    "adamw": "step",
    "batched_natural_gradient_step": "natural_gradient",
    "bring_moments": "step",
    "conjugate_gradient": "curvature",
    "finite_step": "step",
    "fisher_vector_product": "curvature",
    "flat_gradient": "curvature",
    "load_optimizer": "step",
    "natural_gradient_step": "natural_gradient",
    "set_learning_rate": "step",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
