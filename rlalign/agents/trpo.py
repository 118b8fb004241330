"""Trust-region policy optimization."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.agents.agent import Metrics
from rlalign.agents.config import TRPOConfig
from rlalign.agents.on_policy import OnPolicyAgent, normalized
from rlalign.agents.on_policy_metrics import rollout_metrics
from rlalign.agents.optimizer import AgentOptimizer
from rlalign.buffers import TrainBatch
from rlalign.buffers.decisions import Decisions
from rlalign.functional.policy import clipped_surrogate
from rlalign.optim.natural_gradient import NaturalGradientResult, natural_gradient_step

UNCLIPPED = {"clip_low": 1.0, "clip_high": float("inf")}
"""Bounds at which the clipped surrogate is the plain importance-weighted one."""


class TRPO(OnPolicyAgent):
    """A natural-gradient step of bounded KL per rollout, then the critic's fit (Schulman 2015, arXiv:1502.05477).

    Example:
        ```python
        agent = TRPO("CartPole-v1", seed=0)
        agent.fit(total_env_steps=50_000)
        ```
    """

    config_class = TRPOConfig
    config: TRPOConfig

    def build(self) -> None:
        super().build()
        cfg = self.config
        # With Normalize-and-Project the critic alone is projected: the policy's step has its KL checked as it stands.
        self.optimizer = AgentOptimizer(self.model.critic, cfg.optim, nap=cfg.normalize_and_project)

    def iterate(self) -> Metrics:
        self.buffer.add(self.collect())
        batch = self.estimator(self.buffer.drain())
        with self.clock_watch("train"):
            result = self.update(Decisions.of(batch))
            errors = [self.fit_critic(minibatch) for minibatch in self.minibatches(batch)]
        metrics = rollout_metrics(self, batch) | self.optimizer.metrics() | step_metrics(result)
        return metrics | {"value/error": float(torch.stack(errors).mean())}

    def update(self, decisions: Decisions) -> NaturalGradientResult:
        """Improve the surrogate inside the trust region, measured on all decisions of the rollout."""
        cfg, actor = self.config, self.model.actor
        advantages = decisions["advantages"]
        if cfg.normalize_advantages == "batch":
            advantages = normalized(advantages)
        distribution, params_old = actor.distribution, decisions["params_old"]

        def params() -> Tensor:
            return actor(decisions.fields, decisions.get("allowed"))

        def surrogate() -> Float[Tensor, ""]:
            log_ratio = distribution.log_prob(params(), decisions["actions"]) - decisions["log_prob_old"]
            return -clipped_surrogate(log_ratio, advantages, **UNCLIPPED).mean()

        def kl() -> Float[Tensor, ""]:
            return distribution.kl(params_old, params()).mean()

        return natural_gradient_step(
            [p for p in actor.parameters() if p.requires_grad],
            surrogate=surrogate,
            kl=kl,
            max_kl=cfg.max_kl,
            damping=cfg.damping,
            cg_iterations=cfg.cg_iterations,
            backtracks=cfg.backtracks,
            shrink=cfg.shrink,
            accept_ratio=0.0,
        )

    def minibatches(self, batch: TrainBatch) -> Iterator[Decisions]:
        """All decisions of the rollout, dealt anew in every pass of the critic."""
        assert batch.returns is not None
        critic = self.model.critic
        critic.head.fit_support(batch.returns[batch.mask], layer=critic.network.last)
        decisions, order = Decisions.of(batch), self.random("minibatches")
        for _ in range(self.config.critic_epochs):
            yield from decisions.minibatches(self.config.minibatch_size, order)

    def fit_critic(self, minibatch: Decisions) -> Float[Tensor, ""]:
        """One optimizer step of the critic; returns its error before."""
        critic = self.model.critic
        error = critic.head.objective(critic(minibatch.fields), minibatch["returns"]).mean()
        error.backward()
        self.optimizer.take_step(progress=self.step / self.total)
        return error.detach()

    def optimizers(self) -> dict[str, Any]:
        return {"critic": self.optimizer}


def step_metrics(result: NaturalGradientResult) -> Metrics:
    """What a natural-gradient step did."""
    return {
        "policy/kl": float(result.kl),
        "policy/improvement": float(result.improvement),
        "policy/step_accepted": float(result.accepted),
        "policy/backtracks_count": float(result.backtracks),
        "optim/policy_grad_norm": float(result.grad_norm),
    }
