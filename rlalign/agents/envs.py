"""Environments stepped together: three ways of restarting episodes become one, and every episode can be replayed.

Gymnasium's vector environments restart an ended episode at the next step (`NEXT_STEP`), in the same step
(`SAME_STEP`) or when told to (`DISABLED`). `Environments` steps any of them and always tells the true next observation
and which rows are real decisions.
"""

import multiprocessing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from rlalign.agents.config import EnvConfig
from rlalign.agents.consistency import unregistered
from rlalign.agents.envpool_copies import SeededPool
from rlalign.agents.episodes import REPLAY, EnvironmentFault, SeededEpisodes
from rlalign.agents.spaces import Observation
from rlalign.config import ConfigError
from rlalign.training.seeding import derived_seed

Array = np.ndarray
LONGEST_EPISODE = 100_000
"""Steps after which whoever waits for an episode's end gives up."""


@dataclass(frozen=True, eq=False)
class EnvStep:
    """What one step of all copies brought."""

    observation: Observation
    """What the policy sees next: of a fresh episode where one was restarted."""
    next_observation: Observation
    """The true next observation, also where the episode ended."""
    rewards: Array
    terminated: Array
    truncated: Array
    real: Array
    """False where the step only restarted an episode: no decision was made there."""
    info: Mapping[str, Any]


