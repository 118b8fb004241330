"""What sampling leaves behind for training: latents, the Gaussians they were drawn from, and the denoiser's tape."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.diffusion.guidance import AdaptiveProjection
from rlalign.diffusion.pipeline_call import PipelineCall
from rlalign.diffusion.sde import Step, Transition
from rlalign.diffusion.tape import Tape


@dataclass(frozen=True, eq=False, kw_only=True)
class Trajectory:
    """Denoising runs of a batch of samples. A decision is one step of one sample."""

    latents: Float[Tensor, "batch points *dims"]
    """Before the first kept step and after each, in the dtype that the pipeline stores them in."""
    means: Float[Tensor, "batch kept *dims"]
    """Mean of each decision at collection, in float32 or wider; where a step drew nothing, what it returned."""
    first: int
    """The first kept step: with a window, the latents and means of the other steps are let go."""
    std: Float[Tensor, "batch steps"]
    """Deviation of each decision, square root of the step included; 0 where a step drew nothing."""
    log_prob: Float[Tensor, "batch steps"]
    """Log-probability of each decision at collection, in nats per dimension; 0 where a step drew nothing."""
    scored: Bool[Tensor, "batch steps"]
    """True at the decisions to train: drawn, inside the window, and in the trained fraction of the steps."""
    level: Float[Tensor, " steps"]
    """Noise level before each step: sigma of a flow, the cumulative alpha for `ddim`."""
    level_next: Float[Tensor, " steps"]
    guidance: AdaptiveProjection | None = None
    """What guides in place of the pipeline."""
    running: Float[Tensor, "batch kept *dims"] | None = None
    """State of guidance with momentum: the running difference that each step met, float32."""
    transition: Transition
    """The Gaussian of a step, given a prediction."""
    tape: Tape | None
    """What the denoiser was asked; None where steps are replayed by the pipeline."""
    call: PipelineCall
    """What the pipeline was asked."""
    output: Any
    """What the pipeline returned, for all samples, whichever of them were selected since."""
    device: torch.device
    """Where the pipeline works; the tensors above may be kept elsewhere."""

    @property
    def batch_size(self) -> int:
        return self.latents.shape[0]

    @property
    def steps(self) -> int:
        return self.log_prob.shape[1]

    @property
    def dimensions(self) -> int:
        """Number of values in one sample's latents: what clip ranges scale with."""
        return self.latents[0, 0].numel()

    @property
    def nbytes(self) -> int:
        """Bytes held for replay: batch x (kept steps + 1) latents, batch x kept steps means in float32, embeddings."""
        own = (self.latents, self.means, self.std, self.log_prob, self.scored, self.level, self.level_next)
        own += () if self.running is None else (self.running,)
        recorded = self.call.nbytes + (self.tape.nbytes if self.tape is not None else 0)
        return sum(tensor.numel() * tensor.element_size() for tensor in own) + recorded

    def moves(
        self, rows: Int[Tensor, " n"], steps: Int[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n *dims"], Float[Tensor, "n *dims"]]:
        """Latents before and after these steps."""
        return self.latents[rows, steps - self.first], self.latents[rows, steps - self.first + 1]

    def mean_of(self, rows: Int[Tensor, " n"], steps: Int[Tensor, " n"]) -> Float[Tensor, "n *dims"]:
        """Means of these decisions at collection."""
        return self.means[rows, steps - self.first]

    def decisions(self) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Return samples and steps of all scored decisions, sample by sample."""
        rows, steps = self.scored.nonzero().unbind(1)
        return rows, steps

    def select(self, rows: Int[Tensor, " n"]) -> "Trajectory":
        """Return a trajectory of these samples, in this order; what belongs to the others is let go."""
        parts = {name: self.__dict__[name][rows] for name in ("latents", "means", "std", "log_prob", "scored")}
        if self.running is not None:
            parts["running"] = self.running[rows]
        return replace(self, **parts, tape=self.tape and self.tape.select(rows), call=self.call.select(rows))


@dataclass(frozen=True, eq=False, kw_only=True)
class StepScore:
    """Decisions seen by the denoiser as it is now; everything carries gradient."""

    mean: Float[Tensor, "n *dims"]
    std: Float[Tensor, " n"]
    log_prob: Float[Tensor, " n"]
    """In nats per dimension."""
    prediction: Float[Tensor, "n *dims"]
    """What the scheduler would get, guidance included: a velocity, or the noise."""


class Taken:
    """Steps as they are taken, put into one `Trajectory` at the end.

    Args:
        storage: Where latents and means are kept; None: where they are.
        window: The steps whose latents and means are kept, first and one past the last; None: all.
    """

    def __init__(self, storage: str | torch.device | None, window: tuple[int, int] | None = None):
        self.storage = storage
        self.first, self.end = window or (0, math.inf)
        self._latents: list[Tensor] = []
        self._means: list[Tensor] = []
        self._numbers: list[tuple[Tensor, ...]] = []
        self._drawn: list[bool] = []
        self._last: Step | None = None

    @property
    def count(self) -> int:
        return len(self._drawn)

    def add(self, step: Step) -> None:
        nothing = torch.zeros(len(step.x), device=step.x.device)
        if self.first <= self.count < self.end:
            wide = torch.promote_types(step.x.dtype, torch.float32)
            points = (step.x_next,) if self._latents else (step.x, step.x_next)
            self._latents += [self._kept(point) for point in points]
            self._means.append(self._kept(step.mean if step.mean is not None else step.x_next.to(wide)))
        std, log_prob = (nothing if value is None else value for value in (step.std, step.log_prob))
        numbers = (std, log_prob, step.level.to(nothing.device), step.level_next.to(nothing.device))
        self._numbers.append(tuple(map(self._kept, numbers)))  # with the latents, which they index
        self._drawn.append(step.log_prob is not None)
        self._last = step

    def trajectory(
        self,
        trained: int,
        *,
        tape: Tape | None,
        call: PipelineCall,
        output: Any,
        guidance: AdaptiveProjection | None = None,
        running: Tensor | None = None,
    ) -> Trajectory:
        """Close the record; drawn decisions before step `trained` are scored.

        Raises:
            ValueError: The pipeline took no step.
        """
        if self._last is None:
            raise ValueError("the pipeline never called `scheduler.step`; it cannot be sampled step by step.")
        # A pipeline may begin in a wider dtype than its model answers in; the wider one holds both exactly.
        wide = (
            self._latents[0]
            if self._latents[0].dtype.itemsize > self._latents[-1].dtype.itemsize
            else self._latents[-1]
        )
        std, log_prob, level, level_next = (torch.stack(column, -1) for column in zip(*self._numbers, strict=True))
        scored = torch.tensor([drawn and k < trained for k, drawn in enumerate(self._drawn)], device=std.device)
        return Trajectory(
            latents=torch.stack([latents.to(wide.dtype) for latents in self._latents], 1),
            means=torch.stack(self._means, 1),
            first=self.first,
            std=std,
            log_prob=log_prob,
            scored=scored.expand(len(std), -1).clone(),
            level=level,
            level_next=level_next,
            guidance=guidance,
            running=None
            if running is None
            else self._kept(running[:, self.first : self.first + len(self._means)]).clone(),
            transition=self._last.transition,
            tape=tape,
            call=call,
            output=output,
            device=self._last.x.device,
        )

    def _kept(self, tensor: Tensor) -> Tensor:
        return tensor.detach() if self.storage is None else tensor.detach().to(self.storage)
