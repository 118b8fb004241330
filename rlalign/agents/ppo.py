"""Proximal policy optimization."""

from collections.abc import Callable, Iterator, Mapping
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
    """Clipped surrogate on rollouts of the current policy, several passes each (Schulman 2017, arXiv:1707.06347).

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
        self.optimizer = AgentOptimizer(self.model.networks, cfg.optim, nap=cfg.normalize_and_project)
        self.compiled = self._compiled() if cfg.compile else None
        self.measures = UpdateMetrics(cfg)

    def iterate(self) -> Metrics:
        self.buffer.add(self.collect())
        batch = self.estimator(self.buffer.drain())
        with self.clock_watch("train"):
            for minibatch in self.minibatches(batch):
                if not self.update(minibatch):
                    break
        return self.measures.finish(self.model, self.optimizer) | rollout_metrics(self, batch)

    def minibatches(self, batch: TrainBatch) -> Iterator[Decisions]:
        """All decisions of the rollout, dealt anew in every pass."""
        assert batch.returns is not None
        critic = self.model.critic
        critic.head.fit_support(batch.returns[batch.mask], layer=critic.network.last)
        decisions = Decisions.of(batch)
        if self.config.normalize_advantages == "batch":
            decisions = decisions.replaced(advantages=normalized(decisions["advantages"]))
        order = self.random("minibatches")
        for _ in range(self.config.update_epochs):
            yield from decisions.minibatches(self.config.minibatch_size, order)

    def update(self, minibatch: Decisions) -> bool:
        """One optimizer step; False, and none, where the policy has moved too far already (`target_kl`)."""
        norm = None
        if self.compiled is not None and len(minibatch) == self.config.minibatch_size:
            norm, scored = self.compiled(minibatch.fields)
        else:
            loss, scored = self.loss(self.model.networks(minibatch.fields), minibatch.fields)
            loss.backward()
        self.measures.scored(*(tensor.detach() for tensor in scored))
        if self.measures.moved_too_far:
            self.optimizer.flat.clear()
            return False
        self.measures.grad_norms.append(self.optimizer.take_step(progress=self.step / self.total, clipped_from=norm))
        return True

    def loss(
        self, outputs: tuple[Tensor, Tensor], minibatch: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, ""], tuple[Tensor, ...]]:
        """Surrogate and value error, less an entropy bonus; and what the metrics want of the way there."""
        cfg, distribution, (params, value_outputs) = self.config, self.model.actor.distribution, outputs
        log_ratio = distribution.log_prob(params, minibatch["actions"]) - minibatch["log_prob_old"]
        advantages = minibatch["advantages"]
        if cfg.normalize_advantages == "minibatch":
            advantages = normalized(advantages)
        value_error = self.model.critic.head.objective(
            value_outputs,
            minibatch["returns"],
            values_old=minibatch["values"] if cfg.value_clip is not None else None,
            clip=cfg.value_clip,
        )
        surrogate = clipped_surrogate(log_ratio, advantages, clip_low=cfg.clip_low, clip_high=cfg.clip_high)
        objective = surrogate + cfg.value_coef * value_error
        if cfg.entropy_coef:
            objective = objective - cfg.entropy_coef * distribution.entropy(params)
        # Every decision here is real, so this mean is the `token` aggregation.
        return (objective * minibatch["weights"]).mean(), (log_ratio, advantages, value_error, params)

    def _compiled(self) -> Callable[[dict[str, Tensor]], tuple[Tensor, tuple[Tensor, ...]]]:
        from rlalign.agents.compiled import CompiledGradient  # seconds of import that only this needs

        limit = self.config.optim.max_grad_norm
        return CompiledGradient(self.model.networks, self.loss, self.optimizer.flat, max_grad_norm=limit)

    def optimizers(self) -> dict[str, Any]:
        return {"all": self.optimizer}
