"""A tape of what a pipeline asked its denoiser at each step, to ask it again for any samples of any steps at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rlalign.diffusion.combiner import Combiner, Guide, NotCombined


@runtime_checkable
class Slot(Protocol):
    """One argument of a denoiser call, over the steps of a layout. A call holds `parts` copies of the batch."""

    @property
    def form(self) -> tuple[Any, ...]:
        """What must be equal for two steps to fit into one call."""
        ...

    def joined(self, others: Sequence[Any]) -> "Slot":
        """The same argument over several steps, this one first."""
        ...

    def filled(self, x: Tensor, rows: Tensor, steps: Tensor, parts: int) -> Any:
        """The argument for these samples at these steps (numbers within the layout)."""
        ...

    def select(self, rows: Tensor, parts: int) -> "Slot": ...

    def held(self) -> list[Tensor]:
        """The tensors that it keeps alive."""
        ...


@dataclass(frozen=True)
class Latents:
    """The latents of the step, which the trajectory holds: nothing is stored."""

    dtype: torch.dtype

    @property
    def form(self) -> tuple[Any, ...]:
        return ("latents", self.dtype)

    def joined(self, others: Sequence[Any]) -> Slot:
        return self

    def filled(self, x: Tensor, rows: Tensor, steps: Tensor, parts: int) -> Tensor:
        return x.to(self.dtype).repeat(parts, *(1,) * (x.ndim - 1))

    def select(self, rows: Tensor, parts: int) -> Slot:
        return self

    def held(self) -> list[Tensor]:
        return []


@dataclass(frozen=True, eq=False)
class Table:
    """Belongs to no sample, as position ids do: passed on as it was."""

    value: Any

    @property
    def form(self) -> tuple[Any, ...]:
        plain = self.value is None or isinstance(self.value, bool | str) or is_listed_numbers(self.value)
        return ("table", self.value if plain else id(self.value))

    def joined(self, others: Sequence[Any]) -> Slot:
        return self

    def filled(self, x: Tensor, rows: Tensor, steps: Tensor, parts: int) -> Any:
        return self.value

    def select(self, rows: Tensor, parts: int) -> Slot:
        return self

    def held(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(self.value) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, eq=False)
class Scalar:
    """A number that may differ per step, such as the timestep: a vector where a call mixes steps."""

    values: tuple[Any, ...]
    """One for all steps, or one per step."""

    @property
    def form(self) -> tuple[Any, ...]:
        return ("scalar", self.values[0].dtype if isinstance(self.values[0], Tensor) else type(self.values[0]))

    def joined(self, others: Sequence[Any]) -> Slot:
        values = self.values + tuple(value for other in others for value in other.values)
        return self if all(bool(value == values[0]) for value in values) else Scalar(values)

    def filled(self, x: Tensor, rows: Tensor, steps: Tensor, parts: int) -> Any:
        first = steps.tolist()[0]
        if len(self.values) == 1 or bool((steps == first).all()):
            return self.values[first if len(self.values) > 1 else 0]
        values = torch.stack([torch.as_tensor(value, device=x.device) for value in self.values])
        return values[steps.to(x.device)].repeat(parts)

    def select(self, rows: Tensor, parts: int) -> Slot:
        return self

    def held(self) -> list[Tensor]:
        return [value for value in self.values if isinstance(value, Tensor)]


@dataclass(frozen=True, eq=False)
class Rows:
    """One entry per part and sample, such as embeddings: one value for all steps, or one per step."""

    values: Tensor
    """[steps or 1, entries, ...]."""
    entry: Tensor | None = None
    """Which entry a row of the call is, [parts x batch]; None: its own. Samples of one prompt share an entry."""

    @property
    def form(self) -> tuple[Any, ...]:
        return ("rows", self.values.shape[1:], self.values.dtype)

    def joined(self, others: Sequence[Any]) -> Slot:
        if all(same_storage(self.values, other.values) for other in others):
            return self._compact()
        return Rows(torch.cat([self.values, *(other.values for other in others)]))

    def filled(self, x: Tensor, rows: Tensor, steps: Tensor, parts: int) -> Tensor:
        entries = self._entries(rows, parts)
        if len(self.values) == 1:
            return self.values[0, entries]
        return self.values[steps.to(entries.device).repeat(parts), entries]

    def select(self, rows: Tensor, parts: int) -> Slot:
        kept, entry = self._entries(rows, parts).unique(return_inverse=True)
        return Rows(self.values[:, kept], entry)

    def held(self) -> list[Tensor]:
        return [self.values]

    def _entries(self, rows: Tensor, parts: int) -> Tensor:
        rows = rows.to(self.values.device)
        if self.entry is not None:
            return self.entry.unflatten(0, (parts, -1))[:, rows].flatten()
        size = self.values.shape[1] // parts
        return torch.cat([part * size + rows for part in range(parts)])

    def _compact(self) -> Slot:
        """Keep one of neighbours that are equal: a group's samples have one prompt, and all have one empty prompt."""
        value = self.values[0]
        new = torch.ones(len(value), dtype=torch.bool, device=value.device)
        new[1:] = (value[1:] != value[:-1]).flatten(1).any(1) if value.ndim > 1 else value[1:] != value[:-1]
        return self if bool(new.all()) else Rows(value[new][None], new.cumsum(0) - 1)


