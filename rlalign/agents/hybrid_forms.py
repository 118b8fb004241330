"""The two forms of hybrid learning: one policy and critic for all steps, or one of each for every step of an episode.

A form collects, and lays experience `[B, T, ...]` out as critics take it, `[R, N, ...]`, and back.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from rlalign.agents.collect import Collector, Experience
from rlalign.agents.config_hybrid import HNPGConfig
from rlalign.agents.envs import Environments
from rlalign.agents.horizon_waves import HorizonCollector
from rlalign.agents.hybrid_networks import Policy, StepActors, reset
from rlalign.agents.networks import Actor
from rlalign.agents.normalize import ObservationNormalizer
from rlalign.agents.spaces import ActionInterface, ObservationParts

Seen = dict[str, Tensor]
ValueOf = Callable[[Seen, Tensor | None], Tensor]
"""(prepared observations [R, N, ...], allowed actions) -> V [R, N]."""
Prepare = Callable[[Mapping[str, Tensor]], Seen]


@runtime_checkable
class Form(Protocol):
    """What differs between the two."""

    rows: int
    """Critics."""
    policy: Policy
    collector: Any

    def collect(self, normalizer: ObservationNormalizer, *, iteration: int) -> Experience: ...

    def gather(self, values: Tensor, mask: Tensor) -> Tensor:
        """[B, T, ...] -> [R, N, ...]."""
        ...

    def scatter(self, values: Tensor, mask: Tensor) -> Tensor:
        """[R, N] -> [B, T]; the inverse of `gather`, with 0 where nothing was gathered."""
        ...

    def at(self, row: int, seen: Seen, allowed: Tensor | None) -> Tensor:
        """Params [N, ...] of one row's policy."""
        ...

    def by_row(self, steps: Tensor) -> list[tuple[int, Tensor]]:
        """Which row decides at these steps of an episode [N], and which of them [N] are its."""
        ...

    def values(self, found: Experience, prepared: Prepare, value_of: ValueOf) -> tuple[Tensor, Tensor]:
        """V of every state decided in and of its true next state, [B, T] each."""
        ...

    def cut_values(self, found: Experience, prepared: Prepare, value_of: ValueOf) -> Tensor | None:
        """V of true next states where an episode was cut, [B, T], anything elsewhere; None where none was."""
        ...


class Stationary:
    """One policy and one critic; rollouts of fixed length carry episodes on."""

    rows = 1

    def __init__(self, environments: Environments, parts: ObservationParts, actions: ActionInterface, cfg: HNPGConfig):
        self.steps = cfg.rollout_steps
        actor = Actor(parts, actions, cfg.network)
        reset(actor.network, cfg.initialization)
        self.policy: Policy = actor.to(cfg.device)
        self.collector = Collector(environments, parts, actions, seed=cfg.seed, device=cfg.device)

    def collect(self, normalizer: ObservationNormalizer, *, iteration: int) -> Experience:
        assert isinstance(self.policy, Actor)
        return self.collector.collect(self.policy, normalizer, steps=self.steps, iteration=iteration)

    def gather(self, values: Tensor, mask: Tensor) -> Tensor:
        return values[mask][None]

    def scatter(self, values: Tensor, mask: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values[0])

    def at(self, row: int, seen: Seen, allowed: Tensor | None) -> Tensor:
        return self.policy(seen, allowed)

    def by_row(self, steps: Tensor) -> list[tuple[int, Tensor]]:
        return [(0, torch.ones_like(steps, dtype=torch.bool))]

    def values(self, found: Experience, prepared: Prepare, value_of: ValueOf) -> tuple[Tensor, Tensor]:
        seen = prepared(found.observations)
        allowed = found.allowed
        if allowed is not None:
            # What is allowed beyond the last decision was not recorded; only the value of a cut state feels it.
            allowed = torch.cat([allowed, torch.ones_like(allowed[:, :1])], 1).flatten(0, 1)[None]
        shape = (found.mask.shape[0], found.mask.shape[1] + 1)
        values = value_of({name: part.flatten(0, 1)[None] for name, part in seen.items()}, allowed)[0].view(shape)
        next_values = values[:, 1:].clone()
        if found.final:
            final = {name: part[None] for name, part in prepared(found.final).items()}
            next_values[found.final_at.to(values.device)] = value_of(final, None)[0]
        return values[:, :-1].contiguous(), next_values

    def cut_values(self, found: Experience, prepared: Prepare, value_of: ValueOf) -> Tensor | None:
        cut = found.truncated.clone()
        cut[:, -1] |= ~found.terminated[:, -1]
        if not bool(cut.any()):
            return None
        after = {name: part[:, 1:].clone() for name, part in found.observations.items()}
        for name, part in found.final.items():
            after[name][found.final_at] = part
        seen = {name: part[None] for name, part in prepared({n: part[cut] for n, part in after.items()}).items()}
        return self.scatter(value_of(seen, None), cut.to(self.collector.device))


