"""The forward process: put noise on clean latents, and measure how wrong the denoiser is about it."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlalign.diffusion.conditions import Conditions
from rlalign.diffusion.config_dso import DSOObjective
from rlalign.diffusion.sampling import evaluating
from rlalign.functional.flow import flow_matching_error, interpolate
from rlalign.training.seeding import generator


@dataclass(frozen=True, eq=False)
class Corruption:
    """Noise and noise levels for the pairs of a step; columns are winner and loser."""

    level: Float[Tensor, "pairs two=2"]
    """In (0, 1): 0 is clean, 1 is noise."""
    noise: Float[Tensor, "pairs two=2 *dims"]

    def select(self, rows: Int[Tensor, " n"]) -> "Corruption":
        return Corruption(self.level[rows], self.noise[rows])


def draw_corruption(
    cfg: DSOObjective, shape: torch.Size | tuple[int, ...], *, count: int, step: int, seed: int
) -> Corruption:
    """Noise the pairs of a step: a function of (seed, step), drawn on the CPU.

        t = sigmoid(n),  n ~ N(time_mean, time_std²),   ε ~ N(0, I)

    With `shared_noise` both samples of a pair have one t and one ε, else each its own.

    Args:
        shape: Of one sample's latents.
        count: Pairs in the step.
    """
    source = generator(seed, "corruption", step)
    columns = 1 if cfg.shared_noise else 2
    level = (cfg.time_mean + cfg.time_std * torch.randn(count, columns, generator=source)).sigmoid()
    noise = torch.randn(count, columns, *shape, generator=source)
    return Corruption(level.expand(count, 2), noise.expand(count, 2, *shape))


class DenoisingError:
    """ℓ = mean over dimensions of (what the denoiser says - what it should say)².

    | predicts | noisy latents | target |
    |---|---|---|
    | flow | (1 - t) x0 + t ε | ε - x0 |
    | epsilon | sqrt(ᾱ) x0 + sqrt(1 - ᾱ) ε | ε |
    | v_prediction | the same | sqrt(ᾱ) ε - sqrt(1 - ᾱ) x0 |
    | sample | the same | x0 |

    For models of discrete timesteps 0 ... T-1 a noise level t in (0, 1) is the timestep floor(t T).

    Args:
        conditions: What the denoiser is told beside the noisy latents.
    """

    def __init__(self, conditions: Conditions):
        self.conditions = conditions

    def __call__(
        self,
        clean: Float[Tensor, "n *dims"],
        noise: Float[Tensor, "n *dims"],
        level: Float[Tensor, " n"],
        prompts: Int[Tensor, " n"],
    ) -> Float[Tensor, " n"]:
        """The error of each sample, with gradient; dropout is off, as when the samples were drawn."""
        conditions = self.conditions
        x, told, target = self.corrupted(clean, noise, level)
        with evaluating(conditions.sampler.denoiser):
            prediction = conditions.predict(x, told, prompts)
        if target is None:
            return flow_matching_error(prediction, clean, noise)
        return ((prediction.to(target.dtype) - target) ** 2).flatten(1).mean(1)

    def corrupted(
        self, clean: Float[Tensor, "n *dims"], noise: Float[Tensor, "n *dims"], level: Float[Tensor, " n"]
    ) -> tuple[Float[Tensor, "n *dims"], Float[Tensor, " n"], Float[Tensor, "n *dims"] | None]:
        """Noisy latents, the noise level in the terms of `Conditions.predict`, and the target (None for flow)."""
        alpha_bars = self.conditions.alpha_bars
        if alpha_bars is None:
            return interpolate(clean, noise, level), level, None
        timestep = (level * len(alpha_bars)).long().clamp(max=len(alpha_bars) - 1)
        signal = alpha_bars.to(clean.device)[timestep].float().reshape(-1, *(1,) * (clean.ndim - 1))
        clean, noise = clean.float(), noise.float()
        x = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        match self.conditions.kind:
            case "epsilon":
                target = noise
            case "v_prediction":
                target = signal.sqrt() * noise - (1 - signal).sqrt() * clean
            case "sample":
                target = clean
            case other:
                raise ValueError(f"the prediction type {other!r} of the scheduler is not supported.")
        return x, timestep.float(), target
