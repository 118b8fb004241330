"""Reinforcement learning of language models: BNPO and the policy-gradient family."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.llm.config import BNPOConfig, ModelConfig, PolicyGradientConfig
    from rlalign.llm.trainer import BNPOTrainer, PolicyGradientTrainer

__all__ = ["BNPOConfig", "BNPOTrainer", "ModelConfig", "PolicyGradientConfig", "PolicyGradientTrainer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'trainer' if name.endswith('Trainer') else 'config'}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
