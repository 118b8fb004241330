"""What on-policy agents are made of: policy, critic, statistics, and a rollout with values made from experience."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlalign.agents.collect import Experience
from rlalign.agents.config import OnPolicyConfig
from rlalign.agents.envs import Array, Environments
from rlalign.agents.networks import Actor, Critic, normalized, prepare
from rlalign.agents.normalize import ObservationNormalizer, RewardNormalizer
from rlalign.agents.spaces import ActionInterface, Observation, ObservationParts
from rlalign.buffers import Input, Rollout
from rlalign.nn.value_heads import ValueHead

ROWS_AT_ONCE = 8192
"""Decisions per forward pass outside of training; bounds memory, not the result."""


class Networks(torch.nn.Module):
    """Policy and critic together, so that one call (and one gradient) covers both."""

    def __init__(self, actor: torch.nn.Module, critic: torch.nn.Module):
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Parameters of the action distribution, and outputs of the value head."""
        return self.actor(fields, fields.get("allowed")), self.critic(fields)


class ActorCritic:
    """A policy and a critic over one environment's spaces, and the running statistics they see through."""

    def __init__(self, environments: Environments, cfg: OnPolicyConfig, *, gamma: float):
        self.cfg, self.device = cfg, torch.device(cfg.device)
        self.parts = ObservationParts(environments.observation_space)
        self.actions = ActionInterface(
            environments.action_space, squash=cfg.network.squash, log_std=cfg.network.log_std
        )
        head, nap = ValueHead(cfg.value_head), cfg.normalize_and_project
        self.actor = normalized(Actor(self.parts, self.actions, cfg.network), nap).to(self.device)
        self.critic = normalized(Critic(self.parts, head, cfg.network), nap).to(self.device)
        self.networks = Networks(self.actor, self.critic)
        self.observations = ObservationNormalizer(self.parts, cfg.normalize)
        self.rewards = RewardNormalizer(cfg.normalize, gamma=gamma, num_envs=environments.num_envs)

    @torch.no_grad()
    def rollout(self, found: Experience, *, first_group: int) -> Rollout:
        """Add to experience what the networks say about it: log-probabilities, values, values of true next states."""
        batch = found.mask.shape[0]
        seen = self.prepared(found.observations)
        before = {name: value[:, :-1] for name, value in seen.items()}
        allowed = None if found.allowed is None else found.allowed.to(self.device)
        actions = found.actions.to(self.device)
        params = _by_rows(lambda rows, mask: self.actor(rows, mask), before, allowed)
        values = _by_rows(lambda rows, _: self.critic.values(rows), seen, None)
        next_values = values[:, 1:].clone()
        if found.final:
            next_values[found.final_at.to(self.device)] = self.critic.values(self.prepared(found.final))
        inputs = {**before, "actions": actions, "params_old": params}
        inputs |= {} if allowed is None else {"allowed": allowed}
        boundary = found.terminated | found.truncated
        rollout = Rollout(
            log_prob_old=self.actor.distribution.log_prob(params, actions),
            rewards=self.rewards(found.rewards, boundary, found.mask).to(self.device),
            mask=found.mask.to(self.device),
            terminated=found.terminated.to(self.device),
            truncated=found.truncated.to(self.device),
            group=torch.arange(first_group, first_group + batch, device=self.device),
            prompt_id=torch.arange(batch, device=self.device),
            scored=torch.ones(batch, dtype=torch.bool, device=self.device),
            values=values[:, :-1].contiguous(),
            next_values=next_values,
            inputs={name: Input(value=value, axis="per_decision") for name, value in inputs.items()},
        )
        self.observations.update(found.before(), found.mask)
        return rollout

    @torch.no_grad()
    def decide(
        self,
        observation: Observation,
        info: Mapping[str, Any],
        *,
        random: torch.Generator | None,
    ) -> tuple[Array, dict[str, Array]]:
        """Actions for a batch of observations, their log-probabilities, and the states' values."""
        seen = self.prepared(self.parts.tensors(observation))
        allowed = self.parts.allowed(observation, info)
        params = self.actor(seen, None if allowed is None else allowed.to(self.device))
        distribution = self.actor.distribution
        if random is None:
            decisions = distribution.mode(params)
        else:
            decisions = distribution.sample(params, distribution.noise(params.shape[:-1], random).to(self.device))
        about = {"log_prob": distribution.log_prob(params, decisions), "value": self.critic.values(seen)}
        return self.actions.to_env(decisions.cpu()), {name: value.cpu().numpy() for name, value in about.items()}

    def prepared(self, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalised with the statistics as they are, on the device, as networks take it."""
        prepared = prepare(self.parts, self.observations.apply(observation))
        return {name: value.to(self.device) for name, value in prepared.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": self.networks.state_dict(),
            "observations": self.observations.state_dict(),
            "rewards": self.rewards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.observations.load_state_dict(state["observations"])
        self.rewards.load_state_dict(state["rewards"])


def _by_rows(
    forward: Callable[[dict[str, Tensor], Tensor | None], Tensor], seen: Mapping[str, Tensor], mask: Tensor | None
) -> Tensor:
    """Apply a network to [B, T, ...] in pieces of `ROWS_AT_ONCE` rows."""
    shape = next(iter(seen.values())).shape[:2]
    flat = {name: value.flatten(0, 1).split(ROWS_AT_ONCE) for name, value in seen.items()}
    masks = None if mask is None else mask.flatten(0, 1).split(ROWS_AT_ONCE)
    pieces = range(len(next(iter(flat.values()))))
    outputs = [forward({n: v[k] for n, v in flat.items()}, None if masks is None else masks[k]) for k in pieces]
    return torch.cat(outputs).unflatten(0, shape)
