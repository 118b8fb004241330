"""What a diffusers scheduler's predictions mean: from them to the denoised sample of a step, and back."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rlalign.functional.prediction import Level, Prediction, from_denoised, to_denoised

# Names rather than classes: subclasses are found by their bases, and nothing of diffusers is imported.
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_TIMESTEP = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler")
_SIGMA = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler")
_SCALED_SIGMA = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FAMILIES = {name: family for family in (_FLOW, _TIMESTEP, _SIGMA, _SCALED_SIGMA, _EDM) for name in family}
SUPPORTED = tuple(_FAMILIES)


@dataclass(frozen=True, kw_only=True)
class PredictionSpace:
    """One step's conversion between what the denoiser predicts and the denoised sample."""

    kind: Prediction
    sigma: Level | None = None
    """Noise level, of all samples or of each."""
    alpha_bar: Level | None = None
    data_std: float = 1.0
    """EDM's sigma_data: such a model predicts v for latents divided by it."""
    sign: int = 1
    """-1 where the model predicts the negative of the named quantity."""

    def denoised(
        self, prediction: Float[Tensor, "batch *dims"], x: Float[Tensor, "batch *dims"]
    ) -> Float[Tensor, "batch *dims"]:
        """Return x̂0 of a prediction made at the latents `x`, those that the scheduler's step takes."""
        scaled = x / self.data_std
        return self.data_std * to_denoised(
            self.sign * prediction, scaled, kind=self.kind, sigma=self.sigma, alpha_bar=self.alpha_bar
        )

    def prediction(
        self, denoised: Float[Tensor, "batch *dims"], x: Float[Tensor, "batch *dims"]
    ) -> Float[Tensor, "batch *dims"]:
        """Return the prediction that `denoised` turns into `denoised`."""
        scaled, target = x / self.data_std, denoised / self.data_std
        return self.sign * from_denoised(target, scaled, kind=self.kind, sigma=self.sigma, alpha_bar=self.alpha_bar)


def prediction_space(scheduler: Any, timestep: float | int | Tensor) -> PredictionSpace:
    """Read the space of the predictions at a timestep off a scheduler's class, config and noise levels.

    Args:
        scheduler: A diffusers scheduler, its timesteps set.
        timestep: What the pipeline passes to `scheduler.step`.

    Raises:
        ValueError: The scheduler's class or prediction type is not among those known.
    """
    family = scheduler_family(scheduler)
    if family is _TIMESTEP:
        alpha_bar = float(scheduler.alphas_cumprod[int(timestep)])
        return _of_type(scheduler, alpha_bar=alpha_bar)
    sigma = float(scheduler.sigmas[_position(scheduler, timestep)])
    if family is _FLOW:
        # Mochi counts its sigmas from noise at 0 and predicts data - noise.
        inverted = scheduler.config.get("invert_sigmas", False)
        return PredictionSpace(kind="flow", sigma=1 - sigma if inverted else sigma, sign=-1 if inverted else 1)
    if family is _EDM:
        # c_skip x + c_out F of EDM is the v-prediction of x / sigma_data at sigma / sigma_data.
        data_std = scheduler.config.sigma_data
        sign = {"v_prediction": 1, "epsilon": -1}[scheduler.config.prediction_type]
        return PredictionSpace(kind="v_prediction", sigma=sigma / data_std, data_std=data_std, sign=sign)
    if family is _SCALED_SIGMA:
        return _of_scaled_sigma(scheduler, sigma)
    return _of_type(scheduler, sigma=sigma)


def scheduler_family(scheduler: Any) -> tuple[str, ...]:
    """Find the group of schedulers that this one's class belongs to.

    Raises:
        ValueError: None of its classes is known.
    """
    for base in type(scheduler).__mro__:
        if base.__name__ in _FAMILIES:
            return _FAMILIES[base.__name__]
    raise ValueError(
        f"it is not known what the predictions given to {type(scheduler).__name__} mean. Give the pipeline one of "
        f"{', '.join(SUPPORTED)}, by `pipeline.scheduler = <class>.from_config(pipeline.scheduler.config)`."
    )


def evaluations_per_step(scheduler: Any) -> int:
    """Count how often a scheduler asks the denoiser within one step of its solver."""
    if "PNDMScheduler" in (base.__name__ for base in type(scheduler).__mro__):
        # Linear multistep, but for one repeated evaluation at the start; with Runge-Kutta warm-up four of them.
        return 1 if scheduler.config.skip_prk_steps else 4
    return scheduler.order


def _of_scaled_sigma(scheduler: Any, sigma: float) -> PredictionSpace:
    if scheduler.config.prediction_type == "flow_prediction":
        return PredictionSpace(kind="flow", sigma=sigma)
    if scheduler.config.get("use_flow_sigmas", False):
        raise ValueError("flow sigmas with a prediction other than `flow_prediction` are not supported.")
    return _of_type(scheduler, alpha_bar=1 / (sigma**2 + 1))


def _of_type(scheduler: Any, *, sigma: float | None = None, alpha_bar: float | None = None) -> PredictionSpace:
    match scheduler.config.prediction_type:
        case "epsilon":
            return PredictionSpace(kind="edm" if alpha_bar is None else "epsilon", sigma=sigma, alpha_bar=alpha_bar)
        case "v_prediction":
            return PredictionSpace(kind="v_prediction", sigma=sigma, alpha_bar=alpha_bar)
        case "sample" | "original_sample":
            return PredictionSpace(kind="sample")
        case other:
            raise ValueError(f"the prediction type {other!r} of {type(scheduler).__name__} is not supported.")


def _position(scheduler: Any, timestep: float | int | Tensor) -> int:
    """Which of the scheduler's sigmas the denoiser was asked at; before the first step it does not say so itself."""
    if scheduler.step_index is not None:
        return scheduler.step_index
    if scheduler.begin_index is not None:
        return scheduler.begin_index
    if isinstance(timestep, Tensor):
        timestep = timestep.to(scheduler.timesteps.device)
    return int(scheduler.index_for_timestep(timestep))