@dataclass(frozen=True, eq=False)
class ListedRows:
    """As `Rows`, where the pipeline hands over a Python list with an entry per sample."""

    values: tuple[list[Any], ...]

    @property
    def form(self) -> tuple[Any, ...]:
        return ("listed", len(self.values[0]))

    def joined(self, others: Sequence[Any]) -> Slot:
        return ListedRows(self.values + tuple(value for other in others for value in other.values))

    def filled(self, x: Tensor, rows: Tensor, steps: Tensor, parts: int) -> list[Any]:
        size = len(self.values[0]) // parts
        pairs = list(zip(steps.tolist(), rows.tolist(), strict=True))
        return [self.values[step][part * size + row] for part in range(parts) for step, row in pairs]

    def select(self, rows: Tensor, parts: int) -> Slot:
        size = len(self.values[0]) // parts
        places = [part * size + row for part in range(parts) for row in rows.tolist()]
        return ListedRows(tuple([value[place] for place in places] for value in self.values))

    def held(self) -> list[Tensor]:
        return [leaf for leaf in pytree.tree_leaves(self.values) if isinstance(leaf, Tensor)]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the denoiser: its arguments, flattened, and how many copies of the batch it held."""

    slots: tuple[Slot, ...]
    structure: Any
    parts: int

    @property
    def form(self) -> tuple[Any, ...]:
        return (self.structure, self.parts, [slot.form for slot in self.slots])

    def joined(self, others: Sequence["Call"]) -> "Call":
        return replace(
            self, slots=tuple(slot.joined([other.slots[i] for other in others]) for i, slot in enumerate(self.slots))
        )

    def ask(self, denoiser: nn.Module, x: Tensor, rows: Tensor, steps: Tensor) -> list[Tensor]:
        leaves = [slot.filled(x, rows, steps, self.parts) for slot in self.slots]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return split_parts(first_output(denoiser(*args, **kwargs)), self.parts, x.shape)


@dataclass(frozen=True, eq=False)
class Layout:
    """Steps that differ only in numbers, so that samples of all of them fit into one call of the denoiser."""

    steps: tuple[int, ...]
    calls: tuple[Call, ...]
    combiner: Combiner | None
    problem: str = ""
    """Why there is no combiner."""

    def ask(self, denoiser: nn.Module, x: Tensor, rows: Tensor, steps: Tensor, guide: Guide | None) -> Tensor:
        if self.combiner is None:
            raise NotCombined(self.problem)
        places = torch.tensor([self.steps.index(step) for step in steps.tolist()])
        branches = [branch for call in self.calls for branch in call.ask(denoiser, x, rows, places)]
        return self.combiner(branches) if guide is None else guide(self.combiner, branches, x, rows, steps)


@dataclass(frozen=True, eq=False)
class Tape:
    """Every step of one run of a pipeline, ready to be asked again."""

    layouts: tuple[Layout, ...]

    def predict(
        self,
        denoiser: nn.Module,
        x: Float[Tensor, "n *dims"],
        rows: Int[Tensor, " n"],
        steps: Int[Tensor, " n"],
        guide: Guide | None = None,
    ) -> Float[Tensor, "n *dims"]:
        """Return the guided prediction for `x[i]`, the latents of sample `rows[i]` at step `steps[i]`, with gradient.

        One call of the denoiser, or as many as the pipeline makes per step. Only steps with other arguments than
        numbers and tensors of other shapes (a guidance interval, skipped layers) take calls of their own.

        Raises:
            NotCombined: The guidance of a step was not recognised.
        """
        order, predictions = [], []
        for layout in self.layouts:
            chosen = torch.isin(steps, torch.tensor(layout.steps, device=steps.device)).nonzero().squeeze(1)
            if len(chosen):
                order.append(chosen.to(x.device))
                predictions.append(layout.ask(denoiser, x[order[-1]], rows[chosen], steps[chosen], guide))
        return predictions[0] if len(order) == 1 else torch.cat(predictions)[torch.cat(order).argsort()]

    def select(self, rows: Int[Tensor, " n"]) -> "Tape":
        """Return a tape of these samples only."""

        def pick(call: Call) -> Call:
            return replace(call, slots=tuple(slot.select(rows, call.parts) for slot in call.slots))

        return Tape(tuple(replace(layout, calls=tuple(map(pick, layout.calls))) for layout in self.layouts))

    @property
    def nbytes(self) -> int:
        """Bytes of all recorded tensors, each storage counted once."""
        held = [t for layout in self.layouts for call in layout.calls for slot in call.slots for t in slot.held()]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def first_output(output: Any) -> Tensor:
    """Return the prediction in what a denoiser returned: a tensor, or the first entry of a tuple or output class."""
    first = output if isinstance(output, Tensor) else output[0]
    return first if isinstance(first, Tensor) else torch.stack(list(first))


def split_parts(output: Tensor, parts: int, shape: torch.Size) -> list[Tensor]:
    """Cut an output into its parts, each in the latents' shape; a learned variance beside it is left out."""
    return [_fitted(branch, (len(branch), *shape[1:])) for branch in output.chunk(parts)]


def is_listed_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, int | float) for entry in value)


def same_storage(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _fitted(branch: Tensor, shape: tuple[int, ...]) -> Tensor:
    if branch.numel() == torch.Size(shape).numel():
        return branch.reshape(shape)
    return branch[tuple(slice(size) for size in shape)]
