"""Settings of HNPG: data only, no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from rlalign.advantages.config import GAE
from rlalign.agents.config import AgentConfig, AgentOptimConfig, NormalizeConfig
from rlalign.config_fields import STRICT, Count, NonNegative, Positive
from rlalign.nn.config import C51, MSE, ValueHeadConfig


@dataclass(frozen=True, kw_only=True)
class HNPGConfig(AgentConfig):
    """Hybrid natural policy gradient (Zhou, Sekhari, Song & Sun 2023, arXiv:2311.08384); defaults of table 1 there.

    The discount is 1 there; see `advantage`.
    """

    __pydantic_config__ = STRICT

    method: Literal["hnpg"] = "hnpg"
    total_env_steps: Count = 1_000_000
    dataset: str = ""
    """A `.npz` file or a folder of them, or the id of a Minari dataset on this machine."""
    horizon: Count | None = None
    """Steps of every episode, for a policy and a critic of its own at each step (the paper's finite-horizon form); an
    iteration is then one whole episode of every copy. None: one policy and one critic for all steps."""
    rollout_steps: Count = 256
    """Steps of each environment per iteration; without meaning when `horizon` is set."""
    offline_decisions: Count = 1000
    """Recorded decisions drawn per sweep of the critic; with `horizon`, an equal share for each step."""
    online_weight: NonNegative = 1.0
    """λ: weight of the on-policy mean beside the offline one, for critic and policy. 0 learns from the data alone; the
    environment is still played, as the clock and to measure."""
    offline_weight: NonNegative = 1.0
    """0 needs no dataset: TRPO with a critic fitted to Monte-Carlo returns."""
    offline_actions: Literal["policy", "dataset"] = "policy"
    """Actions judged at offline states: drawn from the policy (the published code) or the recorded ones (eq. 48)."""
    clip_actions: bool = True
    """Clip continuous actions to the space's bounds; false hands them over as they are."""
    normalize: NormalizeConfig = field(default_factory=NormalizeConfig)
    advantage: GAE = field(default_factory=lambda: GAE(gamma=0.99, gae_lambda=0.97))
    """On-policy advantages; `gamma` is the discount of returns and offline targets too. The paper's lock has 1."""
    normalize_advantages: Literal["batch", "none"] = "none"
    optim: AgentOptimConfig = field(default_factory=lambda: AgentOptimConfig(eps=1e-8, max_grad_norm=None))
    """Of the critic; every fit begins with a fresh Adam."""
    critic_hidden: list[Count] = field(default_factory=lambda: [64, 64])
    initialization: Literal["orthogonal", "uniform"] = "orthogonal"
    """`uniform` is PyTorch's own, with last layers of a tenth and without offset, as in the published code."""
    value_head: ValueHeadConfig = field(default_factory=MSE)
    critic_steps: Count = 30
    """Full-batch optimizer steps of a fit."""
    critic_sweeps: Count = 1
    """K2: fits per iteration, each with newly drawn data and targets from the one before."""
    critic_averaging: Count = 1
    """K2 - K1: the last fits whose mean is the critic."""
    l2: NonNegative = 0.0
    """Weight of the critic's squared parameters."""
    l2_on: Literal["all", "last"] = "all"
    """Parameters that `l2` is on: all, or the last tensor alone, which is what the published code does."""
    value_samples: Count = 10
    """Actions whose mean Q is V; a `Discrete` policy is summed over exactly."""
    max_kl: Positive = 0.01
    damping: NonNegative = 0.1
    cg_iterations: Count = 10
    backtracks: Count = 10
    shrink: Annotated[float, Field(gt=0, lt=1)] = 0.5
    accept_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    recheck_kl: bool = True
    """Hold the line search inside `max_kl`; false trusts the quadratic model, as the published code does."""

    def __post_init__(self) -> None:
        problems = {
            "`online_weight` and `offline_weight` are both 0: nothing is left to learn from": (
                self.online_weight == 0 and self.offline_weight == 0
            ),
            f"`critic_averaging`={self.critic_averaging} must not exceed `critic_sweeps`={self.critic_sweeps}": (
                self.critic_averaging > self.critic_sweeps
            ),
            "`normalize.rewards` scales on-policy rewards alone, and recorded ones would not fit; set it to false": (
                self.normalize.rewards
            ),
            "`optim.warmup_updates` has no meaning: every fit of the critic begins anew; set it to 0": (
                self.optim.warmup_updates > 0
            ),
            "`value_head.type: c51` needs the next return's distribution, and on-policy returns are numbers": (
                isinstance(self.value_head, C51)
            ),
            f"`offline_decisions`={self.offline_decisions} is less than one per step (`horizon`={self.horizon})": (
                self.horizon is not None and self.offline_weight > 0 and self.offline_decisions < self.horizon
            ),
        }
        broken = [message for message, wrong in problems.items() if wrong]
        if broken:
            raise ValueError("; ".join(broken) + ".")
