"""Facts about what happened (`Rollout`), and the same facts with advantages (`TrainBatch`)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.buffers.inputs import Input, inputs_from, inputs_layout, join_inputs, padded

AnyRollout = TypeVar("AnyRollout", bound="Rollout")


@dataclass(frozen=True, eq=False, kw_only=True)
class Rollout:
    """Facts about what happened. Nothing here depends on gamma, a baseline or a method.

    One row is one rollout, one column one decision: a token, an environment step or a denoising step. The outcome of a
    rollout is `rewards.sum(1)`, never masked: `mask` gates losses and token statistics, `scored` gates baselines.
    """

    log_prob_old: Float[Tensor, "batch time"]
    """Log-probability of each decision under the policy that made it, in nats."""
    rewards: Float[Tensor, "batch time"]
    """Reward that followed each decision; a reward for the whole rollout stands on its last one."""
    mask: Bool[Tensor, "batch time"]
    """True at real decisions; False at padding, tool tokens, reset rows, unscored denoising steps."""
    terminated: Bool[Tensor, "batch time"]
    """The episode ended here: no value beyond it."""
    truncated: Bool[Tensor, "batch time"]
    """The episode was cut here: the next state still has a value."""
    group: Int[Tensor, " batch"]
    """Rollouts collected to be compared with each other. Unique per collection: duplicate prompts differ."""
    prompt_id: Int[Tensor, " batch"]
    """Persistent id of the prompt, condition or start state, the same in every epoch."""
    scored: Bool[Tensor, " batch"]
    """False where the outcome is unknown (the reward failed or abstained): out of every baseline, advantage 0."""
    reward_parts: dict[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    """Each reward function's outcome before weighting; NaN where it does not apply."""
    values: Float[Tensor, "batch time"] | None = None
    """V of the state each decision was made in."""
    next_values: Float[Tensor, "batch time"] | None = None
    """V of the true next state, also where the episode was truncated."""
    log_prob_ref: Float[Tensor, "batch time"] | None = None
    """Log-probability under the frozen reference, in nats."""
    log_prob_engine: Float[Tensor, "batch time"] | None = None
    """Log-probability as an external sampling engine reported it, in nats; NaN where it did not."""
    baseline_reward: Float[Tensor, " batch"] | None = None
    """Outcome of the greedy rollout from the same prompt."""
    inputs: dict[str, Input] = field(default_factory=dict)
    """What the model needs to score the decisions again, by name."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def batch_size(self) -> int:
        return self.log_prob_old.shape[0]

    @property
    def time(self) -> int:
        return self.log_prob_old.shape[1]

    @property
    def outcome(self) -> Float[Tensor, " batch"]:
        """Sum of each rollout's rewards; the mask has no part in it."""
        return self.rewards.sum(1)

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of real decisions of each rollout."""
        return self.mask.sum(1)

    def validate(self) -> None:
        """Raise `ValueError`, in one sentence, at the first field whose shape, dtype, device or graph is wrong."""
        if self.log_prob_old.ndim != 2:
            raise ValueError(f"`log_prob_old` must be [batch, time], got shape {tuple(self.log_prob_old.shape)}.")
        for name, value in self._tensors():
            _check_facts(name, value, self.log_prob_old.device)
        for name in _DECISION_FIELDS:
            _check_tensor(name, self.__dict__.get(name), (self.batch_size, self.time), _KIND.get(name, "float"))
        for name in _ROLLOUT_FIELDS:
            _check_tensor(name, self.__dict__.get(name), (self.batch_size,), _KIND.get(name, "float"))
        for name, value in self.reward_parts.items():
            _check_tensor(f"reward_parts[{name!r}]", value, (self.batch_size,), "float")
        for name, entry in self.inputs.items():
            self._check_input(name, entry)

    def select(self: AnyRollout, rows: Int[Tensor, " selected"] | Bool[Tensor, " batch"]) -> AnyRollout:
        """Return the named rows, in the order given; `per_group` inputs keep the rows of the groups that survive."""
        index = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        surviving = torch.isin(self.group.unique(), self.group[index])

        def pick(entry: Input) -> Input:
            return replace(entry, value=entry.value[surviving if entry.axis == "per_group" else index])

        return self._map(lambda tensor: tensor[index], pick)

    def to(self: AnyRollout, device: torch.device | str) -> AnyRollout:
        """Return the same rollout on another device."""
        return self._map(lambda tensor: tensor.to(device), lambda entry: replace(entry, value=entry.value.to(device)))

    @classmethod
    def concatenate(cls: type[AnyRollout], parts: Sequence[AnyRollout]) -> AnyRollout:
        """Join rollouts row by row; shorter ones are padded at the end with masked decisions.

        Raises:
            ValueError: There is nothing to join, a group stands in two parts, or optional fields differ.
        """
        if not parts:
            raise ValueError("`concatenate` needs at least one rollout, got none.")
        _check_joinable(parts)
        order = torch.cat([part.group.unique() for part in parts]).argsort()
        time = max(part.time for part in parts)
        return cls(
            **{f.name: _join(f.name, [part.__dict__[f.name] for part in parts], time, order) for f in fields(cls)}
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor under one flat name; absent optional fields have no entry."""
        state = dict(self._tensors())
        return state | inputs_layout(self.inputs)

    @classmethod
    def from_state_dict(cls: type[AnyRollout], state: Mapping[str, Tensor]) -> AnyRollout:
        """Rebuild what `state_dict` described.

        Raises:
            ValueError: A name is none of this class's fields.
        """
        plain = {name: value for name, value in state.items() if "/" not in name}
        unknown = set(plain) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"`{sorted(unknown)[0]}` is no field of {cls.__name__}; was it saved by another version?")
        prefix = "reward_parts/"
        parts = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        return cls(**plain, reward_parts=parts, inputs=inputs_from(state))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.__dict__.items():
            if isinstance(value, Tensor):
                yield name, value
        for name, value in self.reward_parts.items():
            yield f"reward_parts/{name}", value
        for name, entry in self.inputs.items():
            yield f"inputs/{name}/value", entry.value

    def _map(self: AnyRollout, on_tensor: Callable[[Tensor], Tensor], on_input: Callable[[Input], Input]) -> AnyRollout:
        changed: dict[str, Any] = {n: on_tensor(v) for n, v in self.__dict__.items() if isinstance(v, Tensor)}
        changed["reward_parts"] = {name: on_tensor(value) for name, value in self.reward_parts.items()}
        changed["inputs"] = {name: on_input(entry) for name, entry in self.inputs.items()}
        return replace(self, **changed)

    def _check_input(self, name: str, entry: Input) -> None:
        match entry.axis:
            case "per_decision":
                expected, shape = (self.batch_size, self.time), tuple(entry.value.shape[:2])
            case "per_rollout":
                expected, shape = (self.batch_size,), tuple(entry.value.shape[:1])
            case "per_group":
                expected, shape = (len(self.group.unique()),), tuple(entry.value.shape[:1])
        if shape != expected:
            raise ValueError(f"`inputs[{name!r}]` is {entry.axis}: it must start with {expected}, got {shape}.")


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainBatch(Rollout):
    """A rollout with advantages: what an objective needs, and nothing an objective must work out again."""

    advantages: Float[Tensor, "batch time"]
    """How much better than expected each decision was; 0 where masked."""
    returns: Float[Tensor, "batch time"] | None = None
    """Targets of the value function; None without one."""
    weights: Float[Tensor, "batch time"] = None  # pyright: ignore[reportAssignmentType]  # ones, made in __post_init__
    """Nonnegative weight of each decision in the loss; multiplies the numerator only."""

    def __post_init__(self) -> None:
        if self.__dict__["weights"] is None:
            object.__setattr__(self, "weights", torch.ones_like(self.log_prob_old))
        super().__post_init__()
        if not bool((self.weights >= 0).all()):
            raise ValueError(f"`weights` must be >= 0, got a smallest value of {float(self.weights.min())}.")

    @classmethod
    def from_rollout(
        cls,
        rollout: Rollout,
        advantages: Float[Tensor, "batch time"],
        returns: Float[Tensor, "batch time"] | None = None,
        weights: Float[Tensor, "batch time"] | None = None,
    ) -> "TrainBatch":
        """Add an estimator's result to the facts it was computed from."""
        facts = {f.name: rollout.__dict__[f.name] for f in fields(Rollout)}
        weights = torch.ones_like(rollout.log_prob_old) if weights is None else weights
        return cls(**facts, advantages=advantages, returns=returns, weights=weights)

    def minibatches(
        self, size: int, generator: torch.Generator, *, keep_groups: bool = False
    ) -> Iterator["TrainBatch"]:
        """Deal the rollouts, in a new random order at each call, into minibatches of at most `size` rows.

        Args:
            size: Rows per minibatch; the last may be smaller.
            generator: Source of the order.
            keep_groups: Deal whole groups, as many as fit; a group larger than `size` comes alone and whole.
        """
        if size < 1:
            raise ValueError(f"a minibatch needs at least one row, got `size`={size}.")
        deal = self._deal_groups if keep_groups else self._deal_rows
        return (self.select(rows.to(self.group.device)) for rows in deal(size, generator))

    def _deal_rows(self, size: int, generator: torch.Generator) -> Sequence[Tensor]:
        return torch.randperm(self.batch_size, generator=generator, device=generator.device).split(size)

    def _deal_groups(self, size: int, generator: torch.Generator) -> Sequence[Tensor]:
        _, index = self.group.unique(return_inverse=True)
        members = index.cpu().argsort(stable=True).split(torch.bincount(index).tolist())
        dealt: list[list[Tensor]] = []
        room = 0
        for group in torch.randperm(len(members), generator=generator, device=generator.device).tolist():
            if not dealt or len(members[group]) > room:
                dealt.append([])
                room = size
            dealt[-1].append(members[group])
            room -= len(members[group])
        return [torch.cat(rows) for rows in dealt]