class FiniteHorizon:
    """A policy and a critic for each of H steps; an iteration plays whole episodes. Values end with the horizon."""

    def __init__(self, environments: Environments, parts: ObservationParts, actions: ActionInterface, cfg: HNPGConfig):
        assert cfg.horizon is not None
        self.rows = cfg.horizon
        actors = StepActors(parts, actions, cfg.network, horizon=cfg.horizon, device=cfg.device)
        actors.reset(cfg.initialization)
        self.policy: Policy = actors
        self.collector = HorizonCollector(
            environments, parts, actions, horizon=cfg.horizon, seed=cfg.seed, device=cfg.device
        )

    def collect(self, normalizer: ObservationNormalizer, *, iteration: int) -> Experience:
        assert isinstance(self.policy, StepActors)
        return self.collector.collect(self.policy, normalizer, iteration=iteration)

    def gather(self, values: Tensor, mask: Tensor) -> Tensor:
        return values.transpose(0, 1).contiguous()

    def scatter(self, values: Tensor, mask: Tensor) -> Tensor:
        return values.t().contiguous().masked_fill(~mask, 0)

    def at(self, row: int, seen: Seen, allowed: Tensor | None) -> Tensor:
        assert isinstance(self.policy, StepActors)
        return self.policy.at(row, seen, allowed)

    def by_row(self, steps: Tensor) -> list[tuple[int, Tensor]]:
        rows = steps.clamp(0, self.rows - 1)
        return [(row, rows == row) for row in rows.unique().tolist()]

    def values(self, found: Experience, prepared: Prepare, value_of: ValueOf) -> tuple[Tensor, Tensor]:
        seen = {name: part.transpose(0, 1).contiguous() for name, part in prepared(found.before()).items()}
        allowed = None if found.allowed is None else found.allowed.transpose(0, 1)
        values = value_of(seen, allowed).t()
        # Column t + 1 shows the true next observation of step t, also where the episode was cut there.
        return values.contiguous(), torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)

    def cut_values(self, found: Experience, prepared: Prepare, value_of: ValueOf) -> Tensor | None:
        return self.values(found, prepared, value_of)[1] if bool(found.truncated.any()) else None


def make_form(environments: Environments, parts: ObservationParts, actions: ActionInterface, cfg: HNPGConfig) -> Form:
    """The form that `horizon` asks for."""
    made = Stationary if cfg.horizon is None else FiniteHorizon
    return made(environments, parts, actions, cfg)


def make_actions(space: spaces.Space, cfg: HNPGConfig) -> ActionInterface:
    """Between decisions and actions, with or without clipping to the space's bounds."""
    interface = ActionInterface if cfg.clip_actions else Unclipped
    return interface(space, squash=cfg.network.squash, log_std=cfg.network.log_std)


class Unclipped(ActionInterface):
    """Hands continuous actions over as the policy made them."""

    def to_env(self, decisions: Tensor) -> np.ndarray:
        space = self.space
        if not isinstance(space, spaces.Box) or self.scaled:
            return super().to_env(decisions)
        return decisions.numpy().reshape(-1, *space.shape).astype(space.dtype, copy=False)
