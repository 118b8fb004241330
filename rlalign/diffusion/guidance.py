"""Adaptive projected guidance on any classic diffusers pipeline that runs classifier-free guidance, without a fork."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlalign.diffusion.branches import two_branches, weighed
from rlalign.diffusion.combiner import NotCombined, infer_combiner
from rlalign.diffusion.intercepted import Intercepted, intercepting
from rlalign.diffusion.networks import denoisers
from rlalign.diffusion.prediction_space import (
    PredictionSpace,
    evaluations_per_step,
    prediction_space,
    scheduler_family,
)
from rlalign.functional.guidance import adaptive_projected

_MOST_CALLS = 4
"""Calls of the denoiser between two steps above which nobody can be stepping the scheduler that is listened to."""


@contextmanager
def adaptive_projected_guidance(
    pipeline: Any, *, eta: float | int = 0.0, norm_threshold: float | int = 15.0, momentum: float | int = -0.5
) -> Iterator["GuidanceLog"]:
    """Replace a pipeline's classifier-free guidance by adaptive projected guidance (APG) for the calls in the block.

        with adaptive_projected_guidance(pipeline) as log:
            image = pipeline(prompt, guidance_scale=15).images[0]

    The pipeline runs as it is, with its own guidance scale. A forward hook hears what its denoiser predicts; the
    scheduler's `step` then gets the prediction guided by APG, in denoised space, in place of the pipeline's own. Both
    are checked against each other first: the pipeline's prediction must be u + w (c - u) of what was heard.

    Args:
        pipeline: Any diffusers pipeline with a `scheduler` that guides in one call of 2 B rows or in two calls.
        eta: Share of the update parallel to the conditional prediction that is kept; 1 keeps all.
        norm_threshold: Largest norm of the difference, per sample over all dimensions; 0 is no limit. It grows with
            sqrt(dimensions) and the latents' scale: choose near `log.metrics()["apg/difference_norm"]`.
        momentum: Of the running difference; negative pushes away from earlier steps, 0 is off. It starts anew with each
            image (at `set_timesteps`). Refused for solvers that ask the denoiser several times per step.

    Yields:
        A log of the current image's steps, with the typical norms.

    Raises:
        ValueError: The scheduler is unknown, or asks several times per step while `momentum` is not 0, or APG is
            already on. During a call: no guidance runs (scale <= 1, or distilled guidance), or more than that.

    Reference:
        Sadat et al. 2025 (arXiv:2410.02416), algorithm 1; defaults of its table 10 for SDXL.
    """
    projection = AdaptiveProjection(eta=eta, norm_threshold=norm_threshold, momentum=momentum)
    session = _Session(projection, pipeline.scheduler)
    _check(session.scheduler, momentum)
    handles = [module.register_forward_hook(session.hear) for module in denoisers(pipeline)]
    with intercepting(session.scheduler, {"step": session.guide, "set_timesteps": session.restart}):
        try:
            yield session.log
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, kw_only=True)
class AdaptiveProjection:
    """The three numbers of APG, and the guidance that they make of one step's predictions."""

    eta: float | int = 0.0
    norm_threshold: float | int = 15.0
    momentum: float | int = -0.5

    def __call__(
        self,
        cond: Float[Tensor, "batch *dims"],
        uncond: Float[Tensor, "batch *dims"],
        x: Float[Tensor, "batch *dims"],
        space: PredictionSpace,
        *,
        scale: float,
        running: Float[Tensor, "batch *dims"] | None = None,
    ) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, "batch *dims"], "GuidanceStep"]:
        """Guide raw predictions in denoised space.

        Args:
            cond: The denoiser's prediction with the condition.
            uncond: The prediction without it.
            x: The latents that the scheduler's step takes.
            space: What the predictions mean (`prediction_space`).
            scale: The guidance scale w.
            running: The running difference that the step before in the same image returned; None at its first.

        Returns:
            The guided prediction in float32 or wider, the running difference (with momentum a part of the sampler's
            state: keep it beside the latents where transitions are to be replayed), and the step's figures.
        """
        guided, after = self.guided(cond, uncond, x, space, scale=scale, running=running)
        denoised, other = (space.denoised(_wide(one), _wide(x)) for one in (cond, uncond))
        figures = GuidanceStep(
            scale=scale,
            difference_norm=float(_norms(denoised - other).mean()),
            running_norm=float(_norms(after).mean()),
            limited_frac=float((_norms(after) > self.norm_threshold).double().mean()) if self.norm_threshold else 0.0,
            parallel_frac=float(_parallel_fractions(after, denoised).mean()),
        )
        return guided, after, figures

    def guided(
        self,
        cond: Float[Tensor, "batch *dims"],
        uncond: Float[Tensor, "batch *dims"],
        x: Float[Tensor, "batch *dims"],
        space: PredictionSpace,
        *,
        scale: float,
        running: Float[Tensor, "batch *dims"] | None = None,
    ) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, "batch *dims"]]:
        """The same without the figures, and with gradient."""
        wide = _wide(x)
        guided, after = adaptive_projected(
            space.denoised(_wide(cond), wide),
            space.denoised(_wide(uncond), wide),
            scale=scale,
            eta=self.eta,
            norm_threshold=self.norm_threshold,
            momentum=self.momentum,
            running=running,
        )
        return space.prediction(guided, wide), after


