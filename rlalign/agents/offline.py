"""Agents that learn from recorded transitions alone: O-DICE, and behaviour cloning, IQL and TD3+BC beside it."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch

from rlalign.agents.agent import Agent, Metrics
from rlalign.agents.bc import BCLearner
from rlalign.agents.config import NormalizeConfig
from rlalign.agents.config_offline import BCConfig, CriticConfig, IQLConfig, ODICEConfig, OfflineConfig, TD3BCConfig
from rlalign.agents.dataset_parts import DatasetError, OfflineDataset
from rlalign.agents.datasets import load_dataset, scaled_rewards
from rlalign.agents.envs import Array
from rlalign.agents.iql import IQLLearner
from rlalign.agents.networks import VECTOR, prepare
from rlalign.agents.normalize import ObservationNormalizer
from rlalign.agents.odice import ODICELearner
from rlalign.agents.offline_parts import Learner
from rlalign.agents.spaces import PLAIN, ActionInterface, Observation, ObservationParts
from rlalign.agents.td3_bc import TD3BCLearner
from rlalign.buffers.transitions import TransitionBuffer, Transitions
from rlalign.config import ConfigError
from rlalign.training.seeding import derived_seed, generator

UPDATES_PER_RECORD = 100
"""Updates between two records of the metrics, and between two looks at signals and checkpoints."""


class OfflineAgent(Agent):
    """Draws batches from the data and hands them to a learner. An environment only serves evaluation.

    Args:
        dataset: A `.npz` file, a folder of them, a shipped set (`rlalign_envs:pendulum_mixed`), the id of a Minari
            dataset on this machine, or `Transitions`.
    """

    config: OfflineConfig
    needs_env = False
    learner_class: ClassVar[type[Learner]]

    def build(self) -> None:
        cfg = self.config
        self.data = self._load()
        self.spaces = self._spaces()
        self.parts = ObservationParts(self.spaces[0])
        if self.parts.images or self.parts.composed:
            raise ConfigError("offline agents take plain observations, no images and no Dict; flatten them first.")
        self.actions = ActionInterface(
            self.spaces[1], squash=cfg.network.squash, scale=True, log_std=cfg.network.log_std
        )
        self.observations = ObservationNormalizer(self.parts, NormalizeConfig(observations=cfg.normalize_observations))
        self.noise = generator(cfg.seed, "weights")
        make: Any = self.learner_class  # each takes its own config
        self.learner = make(cfg, self.parts.vector_size, self.actions.distribution, self.noise)
        self.learner.modules.to(cfg.device)
        self.buffer = TransitionBuffer(None if self.data is None else self._prepared_data(self.data))

    def steps(
        self, *, total_env_steps: int | None = None, total_updates: int | None = None, resume: bool = False
    ) -> Iterator[Metrics]:
        if self.data is None:
            raise ConfigError(f"{type(self).__name__} learns from recorded data: set `dataset`, or pass `dataset=`.")
        yield from super().steps(total_env_steps=total_env_steps, total_updates=total_updates, resume=resume)

    def iterate(self) -> Metrics:
        """Some updates; the metrics are those of the last."""
        cfg, metrics = self.config, {}
        batches = self.random("batches")
        self.noise.manual_seed(derived_seed(cfg.seed, "noise", self.iteration))
        with self.clock_watch("train"):
            for _ in range(min(UPDATES_PER_RECORD, self.total - self.step)):
                batch = self.buffer.sample(cfg.batch_size, batches).to(cfg.device)
                metrics = self.learner.update(batch, progress=self.step / self.total)
                self.step += 1
        return {name: float(value) for name, value in metrics.items()} | {"optim/updates": float(self.step)}

    def decide(
        self, observation: Observation, info: Mapping[str, Any], *, random: torch.Generator | None
    ) -> tuple[Array, dict[str, Array]]:
        policy, distribution = self.learner.policy, self.actions.distribution
        with torch.no_grad():
            seen = prepare(self.parts, self.observations.apply(self.parts.tensors(observation)))[VECTOR]
            params = policy(seen.to(self.config.device))
            if random is None:
                decisions = distribution.mode(params)
            else:
                noise = distribution.noise(params.shape[:-1], random).to(params.device)
                decisions = distribution.sample(params, noise)
            log_prob = distribution.log_prob(params, decisions)
        return self.actions.to_env(decisions.cpu()), {"log_prob": log_prob.cpu().numpy()}

    def learned(self) -> dict[str, Any]:
        return {"networks": self.learner.modules.state_dict(), "observations": self.observations.state_dict()}

    def load_learned(self, state: Mapping[str, Any]) -> None:
        self.learner.modules.load_state_dict(state["networks"])
        self.observations.load_state_dict(state["observations"])

    def optimizers(self) -> dict[str, Any]:
        return self.learner.optimizers

    @property
    def total(self) -> int:
        return self.config.total_updates

    @property
    def observation_space(self) -> gym.Space:
        return self.spaces[0]

    @property
    def action_space(self) -> gym.Space:
        return self.spaces[1]

    def described(self) -> dict[str, Any]:
        return {"observation_shape": list(self.spaces[0].shape or ()), "actions": _described(self.spaces[1])}

    def _load(self) -> Transitions | None:
        match self.dataset:
            case Transitions():
                return self.dataset
            case OfflineDataset():
                return self.dataset.transitions
        if self.config.dataset:
            try:
                return load_dataset(self.config.dataset).transitions
            except DatasetError:
                if not self.description:
                    raise
        if self.description or self.environments is not None:
            return None  # an agent that was saved acts without its data
        raise ConfigError(f"{type(self).__name__} learns from recorded data: set `dataset`, or pass `dataset=`.")

    def _spaces(self) -> tuple[gym.Space, gym.Space]:
        """The environment's, those the agent was saved with, or what the data shows."""
        if self.environments is not None:
            return self.environments.observation_space, self.environments.action_space
        if self.description:
            return _space(self.description["observation_shape"]), _action_space(self.description["actions"])
        assert self.data is not None
        return _space(list(self.data.observations.shape[1:])), _action_space(_seen_actions(self.data))

    def _prepared_data(self, data: Transitions) -> Transitions:
        """Observations as the networks take them, actions as decisions, rewards as the config wants them."""
        _check(data, self.spaces)
        raw = {PLAIN: data.observations}
        self.observations.update(raw, torch.ones(len(data), dtype=torch.bool))

        def vector(observations: torch.Tensor) -> torch.Tensor:
            return prepare(self.parts, self.observations.apply({PLAIN: observations}))[VECTOR]

        rewards = self.config.rewards if isinstance(self.config, CriticConfig) else "raw"
        return replace(
            scaled_rewards(data, rewards),
            observations=vector(data.observations),
            next_observations=vector(data.next_observations),
            actions=self.actions.from_env(data.actions.numpy()),
        )


