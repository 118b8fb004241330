"""Settings that every agent has, and those of PPO, TRPO and the group policy gradient: data only, no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from rlalign.advantages.config import GAE, AdvantageConfig, GroupRelative
from rlalign.config_fields import STRICT, Count, CountOrZero, Finite, Fraction, NonNegative, Positive
from rlalign.nn.config import MSE, ValueHeadConfig


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Which Gymnasium environment, how many copies, stepped how."""

    __pydantic_config__ = STRICT

    id: str = ""
    """A registered id; `module:Id-v0` imports the module first."""
    num_envs: Count = 8
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment."""
    vectorization: Literal["sync", "async", "native", "envpool"] = "sync"
    """`sync` steps copies one after the other; `native` uses the environment's own vector form (fast for 32 copies and
    more); `async` gives each copy a process (slow unless a step takes milliseconds and cores are many)."""
    max_episode_steps: Count | None = None
    """Cut episodes here instead of where the registration says."""
    step_timeout_s: Positive | None = None
    """`async` only: the longest that one step of all copies may take before the environment counts as hung."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The policy's and the critic's network: of equal shape, sharing no weights."""

    __pydantic_config__ = STRICT

    hidden: list[Count] = field(default_factory=lambda: [64, 64])
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    layer_norm: bool = False
    """A LayerNorm with learned scale and offset before each nonlinearity."""
    log_std: Finite = 0.0
    """Where the log standard deviation of a continuous policy begins."""
    squash: bool = False
    """Pass continuous actions through tanh and scale them to the space's bounds, in place of clipping."""


@dataclass(frozen=True, kw_only=True)
class NormalizeAndProject:
    """Normalize-and-Project (Lyle et al. 2024, arXiv:2407.01800) on every network of the agent."""

    __pydantic_config__ = STRICT

    every: Count = 1
    """Optimizer steps between two projections."""
    tensors: Literal["strict", "all_hidden"] = "strict"
    """Project only weights whose output provably meets a norm, or all hidden ones."""


@dataclass(frozen=True, kw_only=True)
class NormalizeConfig:
    """Running statistics, kept in the checkpoint and frozen in evaluation."""

    __pydantic_config__ = STRICT

    observations: bool = False
    rewards: bool = False
    """Divide rewards by the running deviation of the discounted return; logs and evaluation show raw rewards."""
    clip: Positive = 10.0
    """Normalised observations and rewards are cut at this size."""


@dataclass(frozen=True, kw_only=True)
class AgentOptimConfig:
    """Adam."""

    __pydantic_config__ = STRICT

    learning_rate: Positive = 3e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Positive = 1e-5
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Over `total_env_steps` (or `total_updates`)."""
    warmup_updates: CountOrZero = 0
    max_grad_norm: Positive | None = 0.5
    nonfinite_budget: CountOrZero = 3
    """Steps with a NaN or infinite gradient that are skipped before the run stops."""


@dataclass(frozen=True, kw_only=True)
class AgentEvalConfig:
    """Whole episodes in environments of their own, with frozen statistics and raw rewards; before, during and after."""

    __pydantic_config__ = STRICT

    every: CountOrZero = 0
    """Environment steps (or updates, offline) between evaluations; 0: only at the end."""
    before: bool = False
    episodes: Count = 20
    num_envs: Count = 4
    """Copies; each plays the same number of episodes, so that short ones are not counted more often."""
    deterministic: bool = True
    """Take the policy's most probable action."""
    video: bool = True
    """Film one episode at the end, where the environment can be rendered without a screen."""
    patience: Count | None = None
    """Stop after this many evaluations without a new best."""


@dataclass(frozen=True, kw_only=True)
class AgentCheckpointConfig:
    __pydantic_config__ = STRICT

    every: CountOrZero = 50_000
    """Environment steps (or updates, offline) between checkpoints; 0 saves only at the end and when interrupted."""
    keep: Count = 2


