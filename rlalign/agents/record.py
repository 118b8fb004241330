"""Record whole episodes as a dataset: of uniformly random actions, of a trained agent, or of one that errs."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np

from rlalign.agents.agent import Agent
from rlalign.agents.config import EnvConfig
from rlalign.agents.dataset_parts import Reference, checked_episode, joined
from rlalign.agents.datasets import rlalign_score, save_minari, save_npz
from rlalign.agents.envs import Array, Environments, make_environments
from rlalign.agents.evaluate import EPISODE_STEP
from rlalign.agents.saved import SETTINGS
from rlalign.buffers.transitions import Episode, Transitions
from rlalign.config import ConfigError
from rlalign.training.seeding import derived_seed

Kind = Literal["random", "medium", "mixed", "expert"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NOISE = 0.3
"""`medium`: chance that a uniformly random action replaces the agent's."""
REFERENCE_EPISODES = 100
COPIES = 10
"""Episodes played side by side. Each is a function of the seed and its number, so this changes nothing but the time."""

Acting = Callable[[Any, Mapping[str, Any], "list[gym.Space]"], Array]
"""(observations, info, one seeded action space per copy) -> actions."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Episodes, the scores between which policies are placed, and how both came to be."""

    transitions: Transitions
    reference: Reference
    observation_space: gym.Space
    action_space: gym.Space
    algorithm: str
    description: str

    def save(self, out: str | Path | None = None, *, minari: str | None = None) -> None:
        """Write a `.npz` file (where `out` ends so) or a folder of them, and a Minari dataset under the id `minari`.

        Raises:
            DatasetError: The folder or the id is taken.
        """
        if out is not None:
            save_npz(self.transitions, out, reference=self.reference)
        if minari is not None:
            save_minari(
                self.transitions,
                minari,
                observation_space=self.observation_space,
                action_space=self.action_space,
                reference=self.reference,
                algorithm=self.algorithm,
                description=self.description,
            )

    def summary(self) -> dict[str, float]:
        """Counts, mean return, and its rlalign score where both reference scores are known."""
        returns = self.transitions.returns()
        found = {"episodes": float(len(returns)), "steps": float(len(self.transitions))}
        found |= {"return_mean": float(returns.mean()), "return_min": float(returns.min())}
        found["return_max"] = float(returns.max())
        known = {name: value for name, value in vars(self.reference).items() if isinstance(value, float)}
        if len(known) == 2 and len(set(known.values())) == 2:
            found["rlalign_score_mean"] = float(rlalign_score(returns, self.reference).mean())
        return found | known


def record(
    source: str | Path | Agent,
    *,
    episodes: int,
    kind: Kind,
    seed: int = 0,
    noise: float = NOISE,
    checkpoint: str | Path | None = None,
    reference: Reference | None = None,
) -> Recording:
    """Play whole episodes. Which one comes when depends on the seed and its number alone.

        random   every action uniform over the action space
        expert   the agent's most probable action
        medium   the most probable action of `checkpoint`, an earlier one of the run; without a checkpoint the agent's,
                 and at each step, with probability `noise`, a uniform one instead
        mixed    random, then medium, then expert, a third of the episodes each (the earlier kinds get the rest)

    Args:
        source: A run directory, what `save` wrote, an agent; or, for `random` alone, an environment's id.
        reference: Scores to store. None plays for them: 100 episodes of random actions (`ref_min_score`) and 100 of the
            agent's most probable ones (`ref_max_score`, absent when the source is an environment), from other starts.

    Raises:
        ConfigError: The source is no agent and the kind needs one, has no environment, or observes a Dict.
    """
    if kind not in KINDS:
        raise ConfigError(f"`kind` must be {', '.join(KINDS)}, got {kind!r}.")
    agent = source if isinstance(source, Agent) else _agent(Path(source))
    if agent is None and kind != "random":
        raise ConfigError(f"`{source}` is neither a run nor a saved agent, which `kind`={kind} needs.")
    cfg = EnvConfig(id=str(source)) if agent is None else agent.config.env
    player = _Player(replace(cfg, vectorization="sync"), seed)
    players: dict[str, Acting] = {"random": player.uniform}
    if agent is not None:
        players["expert"] = _most_probable(agent)
        earlier = _at_checkpoint(source, checkpoint)
        players["medium"] = _erring(agent, noise) if earlier is None else _most_probable(earlier)
    try:
        played = [
            episode
            for part, count in _shares(kind, episodes).items()
            for episode in player.episodes(players[part], count, part)
        ]
        reference = reference or player.reference(players["random"], players.get("expert"))
    finally:
        player.close()
    return Recording(
        transitions=joined(played, cfg.id),
        reference=reference,
        observation_space=player.envs.observation_space,
        action_space=player.envs.action_space,
        algorithm="random" if agent is None else agent.config.method,
        description=_described(kind, seed, noise, agent, checkpoint),
    )


