"""O-DICE's update: a value of the best distribution near the data, then imitation of what did better than it."""

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.agents.config_offline import ODICEConfig
from rlalign.agents.offline_parts import (
    Critic,
    Critics,
    Learner,
    Metrics,
    Policy,
    SlowCopy,
    gradient,
    ready,
    seeded,
    slow_copy,
    step,
)
from rlalign.agents.optimizer import AgentOptimizer
from rlalign.buffers.transitions import Transitions
from rlalign.functional.dice import (
    bellman_residual,
    dice_weight,
    odice_residuals,
    odice_value_terms,
    orthogonal_combine,
)
from rlalign.functional.policy import weighted_bc
from rlalign.nn.config import MSE
from rlalign.nn.policies import ActionDistribution
from rlalign.nn.value_heads import ValueHead


class ODICELearner(Learner):
    """O-DICE (Mao et al. 2024, arXiv:2402.00348), on batches whose observations are [batch, observation_size] floats.

    Args:
        cfg: Its `rewards`, `dataset` and `normalize_observations` are the caller's business.
        observation_size: Numbers in an observation.
        distribution: Of the actions, in whose units the batches give them.
        generator: Decides the initial weights.
    """

    def __init__(
        self, cfg: ODICEConfig, observation_size: int, distribution: ActionDistribution, generator: torch.Generator
    ):
        self.cfg, nap = cfg, cfg.normalize_and_project
        with seeded(generator):
            critics = [
                Critic(observation_size, cfg.critic_network, ValueHead(MSE())) for _ in range(2 if cfg.twin else 1)
            ]
            value = ready(Critics(critics), cfg)
            policy = ready(Policy(observation_size, distribution, cfg.network), cfg)
        self.value, self.policy, self.target = value, policy, slow_copy(value)
        optimizers = {
            "value": AgentOptimizer(value, cfg.critic_optim, nap=nap),
            "policy": AgentOptimizer(policy, cfg.optim, nap=nap),
        }
        self.slow = SlowCopy(self.target, value)
        super().__init__({"policy": policy, "value": value, "target": self.target}, optimizers)

    def update(self, batch: Transitions, *, progress: float = 0.0) -> Metrics:
        """One step of V, of its slow copy, and of the policy, in this order.

        Args:
            batch: Transitions drawn from the data.
            progress: Share of the training done, for schedules.
        """
        found, residual, metrics = self.value_gradient(batch)
        metrics["value/grad_norm"] = step(self.optimizers["value"], found, progress=progress)
        self.slow.follow(tau=self.cfg.target_tau)
        return metrics | self._update_policy(batch, residual, progress=progress)

    def value_gradient(self, batch: Transitions) -> tuple[Tensor, Float[Tensor, "critics batch"], Metrics]:
        """Gradient by V's parameters (one vector), the residual that weighs the policy's decisions, and metrics."""
        cfg, optimizer = self.cfg, self.optimizers["value"]
        values = self.value.values(batch.observations)
        forward, backward = self._residuals(batch, values)
        weights = {"conjugate_weight": cfg.conjugate_weight, "backward_weight": cfg.backward_weight}
        terms = odice_value_terms(values, forward, backward, **weights, divergence=cfg.divergence)
        linear, forward_term, backward_term = (term.mean() for term in terms)
        if cfg.gradient == "orthogonal":
            # Backward first: the next observations' graph is freed before the others are walked.
            by_next = gradient(backward_term, optimizer)
            by_this = gradient(forward_term, optimizer, retain_graph=True)
            found = gradient(linear, optimizer) + orthogonal_combine([by_this], [by_next])[0]
        else:
            found = gradient(linear + forward_term, optimizer)
        residual = forward.detach()
        metrics = {
            "value/mean": values.detach().mean(),
            "value/residual_mean": residual.mean(),
            "value/residual_max": residual.max(),
            "value/loss": (linear + forward_term).detach(),
        }
        return found, residual, metrics

    def _residuals(self, batch: Transitions, values: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward residual; where only one gradient is taken, the one residual twice."""
        facts, gamma = (batch.rewards, batch.terminated), self.cfg.gamma
        match self.cfg.gradient:
            case "orthogonal":
                with torch.no_grad():
                    both = torch.cat([batch.observations, batch.next_observations])
                    target, next_target = self.target.smallest(both).chunk(2)
                next_values = self.value.values(batch.next_observations)
                return odice_residuals(facts[0], values, next_values, target, next_target, facts[1], gamma=gamma)
            case "true":
                next_values = self.value.values(batch.next_observations)
            case "semi":
                with torch.no_grad():
                    next_values = self.target.smallest(batch.next_observations)
        residual = bellman_residual(facts[0], values, next_values, facts[1], gamma=gamma)
        return residual, residual

    def _update_policy(
        self, batch: Transitions, residual: Float[Tensor, "critics batch"], *, progress: float
    ) -> Metrics:
        cfg = self.cfg
        weights = dice_weight(residual, divergence=cfg.divergence, rule=cfg.weight_rule, max_weight=cfg.max_weight)
        # Each critic weighs every decision; the mean over critics is the mean of their losses.
        log_prob = self.policy.distribution.log_prob(self.policy(batch.observations), batch.actions)
        loss = weighted_bc(log_prob, weights.mean(0)).mean()
        norm = step(self.optimizers["policy"], gradient(loss, self.optimizers["policy"]), progress=progress)
        return {
            "policy/loss": loss.detach(),
            "policy/log_prob_nats": log_prob.detach().mean(),
            "policy/grad_norm": norm,
            "policy/weight_mean": weights.mean(),
            "policy/weight_zero_frac": (weights == 0).float().mean(),
            "policy/weight_capped_frac": (weights >= cfg.max_weight).float().mean(),
        }
