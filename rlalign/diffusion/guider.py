"""The paper's adaptive projected guidance as a diffusers guider, for pipelines that take one as a component."""

from collections.abc import Mapping
from math import isclose
from typing import Any, Literal

from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
from jaxtyping import Float
from torch import Tensor

from rlalign.diffusion.guidance import AdaptiveProjection
from rlalign.diffusion.prediction_space import PredictionSpace


class PaperAPG(BaseGuidance):
    """Adaptive projected guidance in the paper's form: from the conditional prediction, w - 1 times the update.

        pipeline.update_components(guider=PaperAPG(guidance_scale=7.5))

    diffusers' own `AdaptiveProjectedGuidance` starts from the unconditional prediction unless
    `use_original_formulation=True`, and then adds w times the update where the paper adds w - 1 times.

    A guider gets the denoiser's predictions and as a rule nothing else. So by default r, β and the projection act on
    the raw predictions, where the difference of a flow is larger by 1 / σ than in denoised space; the space does not
    matter with η = 1 and neither limit nor momentum. Some modular pipelines show their latents to the guider (Stable
    Diffusion 3, Wan, LTX): there `space="flow"` converts velocities v = noise - data, as the paper does. On any classic
    pipeline use `adaptive_projected_guidance`, which always converts.

    Args:
        guidance_scale: w; 1 is no guidance.
        eta: Share of the update parallel to the conditional prediction that is kept.
        norm_threshold: Largest norm of the difference, per sample; 0 is no limit. The default suits denoised latents.
        momentum: Of the running difference; 0 is off. Starts anew at step 0.
        space: `prediction` for the raw predictions, `flow` for denoised samples of a rectified flow.
        num_train_timesteps: The scheduler's; a flow's σ is the timestep divided by it.
        start: Fraction of the steps after which guidance starts.
        stop: Fraction after which it stops.
        enabled: False leaves the conditional prediction.

    Reference:
        Sadat et al. 2025 (arXiv:2410.02416), algorithm 1.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float | int = 7.5,
        eta: float | int = 0.0,
        norm_threshold: float | int = 15.0,
        momentum: float | int = -0.5,
        space: Literal["prediction", "flow"] = "prediction",
        num_train_timesteps: int = 1000,
        start: float | int = 0.0,
        stop: float | int = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self.space = space
        self.num_train_timesteps = num_train_timesteps
        self.projection = AdaptiveProjection(eta=eta, norm_threshold=norm_threshold, momentum=momentum)
        self.running: Tensor | None = None
        self._latents: Tensor | None = None

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step; the first one of an image resets the momentum."""
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self.running = None

    def prepare_inputs(self, data: Any) -> list[Any]:
        """Split the inputs into those of the conditional and of the unconditional call."""
        self._remember(data.get("hidden_states"))
        return [self._prepare_batch(data, *which) for which in self._calls()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Mapping[str, Any]) -> list[Any]:
        """The same from the state of a modular pipeline's block."""
        self._remember(data.as_dict().get("latents"))
        return [self._prepare_batch_from_block_state(input_fields, data, *which) for which in self._calls()]  # pyright: ignore[reportArgumentType]

    def forward(
        self, pred_cond: Float[Tensor, "batch *dims"], pred_uncond: Float[Tensor, "batch *dims"] | None = None
    ) -> GuiderOutput:
        """Combine the predictions of the two calls."""
        guided = pred_cond if pred_uncond is None else self._guided(pred_cond, pred_uncond)
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return 2 if self._enabled and not isclose(self.guidance_scale, 1.0) and self._in_range() else 1

    def _calls(self) -> list[tuple[int, str]]:
        return list(enumerate(self._input_predictions[: self.num_conditions]))

    def _in_range(self) -> bool:
        if self._num_inference_steps is None:
            return True
        first, end = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return first <= self._step < end

    def _remember(self, latents: Any) -> None:
        self._latents = latents[0] if isinstance(latents, tuple) else latents

    def _guided(self, cond: Tensor, uncond: Tensor) -> Tensor:
        space, x = PredictionSpace(kind="sample"), cond
        if self.space == "flow":
            if self._latents is None or self._latents.shape != cond.shape:
                raise ValueError(
                    'this pipeline keeps its latents from the guider, so PaperAPG(space="flow") cannot convert its '
                    'predictions: use space="prediction", with a norm_threshold chosen for velocities.'
                )
            x, space = (
                self._latents,
                PredictionSpace(kind="flow", sigma=float(self._timestep) / self.num_train_timesteps),
            )
        running = self.running if self.projection.momentum else None
        guided, self.running, _ = self.projection(cond, uncond, x, space, scale=self.guidance_scale, running=running)
        return guided.to(cond.dtype)
