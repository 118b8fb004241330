"""What an on-policy iteration says about itself: gathered without arithmetic, worked out once at its end."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.agents.actor_critic import ActorCritic
from rlalign.agents.config import PPOConfig
from rlalign.agents.optimizer import AgentOptimizer
from rlalign.buffers import TrainBatch
from rlalign.functional.divergence import kl_k3
from rlalign.functional.masked import masked_mean, masked_var
from rlalign.functional.policy import clip_fractions

if TYPE_CHECKING:
    from rlalign.agents.on_policy import OnPolicyAgent


class UpdateMetrics:
    """Keeps what an iteration's minibatches computed anyway, and turns it into metrics."""

    def __init__(self, cfg: PPOConfig):
        self.cfg = cfg
        self.clear()

    def clear(self) -> None:
        self.log_ratios: list[Tensor] = []
        self.advantages: list[Tensor] = []
        self.value_errors: list[Tensor] = []
        self.params: list[Tensor] = []
        self.grad_norms: list[Tensor] = []

    def scored(self, log_ratio: Tensor, advantages: Tensor, value_error: Tensor, params: Tensor) -> None:
        self.log_ratios.append(log_ratio)
        self.advantages.append(advantages)
        self.value_errors.append(value_error)
        self.params.append(params)

    @property
    def moved_too_far(self) -> bool:
        """The last minibatch found the policy beyond 1.5 `target_kl` from the one that collected."""
        limit = self.cfg.target_kl
        return limit is not None and float(kl_from_ratio(self.log_ratios[-1]).mean()) > 1.5 * limit

    def finish(self, model: ActorCritic, optimizer: AgentOptimizer) -> dict[str, float]:
        """Metrics of the iteration; ratios, clips and entropy are those of the last pass. Forgets everything."""
        last = slice(-max(1, len(self.log_ratios) // self.cfg.update_epochs), None)
        log_ratio, advantages = torch.cat(self.log_ratios[last])[None], torch.cat(self.advantages[last])[None]
        low, high = clip_fractions(
            log_ratio,
            advantages,
            torch.ones_like(log_ratio, dtype=torch.bool),
            clip_low=self.cfg.clip_low,
            clip_high=self.cfg.clip_high,
        )
        entropy = model.actor.distribution.entropy(torch.cat(self.params[last]))
        metrics = {
            "policy/kl": float(kl_from_ratio(log_ratio).mean()),
            "policy/ratio_max": float(log_ratio.max().exp()),
            "policy/clip_low_frac": float(low),
            "policy/clip_high_frac": float(high),
            "policy/entropy_nats": float(entropy.mean()),
            "value/error": float(torch.cat(self.value_errors).mean()),
            "optim/grad_norm": float(torch.stack(self.grad_norms).mean()),
        }
        self.clear()
        return metrics | optimizer.metrics()


def rollout_metrics(agent: "OnPolicyAgent", batch: TrainBatch) -> dict[str, float]:
    """How the collected episodes went, and how much of their returns the critic foresaw."""
    assert batch.returns is not None
    assert batch.values is not None
    spread = masked_var(batch.returns, batch.mask)
    unexplained = masked_var(batch.returns - batch.values, batch.mask)
    value = {
        "value/explained_variance": float(1 - unexplained / spread) if float(spread) > 0 else 0.0,
        "value/return_mean": float(masked_mean(batch.returns, batch.mask)),
    }
    head = agent.model.critic.head.metrics(batch.returns[batch.mask])
    return agent.collector.episodes.metrics() | agent.estimator.metrics | value | head


def kl_from_ratio(log_ratio: Tensor) -> Tensor:
    """Estimate KL(old || new) of each decision that the old policy made."""
    return kl_k3(torch.zeros_like(log_ratio), log_ratio)
