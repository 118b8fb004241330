"""Hybrid fitted policy evaluation: a critic regressed on recorded transitions and on-policy returns together.

    f_k = argmin_f  E_off[(f(s,a) - r - γ f_{k-1}(s',a'))²] + λ E_on[(f(s,a) - y)²],   a' ~ π(s')

Zhou, Sekhari, Song & Sun 2023 (arXiv:2311.08384), algorithm 2; with one critic per step, algorithm 5.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.agents.config_hybrid import HNPGConfig
from rlalign.agents.hybrid_networks import Critic, Policy, QNetwork, encoded
from rlalign.agents.hybrid_sources import OfflineSource, OnlineSource, Seen, Source, offline_targets
from rlalign.nn.config import MSE
from rlalign.nn.nap import Projector
from rlalign.nn.policies import ActionDistribution
from rlalign.optim.step import SkipBudget, TrainingDiverged
from rlalign.training.schedules import lr_scale

PROGRESS_TICKS = 10_000
"""Resolution of the learning rate's schedule, which counts progress rather than steps."""


class PolicyEvaluation:
    """The critic and its fits.

    Args:
        make: Builds a critic of the wanted shape.
    """

    def __init__(self, make: Callable[[], Critic], cfg: HNPGConfig):
        self.cfg, self.critic = cfg, make()
        nap = cfg.normalize_and_project
        self.projectors = [] if nap is None else [Projector(row, every=nap.every) for row in self.critic.rows]
        # Without averaging the mean over the last sweeps is the critic itself.
        self.averaged = [make() for _ in range(cfg.critic_averaging)] if cfg.critic_averaging > 1 else [self.critic]
        for member in self.averaged:
            member.load_state_dict(self.critic.state_dict())
        self.budget = SkipBudget(limit=cfg.optim.nonfinite_budget)
        self.learning_rate, self.updates = cfg.optim.learning_rate, 0

    def q(self, seen: Seen, actions: Tensor) -> Float[Tensor, "stack rows"]:
        """Q of encoded actions: the mean over the critics of the last sweeps. Without gradient."""
        if len(self.averaged) == 1:
            return self.critic.values(seen, actions)
        return torch.stack([member.values(seen, actions) for member in self.averaged]).mean(0)

    @torch.no_grad()
    def q_at(self, row: int, seen: Seen, actions: Tensor) -> Float[Tensor, "stack rows"]:
        """Q of one row's critic alone."""
        return torch.stack([member.rows[row].values(seen, actions) for member in self.averaged]).mean(0)

    def run(
        self,
        policy: Policy,
        online: OnlineSource | None,
        draw: Callable[[int], OfflineSource] | None,
        *,
        random: torch.Generator,
        progress: float,
    ) -> tuple[OfflineSource | None, dict[str, float]]:
        """Fit the critic to the current policy.

        Args:
            online: None where on-policy decisions have no weight.
            draw: Sweep -> newly drawn recorded transitions; None without any.

        Returns:
            The transitions of the last sweep, and metrics.
        """
        offline, found = None, {}
        for sweep in range(self.cfg.critic_sweeps):
            offline = None if draw is None else draw(sweep)
            found = self._sweep(policy, online, offline, random, progress)
            kept = sweep - self.cfg.critic_sweeps + len(self.averaged)
            if len(self.averaged) > 1 and kept >= 0:
                self.averaged[kept].load_state_dict(self.critic.state_dict())
        return offline, found

    def _sweep(
        self,
        policy: Policy,
        online: OnlineSource | None,
        offline: OfflineSource | None,
        random: torch.Generator,
        progress: float,
    ) -> dict[str, float]:
        """One fit of every row, the last step's first, since each step's targets come from the step after it."""
        next_actions = None if offline is None else self._next_actions(policy, offline, random)
        losses, errors = [], []
        for row in reversed(range(len(self.critic.rows))):
            sources = [] if online is None else [_fitted(policy.distribution, online, row, online.returns[row])]
            if offline is not None and next_actions is not None:
                targets = self._targets(offline, next_actions, row)
                sources.append(_fitted(policy.distribution, offline, row, targets))
            losses.append(self.fit(row, *_joined(sources), progress=progress))
            errors.append([self._error(row, source) for source in sources])
        names = [name for name, source in (("online", online), ("offline", offline)) if source is not None]
        means = torch.tensor(errors).mean(0)
        return {"value/loss": sum(losses) / len(losses)} | {
            f"value/{name}_error": float(mean) for name, mean in zip(names, means, strict=True)
        }

    @torch.no_grad()
    def _next_actions(self, policy: Policy, offline: OfflineSource, random: torch.Generator) -> Tensor:
        """a' ~ π(s'); with one policy per step, of the step after."""
        step = 1 if self.cfg.horizon is not None else 0
        params = policy({name: value.roll(step, 0) for name, value in offline.next_seen.items()}).roll(-step, 0)
        noise = policy.distribution.noise(params.shape[:2], random).to(params.device)
        return encoded(policy.distribution, policy.distribution.sample(params, noise))

    @torch.no_grad()
    def _targets(self, offline: OfflineSource, next_actions: Tensor, row: int) -> Float[Tensor, " rows"]:
        rewards = offline.rewards[row]
        following = row + 1 if self.cfg.horizon is not None else row
        if following == len(self.critic.rows):
            return rewards
        next_seen = {name: value[row] for name, value in offline.next_seen.items()}
        next_values = self.critic.rows[following].values(next_seen, next_actions[row])
        return offline_targets(rewards, next_values, offline.terminated[row], gamma=self.cfg.advantage.gamma)

    def fit(
        self,
        row: int,
        seen: Mapping[str, Tensor],
        actions: Float[Tensor, "rows numbers"],
        targets: Float[Tensor, " rows"],
        weights: Float[Tensor, " rows"],
        *,
        progress: float = 0.0,
    ) -> float:
        """Full-batch steps of a fresh Adam on one critic; returns the loss before the last one.

        Raises:
            TrainingDiverged: It became NaN or infinite in more fits in a row than `optim.nonfinite_budget` allows.
        """
        network = self.critic.rows[row]
        network.head.fit_support(targets[weights > 0], layer=network.network.last)
        parameters = [p for p in network.parameters() if p.requires_grad]
        saved = [p.detach().clone() for p in parameters]
        adam, objective = self._adam(row, parameters, progress), _objective(network, targets)
        loss = torch.zeros(())
        for _ in range(self.cfg.critic_steps):
            loss = (objective(network(seen, actions)) * weights).sum()
            if self.cfg.l2:
                loss = loss + self.cfg.l2 * _squares(parameters if self.cfg.l2_on == "all" else parameters[-1:])
            adam.zero_grad()
            loss.backward()
            if self.cfg.optim.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.cfg.optim.max_grad_norm)
            adam.step()
        adam.zero_grad()
        self._check(loss, parameters, saved)
        return float(loss.detach())

    def _adam(self, row: int, parameters: Sequence[Tensor], progress: float) -> torch.optim.Optimizer:
        cfg = self.cfg.optim
        tick = min(int(progress * PROGRESS_TICKS), PROGRESS_TICKS)
        scale = lr_scale(tick, warmup_steps=0, total_steps=PROGRESS_TICKS, schedule=cfg.schedule)
        self.learning_rate = cfg.learning_rate * scale
        adam = torch.optim.AdamW(
            parameters,
            lr=self.learning_rate,
            betas=cfg.betas,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            fused=parameters[0].device.type in ("cpu", "cuda"),
        )
        if self.projectors:
            self.projectors[row].attach(adam)
        return adam

    def _check(self, loss: Tensor, parameters: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
        self.updates += self.cfg.critic_steps
        if bool(loss.isfinite()) and all(bool(p.isfinite().all()) for p in parameters):
            self.budget.consecutive = 0
            return
        with torch.no_grad():
            for parameter, before in zip(parameters, saved, strict=True):
                parameter.copy_(before)
        self.budget.consecutive += 1
        self.budget.total += 1
        if self.budget.consecutive > self.budget.limit:
            raise TrainingDiverged(
                f"the critic's fit ended in NaN or infinity, {self.budget.consecutive} times in a row "
                f"({self.budget.limit} allowed); its parameters are those before the fit. Lower `optim.learning_rate`, "
                "set `normalize.observations`, or look at the scale of the rewards."
            )

    @torch.no_grad()
    def _error(self, row: int, source: "_Fitted") -> float:
        """Mean squared error of the decoded values, over the decisions that count."""
        found = self.critic.rows[row].values(source.seen, source.actions)
        return float(((found - source.targets) ** 2 * source.weights).sum() / source.weights.sum().clamp(min=1e-12))

    def metrics(self) -> dict[str, float]:
        found = {
            "optim/learning_rate": self.learning_rate,
            "optim/updates": float(self.updates),
            "optim/fits_skipped": float(self.budget.total),
        }
        parts = [projector.metrics(self.learning_rate) for projector in self.projectors]
        return found | {name: sum(part[name] for part in parts) / len(parts) for name in (parts[0] if parts else ())}

    def state_dict(self) -> dict[str, Any]:
        """What fits carry on, weights apart: an Adam never outlives its fit."""
        return {
            "updates": self.updates,
            "learning_rate": self.learning_rate,
            "budget": self.budget.state_dict(),
            "projectors": [projector.state_dict() for projector in self.projectors],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates, self.learning_rate = state["updates"], state["learning_rate"]
        self.budget.load_state_dict(state["budget"])
        for projector, part in zip(self.projectors, state["projectors"], strict=True):
            projector.load_state_dict(part)

    def networks(self) -> dict[str, Any]:
        """Weights of the critic, and of its last fits where they are averaged."""
        members = self.averaged if len(self.averaged) > 1 else []
        return {"critic": self.critic.state_dict(), "averaged": [member.state_dict() for member in members]}

    def load_networks(self, state: Mapping[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])
        for member, part in zip(self.averaged, state["averaged"], strict=False):
            member.load_state_dict(part)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Fitted:
    """One row's part of a source, with targets."""

    seen: Seen
    actions: Tensor
    targets: Tensor
    weights: Tensor


def _fitted(distribution: ActionDistribution, source: Source, row: int, targets: Tensor) -> _Fitted:
    return _Fitted(
        seen={name: value[row] for name, value in source.seen.items()},
        actions=encoded(distribution, source.actions[row]),
        targets=targets,
        weights=source.weights[row],
    )


def _joined(sources: Sequence[_Fitted]) -> tuple[Seen, Tensor, Tensor, Tensor]:
    first = sources[0]
    seen = {name: torch.cat([source.seen[name] for source in sources]) for name in first.seen}
    actions = torch.cat([source.actions for source in sources])
    return seen, actions, torch.cat([s.targets for s in sources]), torch.cat([s.weights for s in sources])


def _objective(network: QNetwork, targets: Tensor) -> Callable[[Tensor], Tensor]:
    """Outputs -> error per decision. A distribution's targets are encoded once, not at every step."""
    head = network.head
    if isinstance(head.cfg, MSE):
        return lambda outputs: head.objective(outputs, targets)
    probs = head.encode(targets)
    return lambda outputs: head.distribution_objective(outputs, probs)


def _squares(parameters: Sequence[Tensor]) -> Tensor:
    return torch.stack([p.square().sum() for p in parameters]).sum()
