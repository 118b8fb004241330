"""Settings of every advantage estimator: data only, no torch. `type` picks one; defaults are the papers'."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from rlalign.config_fields import STRICT, Finite, NonNegative, Positive

Discount = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class GAE:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438). Needs a critic."""

    __pydantic_config__ = STRICT

    type: Literal["gae"] = "gae"
    gamma: Discount = 0.99
    gae_lambda: Discount = 0.95


@dataclass(frozen=True, kw_only=True)
class GroupEstimatorConfig:
    """What the estimators share that compare the rollouts of a group with each other."""

    __pydantic_config__ = STRICT

    decompose: bool = False
    """Estimate each reward function on its own and average: A = sum_k w_k A_k / sum_k |w_k|."""
    part_weights: dict[str, Finite] = field(default_factory=dict)
    """w_k by reward name, for `decompose`; 1 where a name is missing."""


@dataclass(frozen=True, kw_only=True)
class GroupRelative(GroupEstimatorConfig):
    """GRPO (Shao et al. 2024, arXiv:2402.03300); `scale: false` is Dr. GRPO (Liu et al. 2025, arXiv:2503.20783)."""

    type: Literal["group_relative"] = "group_relative"
    scale: bool = True
    """Divide by the group's standard deviation."""
    unbiased: bool = True
    """Sample deviation (divides by G - 1); false is the population one (Flow-GRPO)."""
    eps: NonNegative = 1e-4


@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(GroupEstimatorConfig):
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740): the baseline is the mean of the other rollouts."""

    type: Literal["leave_one_out"] = "leave_one_out"


@dataclass(frozen=True, kw_only=True)
class BetaNormalized(GroupEstimatorConfig):
    """BNPO's adaptive Beta normalisation (Xiao et al. 2025, arXiv:2506.02864).

    The authors' code is `max_weight: 1e6, max_concentration: null`.
    """

    type: Literal["beta_normalized"] = "beta_normalized"
    alpha: Positive | None = None
    """Fixed first parameter of the normaliser; set both or neither. None adapts to the batch."""
    beta: Positive | None = None
    reward_range: tuple[Finite, Finite] = (0.0, 1.0)
    """Lowest and highest possible outcome (of each part, with `decompose`); mapped to [0, 1]."""
    max_weight: Positive = 10.0
    """Cap on the inverse Beta density, so rare pass rates cannot dominate a batch."""
    max_concentration: Positive | None = 12.0
    """Cap on a + b of the fitted Beta distribution, so nearly equal pass rates cannot make it a spike."""
    normalize_weights: bool = False
    """Divide the weights by their mean over the groups with signal, which keeps their scale constant."""

    def __post_init__(self) -> None:
        if (self.alpha is None) != (self.beta is None):
            raise ValueError(f"set both `alpha` and `beta` or neither, got alpha={self.alpha}, beta={self.beta}.")
        if self.reward_range[0] >= self.reward_range[1]:
            raise ValueError(f"`reward_range` must be [lowest, highest], got {list(self.reward_range)}.")


@dataclass(frozen=True, kw_only=True)
class MaxLikelihood(GroupEstimatorConfig):
    """MaxRL (arXiv:2602.02710): (r - mean) / mean, for rewards >= 0."""

    type: Literal["max_likelihood"] = "max_likelihood"


@dataclass(frozen=True, kw_only=True)
class LengthWeighted(GroupEstimatorConfig):
    """OPO (Hao et al. 2025, arXiv:2505.23585): the baseline weighs each rollout by its length."""

    type: Literal["length_weighted"] = "length_weighted"


@dataclass(frozen=True, kw_only=True)
class BatchScaled(GroupEstimatorConfig):
    """ScaleRL (Khatri et al. 2025, arXiv:2510.13786): centred per prompt, divided by the deviation over the batch."""

    type: Literal["batch_scaled"] = "batch_scaled"


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlusBaseline(GroupEstimatorConfig):
    """REINFORCE++-baseline (Hu et al. 2025, arXiv:2501.03262): centred per prompt, whitened over the batch."""

    type: Literal["reinforce_plus_plus_baseline"] = "reinforce_plus_plus_baseline"
    whiten_over: Literal["rollouts", "decisions"] = "rollouts"
    """What counts once in the batch's mean and variance; with `decisions` (verl) long rollouts count for more."""


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus:
    """REINFORCE++ (Hu et al. 2025, arXiv:2501.03262): return-to-go of each token, whitened over all tokens."""

    __pydantic_config__ = STRICT

    type: Literal["reinforce_plus_plus"] = "reinforce_plus_plus"
    gamma: Discount = 1.0


@dataclass(frozen=True, kw_only=True)
class GreedyBaseline:
    """ReMax (Li et al. 2024, arXiv:2310.10505): the baseline is the outcome of the greedy rollout."""

    __pydantic_config__ = STRICT

    type: Literal["greedy_baseline"] = "greedy_baseline"


@dataclass(frozen=True, kw_only=True)
class PerPromptRunning:
    """Running statistics of each prompt over its last outcomes (DDPO, Black et al. 2024, arXiv:2305.13301)."""

    __pydantic_config__ = STRICT

    type: Literal["per_prompt_running"] = "per_prompt_running"
    window: Annotated[int, Field(ge=2)] = 32
    """Outcomes remembered per prompt, those of this rollout included."""
    min_count: Annotated[int, Field(ge=2)] = 16
    """With fewer outcomes than this a prompt uses the statistics of the batch."""
    scale: Literal["prompt", "batch"] = "prompt"
    """Whose standard deviation divides; `batch` is Flow-GRPO's `global_std` (arXiv:2505.05470)."""
    eps: NonNegative = 1e-6

    def __post_init__(self) -> None:
        if self.min_count > self.window:
            raise ValueError(f"`min_count`={self.min_count} is never reached with `window`={self.window}; lower it.")


AdvantageConfig = Annotated[
    GAE
    | GroupRelative
    | LeaveOneOut
    | BetaNormalized
    | MaxLikelihood
    | LengthWeighted
    | BatchScaled
    | ReinforcePlusPlusBaseline
    | ReinforcePlusPlus
    | GreedyBaseline
    | PerPromptRunning,
    Field(discriminator="type"),
]