@dataclass(frozen=True, kw_only=True)
class AgentLogConfig:
    __pydantic_config__ = STRICT

    every: Count = 1
    """Iterations between two records."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    project: str = "rlalign"


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What every agent has."""

    __pydantic_config__ = STRICT

    seed: CountOrZero = 0
    env: EnvConfig = field(default_factory=EnvConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    normalize_and_project: NormalizeAndProject | None = None
    optim: AgentOptimConfig = field(default_factory=AgentOptimConfig)
    eval: AgentEvalConfig = field(default_factory=AgentEvalConfig)
    checkpoint: AgentCheckpointConfig = field(default_factory=AgentCheckpointConfig)
    log: AgentLogConfig = field(default_factory=AgentLogConfig)
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1`, `mps`. Small networks are fastest on a CPU."""
    threads: Count | None = 1
    """CPU threads of PyTorch; more than one slows small networks down. None leaves PyTorch's choice."""


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(AgentConfig):
    """What the agents share that learn from rollouts of their current policy."""

    total_env_steps: Count = 1_000_000
    rollout_steps: Count = 2048
    """Steps of each environment per iteration."""
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    value_head: ValueHeadConfig = field(default_factory=MSE)
    """How the critic represents a value: a number, or a distribution over bins trained by classification."""
    advantage: AdvantageConfig = field(default_factory=GAE)


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnPolicyConfig):
    """Proximal policy optimization (Schulman et al. 2017, arXiv:1707.06347); defaults of table 3 there, with the
    learning rate, minibatch and epochs for MuJoCo, as in Stable-Baselines3."""

    __pydantic_config__ = STRICT

    method: Literal["ppo"] = "ppo"
    minibatch_size: Annotated[int, Field(ge=2)] = 64
    """Decisions per optimizer step."""
    update_epochs: Count = 10
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    clip_high: NonNegative = 0.2
    normalize_advantages: Literal["minibatch", "batch", "none"] = "minibatch"
    value_coef: NonNegative = 0.5
    value_clip: Positive | None = None
    """Keep new values within this of the old ones (MSE head only)."""
    entropy_coef: Finite = 0.0
    target_kl: Positive | None = None
    """Stop an iteration's updates before the step that finds the policy 1.5 times this far from where it collected."""
    compile: bool = False
    """Compile the update step: up to a minute once, then nearly twice as fast. Needs a C++ compiler."""


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(OnPolicyConfig):
    """Trust-region policy optimization (Schulman et al. 2015, arXiv:1502.05477); defaults of sb3-contrib."""

    __pydantic_config__ = STRICT

    method: Literal["trpo"] = "trpo"
    optim: AgentOptimConfig = field(default_factory=lambda: AgentOptimConfig(learning_rate=1e-3, max_grad_norm=None))
    """Of the critic."""
    max_kl: Positive = 0.01
    damping: Positive = 0.1
    cg_iterations: Count = 15
    backtracks: Count = 10
    shrink: Annotated[float, Field(gt=0, lt=1)] = 0.8
    normalize_advantages: Literal["batch", "none"] = "batch"
    minibatch_size: Annotated[int, Field(ge=2)] = 128
    """Decisions per optimizer step of the critic."""
    critic_epochs: Count = 10


@dataclass(frozen=True, kw_only=True)
class GroupConfig(AgentConfig):
    """A critic-free policy gradient on whole episodes from repeated start states: GRPO, RLOO, BNPO and their like."""

    __pydantic_config__ = STRICT

    method: Literal["policy_gradient_agent"] = "policy_gradient_agent"
    total_env_steps: Count = 1_000_000
    group_size: Annotated[int, Field(ge=2)] = 8
    """Episodes from the same start; `env.num_envs` must be a multiple."""
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    advantage: AdvantageConfig = field(default_factory=GroupRelative)
    success_threshold: Finite | None = None
    """An episode's outcome becomes 1 when its return reaches this, else 0; None keeps the return."""
    minibatches: Count = 1
    update_epochs: Count = 4
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    clip_high: NonNegative = 0.2
    entropy_coef: Finite = 0.0
    aggregation: Literal["token", "sequence_mean", "sequence_sum", "group"] = "token"
