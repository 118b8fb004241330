"""Implicit Q-learning's update: an upper expectile of Q stands for the best action, without asking for unseen ones."""

import torch
from torch import Tensor

from rlalign.agents.config_offline import IQLConfig
from rlalign.agents.offline_parts import (
    Critic,
    Critics,
    Learner,
    Metrics,
    Policy,
    SlowCopy,
    action_features,
    gradient,
    ready,
    seeded,
    slow_copy,
    step,
)
from rlalign.agents.optimizer import AgentOptimizer
from rlalign.buffers.transitions import Transitions
from rlalign.functional.offline import exponential_weights
from rlalign.functional.policy import weighted_bc
from rlalign.functional.value import expectile_error
from rlalign.nn.config import MSE
from rlalign.nn.policies import ActionDistribution
from rlalign.nn.value_heads import ValueHead


class IQLLearner(Learner):
    """IQL (Kostrikov et al. 2022, arXiv:2110.06169), on batches of [batch, observation_size] floats.

    Args:
        cfg: Its `rewards`, `dataset` and `normalize_observations` are the caller's business.
        observation_size: Numbers in an observation.
        distribution: Of the actions, in whose units the batches give them.
        generator: Decides the initial weights.
    """

    def __init__(
        self, cfg: IQLConfig, observation_size: int, distribution: ActionDistribution, generator: torch.Generator
    ):
        self.cfg, nap = cfg, cfg.normalize_and_project
        pair = observation_size + distribution.size
        with seeded(generator):
            q = Critics([Critic(pair, cfg.critic_network, ValueHead(cfg.value_head)) for _ in range(2)])
            value = Critics([Critic(observation_size, cfg.critic_network, ValueHead(MSE()))])
            policy = Policy(observation_size, distribution, cfg.network)
        self.q, self.value, self.policy = ready(q, cfg), ready(value, cfg), ready(policy, cfg)
        self.target = slow_copy(self.q)
        optimizers = {
            "q": AgentOptimizer(self.q, cfg.critic_optim, nap=nap),
            "value": AgentOptimizer(self.value, cfg.critic_optim, nap=nap),
            "policy": AgentOptimizer(self.policy, cfg.optim, nap=nap),
        }
        self.slow = SlowCopy(self.target, self.q)
        modules = {"policy": self.policy, "value": self.value, "q": self.q, "target": self.target}
        super().__init__(modules, optimizers)

    def update(self, batch: Transitions, *, progress: float = 0.0) -> Metrics:
        """One step of V, of the policy, of Q, and of Q's slow copy, in this order.

        Args:
            batch: Transitions drawn from the data.
            progress: Share of the training done, for schedules.
        """
        pairs = torch.cat([batch.observations, action_features(self.policy.distribution, batch.actions)], -1)
        with torch.no_grad():
            recorded = self.target.smallest(pairs)
        metrics = self._update_value(batch, recorded, progress)
        metrics |= self._update_policy(batch, recorded, progress)
        metrics |= self._update_q(batch, pairs, progress)
        self.slow.follow(tau=self.cfg.target_tau)
        return metrics

    def _update_value(self, batch: Transitions, recorded: Tensor, progress: float) -> Metrics:
        values = self.value.smallest(batch.observations)
        loss = expectile_error(values, recorded, expectile=self.cfg.expectile).mean()
        norm = step(self.optimizers["value"], gradient(loss, self.optimizers["value"]), progress=progress)
        return {"value/loss": loss.detach(), "value/mean": values.detach().mean(), "value/grad_norm": norm}

    def _update_policy(self, batch: Transitions, recorded: Tensor, progress: float) -> Metrics:
        cfg = self.cfg
        with torch.no_grad():
            advantages = recorded - self.value.smallest(batch.observations)
        weights = exponential_weights(advantages, temperature=cfg.temperature, max_weight=cfg.max_weight)
        log_prob = self.policy.distribution.log_prob(self.policy(batch.observations), batch.actions)
        loss = weighted_bc(log_prob, weights).mean()
        norm = step(self.optimizers["policy"], gradient(loss, self.optimizers["policy"]), progress=progress)
        return {
            "policy/loss": loss.detach(),
            "policy/log_prob_nats": log_prob.detach().mean(),
            "policy/grad_norm": norm,
            "policy/weight_mean": weights.mean(),
            "policy/weight_capped_frac": (weights >= cfg.max_weight).float().mean(),
        }

    def _update_q(self, batch: Transitions, pairs: Tensor, progress: float) -> Metrics:
        with torch.no_grad():
            following = self.value.smallest(batch.next_observations).masked_fill(batch.terminated, 0)
            targets = batch.rewards + self.cfg.gamma * following
        for critics in (self.q, self.target):
            critics.fit_support(targets)
        loss = self.q.objective(pairs, targets).mean()
        norm = step(self.optimizers["q"], gradient(loss, self.optimizers["q"]), progress=progress)
        outside = self.q.first.head.outside_share(targets)
        return {
            "q/loss": loss.detach(),
            "q/target_mean": targets.mean(),
            "q/grad_norm": norm,
            "q/outside_frac": outside,
        }
