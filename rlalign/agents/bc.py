"""Behaviour cloning's update: raise the log-probability of every recorded decision."""

import torch

from rlalign.agents.config_offline import BCConfig
from rlalign.agents.offline_parts import Learner, Metrics, Policy, gradient, ready, seeded, step
from rlalign.agents.optimizer import AgentOptimizer
from rlalign.buffers.transitions import Transitions
from rlalign.functional.policy import weighted_bc
from rlalign.nn.policies import ActionDistribution


class BCLearner(Learner):
    """Behaviour cloning, on batches whose observations are [batch, observation_size] floats.

    Args:
        cfg: Its `dataset` and `normalize_observations` are the caller's business.
        observation_size: Numbers in an observation.
        distribution: Of the actions, in whose units the batches give them.
        generator: Decides the initial weights.
    """

    def __init__(
        self, cfg: BCConfig, observation_size: int, distribution: ActionDistribution, generator: torch.Generator
    ):
        self.cfg, nap = cfg, cfg.normalize_and_project
        with seeded(generator):
            self.policy = ready(Policy(observation_size, distribution, cfg.network), cfg)
        super().__init__({"policy": self.policy}, {"policy": AgentOptimizer(self.policy, cfg.optim, nap=nap)})

    def update(self, batch: Transitions, *, progress: float = 0.0) -> Metrics:
        """One step of the policy."""
        log_prob = self.policy.distribution.log_prob(self.policy(batch.observations), batch.actions)
        loss = weighted_bc(log_prob, torch.ones_like(log_prob)).mean()
        norm = step(self.optimizers["policy"], gradient(loss, self.optimizers["policy"]), progress=progress)
        return {
            "policy/loss": loss.detach(),
            "policy/log_prob_nats": log_prob.detach().mean(),
            "policy/grad_norm": norm,
        }
