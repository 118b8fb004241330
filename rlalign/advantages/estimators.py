"""Turn rollouts into training batches: each estimator is a configured object around one equation of `functional`.

Statistics over all ranks need no code here: the caller gathers the rollouts first and gives every rank the whole.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.advantages.config import (
    GAE,
    AdvantageConfig,
    BatchScaled,
    BetaNormalized,
    GreedyBaseline,
    GroupEstimatorConfig,
    GroupRelative,
    LeaveOneOut,
    LengthWeighted,
    MaxLikelihood,
    PerPromptRunning,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
)
from rlalign.advantages.metrics import advantage_metrics, advantage_rms, beta_metrics
from rlalign.advantages.per_prompt import PerPromptEstimator
from rlalign.advantages.requirements import (
    constant,
    require_fields,
    require_one_episode_per_row,
    require_rewards_on_decisions,
)
from rlalign.buffers.rollout import Rollout, TrainBatch
from rlalign.functional import advantages as equations
from rlalign.functional.masked import spread


@runtime_checkable
class Estimator(Protocol):
    """What a trainer asks of an estimator."""

    needs: frozenset[str]
    """Optional fields of `Rollout` that must be there."""
    metrics: dict[str, float]
    """Statistics of the last call, by metric name."""

    def __call__(self, rollout: Rollout) -> TrainBatch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def build_estimator(cfg: AdvantageConfig, *, part_weights: Mapping[str, float] | None = None) -> Estimator:
    """Make the estimator that a member of the union describes.

    Args:
        part_weights: Weight of each reward function, for `decompose` when the config names none itself.
    """
    if isinstance(cfg, GroupEstimatorConfig) and part_weights and not cfg.part_weights:
        cfg = replace(cfg, part_weights=dict(part_weights))
    match cfg:
        case GAE():
            return GAEEstimator(cfg)
        case ReinforcePlusPlus():
            return ReturnToGoEstimator(cfg)
        case GreedyBaseline():
            return GreedyBaselineEstimator()
        case PerPromptRunning():
            return PerPromptEstimator(cfg)
        case GroupEstimatorConfig():
            return GroupEstimator(cfg)
    raise TypeError(f"{type(cfg).__name__} is no advantage config; use a member of rlalign.advantages.AdvantageConfig.")


class Stateless:
    """An estimator that remembers nothing between rollouts."""

    needs: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got entries {sorted(state)}.")


class GAEEstimator(Stateless):
    """Values and rewards of any number of episodes per row, to lambda-returns and advantages."""

    needs = frozenset({"values", "next_values"})

    def __init__(self, cfg: GAE) -> None:
        super().__init__()
        self.cfg = cfg

    def __call__(self, rollout: Rollout) -> TrainBatch:
        require_fields(rollout, self.needs, "gae")
        require_rewards_on_decisions(rollout)
        assert rollout.values is not None
        assert rollout.next_values is not None
        advantages = equations.gae(
            rollout.rewards,
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.truncated,
            gamma=self.cfg.gamma,
            gae_lambda=self.cfg.gae_lambda,
            mask=rollout.mask,
        )
        advantages = torch.where(rollout.scored[:, None], advantages, 0.0)
        self.metrics = {"advantage/rms": advantage_rms(advantages, rollout)}
        return TrainBatch.from_rollout(rollout, advantages, returns=advantages + rollout.values)


class ReturnToGoEstimator(Stateless):
    """REINFORCE++: every token's own return-to-go, whitened over all real tokens of all scored rollouts."""

    def __init__(self, cfg: ReinforcePlusPlus) -> None:
        super().__init__()
        self.cfg = cfg

    def __call__(self, rollout: Rollout) -> TrainBatch:
        require_one_episode_per_row(rollout)
        require_rewards_on_decisions(rollout)
        advantages = equations.reinforce_plus_plus(
            rollout.rewards, rollout.mask, gamma=self.cfg.gamma, scored=rollout.scored
        )
        self.metrics = advantage_metrics(advantages, rollout)
        return TrainBatch.from_rollout(rollout, advantages)