class _Player:
    """Plays whole episodes in copies of one environment and keeps them."""

    def __init__(self, cfg: EnvConfig, seed: int):
        self.envs: Environments = make_environments(cfg, seed=seed, num_envs=COPIES, role="recording")
        self.seed = seed
        if not isinstance(self.envs.observation_space, gym.spaces.Box | gym.spaces.Discrete | gym.spaces.MultiDiscrete):
            self.close()
            raise ConfigError(
                f"a dataset holds plain observations, not {self.envs.observation_space}; wrap the environment with "
                "gymnasium.wrappers.FlattenObservation."
            )

    def uniform(self, observation: Any, info: Mapping[str, Any], spaces: list[gym.Space]) -> Array:
        return np.stack([np.asarray(space.sample()) for space in spaces])

    def reference(self, lowest: Acting, highest: Acting | None) -> Reference:
        """Mean returns of 100 episodes each."""
        scores: dict[str, float] = {}
        for name, acting in (("ref_min_score", lowest), ("ref_max_score", highest)):
            if acting is not None:
                played = self.episodes(acting, REFERENCE_EPISODES, name)
                scores[name] = float(np.mean([float(episode.rewards.double().sum()) for episode in played]))
        return Reference(env_id=self.envs.name, **scores)

    def episodes(self, acting: Acting, count: int, role: str) -> Iterator[Episode]:
        """`count` episodes in the order of their numbers; `role` sets their starts apart from others."""
        for first in range(0, count, COPIES):
            yield from self._round(acting, first, role)[: count - first]

    def _round(self, acting: Acting, first: int, role: str) -> list[Episode]:
        seeds = [derived_seed(self.seed, role, first + copy_) % 2**31 for copy_ in range(COPIES)]
        spaces = [_seeded(self.envs.action_space, seed) for seed in seeds]
        observation = self.envs.reset(seeds=seeds)
        kept: list[dict[str, list[Any]]] = [_begun(observation[index]) for index in range(COPIES)]
        running, lengths = np.ones(COPIES, dtype=bool), np.zeros(COPIES, dtype=np.int64)
        while running.any():
            actions = acting(observation, {**self.envs.info, EPISODE_STEP: lengths}, spaces)
            step = self.envs.step(actions)
            for index in np.flatnonzero(running):
                row = kept[index]
                row["observations"].append(np.array(step.next_observation[index]))
                row["actions"].append(actions[index])
                row["rewards"].append(step.rewards[index])
                row["terminated"].append(step.terminated[index])
                row["truncated"].append(step.truncated[index] and not step.terminated[index])
            lengths += running
            running &= ~(step.terminated | step.truncated)
            observation = step.observation
        return [checked_episode({k: np.stack(v) for k, v in row.items()}, self.envs.name) for row in kept]

    def close(self) -> None:
        self.envs.close()


def _begun(observation: Any) -> dict[str, list[Any]]:
    empty: dict[str, list[Any]] = {name: [] for name in ("actions", "rewards", "terminated", "truncated")}
    return empty | {"observations": [np.array(observation)]}


def _seeded(space: gym.Space, seed: int) -> gym.Space:
    own = copy.deepcopy(space)
    own.seed(seed)
    return own


def _most_probable(agent: Agent) -> Acting:
    def act(observation: Any, info: Mapping[str, Any], spaces: list[gym.Space]) -> Array:
        return agent.decide(observation, info, random=None)[0]

    return act


def _erring(agent: Agent, noise: float) -> Acting:
    if not 0 <= noise <= 1:
        raise ConfigError(f"`noise` is the chance of a random action and lies in [0, 1], got {noise}.")

    def act(observation: Any, info: Mapping[str, Any], spaces: list[gym.Space]) -> Array:
        actions = np.array(agent.decide(observation, info, random=None)[0])
        for index, space in enumerate(spaces):
            drawn = np.asarray(space.sample())  # at every step, so that the draws do not depend on one another
            if space.np_random.random() < noise:
                actions[index] = drawn
        return actions

    return act


def _shares(kind: Kind, episodes: int) -> dict[str, int]:
    if episodes < 1:
        raise ConfigError(f"`episodes` must be at least 1, got {episodes}.")
    if kind != "mixed":
        return {kind: episodes}
    parts = ("random", "medium", "expert")
    return {part: (episodes + 2 - index) // 3 for index, part in enumerate(parts)}


def _agent(path: Path) -> Agent | None:
    """The agent at a path, finished or not; None where there is none."""
    from rlalign.agents.run import CLASSES, load_agent, restored

    if any((folder / SETTINGS).is_file() for folder in (path / "model", path)):
        return load_agent(path)
    resolved = path / "config.resolved.json"
    if not resolved.is_file():
        return None
    method = json.loads(resolved.read_text(encoding="utf-8"))["method"]
    if method not in CLASSES:
        raise ConfigError(f"{path} is a run of `{method}`, which acts in no environment.")
    return restored(path, None)


def _at_checkpoint(source: str | Path | Agent, checkpoint: str | Path | None) -> Agent | None:
    from rlalign.agents.run import restored

    if checkpoint is None:
        return None
    if isinstance(source, Agent):
        raise ConfigError("`checkpoint` is one of a run's: give the run directory as `source`.")
    return restored(Path(source), Path(checkpoint))


def _described(kind: str, seed: int, noise: float, agent: Agent | None, checkpoint: str | Path | None) -> str:
    if agent is None or kind == "random":
        return f"Uniformly random actions, seed {seed}."
    erring = f"uniform with probability {noise:g}" if checkpoint is None else f"those of {Path(checkpoint).name}"
    acting = f"actions of a {agent.config.method} agent at step {agent.step}"
    return {
        "expert": f"The most probable {acting}, seed {seed}.",
        "medium": f"The most probable {acting}, {erring}, seed {seed}.",
        "mixed": f"A third each: random; {erring}; the most probable {acting}; seed {seed}.",
    }[kind]
