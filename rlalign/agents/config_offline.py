"""Settings of the agents that learn from recorded data alone: data only, no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from rlalign.agents.config import AgentConfig, AgentOptimConfig, NetworkConfig
from rlalign.config_fields import STRICT, Count, NonNegative, Positive
from rlalign.nn.config import MSE, ValueHeadConfig

Gamma = Annotated[float, Field(ge=0, lt=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]


def _relu(hidden: int, *, layer_norm: bool = False, squash: bool = False) -> NetworkConfig:
    return NetworkConfig(hidden=[hidden, hidden], activation="relu", layer_norm=layer_norm, squash=squash)


def _adam(learning_rate: float, *, weight_decay: float = 0.0) -> AgentOptimConfig:
    return AgentOptimConfig(learning_rate=learning_rate, eps=1e-8, weight_decay=weight_decay, max_grad_norm=None)


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(AgentConfig):
    """What the offline agents share. `env` is for evaluation only; `network` and `optim` are the policy's."""

    __pydantic_config__ = STRICT

    dataset: str = ""
    """A `.npz` file or a folder of them; `package:name` for a set that a package carries, such as
    `rlalign_envs:pendulum_mixed`; or the id of a Minari dataset on this machine."""
    total_updates: Count = 50_000
    """Papers train for 1,000,000 (20 times this), for hours of CPU time."""
    batch_size: Count = 256
    """Transitions per update."""
    normalize_observations: bool = False
    """Centre and scale observations by the dataset's mean and deviation."""


@dataclass(frozen=True, kw_only=True)
class CriticConfig(OfflineConfig):
    """What those share that learn values."""

    __pydantic_config__ = STRICT

    gamma: Gamma = 0.99
    rewards: Literal["raw", "return_range", "none"] = "raw"
    """`return_range` scales them so that the returns of the dataset's episodes span 1000, as papers do on locomotion;
    `none` sets them to 0: imitation of the whole dataset."""
    target_tau: OpenFraction = 0.005
    """Share of the new weights that enters the slow copy at each update."""
    critic_network: NetworkConfig = field(default_factory=lambda: _relu(256))
    critic_optim: AgentOptimConfig = field(default_factory=lambda: _adam(3e-4))


@dataclass(frozen=True, kw_only=True)
class BCConfig(OfflineConfig):
    """Behaviour cloning: the most likely policy of the data."""

    __pydantic_config__ = STRICT

    method: Literal["bc"] = "bc"
    network: NetworkConfig = field(default_factory=lambda: _relu(256))
    optim: AgentOptimConfig = field(default_factory=lambda: _adam(3e-4))


@dataclass(frozen=True, kw_only=True)
class ODICEConfig(CriticConfig):
    """O-DICE (Mao et al. 2024, arXiv:2402.00348); constants of the authors' `configs/offline_RL.yaml`.

    Sized for a CPU: the policy has 256 units a layer (theirs 1024), V is single (theirs twin, except on some mazes) and
    training 20 times shorter. Their imitation setting is `rewards: none`, `network.squash: true`, learning rates of
    1e-4, no LayerNorm, normalised observations and a conjugate weight of 0.4. Their weight decay is Adam's, which
    scales with the gradient; ours is decoupled.
    """

    __pydantic_config__ = STRICT

    method: Literal["odice"] = "odice"
    conjugate_weight: OpenFraction = 0.6
    """The paper's lambda: weight of the divergence's conjugate against that of V itself. Larger values trust the best
    of the data more. Tuned per dataset there: try 0.4 to 0.8."""
    backward_weight: NonNegative = 1.0
    """The paper's eta: how much the gradient through the next state counts; 0 is the semi-gradient."""
    gradient: Literal["orthogonal", "true", "semi"] = "orthogonal"
    """`true` follows the whole residual (OptiDICE-like), `semi` only V(s) (S-DICE)."""
    divergence: Literal["chi_square", "reverse_kl"] = "chi_square"
    weight_rule: Literal["relu", "exact"] = "relu"
    """Policy weight with chi_square: max(e, 0) as the authors run it, or max(e/2 + 1, 0) as the derivation gives it."""
    max_weight: Positive = 100.0
    twin: bool = False
    """Two values instead of one; targets take the smaller."""
    value_head: ValueHeadConfig = field(default_factory=MSE)
    network: NetworkConfig = field(default_factory=lambda: _relu(256))
    optim: AgentOptimConfig = field(default_factory=lambda: _adam(2e-4, weight_decay=1e-4))
    critic_network: NetworkConfig = field(default_factory=lambda: _relu(256, layer_norm=True))
    critic_optim: AgentOptimConfig = field(default_factory=lambda: _adam(2e-4))

    def __post_init__(self) -> None:
        if self.value_head.type != "mse":
            raise ValueError(
                "O-DICE's V minimises an f-divergence's dual, which has no target to classify: `value_head.type` must "
                f"be `mse`, got {self.value_head.type!r}."
            )


@dataclass(frozen=True, kw_only=True)
class IQLConfig(CriticConfig):
    """Implicit Q-learning (Kostrikov et al. 2022, arXiv:2110.06169); constants of its locomotion experiments.

    There the policy's learning rate follows a cosine (`optim.schedule: cosine`), its mean a tanh, and rewards are
    scaled (`rewards: return_range`); mazes use an expectile of 0.9 and a temperature of 10.
    """

    __pydantic_config__ = STRICT

    method: Literal["iql"] = "iql"
    expectile: OpenFraction = 0.7
    """V follows this expectile of Q; towards 1 it is the best action of the data."""
    temperature: NonNegative = 3.0
    """Inverse temperature of the policy's weights; 0 is behaviour cloning."""
    max_weight: Positive = 100.0
    value_head: ValueHeadConfig = field(default_factory=MSE)
    """Of the two Q-functions. V has none: an expectile is no mean of a distribution that a classifier could learn."""
    network: NetworkConfig = field(default_factory=lambda: _relu(256))
    optim: AgentOptimConfig = field(default_factory=lambda: _adam(3e-4))

    def __post_init__(self) -> None:
        if self.value_head.type == "c51":
            raise ValueError(
                "IQL bootstraps from V, which is a number: a `c51` Q-function has no next distribution. "
                "Set `value_head.type` to `hl_gauss`, `two_hot` or `mse`."
            )


@dataclass(frozen=True, kw_only=True)
class TD3BCConfig(CriticConfig):
    """TD3+BC (Fujimoto & Gu 2021, arXiv:2106.06860), for continuous actions with bounds; constants of its table 4."""

    __pydantic_config__ = STRICT

    method: Literal["td3_bc"] = "td3_bc"
    alpha: NonNegative = 2.5
    """Weight of Q, in units of its mean size, against imitation."""
    policy_noise: NonNegative = 0.2
    """Deviation of the noise on the target action, in units of the action range's half."""
    noise_clip: NonNegative = 0.5
    policy_delay: Count = 2
    """Critic updates per policy update."""
    normalize_observations: bool = True
    value_head: ValueHeadConfig = field(default_factory=MSE)
    network: NetworkConfig = field(default_factory=lambda: _relu(256, squash=True))
    optim: AgentOptimConfig = field(default_factory=lambda: _adam(3e-4))

    def __post_init__(self) -> None:
        if not self.network.squash:
            raise ValueError("TD3+BC's policy is deterministic and bounded by a tanh: `network.squash` must be true.")
