"""Proximal policy optimization."""

from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rlalign.agents.agent import Metrics
from rlalign.agents.config import PPOConfig
from rlalign.agents.on_policy import OnPolicyAgent, normalized
from rlalign.agents.on_policy_metrics import UpdateMetrics, rollout_metrics
from rlalign.agents.optimizer import AgentOptimizer
from rlalign.buffers import TrainBatch
from rlalign.buffers.decisions import Decisions
from rlalign.functional.policy import clipped_surrogate


class PPO(OnPolicyAgent):
    """Clipped surrogate on rollouts of the current policy, several passes each (Schulman et al. 2017, arXiv:1707.06347).

    Example:
        ```python
        agent = PPO("CartPole-v1", value_head="hl_gauss", normalize_and_project=True, seed=0)
        agent.fit(total_env_steps=100_000)
        agent.evaluate(episodes=20)
        ```
    """

    config_class = PPOConfig
    config: PPOConfig

    def build(self) -> None:
        super().build()
        cfg = self.config
        self.optimizer = AgentOptimizer(self.model.modules, cfg.optim, nap=cfg.normalize_and_project)
        self.measures = UpdateMetrics(cfg)

    def iterate(self) -> Metrics:
        self.buffer.add(self.collect())
        batch = self.estimator(self.buffer.drain())
        with self.clock_watch("train"):
            for minibatch in self.minibatches(batch):
                self.update(minibatch)
                if self.measures.moved_too_far:
                    break
        return self.measures.finish(self.model, self.optimizer) | rollout_metrics(self, batch)

    def minibatches(self, batch: TrainBatch) -> Iterator[Decisions]:
        """All decisions of the rollout, dealt anew in every pass."""
        assert batch.returns is not None
        self.model.critic.head.fit_support(batch.returns[batch.mask])
        decisions = Decisions.of(batch)
        if self.config.normalize_advantages == "batch":
            decisions = decisions.replaced(advantages=normalized(decisions["advantages"]))
        order = self.random("minibatches")
        for _ in range(self.config.update_epochs):
            yield from decisions.minibatches(self.config.minibatch_size, order)

    def update(self, minibatch: Decisions) -> None:
        """One optimizer step."""
        # Every decision here is real, so this mean is the `token` aggregation.
        (self.objective(minibatch) * minibatch["weights"]).mean().backward()
        self.measures.grad_norms.append(self.optimizer.take_step(progress=self.step / self.total))

    def objective(self, minibatch: Decisions) -> Float[Tensor, " decisions"]:
        """What every decision wants minimised: surrogate and value error, less an entropy bonus."""
        cfg, actor, critic = self.config, self.model.actor, self.model.critic
        params = actor(minibatch.fields, minibatch.get("allowed"))
        log_ratio = actor.distribution.log_prob(params, minibatch["actions"]) - minibatch["log_prob_old"]
        advantages = minibatch["advantages"]
        if cfg.normalize_advantages == "minibatch":
            advantages = normalized(advantages)
        surrogate = clipped_surrogate(log_ratio, advantages, clip_low=cfg.clip_low, clip_high=cfg.clip_high)
        value_error = critic.head.objective(
            critic(minibatch.fields),
            minibatch["returns"],
            values_old=minibatch["values"] if cfg.value_clip is not None else None,
            clip=cfg.value_clip,
        )
        objective = surrogate + cfg.value_coef * value_error
        if cfg.entropy_coef:
            objective = objective - cfg.entropy_coef * actor.distribution.entropy(params)
        self.measures.scored(log_ratio.detach(), advantages, value_error.detach(), params.detach())
        return objective

    def optimizers(self) -> dict[str, Any]:
        return {"all": self.optimizer}
