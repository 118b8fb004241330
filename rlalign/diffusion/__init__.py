"""Alignment of diffusion and flow generators with rewards and simulators, on unmodified diffusers pipelines."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.diffusion.config import FlowGRPOConfig, SDEConfig
    from rlalign.diffusion.config_dso import DSOConfig
    from rlalign.diffusion.dso import DSOTrainer
    from rlalign.diffusion.flow_grpo import FlowGRPOTrainer
    from rlalign.diffusion.generator import ConditionalFlowPipeline
    from rlalign.diffusion.guidance import adaptive_projected_guidance
    from rlalign.diffusion.guider import PaperAPG
    from rlalign.diffusion.sampling import StochasticSampler
    from rlalign.diffusion.tiny import tiny_call, tiny_pipeline

_HOMES = {
    "ConditionalFlowPipeline": "generator",
    "DSOConfig": "config_dso",
    "DSOTrainer": "dso",
    "FlowGRPOConfig": "config",
    "FlowGRPOTrainer": "flow_grpo",
    "PaperAPG": "guider",
    "SDEConfig": "config",
    "StochasticSampler": "sampling",
    "adaptive_projected_guidance": "guidance",
    **dict.fromkeys(("tiny_call", "tiny_pipeline"), "tiny"),
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
