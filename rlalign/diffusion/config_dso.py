"""Settings of DSO: data only, no torch. The authors' constants belong to other latents; see each."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from rlalign.config_fields import STRICT, Count, Finite, NonNegative, Positive
from rlalign.diffusion.config import AdamWConfig, DiffusionConfig


@dataclass(frozen=True, kw_only=True)
class PreferenceOptimConfig(AdamWConfig):
    """How pairs are learned from."""

    __pydantic_config__ = STRICT

    weight_decay: NonNegative = 0.01
    pairs_per_step: Count = 48
    micro_batch: Count = 256
    """Samples per forward and backward; bounds memory, not the gradient."""


@dataclass(frozen=True, kw_only=True)
class SimulatedDataConfig:
    """The generator's own samples with the simulator's judgement."""

    __pydantic_config__ = STRICT

    samples: Count = 3000
    """Drawn from the current generator at the beginning of each round."""
    rounds: Count = 1
    """Rounds of self-improvement: simulate, label, fine-tune, and again from the improved generator."""
    num_inference_steps: Count = 20
    batch_size: Count = 256
    label: str | None = None
    """Outcome of the simulator that decides; its `proxy` when null."""
    threshold: Finite = 0.5
    """Samples at or above it win, below lose."""
    band: NonNegative = 0.0
    """Samples this near to the threshold are left out: their label is noise."""
    path: str | None = None
    """Folder of a set that was written before; nothing is simulated then."""


@dataclass(frozen=True, kw_only=True)
class DSOObjective:
    """Which loss on judged samples."""

    __pydantic_config__ = STRICT

    kind: Literal["dpo", "dro", "anchored_dro", "floored_dro", "sft"] = "dpo"
    beta: Positive = 50.0
    """Of `dpo` and `anchored_dro`, on errors that are means over the latent's dimensions. The authors use 500 on
    16 x 16 x 16 x 8 latents."""
    floor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.5
    """Of `floored_dro`: a losing sample pushes no further once its error is this many times the reference's."""
    time_mean: Finite = 1.0
    """Noise levels are sigmoid(normal(time_mean, time_std)); mean 1 favours much noise (DSO's configuration)."""
    time_std: Positive = 1.0
    shared_noise: bool = True
    """Both samples of a pair get the same noise and noise level (Diffusion-DPO); the authors of DSO draw two."""


@dataclass(frozen=True, kw_only=True)
class DSOConfig(DiffusionConfig):
    """Direct Simulation Optimization (Li et al. 2025, arXiv:2503.22677): DPO or DRO on simulated samples."""

    __pydantic_config__ = STRICT

    method: Literal["dso"] = "dso"
    total_updates: Count = 400
    """Optimizer steps, shared out evenly over the rounds."""
    data: SimulatedDataConfig = field(default_factory=SimulatedDataConfig)
    objective: DSOObjective = field(default_factory=DSOObjective)
    optim: PreferenceOptimConfig = field(default_factory=PreferenceOptimConfig)

    @property
    def batch_size(self) -> int:
        return self.data.batch_size
