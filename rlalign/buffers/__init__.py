"""Rollouts: what happened, shaped `[batch, time]`, the same for tokens, environment steps and denoising steps."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.buffers.inputs import Axis, Input
    from rlalign.buffers.rollout import Rollout, TrainBatch
    from rlalign.buffers.rollout_buffer import RolloutBuffer

__all__ = ["Axis", "Input", "Rollout", "RolloutBuffer", "TrainBatch"]

_HOME = {
    "Axis": "rlalign.buffers.inputs",
    "Input": "rlalign.buffers.inputs",
    "Rollout": "rlalign.buffers.rollout",
    "TrainBatch": "rlalign.buffers.rollout",
    "RolloutBuffer": "rlalign.buffers.rollout_buffer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
