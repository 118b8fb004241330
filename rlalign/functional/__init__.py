"""Every equation of the library, once: functions of tensors and numbers that know no config and no batch object."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.functional import (
        advantages,
        divergence,
        flow,
        guidance,
        masked,
        policy,
        prediction,
        preference,
    )

__all__ = ["advantages", "divergence", "flow", "guidance", "masked", "policy", "prediction", "preference"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return __all__