class ODICE(OfflineAgent):
    """Offline reinforcement learning by orthogonal-gradient update (Mao et al. 2024, arXiv:2402.00348).

    Example:
        ```python
        agent = ODICE("Pendulum-v1", dataset="pendulum_medium.npz")
        agent.fit(total_updates=50_000)
        ```
    """

    config_class = ODICEConfig
    learner_class = ODICELearner


class BC(OfflineAgent):
    """Behaviour cloning."""

    config_class = BCConfig
    learner_class = BCLearner


class IQL(OfflineAgent):
    """Implicit Q-learning (Kostrikov et al. 2022, arXiv:2110.06169)."""

    config_class = IQLConfig
    learner_class = IQLLearner


class TD3BC(OfflineAgent):
    """TD3 with a behaviour-cloning term (Fujimoto & Gu 2021, arXiv:2106.06860). Continuous actions only."""

    config_class = TD3BCConfig
    learner_class = TD3BCLearner


def _space(shape: list[int]) -> gym.Space:
    return gym.spaces.Box(-np.inf, np.inf, tuple(shape), np.float32)


def _seen_actions(data: Transitions) -> dict[str, Any]:
    """Choices are counted; continuous actions are taken to fill [-1, 1], or their own range where they leave it."""
    actions = data.actions
    if not actions.is_floating_point():
        counts = (actions.reshape(len(data), -1).amax(0) + 1).tolist()
        return {"counts": counts, "single": actions.ndim == 1}
    flat = actions.reshape(len(data), -1)
    bound = torch.maximum(flat.abs().amax(0), torch.ones(flat.shape[1]))
    return {"bounds": bound.tolist()}


def _described(space: gym.Space) -> dict[str, Any]:
    match space:
        case gym.spaces.Discrete():
            return {"counts": [int(space.n)], "single": True}
        case gym.spaces.MultiDiscrete():
            return {"counts": [int(count) for count in space.nvec.ravel()], "single": False}
        case gym.spaces.Box():
            return {"low": space.low.ravel().tolist(), "high": space.high.ravel().tolist()}
    raise ConfigError(f"offline agents take Discrete, MultiDiscrete and Box actions, not {space}.")


def _action_space(seen: Mapping[str, Any]) -> gym.Space:
    if "counts" in seen:
        single = seen["single"]
        return gym.spaces.Discrete(seen["counts"][0]) if single else gym.spaces.MultiDiscrete(seen["counts"])
    high = np.asarray(seen.get("high", seen.get("bounds")), dtype=np.float32)
    low = np.asarray(seen.get("low", -high), dtype=np.float32)
    return gym.spaces.Box(low, high, dtype=np.float32)


def _check(data: Transitions, spaces: tuple[gym.Space, gym.Space]) -> None:
    shape, expected = tuple(data.observations.shape[1:]), tuple(spaces[0].shape or ())
    if shape != expected:
        raise ConfigError(f"the dataset's observations have shape {list(shape)}, the environment's {list(expected)}.")
    continuous = isinstance(spaces[1], gym.spaces.Box)
    if continuous != data.actions.is_floating_point():
        kind = "continuous" if data.actions.is_floating_point() else "discrete"
        raise ConfigError(f"the dataset's actions are {kind}, the environment's space is {spaces[1]}.")
    numbers, wanted = data.actions[0].numel(), int(np.prod(spaces[1].shape or (1,)))
    if numbers != wanted:
        raise ConfigError(f"the dataset's actions have {numbers} numbers each, the environment's {wanted}.")
