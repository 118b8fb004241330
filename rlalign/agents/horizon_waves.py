"""Whole episodes of bounded length, one per copy, played by a policy of its own at each step."""

from typing import Any

import numpy as np
import torch

from rlalign.agents.collect import Experience
from rlalign.agents.envs import Environments
from rlalign.agents.hybrid_networks import StepActors
from rlalign.agents.networks import prepare
from rlalign.agents.normalize import ObservationNormalizer
from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.agents.waves import whole_episodes
from rlalign.config import ConfigError
from rlalign.training.seeding import derived_seed, generator


class HorizonCollector:
    """Plays one episode in every copy from its start, so that column t of all rows is step t of an episode.

    Nothing is carried over between waves: a wave is a function of (seed, iteration) and the weights.
    """

    def __init__(
        self,
        environments: Environments,
        parts: ObservationParts,
        actions: ActionInterface,
        *,
        horizon: int,
        seed: int,
        device: str,
    ):
        self.environments, self.parts, self.actions = environments, parts, actions
        self.horizon, self.seed, self.device = horizon, seed, torch.device(device)
        self.env_steps, self.episodes = 0, 0

    @torch.no_grad()
    def collect(self, policy: StepActors, normalizer: ObservationNormalizer, *, iteration: int) -> Experience:
        """Play every copy's episode to its end; column t + 1 of the observations is the true one after step t.

        Raises:
            ConfigError: An episode goes on beyond the horizon.
        """
        envs = self.environments
        running = np.ones(envs.num_envs, dtype=bool)
        noise = policy.distribution.noise((self.horizon, envs.num_envs), generator(self.seed, "actions", iteration))
        noise = noise.to(self.device)
        observation = self._start(iteration)
        seen, allowed = [self.parts.tensors(observation)], []
        decisions, played, masks = [], [], []
        for step in range(self.horizon):
            prepared = prepare(self.parts, normalizer.apply(seen[-1]))
            mask = self.parts.allowed(observation, envs.info)
            params = policy.at(
                step,
                {name: value.to(self.device) for name, value in prepared.items()},
                None if mask is None else mask.to(self.device),
            )
            decision = policy.distribution.sample(params, noise[step]).cpu()
            result = envs.step(self.actions.to_env(decision))
            observation = result.observation
            decisions.append(decision)
            allowed.append(mask)
            played.append(result)
            masks.append(running.copy())
            running &= ~(result.terminated | result.truncated)
            seen.append(self.parts.tensors(result.next_observation))
        if running.any():
            raise ConfigError(
                f"`horizon`={self.horizon}, but {int(running.sum())} of {len(running)} episodes went on; set it to the "
                "length of the longest episode, or cut episodes with `env.max_episode_steps`."
            )
        found = whole_episodes(seen, allowed, decisions, played, np.stack(masks, 1))
        self.env_steps += int(found.mask.sum())
        self.episodes += len(running)
        return found

    def _start(self, iteration: int) -> Any:
        """A seed for each copy, where copies take one each; a native vector form draws all starts from one."""
        envs = self.environments
        if not envs.own:
            return envs.reset(seeds=derived_seed(self.seed, "start", iteration) % 2**31)
        rows = range(envs.num_envs)
        return envs.reset(seeds=[derived_seed(self.seed, "start", iteration, row) % 2**31 for row in rows])

    def state_dict(self) -> dict[str, Any]:
        return {"env_steps": self.env_steps, "episodes": self.episodes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.env_steps, self.episodes = state["env_steps"], state["episodes"]