@dataclass(frozen=True, kw_only=True)
class GuidanceStep:
    """What guidance did in one step: means over the samples, in denoised space."""

    scale: float
    """The guidance scale w, as read off the pipeline's own prediction."""
    difference_norm: float
    """|D_c - D_u|."""
    running_norm: float
    """|m|, which `norm_threshold` limits; |D_c - D_u| without momentum."""
    limited_frac: float
    """Share of samples that the limit cut."""
    parallel_frac: float
    """Share of |m|² along D_c, which `eta=0` removes."""


@dataclass(eq=False)
class GuidanceLog:
    """The steps of the image that is being made, or was made last."""

    steps: list[GuidanceStep] = field(default_factory=list)
    running: Tensor | None = None
    """The running difference m after the last step."""

    def metrics(self) -> dict[str, float]:
        """Means over the steps of the image."""
        if not self.steps:
            raise ValueError("no step was guided yet: call the pipeline inside the block first.")
        return {f"apg/{one.name}": fmean(vars(step)[one.name] for step in self.steps) for one in fields(GuidanceStep)}

    def clear(self) -> None:
        """Forget the image."""
        self.steps.clear()
        self.running = None


@dataclass(eq=False)
class _Session:
    """The state of one block: what was heard since the last step, and the momentum of the image."""

    projection: AdaptiveProjection
    scheduler: Any
    log: GuidanceLog = field(default_factory=GuidanceLog)
    heard: list[Tensor] = field(default_factory=list)

    def restart(self, _: Mapping[str, Any]) -> None:
        """A new image begins."""
        self.heard.clear()
        self.log.clear()

    def hear(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.heard.append(output if isinstance(output, Tensor) else output[0])
        if len(self.heard) > _MOST_CALLS:
            raise ValueError(
                "the denoiser runs, but the scheduler that the pipeline had at the beginning of the block takes no "
                "step: set `pipeline.scheduler` before the block, and run other pipelines of this denoiser after it."
            )

    def guide(self, arguments: dict[str, Any]) -> None:
        """Put the guided prediction in place of the pipeline's own among the arguments of `scheduler.step`."""
        prediction, x = arguments["model_output"], arguments["sample"]
        branches = self._branches(prediction)
        if len(branches) == 1 and self.log.steps:
            return  # Guidance ended before the last step, as guidance intervals do: nothing to project.
        recognised = _pair(branches, prediction)
        if recognised is None and not self.log.steps:
            return  # Condition and no condition give the same: any guidance of it is the same too.
        cond, uncond, scale = recognised or (*branches, self.log.steps[-1].scale)
        space = prediction_space(self.scheduler, arguments["timestep"])
        running = self.log.running if self.projection.momentum else None
        guided, self.log.running, figures = self.projection(cond, uncond, x, space, scale=scale, running=running)
        self.log.steps.append(figures)
        arguments["model_output"] = guided.to(prediction.dtype)

    def _branches(self, prediction: Tensor) -> list[Tensor]:
        outputs, self.heard = self.heard, []
        rows = len(prediction)
        if any(len(output) % rows or output.shape[1:] != prediction.shape[1:] for output in outputs):
            shapes = [tuple(output.shape) for output in outputs]
            raise ValueError(
                f"the denoiser's outputs {shapes} are not rows of predictions like the {tuple(prediction.shape)} that "
                "the scheduler gets; this pipeline's guidance cannot be replaced from outside."
            )
        return [branch for output in outputs for branch in output.split(rows)]


def _pair(branches: list[Tensor], prediction: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """Both predictions and the scale, which is read off the pipeline's own: no pipeline needs to be asked for it.

    None where both are equal.
    """
    two_branches(branches)
    try:
        combiner = infer_combiner(branches, prediction, candidates=())
    except NotCombined as error:
        raise ValueError(
            "the pipeline's prediction is not u + w (c - u) of its denoiser's two outputs: it changes it afterwards, "
            "by `guidance_rescale` (set it to 0) or a renormalisation (Qwen-Image), or guides in another space."
        ) from error
    return None if combiner is None else weighed(combiner, branches)


def _check(scheduler: Any, momentum: float | int) -> None:
    scheduler_family(scheduler)
    if isinstance(vars(scheduler).get("step"), Intercepted):
        raise ValueError(
            "adaptive projected guidance is already on for this pipeline's scheduler; leave that block first."
        )
    if momentum != 0 and evaluations_per_step(scheduler) > 1:
        raise ValueError(
            f"{type(scheduler).__name__} asks the denoiser {evaluations_per_step(scheduler)} times per step, and "
            "momentum would count each; pass momentum=0, or use a multistep solver (DPMSolverMultistepScheduler)."
        )


def _wide(x: Tensor) -> Tensor:
    # Dividing by small noise levels amplifies rounding. Apple's GPUs have no float64.
    return x.float() if x.device.type == "mps" else x.double()


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def _parallel_fractions(running: Tensor, cond: Tensor) -> Tensor:
    product = (running * cond).flatten(1).sum(1)
    scale = (_norms(running) * _norms(cond)).clamp(min=torch.finfo(torch.float32).tiny)
    return (product / scale) ** 2
