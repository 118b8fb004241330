"""What a pipeline tells its denoiser about each prompt: recorded once, then asked about any latents at any noise level.

Only the conditional branch is kept: fine-tuning on clean samples, like pretraining, has no guidance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rlalign.config import ConfigError
from rlalign.diffusion.combiner import Combiner
from rlalign.diffusion.config import SDEConfig
from rlalign.diffusion.prompts import Prompts
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.sde import stochastic_scheduler
from rlalign.diffusion.tape import (
    Call,
    Latents,
    Layout,
    ListedRows,
    Rows,
    Slot,
    Table,
    first_output,
    split_parts,
)
from rlalign.diffusion.trajectory import Trajectory

_STEPS = 3
"""Of the recorded run: two noise levels fix how the model's time depends on them, the third checks it."""


@dataclass(frozen=True)
class ModelTime:
    """How a denoiser is told the noise level: `offset + scale x level`, its level sigma or a discrete timestep."""

    offset: float | int
    scale: float | int
    dtype: torch.dtype

    def __call__(self, level: Float[Tensor, " n"]) -> Tensor:
        return (self.offset + self.scale * level).to(self.dtype)


@dataclass(frozen=True, eq=False)
class _Asked:
    """The arguments for some prompts. `slots` has a `ModelTime` where the noise level stands."""

    slots: tuple[Slot | ModelTime, ...]
    structure: Any
    count: int

    def ask(self, denoiser: nn.Module, x: Tensor, level: Tensor, rows: Tensor) -> Tensor:
        still = torch.zeros_like(rows)
        leaves = [slot(level) if isinstance(slot, ModelTime) else slot.filled(x, rows, still, 1) for slot in self.slots]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return split_parts(first_output(denoiser(*args, **kwargs)), 1, x.shape)[0]

    def joined(self, other: "_Asked") -> "_Asked | None":
        """The arguments for both's prompts; None where they do not fit into one call."""
        if self.structure != other.structure:
            return None
        slots = [_joined(mine, theirs) for mine, theirs in zip(self.slots, other.slots, strict=True)]
        kept = tuple(slot for slot in slots if slot is not None)
        return replace(self, slots=kept, count=self.count + other.count) if len(kept) == len(slots) else None


class Conditions:
    """Asks the denoiser of a pipeline without the pipeline.

    A short run of the pipeline per prompt records the arguments of its denoiser. Latents and noise level are then
    replaced; everything else (embeddings, ids, distilled guidance) stays as the pipeline gave it.

    Args:
        pipeline: Any that `StochasticSampler` takes.
        prompts: What may be asked for.
        call: Further arguments of each call of the pipeline.
        batch_size: Prompts per recorded run.

    Attributes:
        kind: What the denoiser predicts: flow, epsilon, v_prediction or sample.
        alpha_bars: Of each discrete timestep; None for flow models, whose level is sigma.
        sign: -1 where the pipeline turns the denoiser's output around.
    """

    def __init__(self, pipeline: DiffusionPipeline, prompts: Prompts, call: Mapping[str, Any], *, batch_size: int = 64):
        self.prompts, self.call, self.batch_size = prompts, dict(call), batch_size
        self.sampler = StochasticSampler(pipeline, SDEConfig())
        scheduler: Any = stochastic_scheduler(pipeline.scheduler, SDEConfig())
        flow = scheduler.sde.kind != "ddim"
        self.alpha_bars: Tensor | None = None if flow else scheduler.alphas_cumprod
        self.kind = "flow" if flow else scheduler.config["prediction_type"]
        self.sign = 1
        self._asked: list[_Asked] = []
        self._known: dict[int, tuple[int, int]] = {}

    def record(self, indices: Sequence[int]) -> None:
        """Make sure that these prompts can be asked about.

        Raises:
            ConfigError: The denoiser's arguments depend on the noise level in a way that is not understood.
            NotCombined: The pipeline's guidance was not recognised.
        """
        new = [k for k in dict.fromkeys(indices) if k not in self._known]
        for first in range(0, len(new), self.batch_size):
            part = new[first : first + self.batch_size]
            self._add(part, self._recorded(part))

    def predict(
        self, x: Float[Tensor, "n *dims"], level: Float[Tensor, " n"], prompts: Int[Tensor, " n"]
    ) -> Float[Tensor, "n *dims"]:
        """What the denoiser says of `x[i]` at a noise level, given its prompt; with gradient.

        Args:
            x: Noisy latents.
            level: Sigma of each for flow models, else the discrete timestep as a float.
            prompts: Row of each one's prompt; `record` has seen it.
        """
        homes, rows = torch.tensor([self._known[prompt] for prompt in prompts.tolist()]).unbind(1)
        order, parts = [], []
        for home in homes.unique().tolist():
            here = (homes == home).nonzero().squeeze(1)
            there = here.to(x.device)
            order.append(there)
            parts.append(self._asked[home].ask(self.sampler.denoiser, x[there], level[there], rows[here]))
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)[torch.cat(order).argsort()]
        return self.sign * joined

    @property
    def nbytes(self) -> int:
        """Memory of the recorded arguments."""
        slots = [slot for asked in self._asked for slot in asked.slots if not isinstance(slot, ModelTime)]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for s in slots for t in s.held()}
        return sum(held.values())

    def _add(self, prompts: Sequence[int], asked: _Asked) -> None:
        """Put the arguments beside those that fit into one call with them."""
        for home, other in enumerate(self._asked):
            joined = other.joined(asked)
            if joined is not None:
                self._asked[home] = joined
                self._known |= {prompt: (home, other.count + row) for row, prompt in enumerate(prompts)}
                return
        self._known |= {prompt: (len(self._asked), row) for row, prompt in enumerate(prompts)}
        self._asked.append(asked)

    def _recorded(self, indices: Sequence[int]) -> _Asked:
        latent = {"output_type": "latent"} if "output_type" in self.prompts.parameters else {}
        call = {**self.prompts.call(indices), **self.call, "num_inference_steps": _STEPS, **latent}
        run = self.sampler.sample(call, seeds=range(len(indices)))
        assert run.tape is not None
        layout = max(run.tape.layouts, key=lambda layout: len(layout.steps))
        asked, part, self.sign = conditional_branch(layout)
        times = self._times(run, layout)
        slots = tuple(
            _settled(slot, run.latents[:, 0], len(indices), asked.parts, part, times, f"argument {place + 1}")
            for place, slot in enumerate(asked.slots)
        )
        if not any(isinstance(slot, ModelTime) for slot in slots):
            raise ConfigError(
                "no argument of the denoiser depends on the noise level; this model cannot be fine-tuned."
            )
        return _Asked(slots, asked.structure, len(indices))

    def _times(self, run: Trajectory, layout: Layout) -> list[float]:
        """The noise level of each recorded step, in the terms of `predict`."""
        levels = run.level[list(layout.steps)].double().cpu()
        if self.alpha_bars is None:
            return levels.tolist()
        return [float((self.alpha_bars.double().cpu() - level).abs().argmin()) for level in levels]


