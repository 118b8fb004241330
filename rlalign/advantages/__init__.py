"""Advantage estimators as configured objects: `Rollout` in, `TrainBatch` out, one union for all domains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.advantages.config import (
        GAE,
        AdvantageConfig,
        BatchScaled,
        BetaNormalized,
        GreedyBaseline,
        GroupRelative,
        LeaveOneOut,
        LengthWeighted,
        MaxLikelihood,
        PerPromptRunning,
        ReinforcePlusPlus,
        ReinforcePlusPlusBaseline,
    )
    from rlalign.advantages.estimators import Estimator, build_estimator
    from rlalign.advantages.per_prompt import PassRateHistory

__all__ = [
    "GAE",
    "AdvantageConfig",
    "BatchScaled",
    "BetaNormalized",
    "Estimator",
    "GreedyBaseline",
    "GroupRelative",
    "LeaveOneOut",
    "LengthWeighted",
    "MaxLikelihood",
    "PassRateHistory",
    "PerPromptRunning",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusBaseline",
    "build_estimator",
]

_ELSEWHERE = {
    "Estimator": "rlalign.advantages.estimators",
    "build_estimator": "rlalign.advantages.estimators",
    "PassRateHistory": "rlalign.advantages.per_prompt",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE.get(name, "rlalign.advantages.config")), name)


def __dir__() -> list[str]:
    return __all__