_DECISION_FIELDS = (
    *("log_prob_old", "rewards", "mask", "terminated", "truncated", "values", "next_values", "log_prob_ref"),
    *("log_prob_engine", "advantages", "returns", "weights"),
)
_ROLLOUT_FIELDS = ("group", "prompt_id", "scored", "baseline_reward")
_KIND = {
    **dict.fromkeys(("mask", "terminated", "truncated", "scored"), "bool"),
    **dict.fromkeys(("group", "prompt_id"), "int64"),
}


def _check_facts(name: str, value: Tensor, device: torch.device) -> None:
    if value.requires_grad:
        # A graph behind `log_prob_old` or `advantages` cancels or bends the policy gradient without any error.
        raise ValueError(f"`{name}` requires grad, but a rollout holds facts; detach it.")
    if value.device != device:
        raise ValueError(f"`{name}` is on {value.device}, `log_prob_old` on {device}; use `.to(device)`.")


def _check_tensor(name: str, value: Tensor | None, shape: tuple[int, ...], kind: str) -> None:
    if value is None:
        return
    if tuple(value.shape) != shape:
        layout = "[batch, time]" if len(shape) == 2 else "[batch]"
        raise ValueError(f"`{name}` must be {layout} = {list(shape)}, got {list(value.shape)}.")
    fits = {"float": value.is_floating_point(), "bool": value.dtype == torch.bool, "int64": value.dtype == torch.int64}
    if not fits[kind]:
        raise ValueError(f"`{name}` must be {kind}, got {str(value.dtype).removeprefix('torch.')}.")


def _check_joinable(parts: Sequence[Rollout]) -> None:
    ids, count = torch.cat([part.group.unique() for part in parts]).unique(return_counts=True)
    if bool((count > 1).any()):
        raise ValueError(
            f"group {int(ids[count > 1][0])} stands in two rollouts; a group is collected at once, "
            "so number the groups of each collection anew."
        )
    for part in parts[1:]:
        for name, value in part.__dict__.items():
            first = parts[0].__dict__[name]
            same = set(first) == set(value) if isinstance(value, dict) else (first is None) == (value is None)
            if not same:
                raise ValueError(f"`{name}` differs between the rollouts to join: some have entries that others lack.")


def _join(name: str, values: list[Any], time: int, order: Tensor) -> Any:
    match values[0]:
        case None:
            return None
        case Tensor():
            return torch.cat([padded(value, time, 0) for value in values])
        case _ if name == "inputs":
            return {key: join_inputs(key, [value[key] for value in values], time, order) for key in values[0]}
        case _:
            return {key: torch.cat([value[key] for value in values]) for key in values[0]}
