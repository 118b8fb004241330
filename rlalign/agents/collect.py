"""Play the environments with the current policy and write down what happened."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.agents.envs import Environments, EnvStep
from rlalign.agents.networks import Actor, prepare
from rlalign.agents.normalize import ObservationNormalizer
from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.training.seeding import generator


@dataclass(frozen=True, eq=False)
class Experience:
    """What the environments showed: rows are copies, columns are steps."""

    observations: dict[str, Tensor]
    """[B, T+1, ...] raw; column t+1 is what the policy saw after step t."""
    actions: Tensor
    rewards: Float[Tensor, "batch time"]
    """Raw."""
    mask: Bool[Tensor, "batch time"]
    terminated: Bool[Tensor, "batch time"]
    truncated: Bool[Tensor, "batch time"]
    final: dict[str, Tensor]
    """[K, ...] true next observations of the K truncated decisions where column t+1 shows another episode's."""
    final_at: Bool[Tensor, "batch time"]
    """Which decisions those are, in the order of `final`."""
    allowed: Bool[Tensor, "batch time actions"] | None

    def before(self) -> dict[str, Tensor]:
        """The observation each decision was made on."""
        return {name: value[:, :-1] for name, value in self.observations.items()}


class Collector:
    """Steps all copies together and carries their episodes on from one rollout to the next.

    Sampling noise is a function of (seed, iteration), so a rollout is one of the weights and the environments' states.
    """

    def __init__(
        self, environments: Environments, parts: ObservationParts, actions: ActionInterface, *, seed: int, device: str
    ):
        self.environments, self.parts, self.actions = environments, parts, actions
        self.seed, self.device = seed, torch.device(device)
        self.episodes = EpisodeStatistics(environments.num_envs)
        self.env_steps = 0
        """Decisions made, all copies together; restarts do not count."""

    @torch.no_grad()
    def collect(self, actor: Actor, normalizer: ObservationNormalizer, *, steps: int, iteration: int) -> Experience:
        """Let `actor` make `steps` decisions in every copy."""
        envs = self.environments
        if envs.observation is None:
            envs.reset()
        noise = actor.distribution.noise((steps, envs.num_envs), generator(self.seed, "actions", iteration))
        noise = noise.to(self.device)
        seen = self.parts.tensors(envs.observation)
        allowed = self.parts.allowed(envs.observation, envs.info)
        observations, masks, decisions, played = [seen], [allowed], [], []
        for step_noise in noise:
            params = actor(self._prepared(seen, normalizer), None if allowed is None else allowed.to(self.device))
            decision = actor.distribution.sample(params, step_noise).cpu()
            step = envs.step(self.actions.to_env(decision))
            seen = self.parts.tensors(step.observation)
            allowed = self.parts.allowed(step.observation, step.info)
            observations.append(seen)
            masks.append(allowed)
            decisions.append(decision)
            played.append(step)
        found = self._experience(observations, decisions, played, masks)
        self.env_steps += int(found.mask.sum())
        self.episodes.update(found.rewards.numpy(), found.mask.numpy(), (found.terminated | found.truncated).numpy())
        return found

    def _prepared(self, seen: dict[str, Tensor], normalizer: ObservationNormalizer) -> dict[str, Tensor]:
        prepared = prepare(self.parts, normalizer.apply(seen))
        return {name: value.to(self.device) for name, value in prepared.items()}

    def _experience(
        self,
        observations: list[dict[str, Tensor]],
        decisions: list[Tensor],
        played: list[EnvStep],
        masks: list[Tensor | None],
    ) -> Experience:
        def column(name: str, dtype: Any) -> Tensor:
            return torch.from_numpy(np.stack([vars(step)[name] for step in played], 1).astype(dtype, copy=False))

        terminated, truncated, real = column("terminated", bool), column("truncated", bool), column("real", bool)
        truncated = truncated & ~terminated
        final_at = torch.zeros_like(truncated)
        finals: list[dict[str, Tensor]] = []
        for time, step in enumerate(played):
            if step.next_observation is not step.observation and bool(truncated[:, time].any()):
                final_at[:, time] = truncated[:, time]
                shown = self.parts.tensors(step.next_observation)
                finals += [
                    {name: part[row] for name, part in shown.items()}
                    for row in truncated[:, time].nonzero().squeeze(1).tolist()
                ]
        # `final` is gathered step by step, but read row by row.
        order = final_at.t().nonzero()
        by_row = sorted(range(len(order)), key=lambda k: (int(order[k, 1]), int(order[k, 0])))
        return Experience(
            observations={n: torch.stack([o[n] for o in observations], 1) for n in observations[0]},
            actions=torch.stack(decisions, 1),
            rewards=column("rewards", np.float32),
            mask=real,
            terminated=terminated,
            truncated=truncated,
            final={n: torch.stack([finals[k][n] for k in by_row]) for n in finals[0]} if finals else {},
            final_at=final_at,
            allowed=stacked_masks(masks[:-1]),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "environments": self.environments.state_dict(),
            "episodes": self.episodes.state_dict(),
            "env_steps": self.env_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.environments.load_state_dict(state["environments"])
        self.episodes.load_state_dict(state["episodes"])
        self.env_steps = state["env_steps"]


class EpisodeStatistics:
    """Raw returns and lengths of the last episodes that ended in training."""

    def __init__(self, num_envs: int, *, window: int = 100):
        self.running_return, self.running_length = np.zeros(num_envs), np.zeros(num_envs, dtype=np.int64)
        self.returns: deque[float] = deque(maxlen=window)
        self.lengths: deque[int] = deque(maxlen=window)
        self.count = 0

    def update(self, rewards: np.ndarray, mask: np.ndarray, boundary: np.ndarray) -> None:
        """Take in a rollout [B, T], column by column."""
        for time in range(rewards.shape[1]):
            real = mask[:, time]
            self.running_return += np.where(real, rewards[:, time], 0.0)
            self.running_length += real
            ended = boundary[:, time] & real
            if ended.any():
                self.returns.extend(self.running_return[ended].tolist())
                self.lengths.extend(self.running_length[ended].tolist())
                self.count += int(ended.sum())
                self.running_return[ended], self.running_length[ended] = 0.0, 0

    def metrics(self) -> dict[str, float]:
        """Nothing before the first episode has ended."""
        if not self.returns:
            return {}
        return {
            "episode/return_mean": float(np.mean(self.returns)),
            "episode/length_mean": float(np.mean(self.lengths)),
            "episode/count": float(self.count),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "running_return": torch.from_numpy(self.running_return.copy()),
            "running_length": torch.from_numpy(self.running_length.copy()),
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "count": self.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.running_return = state["running_return"].numpy().copy()
        self.running_length = state["running_length"].numpy().copy()
        self.returns = deque(state["returns"], maxlen=self.returns.maxlen)
        self.lengths = deque(state["lengths"], maxlen=self.lengths.maxlen)
        self.count = state["count"]


def stacked_masks(masks: list[Tensor | None]) -> Tensor | None:
    """Masks of each step as [B, T, ...]; everything is allowed where a step names none."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return None
    everything = torch.ones_like(given[0])
    return torch.stack([everything if mask is None else mask for mask in masks], 1)
