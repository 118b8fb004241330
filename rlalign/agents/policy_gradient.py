"""A critic-free policy gradient on groups of whole episodes: GRPO, RLOO, BNPO and their like, for agents."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.advantages import build_estimator
from rlalign.agents.agent import Agent, Metrics
from rlalign.agents.config import GroupConfig
from rlalign.agents.envs import Array
from rlalign.agents.networks import Actor, normalized, prepare
from rlalign.agents.normalize import ObservationNormalizer
from rlalign.agents.on_policy_metrics import kl_from_ratio
from rlalign.agents.optimizer import AgentOptimizer
from rlalign.agents.spaces import ActionInterface, Observation, ObservationParts
from rlalign.agents.waves import WaveCollector
from rlalign.buffers import Input, Rollout, RolloutBuffer, TrainBatch
from rlalign.config import ConfigError
from rlalign.functional.masked import aggregate, masked_mean
from rlalign.functional.policy import clip_fractions, clipped_surrogate


class PolicyGradientAgent(Agent):
    """Compare episodes from the same start with each other, with any estimator the language models use.

    Example:
        ```python
        agent = PolicyGradientAgent("CartPole-v1", advantage="leave_one_out", num_envs=32)
        agent.fit(total_env_steps=100_000)
        ```
    """

    config_class = GroupConfig
    config: GroupConfig

    def build(self) -> None:
        cfg = self.config
        assert self.environments is not None
        if not self.environments.own:
            raise ConfigError(
                "groups of episodes from equal starts need copies that can be seeded one by one: name the environment "
                "by `env.id`, with `env.vectorization` sync or async."
            )
        self.device = torch.device(cfg.device)
        self.parts = ObservationParts(self.environments.observation_space)
        self.actions = ActionInterface(
            self.environments.action_space, squash=cfg.network.squash, log_std=cfg.network.log_std
        )
        actor = normalized(Actor(self.parts, self.actions, cfg.network), cfg.normalize_and_project)
        assert isinstance(actor, Actor)
        self.actor = actor.to(self.device)
        self.observations = ObservationNormalizer(self.parts, cfg.normalize)
        self.optimizer = AgentOptimizer(self.actor, cfg.optim, nap=cfg.normalize_and_project)
        self.collector = WaveCollector(
            self.environments, self.parts, self.actions, group_size=cfg.group_size, seed=cfg.seed, device=cfg.device
        )
        self.estimator, self.buffer = build_estimator(cfg.advantage), RolloutBuffer()
        self.last: tuple[Tensor, TrainBatch] | None = None
        """Log-ratios of this iteration's last minibatch, and the minibatch."""

    def iterate(self) -> Metrics:
        self.last = None
        self.buffer.add(self.collect())
        batch = self.estimator(self.buffer.drain())
        with self.clock_watch("train"):
            for minibatch in self.minibatches(batch):
                self.update(minibatch)
        return self.metrics(batch)

    def collect(self) -> Rollout:
        """Play a wave of episodes; the outcome of a row is its return, or whether that reached the threshold."""
        with self.clock_watch("collect"), torch.no_grad():
            found = self.collector.collect(self.actor, self.observations, iteration=self.iteration)
            self.step, cfg = self.collector.env_steps, self.config
            before = self.prepared(found.before())
            allowed = {} if found.allowed is None else {"allowed": found.allowed.to(self.device)}
            actions = found.actions.to(self.device)
            params = self.actor(before, allowed.get("allowed"))
            self.returns, rewards = found.rewards.sum(1), found.rewards
            if cfg.success_threshold is not None:
                reached = (self.returns >= cfg.success_threshold).to(rewards)
                last = found.mask.sum(1, keepdim=True) - 1
                rewards = torch.zeros_like(rewards).scatter(1, last, reached[:, None])
            rows = len(rewards)
            group = torch.arange(rows) // cfg.group_size + self.iteration * (rows // cfg.group_size)
            self.observations.update(found.before(), found.mask)
            return Rollout(
                log_prob_old=self.actor.distribution.log_prob(params, actions),
                rewards=rewards.to(self.device),
                mask=found.mask.to(self.device),
                terminated=found.terminated.to(self.device),
                truncated=found.truncated.to(self.device),
                group=group.to(self.device),
                prompt_id=group.to(self.device),
                scored=torch.ones(rows, dtype=torch.bool, device=self.device),
                inputs={
                    name: Input(value=value, axis="per_decision")
                    for name, value in {**before, **allowed, "actions": actions}.items()
                },
            )

    def minibatches(self, batch: TrainBatch) -> Iterator[TrainBatch]:
        """Whole groups with signal, dealt anew in every pass."""
        learnable = batch.select((batch.advantages != 0).any(1)) if not self.config.entropy_coef else batch
        order = self.random("minibatches")
        for _ in range(self.config.update_epochs if learnable.batch_size else 0):
            size = max(1, -(-learnable.batch_size // self.config.minibatches))
            yield from learnable.minibatches(size, order, keep_groups=True)

    def update(self, batch: TrainBatch) -> None:
        """One optimizer step."""
        objective, log_ratio = self.objective(batch)
        loss = aggregate(objective, batch.mask, weights=batch.weights, mode=self.config.aggregation, group=batch.group)
        loss.backward()
        self.grad_norm = self.optimizer.take_step(progress=self.step / self.total)
        self.last = (log_ratio.detach(), batch)

    def objective(self, batch: TrainBatch) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
        """What every decision wants minimised, and its log-ratio; forward passes skip what is masked."""
        cfg, mask, distribution = self.config, batch.mask, self.actor.distribution
        given = {name: entry.value[mask] for name, entry in batch.inputs.items()}
        params = self.actor(given, given.get("allowed"))
        blank = torch.zeros_like(batch.log_prob_old)
        log_prob = blank.masked_scatter(mask, distribution.log_prob(params, given["actions"]))
        log_ratio = torch.where(mask, log_prob - batch.log_prob_old, 0.0)
        objective = clipped_surrogate(log_ratio, batch.advantages, clip_low=cfg.clip_low, clip_high=cfg.clip_high)
        if cfg.entropy_coef:
            objective = objective - cfg.entropy_coef * blank.masked_scatter(mask, distribution.entropy(params))
        return objective, log_ratio

    def metrics(self, batch: TrainBatch) -> Metrics:
        found = {
            "episode/return_mean": float(self.returns.mean()),
            "episode/length_mean": float(batch.lengths.float().mean()),
            "episode/count": float(self.collector.episodes),
            "reward/mean": float(batch.outcome.mean()),
            "signal/group_frac": float((batch.advantages != 0).any(1).float().mean()),
            **self.optimizer.metrics(),
            **self.estimator.metrics,
        }
        if self.last is not None:
            log_ratio, last = self.last
            clips = {"clip_low": self.config.clip_low, "clip_high": self.config.clip_high}
            low, high = clip_fractions(log_ratio, last.advantages, last.mask, **clips)
            found |= {
                "policy/kl": float(masked_mean(kl_from_ratio(log_ratio), last.mask)),
                "policy/clip_low_frac": float(low),
                "policy/clip_high_frac": float(high),
                "optim/grad_norm": float(self.grad_norm),
            }
        return found

    def decide(
        self, observation: Observation, info: Mapping[str, Any], *, random: torch.Generator | None
    ) -> tuple[Array, dict[str, Array]]:
        with torch.no_grad():
            allowed = self.parts.allowed(observation, info)
            seen = self.prepared(self.parts.tensors(observation))
            params = self.actor(seen, None if allowed is None else allowed.to(self.device))
            distribution = self.actor.distribution
            if random is None:
                decisions = distribution.mode(params)
            else:
                decisions = distribution.sample(params, distribution.noise(params.shape[:-1], random).to(self.device))
            log_prob = distribution.log_prob(params, decisions)
        return self.actions.to_env(decisions.cpu()), {"log_prob": log_prob.cpu().numpy()}

    def prepared(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        prepared = prepare(self.parts, self.observations.apply(observation))
        return {name: value.to(self.device) for name, value in prepared.items()}

    def learned(self) -> dict[str, Any]:
        return {"networks": self.actor.state_dict(), "observations": self.observations.state_dict()}

    def load_learned(self, state: Mapping[str, Any]) -> None:
        self.actor.load_state_dict(state["networks"])
        self.observations.load_state_dict(state["observations"])

    def optimizers(self) -> dict[str, Any]:
        return {"policy": self.optimizer}

    def progress(self) -> dict[str, Any]:
        return {"collector": self.collector, "buffer": self.buffer, "estimator": self.estimator}
