"""What the model needs to score a decision again: carried by rollouts, never looked into."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Shaped
from torch import Tensor

Axis = Literal["per_decision", "per_rollout", "per_group"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True, eq=False, kw_only=True)
class Input:
    """Something the model needs to score a decision again; the core carries it without looking inside."""

    value: Shaped[Tensor, "rows *rest"]
    axis: Axis
    """`per_decision` [B, T, ...], `per_rollout` [B, ...], or `per_group` [G, ...] by ascending group id."""
    pad_value: bool | int | float | None = None
    """Fills dimension 1 when rollouts of different length are joined. None: zeros for `per_decision`, else an error."""


def join_inputs(name: str, entries: list[Input], time: int, order: Tensor) -> Input:
    """Join one input of several rollouts.

    Args:
        time: Decisions of the longest rollout.
        order: Sorts the joined groups by id.
    """
    first = entries[0]
    if any(entry.axis != first.axis or entry.pad_value != first.pad_value for entry in entries):
        raise ValueError(f"`inputs[{name!r}]` has another axis or pad value in another rollout.")
    values = [entry.value for entry in entries]
    if first.axis == "per_decision":
        values = [padded(value, time, first.pad_value or 0) for value in values]
    elif first.pad_value is not None and first.value.ndim > 1:
        width = max(value.shape[1] for value in values)
        values = [padded(value, width, first.pad_value) for value in values]
    if any(value.shape[1:] != values[0].shape[1:] for value in values):
        shapes = sorted({tuple(value.shape[1:]) for value in values})
        raise ValueError(f"`inputs[{name!r}]` has rows of shapes {shapes}; give it a `pad_value` or equal shapes.")
    joined = torch.cat(values)
    return replace(first, value=joined[order] if first.axis == "per_group" else joined)


def padded(value: Tensor, width: int, fill: bool | int | float) -> Tensor:
    """Lengthen dimension 1, where there is one, to `width`."""
    if value.ndim < 2 or value.shape[1] == width:
        return value
    return torch.cat([value, value.new_full((value.shape[0], width - value.shape[1], *value.shape[2:]), fill)], 1)


def inputs_layout(inputs: Mapping[str, Input]) -> dict[str, Tensor]:
    """Describe axis and pad value of each input as tensors; the values themselves are listed by `Rollout`."""
    state = {}
    for name, entry in inputs.items():
        state[f"inputs/{name}/axis"] = torch.tensor(AXES.index(entry.axis))
        if entry.pad_value is not None:
            state[f"inputs/{name}/pad_value"] = torch.tensor(entry.pad_value, dtype=entry.value.dtype)
    return state


def inputs_from(state: Mapping[str, Tensor]) -> dict[str, Input]:
    """Rebuild the inputs from the entries of a rollout's state that begin with `inputs/`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        if key.startswith("inputs/"):
            name, _, part = key.removeprefix("inputs/").rpartition("/")
            found.setdefault(name, {})[part] = value
    return {
        name: Input(
            value=parts["value"],
            axis=AXES[int(parts["axis"])],
            pad_value=parts["pad_value"].item() if "pad_value" in parts else None,
        )
        for name, parts in found.items()
    }