def conditional_branch(layout: Layout) -> tuple[Call, int, int]:
    """Which of a step's denoiser outputs is the conditional one: that which guidance extrapolates to.

    Returns:
        Its call, its part of that call, and the sign the pipeline gives to the outputs.

    Raises:
        ConfigError: The step's guidance was not recognised.
    """
    branches = [(call, part) for call in layout.calls for part in range(call.parts)]
    combiner = layout.combiner or (Combiner() if len(branches) == 1 else None)
    if combiner is None:
        raise ConfigError(
            f"which of the denoiser's outputs is the conditional one could not be read off: {layout.problem} Leave the "
            "guidance out of `pipeline.call`."
        )
    weights = {combiner.base: 1 - sum(combiner.weights), **dict(zip(combiner.others, combiner.weights, strict=True))}
    call, part = branches[max(weights, key=weights.__getitem__)]
    return call, part, combiner.sign


def _settled(
    slot: Slot, x: Tensor, batch: int, parts: int, part: int, times: Sequence[float], name: str
) -> Slot | ModelTime:
    """One argument, cut to one branch; the one that follows the noise level becomes a function of it."""
    rows = torch.arange(batch)
    values = [slot.filled(x, rows, torch.full_like(rows, step), parts) for step in range(len(times))]
    if isinstance(slot, Latents) or all(_equal(value, values[0]) for value in values[1:]):
        match slot:
            case Latents():
                return slot
            case Rows():
                return Rows(values[0].chunk(parts)[part][None])
            case ListedRows():
                return ListedRows((values[0][part * batch : (part + 1) * batch],))
        return Table(values[0])
    numbers = [torch.as_tensor(value).detach().flatten()[0].double().cpu().item() for value in values]
    return _model_time(numbers, times, torch.as_tensor(values[0]).dtype, name)


def _model_time(numbers: Sequence[float], times: Sequence[float], dtype: torch.dtype, name: str) -> ModelTime:
    scale = (numbers[-1] - numbers[0]) / (times[-1] - times[0])
    offset = numbers[0] - scale * times[0]
    half = dtype.is_floating_point and dtype.itemsize < 4
    rounding = max(map(abs, numbers)) * (4 * torch.finfo(dtype).eps if half else 1e-4)
    # Whole numbers first: 999.99994 is float32's 1000.
    for one in (ModelTime(round(offset), round(scale), dtype), ModelTime(offset, scale, dtype)):
        if all(abs(one.offset + one.scale * t - n) <= rounding for t, n in zip(times, numbers, strict=True)):
            return one
    raise ConfigError(
        f"{name} of the denoiser changes from step to step and is not the noise level ({numbers} at {list(times)}), so "
        "it is not known at other levels. Leave out of `pipeline.call` what makes it change."
    )


def _joined(mine: Slot | ModelTime, theirs: Slot | ModelTime) -> Slot | ModelTime | None:
    match mine, theirs:
        case (Rows(values=a), Rows(values=b)) if a.shape[2:] == b.shape[2:] and a.dtype == b.dtype:
            return Rows(torch.cat([a, b], 1))
        case ListedRows(values=(a,)), ListedRows(values=(b,)):
            return ListedRows((a + b,))
        case Table(value=a), Table(value=b):
            return mine if _equal(a, b) else None
        case (ModelTime() | Latents(), ModelTime() | Latents()):
            return mine if mine == theirs else None
    return None


def _equal(a: Any, b: Any) -> bool:
    mine, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(mine) == len(theirs) and all(_equal_leaves(x, y) for x, y in zip(mine, theirs, strict=True))


def _equal_leaves(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
