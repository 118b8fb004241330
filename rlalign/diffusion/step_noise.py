"""Which noise a denoising step gets, settled by the pipeline's scheduler."""

from dataclasses import dataclass
from typing import Any, Literal

from rlalign.diffusion.config import SDEConfig

_USUAL_NOISE = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ddim": 1.0}
"""Flow-GRPO arXiv:2505.05470, DanceGRPO arXiv:2505.07818, CPS arXiv:2509.05952, DDPO arXiv:2305.13301."""


@dataclass(frozen=True, kw_only=True)
class StepNoise:
    """How noise enters a step: an `SDEConfig` with nothing left open."""

    kind: Literal["flow_sde", "dance_sde", "cps", "ddim"]
    noise_level: float

    @classmethod
    def of(cls, sde: SDEConfig, scheduler: Any) -> "StepNoise":
        """Settle what is `auto` by the pipeline's scheduler."""
        kind = sde.kind
        if kind == "auto":
            kind = "ddim" if predicts_noise(scheduler) else "flow_sde"
        return cls(kind=kind, noise_level=_USUAL_NOISE[kind] if sde.noise_level == "auto" else sde.noise_level)


def predicts_noise(scheduler: Any) -> bool:
    """Whether a scheduler's model predicts noise, v or samples, and not a flow's velocity."""
    return "beta_schedule" in scheduler.config and scheduler.config.get("prediction_type") != "flow_prediction"