class Environments:
    """`num_envs` copies of one environment.

    Args:
        vector: Any Gymnasium vector environment.
        seed: What a foreign vector environment is seeded with, once.
        own: The copies are `SeededEpisodes`: each episode is a function of its seed and its number.
    """

    def __init__(self, vector: VectorEnv, *, name: str, seed: int, own: bool = False):
        self.vector, self.name, self.seed = vector, name, seed
        self.num_envs = vector.num_envs
        self.observation_space, self.action_space = vector.single_observation_space, vector.single_action_space
        self.mode = AutoresetMode(vector.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
        self.own = own
        self.timeout: float | None = None
        self.observation: Observation = None
        self.info: Mapping[str, Any] = {}
        self.ended = np.zeros(self.num_envs, dtype=bool)
        self.steps = 0
        self.taken: list[Array] = []
        """Actions since the start, where nothing else can tell how the copies came to where they are."""

    def reset(self, *, seeds: list[int] | int | None = None) -> Observation:
        """Begin new episodes in all copies; with `seeds`, from these starts.

        A vector form that is not ours takes the first of them and counts on from it.
        """
        first = seeds if seeds is not None else None if self.own else derived_seed(self.seed, "reset") % 2**31
        if isinstance(first, list) and not self.own:
            first = first[0]
        with self._told():
            self.observation, self.info = self._reset(seed=first)
        self.ended[:] = False
        self.taken = []
        self._check("reset", self.observation, np.zeros(self.num_envs))
        return self.observation

    def step(self, actions: Array) -> EnvStep:
        """Step all copies.

        Raises:
            EnvironmentFault: An observation or reward is not finite, a shape is wrong, or a copy raised or hung.
        """
        if not self.own:
            self.taken.append(actions)
        with self._told():
            if self.timeout is not None and isinstance(self.vector, AsyncVectorEnv):
                self.vector.step_async(actions)
                seen, rewards, terminated, truncated, info = self.vector.step_wait(timeout=self.timeout)
            else:
                seen, rewards, terminated, truncated, info = self.vector.step(actions)
        self.steps += 1
        self._check("step", seen, rewards)
        return self._interpreted(seen, rewards, terminated, truncated, info)

    def _reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        if self.timeout is None or not isinstance(self.vector, AsyncVectorEnv):
            return self.vector.reset(seed=seed, options=options)
        self.vector.reset_async(seed=seed, options=options)
        return self.vector.reset_wait(timeout=self.timeout)

    def _interpreted(
        self, seen: Observation, rewards: Array, terminated: Array, truncated: Array, info: Mapping[str, Any]
    ) -> EnvStep:
        over, real, true_next = terminated | truncated, ~self.ended, seen
        match self.mode:
            case AutoresetMode.NEXT_STEP:
                self.ended = over
            case AutoresetMode.SAME_STEP if over.any():
                true_next = _with_rows(seen, over, info["final_obs"])
                self._check("step", true_next, rewards)
            case AutoresetMode.DISABLED if over.any():
                true_next = _copied(seen)
                with self._told():
                    seen, started = self._reset(options={"reset_mask": over.copy()})
                self._check("reset", seen, rewards)
                info = _merged(info, started, over)
        self.observation, self.info = seen, info
        return EnvStep(seen, true_next, rewards, terminated, truncated, real, info)

    def _told(self) -> "_Told":
        return _Told(self)

    def _check(self, where: str, observation: Observation, rewards: Array) -> None:
        if not np.isfinite(rewards).all():
            index = int(np.flatnonzero(~np.isfinite(rewards))[0])
            raise EnvironmentFault(
                f"{self.name}, copy {index}, {where} {self.steps}: the reward is {rewards[index]}. "
                "Fix the environment, or bound it with gymnasium.wrappers.TransformReward."
            )
        for name, values in observation.items() if isinstance(observation, Mapping) else [("", observation)]:
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                index = int(np.flatnonzero(~np.isfinite(values).reshape(self.num_envs, -1).all(1))[0])
                part = f" `{name}`" if name else ""
                raise EnvironmentFault(
                    f"{self.name}, copy {index}, {where} {self.steps}: the observation{part} has NaN or infinite "
                    f"entries: {np.asarray(values[index]).ravel()[:8]}. Fix the environment."
                )

    def close(self) -> None:
        self.vector.close()

    def state_dict(self) -> dict[str, Any]:
        """How to come to the same place again: each episode's start and actions (or all actions since the reset)."""
        if self.observation is None:
            return {"started": False}
        state: dict[str, Any] = {"started": True, "steps": self.steps, "ended": torch.from_numpy(self.ended.copy())}
        if self.own:
            assert isinstance(self.vector, (SyncVectorEnv, AsyncVectorEnv))
            logs = self.vector.call("replay_log")
            state["episodes"] = {str(index): log for index, log in enumerate(logs)}
        else:
            state["taken"] = torch.from_numpy(np.stack(self.taken)) if self.taken else None
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Play the copies back to where they were."""
        if not state["started"]:
            return
        if self.own:
            replay = {int(index): log for index, log in state["episodes"].items()}
            with self._told():
                self.observation, self.info = self._reset(options={REPLAY: replay})
        else:
            self.reset()
            for actions in [] if state["taken"] is None else state["taken"].numpy():
                self.step(actions)
        self.steps = state["steps"]
        self.ended = state["ended"].numpy().copy()


def require_end(steps: int, name: str) -> None:
    """Stop waiting for an episode that seems to have no end.

    Raises:
        EnvironmentFault: `steps` has reached `LONGEST_EPISODE`.
    """
    if steps >= LONGEST_EPISODE:
        raise EnvironmentFault(
            f"{name}: an episode has not ended within {steps:,} steps, and whole episodes are asked for. Set "
            "`env.max_episode_steps`."
        )


class _Told:
    """Says which environment failed, in one sentence, whatever its code raised."""

    def __init__(self, environments: Environments):
        self.environments = environments

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, EnvironmentFault):
            return
        if isinstance(error, multiprocessing.TimeoutError):
            raise EnvironmentFault(
                f"{self.environments.name}, copies {self._hung()}, step {self.environments.steps}: no answer within "
                f"{self.environments.timeout:g} s. Raise `env.step_timeout_s`, or fix what hangs."
            ) from error
        raise EnvironmentFault(
            f"{self.environments.name}, step {self.environments.steps}: {type(error).__name__}: {error}"
        ) from error

    def _hung(self) -> list[int]:
        vector = self.environments.vector
        assert isinstance(vector, AsyncVectorEnv)
        return [index for index, pipe in enumerate(vector.parent_pipes) if not pipe.poll(0)]


def make_environments(
    cfg: EnvConfig, *, seed: int, num_envs: int | None = None, render: bool = False, role: str = "train"
) -> Environments:
    """Build the copies that a config asks for.

    Args:
        num_envs: Instead of the config's.
        render: Make frames for a video.
        role: Copies in different roles see different episodes.

    Raises:
        ConfigError: No such environment, or it refuses its arguments.
    """
    if not cfg.id:
        raise ConfigError("`env.id` is empty: name a Gymnasium environment, such as CartPole-v1 or module:Id-v0.")
    count, base = num_envs or cfg.num_envs, derived_seed(seed, "env", role)
    limit = {} if cfg.max_episode_steps is None else {"max_episode_steps": cfg.max_episode_steps}
    try:
        match cfg.vectorization:
            case "native":
                vector = gym.make_vec(cfg.id, count, vectorization_mode="vector_entry_point", **limit, **cfg.kwargs)
            case "envpool":
                vector = SeededPool(cfg.id, count, {**limit, **cfg.kwargs}, seed=base % 2**31)
            case _:
                made = [_maker(cfg, limit, base, index, render=render) for index in range(count)]
                # Restarted in the same step, every step is a decision: rollouts and minibatches have their full size.
                kind = SyncVectorEnv if cfg.vectorization == "sync" else AsyncVectorEnv
                vector = kind(made, autoreset_mode=AutoresetMode.SAME_STEP)
    except (gym.error.Error, TypeError, ValueError, AssertionError, ModuleNotFoundError) as error:
        raise ConfigError(f"`env.id`={cfg.id}: {type(error).__name__}: {error}{unregistered(error)}") from error
    found = Environments(vector, name=cfg.id, seed=base, own=cfg.vectorization in ("sync", "async"))
    found.timeout = cfg.step_timeout_s
    return found


def _maker(cfg: EnvConfig, limit: Mapping[str, int], base: int, index: int, *, render: bool) -> Any:
    mode = {"render_mode": "rgb_array"} if render else {}

    def make() -> gym.Env:
        env = gym.make(cfg.id, disable_env_checker=True, **mode, **limit, **cfg.kwargs)
        return SeededEpisodes(env, name=cfg.id, seed=base, index=index)

    return make


def _with_rows(seen: Observation, rows: Array, final: Any) -> Observation:
    """`seen` with the final observations in `rows`; `final` is an object array of one observation per copy."""
    if isinstance(seen, Mapping):
        parts = {name: [None if one is None else one[name] for one in final] for name in seen}
        return {name: _with_rows(part, rows, parts[name]) for name, part in seen.items()}
    merged = seen.copy()
    for index in np.flatnonzero(rows):
        merged[index] = final[index]
    return merged


def _merged(info: Mapping[str, Any], started: Mapping[str, Any], rows: Array) -> dict[str, Any]:
    """What each copy says now: `info` of a step, with that of the episodes started after it in `rows`."""
    merged = dict(info)
    for name, values in started.items():
        old = merged.get(name)
        if isinstance(values, np.ndarray) and isinstance(old, np.ndarray) and old.shape == values.shape:
            values = np.where(rows.reshape(-1, *[1] * (values.ndim - 1)), values, old)
        merged[name] = values
    return merged


def _copied(observation: Observation) -> Observation:
    return {k: v.copy() for k, v in observation.items()} if isinstance(observation, Mapping) else observation.copy()
