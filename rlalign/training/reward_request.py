"""The rows a reward function is asked about, with TRL's argument names. Stdlib only."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlalign.training.reward_call import RewardError
from rlalign.training.reward_function import RewardFunction

_OFFERED = frozenset({"trainer_state", "log_metric", "log_extra"})


@dataclass(frozen=True, kw_only=True)
class Request:
    """The rows of one call: every column is a list of `rows` items."""

    rows: int
    columns: dict[str, list[Any]]
    trainer_state: dict[str, Any] = field(default_factory=dict)
    watch_inputs: bool = False
    """Tell whether the function changed its arguments (they are copies; this is for `rlalign check`)."""
    started: float = 0.0

    def take(self, indices: Iterable[int]) -> "Request":
        kept = list(indices)
        columns = {name: [values[i] for i in kept] for name, values in self.columns.items()}
        return replace(self, rows=len(kept), columns=columns)

    def only(self, names: frozenset[str]) -> dict[str, list[Any]]:
        return {name: values for name, values in self.columns.items() if name in names}


def make_request(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]] | None,
    columns: Mapping[str, Sequence[Any]] | None,
    trainer_state: Any,
) -> Request:
    """Name the arguments as TRL does and check that every column has one entry per completion.

    Raises:
        ValueError: A column is longer or shorter than the completions.
    """
    named: dict[str, Sequence[Any]] = {"prompts": prompts, "completions": completions}
    if completion_ids is not None:
        named["completion_ids"] = [list(ids) for ids in completion_ids]
    # TRL never passes these three as columns: their plural is the argument.
    named |= {k: v for k, v in (columns or {}).items() if k not in ("prompt", "completion", "completion_ids")}
    rows = len(completions)
    for name, values in named.items():
        if len(values) != rows:
            raise ValueError(f"column '{name}' has {len(values)} entries for {rows} completions; give one per row.")
    state: Mapping[str, Any] = {}
    if trainer_state is not None:
        state = trainer_state if isinstance(trainer_state, Mapping) else vars(trainer_state)
    plain = {key: value for key, value in state.items() if isinstance(value, str | int | float | bool | None)}
    return Request(rows=rows, columns={name: list(values) for name, values in named.items()}, trainer_state=plain)


def check_columns(function: RewardFunction, required: Iterable[str], given: Collection[str]) -> None:
    """Refuse a function that asks for what the data does not have.

    Raises:
        RewardError: With the missing and the present names.
    """
    lacking = [name for name in required if name not in given and name not in _OFFERED]
    if lacking:
        raise RewardError(
            f"reward '{function.name}' asks for {', '.join(f'`{name}`' for name in lacking)}, but the rows have "
            f"only {', '.join(f'`{name}`' for name in sorted(given))}. Add the column to the data set, "
            "rename the parameter, or give it a default."
        )
