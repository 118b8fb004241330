"""Settings of the diffusion trainers: data only, no torch. Defaults are those of GRPO-Guard and DSO where they fit."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from rlalign.advantages.config import AdvantageConfig, GroupRelative
from rlalign.config_fields import STRICT, Count, CountOrZero, Finite, Fraction, NonNegative, Positive
from rlalign.diffusion.config_pretrain import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Which generator, in which precision, on which device."""

    __pydantic_config__ = STRICT

    source: str | None = None
    """Hub id or directory of a diffusers pipeline, or `module:function` that returns one."""
    revision: str | None = None
    pretrain: PretrainConfig | None = None
    """In place of `source`: train a small generator from scratch on this data, once, and keep it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the frozen weights. `auto`: float32 on CPU and MPS, bfloat16 on CUDA devices that have it. What is trained is
    float32 in any case."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    gradient_checkpointing: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of every call of the pipeline while training, such as `guidance_scale`, `height`, `width`."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """What is generated: texts, class labels, or rows of columns."""

    __pydantic_config__ = STRICT

    values: list[str | int] = field(default_factory=list)
    file: str | None = None
    """`.txt`: a prompt per line. `.jsonl`: a row per line, with `prompt` and columns that the reward may ask for."""


@dataclass(frozen=True, kw_only=True)
class SampleRewardConfig:
    """What judges samples: `f(samples, prompts, **columns)`, or a simulator."""

    __pydantic_config__ = STRICT

    function: str
    """`module:function`, `module:SimulatorClass` or `path/file.py:name`."""
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments bound to the function, or given to the simulator's class."""
    outcome: str | None = None
    """Which of a simulator's outcomes is the reward; its own `proxy` when null."""
    graded: str | None = None
    """Outcome that takes over once the reward saturates: three steps with at least 90 % of groups without signal."""
    timeout_s: Positive = 600.0
    on_error: Literal["raise", "abstain", "penalty"] = "abstain"
    penalty: Finite = 0.0
    error_budget: Fraction = 0.05


@dataclass(frozen=True, kw_only=True)
class SDEConfig:
    """How noise enters a denoising step, which makes the step a decision with a probability."""

    __pydantic_config__ = STRICT

    kind: Literal["auto", "flow_sde", "dance_sde", "cps", "ddim"] = "auto"
    """`flow_sde` (Flow-GRPO), `dance_sde` (DanceGRPO), `cps` (coefficients-preserving sampling) for flow models; `ddim`
    for models that predict noise or v. `auto`: `ddim` for these, else `flow_sde`."""
    noise_level: Positive | Literal["auto"] = "auto"
    """a of `flow_sde` and `cps`, eta of `dance_sde` and `ddim`. `auto`: what the papers use, 0.7, 0.8, 0.3 and 1."""


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """Adaptive projected guidance (Sadat et al. 2025, arXiv:2410.02416) in place of the pipeline's classifier-free one.

    The scale is the pipeline's own argument, in `pipeline.call`.
    """

    __pydantic_config__ = STRICT

    eta: Finite = 0.0
    """Share of the update parallel to the conditional prediction that is kept."""
    norm_threshold: NonNegative = 15.0
    """Largest norm of the difference per sample, in denoised latents; 0: no limit. 15 is the paper's for SDXL."""
    momentum: Annotated[float, Field(gt=-1, lt=1)] = -0.5
    """Of the running difference, which is then recorded with every step; 0: off."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """One rollout: prompts, samples of each, denoising steps."""

    __pydantic_config__ = STRICT

    prompts_per_step: Count = 8
    group_size: Annotated[int, Field(ge=2)] = 16
    """Samples of one prompt, compared with each other."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 10
    sde: SDEConfig = field(default_factory=SDEConfig)
    window: Count | None = None
    """Only this many consecutive steps have noise and are trained, the rest is deterministic; null: all steps."""
    window_range: tuple[CountOrZero, Count] | None = None
    """Where the window may lie: [first step, one past the last]; null: anywhere. It is drawn anew each rollout."""
    trained_fraction: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the steps with noise that are trained; .99 of 10 leaves out the last, whose noise is close to none."""
    guidance: GuidanceConfig | None = None
    """Guide rollouts by adaptive projection; evaluation and use of the pipeline keep its own guidance."""
    same_noise: bool = False
    """Start all samples of a group from the same noise (DanceGRPO)."""
    batch_size: Count = 64
    """Samples per call of the pipeline; bounds memory, not the result."""
    by_pipeline: bool = False
    """Replay steps by running the pipeline's own code for each: slower, and right for guidance that is no affine
    combination of the denoiser's outputs, such as `guidance_rescale`."""
    offload: bool = False
    """Keep the recorded latents and means in main memory, not on the device."""


