"""Recorded steps for off-policy and offline learning: each knows its own true next observation."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Episode:
    """One episode as it was recorded: T decisions and the T + 1 observations around them."""

    observations: Shaped[Tensor, "steps_and_one ..."]
    actions: Shaped[Tensor, "steps ..."]
    rewards: Float[Tensor, " steps"]
    terminated: Bool[Tensor, " steps"]
    """True at most at the last step: the episode ended, nothing comes after."""
    truncated: Bool[Tensor, " steps"]
    """True at most at the last step: the episode was cut, its last observation still has a value."""

    def __post_init__(self) -> None:
        steps = len(self.rewards)
        if steps == 0:
            raise ValueError("`rewards` is empty; an episode has at least one step.")
        if len(self.observations) != steps + 1:
            raise ValueError(
                f"`observations` has {len(self.observations)} rows for {steps} rewards; it must have one more than "
                "rewards: the last one is the observation after the last action."
            )
        for name in ("actions", "terminated", "truncated"):
            length = len(vars(self)[name])
            if length != steps:
                raise ValueError(f"`{name}` has {length} rows for {steps} rewards; it must have as many.")
        for name in ("terminated", "truncated"):
            inside = vars(self)[name][:-1].nonzero()
            if len(inside):
                raise ValueError(
                    f"`{name}` is true at step {int(inside[0])} of {steps}, inside the episode; what follows is "
                    "another episode and must be recorded as one."
                )


@dataclass(frozen=True, eq=False, kw_only=True)
class Transitions:
    """Recorded steps, one per row. Rows know their episode and their place in it, so any selection stays meaningful."""

    observations: Shaped[Tensor, "rows ..."]
    actions: Shaped[Tensor, "rows ..."]
    """Discrete: int64 [rows] or [rows, choices]; continuous: float [rows, dims]."""
    rewards: Float[Tensor, " rows"]
    next_observations: Shaped[Tensor, "rows ..."]
    """The true next observation, also where the episode ended or was cut: never that of the next episode."""
    terminated: Bool[Tensor, " rows"]
    """The episode ended here: no value beyond it."""
    truncated: Bool[Tensor, " rows"]
    """The episode was cut here: the next observation still has a value."""
    episode: Int[Tensor, " rows"]
    step: Int[Tensor, " rows"]
    """Index inside the episode, from 0."""
    next_actions: Shaped[Tensor, "rows ..."] | None = None
    """The action taken in the next observation, for methods that evaluate the data's own policy."""

    def __post_init__(self) -> None:
        rows, shape = self.rewards.shape[0], self.observations.shape
        for name, value in self._tensors():
            if value.shape[0] != rows:
                raise ValueError(f"`{name}` has {value.shape[0]} rows, `rewards` has {rows}.")
            if value.requires_grad:
                raise ValueError(f"`{name}` requires grad, but transitions hold facts; detach it.")
        if self.next_observations.shape != shape or self.next_observations.dtype != self.observations.dtype:
            raise ValueError(
                f"`next_observations` is {self.next_observations.dtype} {list(self.next_observations.shape)}, "
                f"`observations` is {self.observations.dtype} {list(shape)}; they must be alike."
            )

    def __len__(self) -> int:
        return self.rewards.shape[0]

    @classmethod
    def from_episodes(cls, episodes: Sequence[Episode]) -> "Transitions":
        """Cut episodes into steps. No row of one sees an observation of another.

        The last step keeps its own next observation, so a truncated episode loses nothing. (Sets that store no last
        observation, such as D4RL's, must drop that step.)

        Raises:
            ValueError: There is no episode, or two differ in the shape or kind of observations or actions.
        """
        if not episodes:
            raise ValueError("transitions need at least one episode, got none.")
        _check_alike(episodes)
        lengths = torch.tensor([len(episode.rewards) for episode in episodes])
        return cls(
            observations=torch.cat([episode.observations[:-1] for episode in episodes]),
            actions=torch.cat([episode.actions for episode in episodes]),
            rewards=torch.cat([episode.rewards for episode in episodes]),
            next_observations=torch.cat([episode.observations[1:] for episode in episodes]),
            terminated=torch.cat([episode.terminated for episode in episodes]),
            truncated=torch.cat([episode.truncated for episode in episodes]),
            episode=torch.arange(len(episodes)).repeat_interleave(lengths),
            step=torch.cat([torch.arange(int(length)) for length in lengths]),
        )

    def episodes(self) -> Iterator[Episode]:
        """Put the steps back together: the inverse of `from_episodes`.

        Raises:
            ValueError: The rows are not whole episodes in order, for example because they are a sample.
        """
        for rows in self._episode_rows():
            part = self.select(rows)
            if not torch.equal(part.step, torch.arange(len(part), device=part.step.device)):
                raise ValueError(
                    f"episode {int(part.episode[0])} has steps {part.step[:5].tolist()}...; only whole episodes in "
                    "order can be put back together."
                )
            yield Episode(
                observations=torch.cat([part.observations, part.next_observations[-1:]]),
                actions=part.actions,
                rewards=part.rewards,
                terminated=part.terminated,
                truncated=part.truncated,
            )

    def returns(self) -> Float[Tensor, " episodes"]:
        """Undiscounted sum of rewards of each episode, in the order of their ids."""
        _, index = self.episode.unique(return_inverse=True)
        count = int(index.max()) + 1 if len(self) else 0
        return torch.zeros(count, dtype=torch.float64, device=index.device).index_add(0, index, self.rewards.double())

    def reward_scale(self, *, spread: float | int = 1000.0) -> float:
        """Factor on the rewards that gives episode returns a range of `spread`.

            scale = spread / (max return - min return)

        O-DICE, IQL and others train on locomotion with 1000, the length of those episodes, so that residuals are of
        the order of one reward. Whole episodes are needed: the returns of a sample mean nothing.

        Raises:
            ValueError: All episodes have the same return.
        """
        returns = self.returns()
        low, high = float(returns.min()), float(returns.max())
        if not high > low:
            raise ValueError(
                f"all {len(returns)} episodes have a return of {low:g}, so returns have no range to scale by; set "
                "`rewards: raw`."
            )
        return float(spread) / (high - low)

    def with_rewards(self, rewards: Float[Tensor, " rows"]) -> "Transitions":
        """The same steps with other rewards."""
        return replace(self, rewards=rewards)

    def select(self, rows: Int[Tensor, " selected"] | Bool[Tensor, " rows"]) -> "Transitions":
        """The named rows, in the order given."""
        return Transitions(**{name: value[rows] for name, value in self._tensors()})

    def to(self, device: torch.device | str) -> "Transitions":
        """The same steps on another device."""
        return Transitions(**{name: value.to(device) for name, value in self._tensors()})

    @classmethod
    def concatenate(cls, parts: Sequence["Transitions"]) -> "Transitions":
        """Join rows; each part's episodes get ids of their own.

        Raises:
            ValueError: There is nothing to join, or some parts have `next_actions` and others do not.
        """
        if not parts:
            raise ValueError("`concatenate` needs at least one set of transitions, got none.")
        if len({part.next_actions is None for part in parts}) > 1:
            raise ValueError("`next_actions` differs between the parts to join: some have it and others lack it.")
        joined: dict[str, Any] = {}
        for name, _ in parts[0]._tensors():
            joined[name] = torch.cat([vars(part)[name] for part in parts])
        first = 0
        ids = []
        for part in parts:
            ids.append(part.episode + first)
            first += int(part.episode.max()) + 1 if len(part) else 0
        return cls(**joined | {"episode": torch.cat(ids)})

    def fingerprint(self) -> str:
        """Hex SHA-256 of every number: the same set, in the same order, gives the same one on every machine."""
        digest = hashlib.sha256()
        for name, value in self._tensors():
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor under its name; an absent optional field has no entry."""
        return dict(self._tensors())

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "Transitions":
        """Rebuild what `state_dict` described.

        Raises:
            ValueError: A name is none of this class's fields.
        """
        unknown = set(state) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"`{sorted(unknown)[0]}` is no field of Transitions; was it saved by another version?")
        return cls(**state)

    def _episode_rows(self) -> Sequence[Tensor]:
        _, index = self.episode.unique(return_inverse=True)
        return index.argsort(stable=True).split(torch.bincount(index).tolist())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in vars(self).items():
            if value is not None:
                yield name, value


class TransitionBuffer:
    """Holds transitions and draws batches from them, uniformly and with replacement.

    Args:
        transitions: What to begin with; None begins empty.
    """

    def __init__(self, transitions: Transitions | None = None) -> None:
        self._held = transitions

    def __len__(self) -> int:
        return 0 if self._held is None else len(self._held)

    @property
    def transitions(self) -> Transitions:
        """Everything held.

        Raises:
            ValueError: The buffer is empty.
        """
        if self._held is None:
            raise ValueError("the transition buffer is empty; `add` transitions first.")
        return self._held

    def add(self, transitions: Transitions) -> None:
        """Keep transitions; their episodes get new ids."""
        self._held = transitions if self._held is None else Transitions.concatenate([self._held, transitions])

    def sample(self, size: int, generator: torch.Generator) -> Transitions:
        """Draw `size` rows.

        Raises:
            ValueError: The buffer is empty or the size below 1.
        """
        if size < 1:
            raise ValueError(f"a batch needs at least one row, got `size`={size}.")
        held = self.transitions
        if not len(held):
            raise ValueError("the transition buffer holds no row to sample.")
        rows = torch.randint(len(held), (size,), generator=generator, device=generator.device)
        return held.select(rows.to(held.rewards.device))

    def by_step(self, step: int) -> "TransitionBuffer":
        """A buffer of the rows that stand at this place of their episode, for finite-horizon methods.

        Raises:
            ValueError: No episode is that long.
        """
        chosen = self.transitions.step == step
        if not bool(chosen.any()):
            longest = int(self.transitions.step.max()) + 1
            raise ValueError(f"no episode has a step {step}; the longest has {longest} steps.")
        return TransitionBuffer(self.transitions.select(chosen))

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._held is None else self._held.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._held = Transitions.from_state_dict(state) if state else None


def _check_alike(episodes: Sequence[Episode]) -> None:
    first = episodes[0]
    for number, episode in enumerate(episodes):
        for name in ("observations", "actions"):
            here, expected = vars(episode)[name], vars(first)[name]
            if here.shape[1:] != expected.shape[1:] or here.dtype != expected.dtype:
                raise ValueError(
                    f"episode {number} has `{name}` of {here.dtype} {list(here.shape[1:])}, episode 0 of "
                    f"{expected.dtype} {list(expected.shape[1:])}; all episodes must be alike."
                )
