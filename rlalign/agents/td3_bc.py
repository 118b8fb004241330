"""TD3+BC's update: a deterministic policy climbs Q and is held to the recorded actions."""

import torch
from torch import Tensor

from rlalign.agents.config_offline import TD3BCConfig
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
from rlalign.config import ConfigError
from rlalign.functional.offline import td3_bc_objective
from rlalign.nn.policies import ActionDistribution, Gaussian
from rlalign.nn.value_heads import ValueHead


class TD3BCLearner(Learner):
    """TD3+BC (Fujimoto & Gu 2021, arXiv:2106.06860), on batches of [batch, observation_size] floats.

    The policy is the mode of a squashed Gaussian; its deviation has no part in it.

    Args:
        cfg: Its `rewards`, `dataset` and `normalize_observations` are the caller's business.
        observation_size: Numbers in an observation.
        distribution: A squashed `Gaussian`; batches give actions in its units, (-1, 1).
        generator: Decides the initial weights, and the noise on target actions from then on.

    Raises:
        ConfigError: Actions are not continuous and bounded.
    """

    def __init__(
        self, cfg: TD3BCConfig, observation_size: int, distribution: ActionDistribution, generator: torch.Generator
    ):
        if not isinstance(distribution, Gaussian) or not distribution.squash:
            raise ConfigError(
                "TD3+BC follows the slope of Q by a continuous, bounded action, so it needs a `Box` action space with "
                f"bounds and `network.squash: true`; got {type(distribution).__name__} actions. Use odice, iql or bc."
            )
        self.cfg, self.generator, nap = cfg, generator, cfg.normalize_and_project
        pair = observation_size + distribution.size
        with seeded(generator):
            q = Critics([Critic(pair, cfg.critic_network, ValueHead(cfg.value_head)) for _ in range(2)])
            policy = Policy(observation_size, distribution, cfg.network)
        # Frozen: nothing here depends on it, and it would otherwise be an unused weight.
        distribution.log_std.requires_grad_(False)
        self.q, self.policy = ready(q, cfg), ready(policy, cfg)
        self.target, self.slow_policy = slow_copy(self.q), slow_copy(self.policy)
        optimizers = {
            "q": AgentOptimizer(self.q, cfg.critic_optim, nap=nap),
            "policy": AgentOptimizer(self.policy, cfg.optim, nap=nap),
        }
        self.slow = [SlowCopy(self.target, self.q), SlowCopy(self.slow_policy, self.policy)]
        modules = {"policy": self.policy, "q": self.q, "target": self.target, "slow_policy": self.slow_policy}
        super().__init__(modules, optimizers)

    def act(self, policy: Policy, observations: Tensor) -> Tensor:
        """The action that `policy`, ours or the slow one, takes."""
        return policy.distribution.mode(policy(observations))

    def update(self, batch: Transitions, *, progress: float = 0.0) -> Metrics:
        """One step of Q; every `policy_delay` updates one of the policy and of both slow copies.

        Args:
            batch: Transitions drawn from the data.
            progress: Share of the training done, for schedules.
        """
        metrics = self._update_q(batch, progress)
        if self.optimizers["q"].updates % self.cfg.policy_delay == 0:
            metrics |= self._update_policy(batch, progress)
            for slow in self.slow:
                slow.follow(tau=self.cfg.target_tau)
        return metrics

    @torch.no_grad()
    def target_actions(self, observations: Tensor) -> Tensor:
        """The slow policy's actions with clipped noise, inside the bounds."""
        cfg, actions = self.cfg, self.act(self.slow_policy, observations)
        noise = torch.randn(actions.shape, generator=self.generator, device=self.generator.device).to(actions)
        return (actions + (cfg.policy_noise * noise).clamp(-cfg.noise_clip, cfg.noise_clip)).clamp(-1, 1)

    def _update_q(self, batch: Transitions, progress: float) -> Metrics:
        pairs = torch.cat([batch.observations, batch.actions], -1)
        following = torch.cat([batch.next_observations, self.target_actions(batch.next_observations)], -1)
        discounts = self.cfg.gamma * (~batch.terminated).to(batch.rewards)
        with torch.no_grad():
            targets = batch.rewards + discounts * self.target.smallest(following)
        for critics in (self.q, self.target):
            critics.fit_support(targets)
        if self.cfg.value_head.type == "c51":
            loss = self._distributional(pairs, following, batch.rewards, discounts).mean()
        else:
            loss = self.q.objective(pairs, targets).mean()
        norm = step(self.optimizers["q"], gradient(loss, self.optimizers["q"]), progress=progress)
        outside = self.q.first.head.outside_share(targets)
        return {
            "q/loss": loss.detach(),
            "q/target_mean": targets.mean(),
            "q/grad_norm": norm,
            "q/outside_frac": outside,
        }

    def _distributional(self, pairs: Tensor, following: Tensor, rewards: Tensor, discounts: Tensor) -> Tensor:
        """Cross-entropy to the distribution of whichever slow critic expects less in the next state."""
        with torch.no_grad():
            outputs = torch.stack([critic(following) for critic in self.target])
            lesser = self.target.values(following).argmin(0)
            head = self.target.first.head
            target = head.projected(
                outputs[lesser, torch.arange(len(lesser), device=lesser.device)], rewards, discounts
            )
        return torch.stack([critic.head.distribution_objective(critic(pairs), target) for critic in self.q])

    def _update_policy(self, batch: Transitions, progress: float) -> Metrics:
        actions = self.act(self.policy, batch.observations)
        q_values = self.q.first.values(torch.cat([batch.observations, actions], -1))
        loss = td3_bc_objective(q_values, actions, batch.actions, alpha=self.cfg.alpha).mean()
        # By the policy's weights alone: the critic is only passed through.
        norm = step(self.optimizers["policy"], gradient(loss, self.optimizers["policy"]), progress=progress)
        distance = (actions - batch.actions).detach().square().mean()
        return {
            "policy/loss": loss.detach(),
            "policy/grad_norm": norm,
            "policy/q_mean": q_values.detach().mean(),
            "policy/distance_squared": distance,
        }