@dataclass(frozen=True, kw_only=True)
class StepObjective:
    """The clipped surrogate on the ratio of denoising steps, and GRPO-Guard's two corrections of it."""

    __pydantic_config__ = STRICT

    clip_low: Positive | Literal["auto"] = "auto"
    """`auto`: a constant over the square root of the latent's dimensions; see `rlalign.functional.ratios.step_clip`."""
    clip_high: Positive | Literal["auto"] = "auto"
    ratio_norm: bool = True
    """GRPO-Guard's ratio normalisation: log-ratios have mean 0 and the same spread at every step."""
    reweight: bool = True
    """GRPO-Guard's gradient reweighting: every step's gradient has the same scale. Weights are divided by their mean
    over the trained steps, so that learning rates keep their meaning."""
    authors_bias: bool = False
    """Average the drift over the samples of a micro-batch that are at the same step, as the authors' code does
    by a slip that they confirmed. The gradient then depends on `optim.micro_batch`."""
    advantage_clip: Positive | None = 5.0
    kl_coef: NonNegative = 0.0
    """Weight of the exact KL divergence to the reference at each step, in nats per dimension; `reweight` leaves it
    alone."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW on the trained weights, which are float32."""

    __pydantic_config__ = STRICT

    learning_rate: Positive = 1e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NonNegative = 1e-4
    warmup_steps: CountOrZero = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: Positive | None = 1.0
    nonfinite_budget: CountOrZero = 3
    """Steps with a NaN or infinite gradient that are skipped before the run stops."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(AdamWConfig):
    """How a rollout is learned from."""

    __pydantic_config__ = STRICT

    update_epochs: Count = 1
    minibatches: Count = 2
    """Optimizer steps per pass over a rollout; groups stay whole. From the second on a step is off-policy."""
    micro_batch: Count = 64
    """Decisions (denoising steps of samples) per forward and backward; bounds memory, not the gradient."""


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """Low-rank adapter of the denoiser; loads in plain diffusers."""

    __pydantic_config__ = STRICT

    r: Count = 32
    alpha: Positive = 64.0
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])
    """Name endings of the linear layers; those of joint attention (`add_q_proj` ...) are added where there are any."""
    init: Literal["gaussian", "default"] = "gaussian"


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Moving average of the trained weights; evaluated and saved in their place."""

    __pydantic_config__ = STRICT

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    every: Count = 8
    """Optimizer steps between two updates of the average."""


@dataclass(frozen=True, kw_only=True)
class SampleEvalConfig:
    """Deterministic samples from fixed noise, judged by every outcome and by the watch; before, during and after."""

    __pydantic_config__ = STRICT

    every: CountOrZero = 0
    """Steps (DSO: optimizer steps) between evaluations; 0: only before and after."""
    samples: Count = 256
    num_inference_steps: Count = 20
    watch: str | None = None
    """`module:function` of (samples, prompts) -> numbers that show over-optimisation: fidelity, diversity, cheats."""
    watch_args: dict[str, Any] = field(default_factory=dict)
    render: str | None = None
    """`module:function` that turns samples that are not images into shapes to draw."""
    pictures: CountOrZero = 12
    """Samples drawn for the report at each evaluation, always from the same noise."""
    stop_below: dict[str, Finite] = field(default_factory=dict)
    """End the run when a metric falls below this, such as `gold` or `diversity`; the best checkpoint is kept."""
    stop_above: dict[str, Finite] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DiffusionCheckpointConfig:
    __pydantic_config__ = STRICT

    every: CountOrZero = 25
    """Steps between checkpoints; 0 saves only at the end and when interrupted."""
    keep: Count = 2


@dataclass(frozen=True, kw_only=True)
class DiffusionLogConfig:
    __pydantic_config__ = STRICT

    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    project: str = "rlalign"


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ABC):
    """What both trainers have."""

    __pydantic_config__ = STRICT

    method: str = ""
    seed: CountOrZero = 0
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    reward: SampleRewardConfig | None = None
    lora: LoRASettings | None = field(default_factory=LoRASettings)
    """null trains all weights of the denoiser."""
    average: AverageConfig | None = field(default_factory=AverageConfig)
    eval: SampleEvalConfig = field(default_factory=SampleEvalConfig)
    checkpoint: DiffusionCheckpointConfig = field(default_factory=DiffusionCheckpointConfig)
    log: DiffusionLogConfig = field(default_factory=DiffusionLogConfig)
    accelerate: dict[str, Any] = field(default_factory=dict)
    """Fields of `accelerate.Accelerator`."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Samples per call of the pipeline."""


@dataclass(frozen=True, kw_only=True)
class FlowGRPOConfig(DiffusionConfig):
    """Flow-GRPO (Liu et al. 2025, arXiv:2505.05470) with GRPO-Guard's corrections (arXiv:2510.22319).

    On a `ddim` sampler the same loss is DDPO's (Black et al. 2024, arXiv:2305.13301).
    """

    __pydantic_config__ = STRICT

    method: Literal["flow_grpo"] = "flow_grpo"
    total_steps: Count = 100
    """Rollouts, each followed by `optim.update_epochs` x `optim.minibatches` optimizer steps."""
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
    advantage: AdvantageConfig = field(default_factory=GroupRelative)
    objective: StepObjective = field(default_factory=StepObjective)
    optim: TuneConfig = field(default_factory=TuneConfig)
    stop_without_signal: CountOrZero = 3
    """Stop (or turn to `reward.graded`) after so many steps with at least 90 % of groups without signal; 0 warns."""

    @property
    def batch_size(self) -> int:
        return self.rollout.batch_size