class GreedyBaselineEstimator(Stateless):
    """ReMax: outcome minus the outcome of the greedy rollout from the same prompt."""

    needs = frozenset({"baseline_reward"})

    def __call__(self, rollout: Rollout) -> TrainBatch:
        require_fields(rollout, self.needs, "greedy_baseline")
        require_one_episode_per_row(rollout)
        assert rollout.baseline_reward is not None
        outcome = equations.greedy_baseline(rollout.outcome, rollout.baseline_reward, scored=rollout.scored)
        advantages = spread(outcome, rollout.mask)
        self.metrics = advantage_metrics(advantages, rollout)
        return TrainBatch.from_rollout(rollout, advantages)


class GroupEstimator(Stateless):
    """Any estimator that compares the outcomes of a group, on their sum or on each reward part."""

    def __init__(self, cfg: GroupEstimatorConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def __call__(self, rollout: Rollout) -> TrainBatch:
        require_one_episode_per_row(rollout)
        self.metrics = {}
        whole = self._decomposed(rollout) if self.cfg.decompose else self._estimate(rollout, rollout.outcome, "bnpo/")
        advantages = spread(whole, rollout.mask)
        self.metrics |= advantage_metrics(advantages, rollout, whole)
        return TrainBatch.from_rollout(rollout, advantages)

    def _estimate(
        self,
        rollout: Rollout,
        rewards: Float[Tensor, " batch"],
        prefix: str,
        scored: Bool[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, " batch"]:
        scored = rollout.scored if scored is None else scored
        advantages = group_advantages(self.cfg, rollout, rewards, scored)
        if isinstance(self.cfg, BetaNormalized):
            self.metrics |= beta_metrics(self.cfg, rewards, advantages, rollout.group, scored, prefix)
        return advantages

    def _decomposed(self, rollout: Rollout) -> Float[Tensor, " batch"]:
        """Average over the parts that apply to a rollout; a part equal everywhere says nothing and is left out."""
        self._check_parts(rollout)
        total = torch.zeros_like(rollout.outcome)
        weight_sum = torch.zeros_like(total)
        for name, part in rollout.reward_parts.items():
            applies = rollout.scored & ~part.isnan()
            if constant(part[applies]):
                continue
            weight = self.cfg.part_weights.get(name, 1.0)
            total += weight * self._estimate(rollout, part.to(total), f"bnpo/{name}_", applies)
            weight_sum += abs(weight) * applies
        return torch.where(weight_sum > 0, total / weight_sum.clamp(min=torch.finfo(total.dtype).tiny), 0.0)

    def _check_parts(self, rollout: Rollout) -> None:
        if not rollout.reward_parts:
            raise ValueError("`advantage.decompose: true` needs `reward_parts`, and this rollout has none.")
        unknown = sorted(set(self.cfg.part_weights) - set(rollout.reward_parts))
        if unknown:
            known = sorted(rollout.reward_parts)
            raise ValueError(f"`advantage.part_weights` names {unknown[0]!r}, but the rewards are {known}.")


def group_advantages(
    cfg: GroupEstimatorConfig,
    rollout: Rollout,
    rewards: Float[Tensor, " batch"],
    scored: Bool[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Call the equation that `cfg` names on one reward per rollout."""
    group = rollout.group
    match cfg:
        case GroupRelative():
            return equations.group_relative(
                rewards, group, scale=cfg.scale, unbiased=cfg.unbiased, eps=cfg.eps, scored=scored
            )
        case LeaveOneOut():
            return equations.leave_one_out(rewards, group, scored=scored)
        case BetaNormalized():
            return equations.beta_normalized(
                rewards,
                group,
                alpha=cfg.alpha,
                beta=cfg.beta,
                reward_range=cfg.reward_range,
                max_weight=cfg.max_weight,
                max_concentration=cfg.max_concentration,
                normalize_weights=cfg.normalize_weights,
                scored=scored,
            )
        case MaxLikelihood():
            return equations.max_likelihood(rewards, group, scored=scored)
        case LengthWeighted():
            return equations.length_weighted(rewards, group, rollout.lengths, scored=scored)
        case BatchScaled():
            return equations.batch_scaled(rewards, group, scored=scored)
        case ReinforcePlusPlusBaseline():
            lengths = rollout.lengths if cfg.whiten_over == "decisions" else None
            return equations.reinforce_plus_plus_baseline(rewards, group, lengths=lengths, scored=scored)
    raise TypeError(f"{type(cfg).__name__} is no group estimator.")
