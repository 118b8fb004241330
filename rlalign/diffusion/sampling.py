"""Sampling with log-probabilities from an unmodified pipeline, and scoring any of its steps again."""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Int
from torch import Tensor, nn

from rlalign.diffusion.config import SDEConfig
from rlalign.diffusion.guidance import AdaptiveProjection
from rlalign.diffusion.guided_steps import GuidedSteps, Replayed
from rlalign.diffusion.networks import denoiser_named, evaluating
from rlalign.diffusion.pipeline_call import PipelineCall, per_sample, quiet, recorded_prompts, replaced_scheduler
from rlalign.diffusion.recorder import Recorder
from rlalign.diffusion.sde import Step, StochasticStep, stochastic_scheduler
from rlalign.diffusion.trajectory import StepScore, Taken, Trajectory
from rlalign.functional.flow import gaussian_log_prob
from rlalign.training.seeding import derived_seed

Window = tuple[int, int]


class StochasticSampler:
    """Draws samples from a diffusers pipeline by steps with a known density, and replays any of those steps.

    The pipeline runs its own `__call__`. While it does, its scheduler is replaced by a copy that adds noise, and hooks
    on its denoiser record what it is asked; afterwards, or when something raises, the pipeline is as it was.

    Args:
        pipeline: Any pipeline whose `scheduler.step` is called once per denoising step.
        sde: Which noise.
        window: First and one past the last step that add noise; the others are the scheduler's own. None: all but the
            last, after which nothing would take the noise out again.
        trained_fraction: Only the first `int(steps * trained_fraction)` steps are marked as `scored`.
        denoiser: Name of the component that predicts. None: `transformer` or `unet`, or the only network there is.
        arguments: Arguments of every call of the pipeline; those of a single call stand above them.
        storage: Where trajectories keep latents and means, such as "cpu". None: where the pipeline works.
        by_pipeline: Replay by running the pipeline's `__call__` for each step alone, in place of the recorded denoiser
            calls: slower, and right for guidance that is no affine combination of the denoiser's outputs.
        guidance: Guide by adaptive projection in place of the pipeline's classifier-free guidance, at its scale. With
            momentum the trajectory holds the running difference that each step met.

    Raises:
        ValueError: The scheduler does not fit the noise, there is no telling which component is the denoiser, or a
            setting is out of range.

    Example:
        >>> from rlalign.diffusion import tiny_call, tiny_pipeline
        >>> sampler = StochasticSampler(tiny_pipeline("sd3"), SDEConfig())
        >>> trajectory = sampler.sample(tiny_call("sd3", 2), seeds=[0, 1])
        >>> rows, steps = trajectory.decisions()
        >>> sampler.replay(trajectory, rows, steps).log_prob.shape  # 2 samples x 3 scored steps in one denoiser call
        torch.Size([6])

    Reference:
        Liu et al. 2025 (arXiv:2505.05470) for the SDE and the trained fraction; Li et al. 2025 (arXiv:2507.21802),
        MixGRPO, for windows.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        sde: SDEConfig,
        *,
        window: Window | None = None,
        trained_fraction: float | int = 0.99,
        denoiser: str | None = None,
        arguments: Mapping[str, Any] | None = None,
        storage: str | torch.device | None = None,
        by_pipeline: bool = False,
        guidance: AdaptiveProjection | None = None,
    ):
        if not 0 < trained_fraction <= 1:
            raise ValueError(f"`trained_fraction` is a share of the steps in (0, 1], got {trained_fraction}.")
        _check_window(window)
        if guidance is not None and by_pipeline:
            raise ValueError("`guidance` projects recorded predictions, which `by_pipeline=True` does without.")
        stochastic_scheduler(pipeline.scheduler, sde)  # fail early
        self.pipeline, self.sde, self.arguments = pipeline, sde, dict(arguments or {})
        self.window, self.trained_fraction = window, trained_fraction
        self.storage, self.by_pipeline, self._name = storage, by_pipeline, denoiser
        self.guidance = guidance
        denoiser_named(pipeline, denoiser)

    @property
    def denoiser(self) -> nn.Module:
        """The pipeline's network that predicts, as it stands there now."""
        return denoiser_named(self.pipeline, self._name)

    def sample(
        self,
        call: Mapping[str, Any],
        *,
        seeds: Sequence[int],
        window: Window | None = None,
        same_noise: Sequence[int] | None = None,
    ) -> Trajectory:
        """Run the pipeline once, for one sample per seed.

        Args:
            call: Arguments of the pipeline, without `generator`.
            seeds: One per sample; it alone decides the sample's initial noise (that of
                `torch.Generator().manual_seed(seed)`) and the noise of its steps, whatever stands beside it.
            window: Instead of the sampler's own, for this run.
            same_noise: Seeds of the initial noise, where it is to be shared within a group.

        Raises:
            ValueError: The call does not give one sample per seed, or a window reaches past the last step.
        """
        call = self.arguments | dict(call)
        initial = seeds if same_noise is None else same_noise
        _check_call(call, seeds, initial)
        window = window or self.window
        scheduler, taken = self._scheduler(window), Taken(self.storage, window)
        recorder = Recorder(self.denoiser, len(seeds), _numbers(self.pipeline, call))

        guided = None if self.guidance is None else GuidedSteps(self.guidance, recorder)

        def guide(step: Step) -> Tensor:
            _check_count(step.x, seeds)
            if guided is not None:
                return guided(step)
            if not self.by_pipeline:
                recorder.close_step(step)
            return step.prediction

        own = [derived_seed(seed, "denoise") for seed in seeds]
        scheduler.noise = lambda position, like: _step_noise(own, position, like)
        scheduler.guide, scheduler.listener = guide, taken.add
        noise = [torch.Generator().manual_seed(seed) for seed in initial]
        listening = nullcontext() if self.by_pipeline else recorder
        with self._running(scheduler), listening, recorded_prompts(self.pipeline) as encoded, torch.no_grad():
            output = self.pipeline(**call, generator=noise)  # type: ignore[operator]
        tape = None if self.by_pipeline else recorder.tape()
        # Embeddings stand on the tape already; a second copy is only for steps that it cannot replay.
        kept = () if tape is not None and all(layout.combiner for layout in tape.layouts) else tuple(encoded)
        asked = PipelineCall(per_sample(call, len(seeds)), len(seeds), kept)
        trained = _trained_steps(taken.count, self.trained_fraction, window)
        running = None if guided is None else guided.met()
        return taken.trajectory(trained, tape=tape, call=asked, output=output, guidance=self.guidance, running=running)

    def replay(self, trajectory: Trajectory, rows: Int[Tensor, " n"], steps: Int[Tensor, " n"]) -> StepScore:
        """Score decisions under the denoiser as it is now, steps mixed freely, in one call of it and with gradient.

        Neither the text encoders nor the decoder run. Where the pipeline guides, gradient flows through both branches.
        Dropout is off while the denoiser runs; with gradient checkpointing keep the denoiser in evaluation mode, since
        it runs again in the backward pass. With `by_pipeline`, each step is a run of the pipeline.

        Args:
            trajectory: From `sample`.
            rows: Samples.
            steps: The step of each.

        Raises:
            NotCombined: The pipeline's guidance was not recognised; `by_pipeline` needs no knowledge of it.
            ValueError: A step drew nothing, so it has no density.
        """
        if trajectory.tape is None:
            return self._step_by_step(trajectory, rows, steps)
        x, x_next = self._moves(trajectory, rows, steps)
        with evaluating(self.denoiser):
            guide = None if trajectory.guidance is None else Replayed(trajectory, trajectory.guidance)
            prediction = trajectory.tape.predict(self.denoiser, x, rows, steps, guide)
        return _score(trajectory, x, x_next, prediction, steps)

    def replay_by_pipeline(self, trajectory: Trajectory, rows: Int[Tensor, " n"], step: int) -> StepScore:
        """Score one step of some samples by running the pipeline's own `__call__` for that step alone, with gradient.

        Right for whatever a pipeline does between its denoiser and its scheduler, but its count of steps starts again
        at 0: guidance that depends on it is evaluated wrongly. Slower than `replay`. Text is not encoded again if the
        sampler was made with `by_pipeline`, or could not recognise the guidance.

        Raises:
            ValueError: The step drew nothing, so it has no density; or it was guided by `guidance`.
        """
        if trajectory.guidance is not None:
            raise ValueError("steps that were guided by `guidance` are replayed by `replay` alone.")
        steps = torch.full_like(rows, step)
        x, x_next = self._moves(trajectory, rows, steps)
        scheduler = self._scheduler(None)
        scheduler.mode, scheduler.only = "score", step
        heard: list[Step] = []
        scheduler.listener = heard.append
        takes = inspect.signature(type(self.pipeline).__call__).parameters  # type: ignore[operator]
        changed = {"latents": x} | ({"output_type": "latent"} if "output_type" in takes else {})
        with self._running(scheduler):
            trajectory.call.select(rows).run(self.pipeline, **changed)
        return _score(trajectory, x, x_next, heard[0].prediction, steps)

    def parity(self, trajectory: Trajectory, limit_rows: int | None = 4) -> float:
        """Return the largest difference between replayed and recorded log-probabilities; before any update it is ~0.

        Above a tenth of the clip range, look for: another batch size or precision in training (bfloat16 on a GPU),
        autocast around one of the two, compilation, quantised or trained text encoders.

        `limit_rows` looks only at that many samples; None: at all.

        Raises:
            ValueError: Nothing of the trajectory is scored.
        """
        rows, steps = trajectory.decisions()
        if limit_rows is not None:
            rows, steps = rows[rows < limit_rows], steps[rows < limit_rows]
        if not len(rows):
            raise ValueError("no step of the trajectory is scored; widen `window` or raise `trained_fraction`.")
        with torch.no_grad():
            now = self.replay(trajectory, rows, steps).log_prob
        return float((now.cpu() - trajectory.log_prob[rows, steps].cpu()).abs().max())

    def _step_by_step(self, trajectory: Trajectory, rows: Tensor, steps: Tensor) -> StepScore:
        places = [(steps == step).nonzero().squeeze(1) for step in steps.unique()]
        scores = [self.replay_by_pipeline(trajectory, rows[place], int(steps[place[0]])) for place in places]
        order = torch.cat(places).argsort().to(trajectory.device)
        parts = {name: torch.cat([score.__dict__[name] for score in scores])[order] for name in scores[0].__dict__}
        return StepScore(**parts)

    @contextmanager
    def _running(self, scheduler: StochasticStep) -> Iterator[None]:
        """Let the pipeline use this scheduler, and its denoiser no dropout, without a progress bar."""
        with replaced_scheduler(self.pipeline, scheduler), evaluating(self.denoiser), quiet(self.pipeline):
            yield

    def _scheduler(self, window: Window | None) -> StochasticStep:
        _check_window(window)
        scheduler = stochastic_scheduler(self.pipeline.scheduler, self.sde)
        scheduler.mode, scheduler.window = "sample", window
        return scheduler

    def _moves(self, trajectory: Trajectory, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Latents before and after each decision, where the denoiser works."""
        place = trajectory.std.device
        rows, steps = rows.to(place), steps.to(place)
        still = trajectory.std[rows, steps] <= 0
        if bool(still.any()):
            raise ValueError(
                f"step {int(steps[still][0])} drew nothing and has no density: it lies outside the window, or is the "
                "last one. Replay the decisions of `trajectory.scored`."
            )
        x, x_next = trajectory.moves(rows, steps)
        return x.to(trajectory.device), x_next.to(trajectory.device)


def _check_call(call: Mapping[str, Any], seeds: Sequence[int], initial: Sequence[int]) -> None:
    if "generator" in call:
        raise ValueError("leave `generator` out of the call: `seeds` gives each sample a generator of its own.")
    if not seeds or len(initial) != len(seeds):
        raise ValueError(f"`seeds` and `same_noise` hold one seed per sample, got {len(seeds)} and {len(initial)}.")


def _check_count(x: Tensor, seeds: Sequence[int]) -> None:
    if len(x) != len(seeds):
        raise ValueError(f"the call makes {len(x)} samples for {len(seeds)} seeds; give one seed to each.")


def _trained_steps(count: int, fraction: float | int, window: Window | None) -> int:
    if window is not None and window[1] > count:
        raise ValueError(f"`window` is {list(window)} but the pipeline took {count} steps (`num_inference_steps`).")
    # 0.29 x 100 is 28.999999999999996 in floating point.
    return math.floor(count * fraction + 1e-9)


def _check_window(window: Window | None) -> None:
    if window is not None and not 0 <= window[0] < window[1]:
        raise ValueError(f"`window` is [first step, one past the last] with 0 <= first < end, got {list(window)}.")


def _step_noise(seeds: Sequence[int], position: int, like: Tensor) -> Tensor:
    """Noise that is a function of a sample's seed and the step, drawn on the CPU so that every device gets the same."""
    _check_count(like, seeds)
    source, noise = torch.Generator(), torch.empty(like.shape)
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=source.manual_seed(seed + position))
    return noise.to(like)


def _numbers(pipeline: DiffusionPipeline, call: Mapping[str, Any]) -> list[float]:
    """The numbers among the arguments of a call, defaults included: one of them may be the guidance weight."""
    defaults = inspect.signature(type(pipeline).__call__).parameters.values()  # type: ignore[operator]
    arguments = {parameter.name: parameter.default for parameter in defaults} | dict(call)
    return [float(v) for v in arguments.values() if isinstance(v, int | float) and not isinstance(v, bool)]


def _score(trajectory: Trajectory, x: Tensor, x_next: Tensor, prediction: Tensor, steps: Tensor) -> StepScore:
    steps = steps.to(trajectory.level.device)
    level, level_next = trajectory.level[steps].to(x.device), trajectory.level_next[steps].to(x.device)
    mean, std = trajectory.transition(x, prediction, level, level_next)
    return StepScore(mean=mean, std=std, log_prob=gaussian_log_prob(x_next, mean, std), prediction=prediction)
