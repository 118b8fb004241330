"""Policies and critics of hybrid learning: one for all steps, or one for each step, behind the same calls.

Tensors have the critics first, `[R, N, ...]`: R = 1 for one policy and critic, R = horizon for one of each per step.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from rlalign.agents.config import NetworkConfig, NormalizeAndProject
from rlalign.agents.networks import VECTOR, Actor, Features, normalized
from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.config import ConfigError
from rlalign.nn.mlp import MLP
from rlalign.nn.policies import ActionDistribution, Categorical, Gaussian, MultiCategorical
from rlalign.nn.stacked import StackedMLP
from rlalign.nn.value_heads import ValueHead

Initialization = Literal["orthogonal", "uniform"]
OUT_SCALE = 0.1
"""Of last layers under `uniform`, and of the critic's under `orthogonal`."""


class StepActors(nn.Module):
    """H policies, one for each step of an episode, with stacked parameters."""

    def __init__(
        self,
        parts: ObservationParts,
        actions: ActionInterface,
        cfg: NetworkConfig,
        *,
        horizon: int,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        if parts.images:
            raise ConfigError("`horizon` stacks plain networks, which read no images; set it to null.")
        rows = [Actor(parts, actions, cfg).to(device) for _ in range(horizon)]
        self.distribution = _stacked_distribution(actions.distribution, horizon, device)
        self.network = StackedMLP([row.network for row in rows])
        self._row_distributions = [_row_of(self.distribution, step) for step in range(horizon)]

    def forward(self, seen: Mapping[str, Tensor], allowed: Tensor | None = None) -> Tensor:
        """Params [H, N, ...] of observations [H, N, ...]: each step's policy on its own."""
        params = self.distribution(self.network(seen[VECTOR]))
        return params if allowed is None else self.distribution.masked(params, allowed)

    def at(self, step: int, seen: Mapping[str, Tensor], allowed: Tensor | None = None) -> Tensor:
        """Params [N, ...] of one step's policy."""
        params = self._row_distributions[step](self.network.rows[step](seen[VECTOR]))
        return params if allowed is None else self.distribution.masked(params, allowed)

    def reset(self, kind: Initialization) -> None:
        for row in self.network.rows:
            reset(row, kind)


class QNetwork(nn.Module):
    """Observation and action -> outputs of a value head."""

    def __init__(
        self, parts: ObservationParts, action_size: int, head: ValueHead, hidden: Sequence[int], cfg: NetworkConfig
    ):
        super().__init__()
        self.features, self.head = Features(parts), head
        sizes = [self.features.size + action_size, *hidden, head.out_features]
        self.network = MLP(sizes, cfg.activation, out_gain=OUT_SCALE, layer_norm=cfg.layer_norm)

    def forward(self, seen: Mapping[str, Tensor], actions: Float[Tensor, "*rows numbers"]) -> Tensor:
        return self.network(torch.cat([self.features(seen), actions], -1))

    def values(self, seen: Mapping[str, Tensor], actions: Float[Tensor, "*rows numbers"]) -> Float[Tensor, "*rows"]:
        return self.head.values(self(seen, actions))

    def reset(self, kind: Initialization) -> None:
        """Start weights anew; a head of several outputs begins at 0 exactly."""
        reset(self.network, kind)
        if self.head.out_features > 1:
            nn.init.zeros_(self.network.last.weight)
            with torch.no_grad():
                self.network.last.bias.copy_(self.head.init_bias())


class Critic(nn.Module):
    """Q functions: one, or one for each step with stacked parameters."""

    def __init__(self, rows: Sequence[QNetwork]):
        super().__init__()
        self.rows = list(rows)
        if len(rows) == 1:
            self.only = rows[0]
        else:
            self.heads = nn.ModuleList(row.head for row in rows)
            self.stack = StackedMLP([row.network for row in rows])

    @torch.no_grad()
    def values(
        self, seen: Mapping[str, Tensor], actions: Float[Tensor, "stack rows numbers"]
    ) -> Float[Tensor, "stack rows"]:
        """Q of each row's critic, without gradient: fits go through `rows`."""
        if len(self.rows) == 1:
            return self.only.values(seen, actions)
        outputs = self.stack(torch.cat([seen[VECTOR], actions], -1))
        if self.rows[0].head.out_features == 1:
            return outputs.squeeze(-1)
        return torch.stack([row.head.values(part) for row, part in zip(self.rows, outputs, strict=True)])


def make_critic(
    parts: ObservationParts,
    actions: ActionInterface,
    heads: Sequence[ValueHead],
    hidden: Sequence[int],
    cfg: NetworkConfig,
    *,
    initialization: Initialization,
    nap: NormalizeAndProject | None = None,
    device: torch.device | str = "cpu",
) -> Critic:
    """A critic with as many rows as heads."""
    rows: list[Any] = []
    for head in heads:
        row = QNetwork(parts, actions.distribution.size, head, hidden, cfg)
        row.reset(initialization)
        rows.append(normalized(row, nap).to(device))
    return Critic(rows)


def encoded(distribution: ActionDistribution, decisions: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Decisions as a critic takes them, `distribution.size` numbers each: choices one-hot, numbers as they are."""
    match distribution:
        case Categorical():
            return nn.functional.one_hot(decisions, distribution.size).float()
        case MultiCategorical():
            digits = zip(decisions.unbind(-1), distribution.counts, strict=True)
            return torch.cat([nn.functional.one_hot(digit, count) for digit, count in digits], -1).float()
    return decisions.float()


def reset(network: MLP, kind: Initialization) -> None:
    """Start an MLP's weights anew; `orthogonal` is what it was built with."""
    if kind == "orthogonal":
        return
    for layer in network:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    with torch.no_grad():
        network.last.weight.mul_(OUT_SCALE)
        network.last.bias.zero_()


def _stacked_distribution(
    distribution: ActionDistribution, horizon: int, device: torch.device | str
) -> ActionDistribution:
    """The only distribution with parameters is the Gaussian, whose deviations become `[H, 1, dims]`."""
    if isinstance(distribution, Gaussian):
        distribution.log_std = nn.Parameter(distribution.log_std.detach().repeat(horizon, 1, 1).to(device))
    return distribution


def _row_of(distribution: ActionDistribution, step: int) -> ActionDistribution:
    """One step's distribution, which shares the memory of the stacked one."""
    if not isinstance(distribution, Gaussian):
        return distribution
    row = Gaussian(distribution.size, log_std_range=distribution.log_std_range, squash=distribution.squash)
    row.log_std.data = distribution.log_std.data[step, 0]
    return row


Policy = Actor | StepActors
"""One policy for all steps, or one for each."""
