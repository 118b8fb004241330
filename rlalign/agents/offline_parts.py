"""What offline learners are built of: policy, critics with their slow copy, and a step that touches one module only."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from rlalign.agents.config import AgentConfig, NetworkConfig
from rlalign.agents.optimizer import AgentOptimizer
from rlalign.nn.mlp import MLP
from rlalign.nn.nap import to_normalized
from rlalign.nn.policies import ActionDistribution, Categorical, MultiCategorical
from rlalign.nn.value_heads import ValueHead

Net = TypeVar("Net", bound=nn.Module)
Metrics = dict[str, Tensor]
"""Name -> a detached number, left on its device: reading every one of them at every update costs time."""


class Policy(nn.Module):
    """Observations -> parameters of the action distribution."""

    def __init__(self, observation_size: int, distribution: ActionDistribution, cfg: NetworkConfig):
        super().__init__()
        self.distribution = distribution
        sizes = [observation_size, *cfg.hidden, distribution.size]
        self.network = MLP(sizes, cfg.activation, out_gain=0.01, layer_norm=cfg.layer_norm)

    def forward(self, observations: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows params"]:
        return self.distribution(self.network(observations))


class Critic(nn.Module):
    """Features -> outputs of a value head; `values` decodes them."""

    def __init__(self, features: int, cfg: NetworkConfig, head: ValueHead):
        super().__init__()
        self.head = head
        self.network = MLP([features, *cfg.hidden, head.out_features], cfg.activation, layer_norm=cfg.layer_norm)
        if head.out_features > 1:
            nn.init.zeros_(self.network.last.weight)
            with torch.no_grad():
                self.network.last.bias.copy_(head.init_bias())

    def forward(self, features: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows outputs"]:
        return self.network(features)

    def values(self, features: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows"]:
        return self.head.values(self(features))


class Critics(nn.Module):
    """One critic or several independent ones, asked together."""

    def __init__(self, critics: Sequence[Critic]):
        super().__init__()
        self.members = nn.ModuleList(critics)

    def __iter__(self) -> Iterator[Critic]:
        for member in self.members:
            assert isinstance(member, Critic)
            yield member

    @property
    def first(self) -> Critic:
        return next(iter(self))

    def values(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, "critics rows"]:
        return torch.stack([critic.values(features) for critic in self])

    def smallest(self, features: Float[Tensor, "rows features"]) -> Float[Tensor, " rows"]:
        """The smaller value of each row: independent critics seldom overrate the same one."""
        return self.values(features).amin(0)

    def fit_support(self, targets: Float[Tensor, " rows"]) -> None:
        """Widen automatic supports before `targets` are used. Call it on the slow copy too, so that both stay alike."""
        for critic in self:
            critic.head.fit_support(targets, layer=critic.network.last)

    def objective(
        self, features: Float[Tensor, "rows features"], targets: Float[Tensor, " rows"]
    ) -> Float[Tensor, "critics rows"]:
        """Each critic's head against scalar targets."""
        return torch.stack([critic.head.objective(critic(features), targets) for critic in self])


def ready(network: Net, cfg: AgentConfig) -> Net:
    """Put in Normalize-and-Project's norms where the config asks for it, and move to its device."""
    nap = cfg.normalize_and_project
    if nap is not None:
        for one in network if isinstance(network, Critics) else (network,):
            to_normalized(one, tensors=nap.tensors, constant=True)
    return network.to(cfg.device)


def slow_copy(network: Net) -> Net:
    """A copy that only `follow` moves."""
    return copy.deepcopy(network).requires_grad_(False)


class SlowCopy:
    """Moves a slow copy towards its source.

    Args:
        target: What `slow_copy` made.
        source: What it was made of, after its optimizer was.
    """

    def __init__(self, target: nn.Module, source: nn.Module):
        self.target: list[Tensor] = list(target.parameters())
        self.source: list[Tensor] = list(source.parameters())

    @torch.no_grad()
    def follow(self, *, tau: float) -> None:
        """θ' <- (1 - τ) θ' + τ θ."""
        torch._foreach_lerp_(self.target, self.source, tau)


def gradient(
    loss: Float[Tensor, ""], optimizer: AgentOptimizer, *, retain_graph: bool = False
) -> Float[Tensor, " parameters"]:
    """Gradient by an optimizer's weights, laid out as its buffer; nothing is accumulated, here or anywhere else."""
    found = torch.autograd.grad(loss, optimizer.parameters, retain_graph=retain_graph, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def step(optimizer: AgentOptimizer, found: Float[Tensor, " parameters"], *, progress: float) -> Tensor:
    """Let an optimizer step along this gradient, in place of whatever was there.

    Returns:
        The gradient's norm before clipping.
    """
    optimizer.flat.gradient.copy_(found)
    return optimizer.take_step(progress=progress).clone()


def action_features(
    distribution: ActionDistribution, actions: Shaped[Tensor, "..."]
) -> Float[Tensor, "*rows features"]:
    """Actions as a Q-function takes them: `distribution.size` numbers, choices as one-hot."""
    match distribution:
        case Categorical():
            return nn.functional.one_hot(actions, distribution.size).float()
        case MultiCategorical():
            digits = zip(actions.unbind(-1), distribution.counts, strict=True)
            return torch.cat([nn.functional.one_hot(digit, count) for digit, count in digits], -1).float()
    return actions.float()


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Initialise networks inside: their weights depend on this generator alone, and the global one stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


class Learner:
    """What every offline learner keeps: its networks, what trains them, and their state.

    Args:
        modules: All networks, slow copies included.
        optimizers: Name -> what trains one of them.
    """

    def __init__(self, modules: dict[str, nn.Module], optimizers: dict[str, AgentOptimizer]):
        self.modules, self.optimizers = nn.ModuleDict(modules), optimizers

    def state_dict(self) -> dict[str, Any]:
        """Weights and optimizer state. A generator stays its owner's to save."""
        return {
            "modules": self.modules.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.modules.load_state_dict(state["modules"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
