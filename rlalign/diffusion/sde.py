"""Schedulers whose step draws from a Gaussian with a known density: the user's own scheduler, its class swapped."""

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from jaxtyping import Float
from torch import Tensor

from rlalign.diffusion.config import SDEConfig
from rlalign.diffusion.prediction_space import PredictionSpace
from rlalign.diffusion.step_noise import StepNoise, predicts_noise
from rlalign.functional.flow import ddim_step, gaussian_log_prob, sde_step
from rlalign.functional.prediction import from_denoised, to_denoised

Mode = Literal["ode", "sample", "score"]

# What a DDIM scheduler takes over from the scheduler it stands in for.
_NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transition:
    """The Gaussian that a denoising step draws from, as a function of the prediction: one for sampling and replay."""

    sde: StepNoise
    prediction_type: Literal["flow", "epsilon", "v_prediction", "sample"]
    sigma_max: float
    """The flow schedule's second level, for the pole at 1; without meaning for `ddim`."""

    def __call__(
        self,
        x: Float[Tensor, "batch *dims"],
        prediction: Float[Tensor, "batch *dims"],
        level: Float[Tensor, " batch"],
        level_next: Float[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, " batch"]]:
        """Return mean and deviation, in float32 or wider. Levels are sigmas, or cumulative alphas for `ddim`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, prediction = x.to(dtype), prediction.to(dtype)
        noise = self.sde.noise_level
        if self.sde.kind != "ddim":
            kind, sigma_max = self.sde.kind, self.sigma_max
            return sde_step(x, prediction, level, level_next, noise_level=noise, kind=kind, sigma_max=sigma_max)
        if self.prediction_type != "epsilon":
            denoised = to_denoised(prediction, x, kind=self.prediction_type, alpha_bar=level)
            prediction = from_denoised(denoised, x, kind="epsilon", alpha_bar=level)
        return ddim_step(x, prediction, level, level_next, eta=noise)

    def space(self, level: Float[Tensor, " batch"]) -> PredictionSpace:
        """What predictions at these levels mean."""
        if self.prediction_type == "sample":
            return PredictionSpace(kind="sample")
        if self.sde.kind == "ddim":
            return PredictionSpace(kind=self.prediction_type, alpha_bar=level)
        return PredictionSpace(kind=self.prediction_type, sigma=level)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """What one call of a scheduler's `step` did."""

    position: int
    """How many steps this run of the pipeline had taken before."""
    level: Float[Tensor, ""]
    level_next: Float[Tensor, ""]
    transition: Transition
    x: Float[Tensor, "batch *dims"]
    prediction: Float[Tensor, "batch *dims"]
    x_next: Float[Tensor, "batch *dims"]
    mean: Float[Tensor, "batch *dims"] | None = None
    """None where the step was the scheduler's own, without noise."""
    std: Float[Tensor, " batch"] | None = None
    log_prob: Float[Tensor, " batch"] | None = None


def stochastic_scheduler(scheduler: Any, sde: SDEConfig) -> "StochasticStep":
    """Copy a scheduler and give the copy a step that adds noise of known density; the original is left alone.

    The class of the copy is swapped in place, because building one with `from_config` loses what a pipeline patched at
    run time (Stable Diffusion 1.5's `steps_offset`). For `ddim`, a scheduler of another family is replaced by a DDIM
    scheduler with the same noise schedule. The copy begins in the mode `ode`, where it is the stock scheduler.

    Args:
        scheduler: That of the user's pipeline; diffusers gives schedulers no common type.
        sde: Which noise.

    Raises:
        ValueError: The scheduler and the kind of noise do not fit each other, or a setting of the scheduler leaves the
            step without a density.
    """
    if "step" in vars(scheduler):
        raise ValueError(
            "the pipeline's `scheduler.step` is wrapped, as `adaptive_projected_guidance` does, and a wrapped step has "
            "no known density. Sample outside that context."
        )
    noise = StepNoise.of(sde, scheduler)
    copied = _ddim_scheduler(scheduler) if noise.kind == "ddim" else _flow_scheduler(scheduler, noise.kind)
    copied.__class__ = _stochastic_class(type(copied))
    assert isinstance(copied, StochasticStep)
    copied.sde = noise
    return copied


