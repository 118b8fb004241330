"""Writes a tape: listens to the denoiser while a pipeline runs, and sorts each argument by what it belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rlalign.diffusion.combiner import Combiner, NotCombined, infer_combiner
from rlalign.diffusion.sde import Step
from rlalign.diffusion.tape import (
    Call,
    Latents,
    Layout,
    ListedRows,
    Rows,
    Scalar,
    Slot,
    Table,
    Tape,
    first_output,
    split_parts,
)

# Arguments that may be as long as the batch by chance and still belong to no sample.
_TABLES = frozenset({"img_ids", "txt_ids", "image_rotary_emb", "rotary_emb", "freqs_cis", "skip_layers"})

EQUAL_BRANCHES = (
    "the guided and the unguided output of the denoiser are equal at every step, so the guidance weight cannot be read "
    "off. Guidance does nothing here: train without it (guidance_scale=1)."
)


@dataclass(frozen=True, eq=False)
class _Recorded:
    calls: list[Call]
    combiner: Combiner | None
    problem: str


@dataclass(eq=False)
class Recorder:
    """Context manager that hooks a denoiser and leaves no hook behind.

    Args:
        denoiser: The module that a pipeline calls at each step.
        batch_size: Number of samples; a call may hold them several times.
        numbers: The numbers among the pipeline's arguments. One may be the guidance weight.
    """

    denoiser: nn.Module
    batch_size: int
    numbers: Sequence[float]
    _steps: list[_Recorded] = field(default_factory=list)
    _asked: list[Any] = field(default_factory=list)
    _answers: list[Tensor] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> "Recorder":
        self._handles.append(self.denoiser.register_forward_pre_hook(self._on_call, with_kwargs=True))
        self._handles.append(self.denoiser.register_forward_hook(self._on_answer))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def close_step(self, step: Step) -> tuple[list[Tensor], Combiner | None, str]:
        """Take the calls since the last step as those that made this step's prediction.

        Returns:
            The denoiser's outputs, how the prediction is combined of them, and why that is not known.

        Raises:
            ValueError: There was no call, or its rows do not fit the number of samples.
        """
        asked, answers = self._asked, self._answers
        self._asked, self._answers = [], []
        if not asked:
            raise ValueError(
                f"the pipeline took step {step.position} without calling its {type(self.denoiser).__name__}; "
                "name the component that it does call with `denoiser=`."
            )
        branches = [part for out in answers for part in split_parts(out, self._parts(out), step.prediction.shape)]
        earlier = self._steps[-1].calls if self._steps and len(self._steps[-1].calls) == len(asked) else []
        calls = []
        for index, (arguments, answer) in enumerate(zip(asked, answers, strict=True)):
            calls.append(_call(arguments, self._parts(answer), step.x, earlier[index] if earlier else None))
        self._steps.append(_Recorded(calls, *self._combined(branches, step)))
        return branches, *self._settled(self._steps[-1])

    def tape(self) -> Tape:
        """Group the steps that fit into one call of the denoiser."""
        groups: list[tuple[tuple[Any, ...], list[int]]] = []
        for position, step in enumerate(self._steps):
            form = ([call.form for call in step.calls], *self._settled(step))
            for known, positions in groups:
                if known == form:
                    positions.append(position)
                    break
            else:
                groups.append((form, [position]))
        return Tape(tuple(self._layout(positions, form[1], form[2]) for form, positions in groups))

    def _on_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # Containers are copied before the call: a model may change a nested dictionary of arguments.
        self._asked.append(pytree.tree_map(lambda leaf: leaf, (args, dict(kwargs))))

    def _on_answer(self, _: nn.Module, args: Any, output: Any) -> None:
        self._answers.append(first_output(output))

    def _parts(self, answer: Tensor) -> int:
        if len(answer) % self.batch_size:
            raise ValueError(
                f"the denoiser answered with {len(answer)} rows for {self.batch_size} seeds: the call must make one "
                "sample per seed (prompts x num_images_per_prompt)."
            )
        return len(answer) // self.batch_size

    def _combined(self, branches: list[Tensor], step: Step) -> tuple[Combiner | None, str]:
        known = next((before.combiner for before in reversed(self._steps) if before.combiner is not None), None)
        try:
            return infer_combiner(branches, step.prediction, candidates=self.numbers, known=known), ""
        except NotCombined as error:
            return None, f"step {step.position}: {error}"

    def _settled(self, step: _Recorded) -> tuple[Combiner | None, str]:
        """A step whose branches were equal takes the weight of another step with as many."""
        if step.combiner is not None or step.problem:
            return step.combiner, step.problem
        parts = [call.parts for call in step.calls]
        alike = [other for other in self._steps if other.combiner and [call.parts for call in other.calls] == parts]
        return (alike[0].combiner, "") if alike else (None, EQUAL_BRANCHES)

    def _layout(self, positions: list[int], combiner: Combiner | None, problem: str) -> Layout:
        first, *others = (self._steps[position].calls for position in positions)
        calls = tuple(call.joined([other[index] for other in others]) for index, call in enumerate(first))
        return Layout(tuple(positions), calls, combiner, problem)


def _call(arguments: Any, parts: int, x: Tensor, before: Call | None) -> Call:
    copies = x.repeat(parts, *(1,) * (x.ndim - 1))

    def is_row_list(value: Any) -> bool:
        """One entry per row of the call; a list of tensors that have a row each (residuals) is none."""
        whole = isinstance(value, list) and all(isinstance(e, Tensor) and _has_rows(e, len(copies)) for e in value)
        return isinstance(value, list) and len(value) == len(copies) and not whole

    flat, structure = pytree.tree_flatten_with_path(arguments, is_leaf=is_row_list)
    before = before if before is not None and before.structure == structure else None
    slots = []
    for index, (path, leaf) in enumerate(flat):
        names = {entry.key for entry in path if isinstance(entry, pytree.MappingKey)}
        slot = _slot(leaf, copies, is_table=bool(names & _TABLES))
        slots.append(_shared(slot, before.slots[index]) if before is not None else slot)
    return Call(tuple(slots), structure, parts)


def _slot(leaf: Any, copies: Tensor, *, is_table: bool) -> Slot:
    match leaf:
        case Tensor() if leaf.shape == copies.shape and torch.equal(leaf, copies.to(leaf.dtype)):
            return Latents(leaf.dtype)
        case Tensor() if _has_rows(leaf, len(copies)) and not is_table:
            return Rows(leaf[None])
        case list() if not is_table:
            return ListedRows((leaf,))
        case int() | float() if not isinstance(leaf, bool):
            return Scalar((leaf,))
        case Tensor() if leaf.ndim == 0:
            return Scalar((leaf,))
    return Table(leaf)


def _has_rows(leaf: Tensor, rows: int) -> bool:
    return leaf.ndim > 0 and len(leaf) == rows


def _shared(slot: Slot, before: Slot) -> Slot:
    """The slot of the step before, where both hold equal tensors: embeddings are kept once, not once per step."""
    match slot, before:
        case (Table(value=Tensor() as new), Table(value=Tensor() as old)):
            return before if _equal(new, old) else slot
        case (Rows(values=new), Rows(values=old)):
            return before if _equal(new, old) else slot
    return slot


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
