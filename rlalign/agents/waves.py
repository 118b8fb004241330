"""Whole episodes from repeated starts, one per row: what the group estimators compare."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlalign.agents.collect import Experience, stacked_masks
from rlalign.agents.envs import Environments, EnvStep, require_end
from rlalign.agents.networks import Actor, prepare
from rlalign.agents.normalize import ObservationNormalizer
from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.training.seeding import derived_seed, generator

NOISE_STEPS = 256
"""Steps whose sampling noise is drawn at once."""


class WaveCollector:
    """Plays one episode in every copy, all copies of a group from the same start.

    Nothing is carried over between waves, so a wave is a function of (seed, iteration) and the weights.
    """

    def __init__(
        self,
        environments: Environments,
        parts: ObservationParts,
        actions: ActionInterface,
        *,
        group_size: int,
        seed: int,
        device: str,
    ):
        self.environments, self.parts, self.actions = environments, parts, actions
        self.group_size, self.seed, self.device = group_size, seed, torch.device(device)
        self.env_steps, self.episodes = 0, 0

    @torch.no_grad()
    def collect(self, actor: Actor, normalizer: ObservationNormalizer, *, iteration: int) -> Experience:
        """Play until every copy's episode has ended."""
        envs, rows = self.environments, self.environments.num_envs
        starts = [derived_seed(self.seed, "start", iteration, row // self.group_size) % 2**31 for row in range(rows)]
        observation = envs.reset(seeds=starts)
        random = generator(self.seed, "actions", iteration)
        running = np.ones(rows, dtype=bool)
        seen, allowed = [self.parts.tensors(observation)], [self.parts.allowed(observation, envs.info)]
        decisions, played, masks = [], [], []
        noise = torch.empty(0)
        while running.any():
            require_end(len(played), envs.name)
            if len(played) % NOISE_STEPS == 0:
                noise = actor.distribution.noise((NOISE_STEPS, rows), random)
            prepared = prepare(self.parts, normalizer.apply(seen[-1]))
            mask = None if allowed[-1] is None else allowed[-1].to(self.device)
            params = actor({name: value.to(self.device) for name, value in prepared.items()}, mask)
            decision = actor.distribution.sample(params, noise[len(played) % NOISE_STEPS].to(self.device)).cpu()
            step = envs.step(self.actions.to_env(decision))
            decisions.append(decision)
            played.append(step)
            masks.append(running.copy())
            running &= ~(step.terminated | step.truncated)
            seen.append(self.parts.tensors(step.observation))
            allowed.append(self.parts.allowed(step.observation, step.info))
        found = whole_episodes(seen, allowed[:-1], decisions, played, np.stack(masks, 1))
        self.env_steps += int(found.mask.sum())
        self.episodes += rows
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"env_steps": self.env_steps, "episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env_steps, self.episodes = state["env_steps"], state["episodes"]


def whole_episodes(
    seen: list[dict[str, Tensor]],
    allowed: list[Tensor | None],
    decisions: list[Tensor],
    played: list[EnvStep],
    mask: np.ndarray,
) -> Experience:
    """Experience of one episode per row; what the copies did after its end is not part of it.

    Args:
        seen: What stands before each decision, and after the last.
        allowed: Which actions each decision could choose.
        mask: [rows, decisions] True until a row's episode has ended.
    """

    def column(name: str) -> Tensor:
        return torch.from_numpy(np.where(mask, np.stack([vars(step)[name] for step in played], 1), 0))

    terminated = column("terminated").bool()
    return Experience(
        observations={name: torch.stack([one[name] for one in seen], 1) for name in seen[0]},
        actions=torch.stack(decisions, 1),
        rewards=column("rewards").float(),
        mask=torch.from_numpy(mask),
        terminated=terminated,
        truncated=column("truncated").bool() & ~terminated,
        final={},
        final_at=torch.zeros_like(terminated),
        allowed=stacked_masks(allowed),
    )