class StochasticStep(SchedulerMixin, ABC):
    """What a swapped class adds to its stock scheduler: `mode`, `noise`, `window` and a listener.

    `ode` calls the stock step. `sample` draws the next latents inside the window, and calls the stock step outside it
    and for the last step, after which nothing would take the noise out again. `score` visits the one step `only` and
    does not move: the caller computes the density from what the listener hears.
    """

    stock: type[Any]
    """The class that was swapped out."""
    sde: StepNoise
    mode: Mode = "ode"
    window: tuple[int, int] | None = None
    """First and one past the last step that may add noise, in steps of the run; None: all."""
    noise: Callable[[int, Tensor], Tensor] | None = None
    """Standard normal noise for a step of the run, shaped like the latents."""
    listener: Callable[[Step], None] | None = None
    guide: Callable[[Step], Tensor] | None = None
    """Asked before each step, its `x_next` still `x`, for the prediction to take in place of the pipeline's."""
    only: int = 0
    taken: int = 0

    @abstractmethod
    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Noise level before and after the step, and whether it is the schedule's last."""

    @abstractmethod
    def transition(self) -> Transition:
        """The Gaussian of the run's steps."""

    @abstractmethod
    def stored_dtype(self, prediction: Tensor, x: Tensor) -> torch.dtype:
        """What the stock step returns the next latents in."""

    def stock_step(self, prediction: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        return self.stock.step(self, prediction, timestep, x, return_dict=False)[0]

    def draws(self, *, last: bool) -> bool:
        """Whether the step about to be taken adds noise."""
        first, end = self.window or (0, self.taken + 1)
        return not last and self.sde.noise_level > 0 and first <= self.taken < end

    def move(self, prediction: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        """Take one step of the run, tell the listener, and return the next latents."""
        level, level_next, last = self.levels(timestep)
        transition = self.transition()
        facts: dict[str, Any] = {"position": self.taken, "level": level, "level_next": level_next}
        facts["transition"] = transition
        if self.guide is not None:
            prediction = self.guide(Step(x=x, prediction=prediction, x_next=x, **facts))
        mean = std = log_prob = None
        if self.mode == "score":
            x_next = x
        elif not self.draws(last=last):
            x_next = self.stock_step(prediction, timestep, x)
        else:
            mean, std = transition(x, prediction, level.expand(len(x)), level_next.expand(len(x)))
            assert self.noise is not None
            drawn = mean + std.reshape(-1, *(1,) * (x.ndim - 1)) * self.noise(self.taken, mean)
            # Rounded first and scored after: the stored latents are what a replay will see.
            x_next = drawn.to(self.stored_dtype(prediction, x))
            log_prob = gaussian_log_prob(x_next, mean, std)
        if self.listener is not None:
            facts |= {"mean": mean, "std": std, "log_prob": log_prob}
            self.listener(Step(x=x, prediction=prediction, x_next=x_next, **facts))
        self.taken += 1
        return x_next


class _FlowStep(StochasticStep, FlowMatchEulerDiscreteScheduler):
    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor, bool]:
        if self.step_index is None:
            self._init_step_index(float(timestep))
        index = self.only if self.mode == "score" else self.step_index
        sigmas = torch.as_tensor(self.sigmas)
        assert index is not None
        return sigmas[index], sigmas[index + 1], index + 2 == len(sigmas)

    def transition(self) -> Transition:
        return Transition(sde=self.sde, prediction_type="flow", sigma_max=float(torch.as_tensor(self.sigmas)[1]))

    def stored_dtype(self, prediction: Tensor, x: Tensor) -> torch.dtype:
        return prediction.dtype

    def stock_step(self, prediction: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        moved = super().stock_step(prediction, timestep, x)
        assert self._step_index is not None
        self._step_index -= 1  # `move` counts for every kind of step
        return moved

    def move(self, prediction: Tensor, timestep: Tensor, x: Tensor) -> Tensor:
        x_next = super().move(prediction, timestep, x)
        assert self._step_index is not None
        self._step_index += 1
        return x_next


class _DDIMStep(StochasticStep, DDIMScheduler):
    def levels(self, timestep: Tensor) -> tuple[Tensor, Tensor, bool]:
        assert self.num_inference_steps is not None
        before = int(timestep) - self.config["num_train_timesteps"] // self.num_inference_steps
        level_next = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        return self.alphas_cumprod[int(timestep)], level_next, before < 0

    def transition(self) -> Transition:
        return Transition(sde=self.sde, prediction_type=self.config["prediction_type"], sigma_max=1.0)

    def stored_dtype(self, prediction: Tensor, x: Tensor) -> torch.dtype:
        return torch.promote_types(prediction.dtype, x.dtype)


@functools.cache
def _stochastic_class(stock: Any) -> Any:
    """Subclass a scheduler. Pipelines read the signatures of its methods, so both keep the stock ones."""
    adding = _DDIMStep if issubclass(stock, DDIMScheduler) else _FlowStep
    stock_step, stock_set = inspect.unwrap(stock.step), inspect.unwrap(stock.set_timesteps)

    @functools.wraps(stock_step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any):
        if self.mode == "ode":
            return stock.step(self, model_output, timestep, sample, *args, **options)
        return_dict = options.pop("return_dict", True)
        _check_options(options, args)
        x_next = self.move(model_output, torch.as_tensor(timestep), sample)
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    @functools.wraps(stock_set)
    def set_timesteps(self: Any, *args: Any, **options: Any) -> None:
        stock.set_timesteps(self, *args, **options)
        self.taken = 0
        if self.mode == "score":
            self.timesteps = self.timesteps[self.only : self.only + 1]

    members = {"stock": stock, "step": step, "set_timesteps": set_timesteps}
    return type(f"Stochastic{stock.__name__}", (adding, stock), members)


def _check_options(options: dict[str, Any], args: tuple[Any, ...]) -> None:
    """Refuse what would change the step's Gaussian; the pipeline's generator is passed to every step and not needed."""
    changed = {name: value for name, value in options.items() if name != "generator" and value}
    if changed or args:
        raise ValueError(
            f"the pipeline asks its scheduler for {changed or args}, which changes the step's density. "
            "Leave it out of the call: the noise is set by `sde.kind` and `sde.noise_level`."
        )


def _flow_scheduler(scheduler: Any, kind: str) -> Any:
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        advice = "use `sde.kind: ddim`" if predicts_noise(scheduler) else "give the pipeline one"
        raise ValueError(
            f"`sde.kind: {kind}` needs a FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}; {advice}."
        )
    for name in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config[name]:
            raise ValueError(
                f"the scheduler's `{name}` leaves a step without the density of {kind!r}; set it to False."
            )
    return copy.deepcopy(scheduler)


def _ddim_scheduler(scheduler: Any) -> Any:
    if not predicts_noise(scheduler):
        raise ValueError(
            f"`sde.kind: ddim` needs a scheduler with a schedule of betas, got {type(scheduler).__name__} of a flow; "
            "flow-matching pipelines take `flow_sde`, `dance_sde` or `cps`."
        )
    if isinstance(scheduler, DDIMScheduler):
        for name in ("clip_sample", "thresholding"):
            if scheduler.config[name]:
                raise ValueError(f"the scheduler's `{name}` leaves a step without gradient; set it to False.")
        return copy.deepcopy(scheduler)
    known = {name: scheduler.config[name] for name in _NOISE_SCHEDULE if scheduler.config.get(name) is not None}
    return DDIMScheduler(**known, clip_sample=False)
