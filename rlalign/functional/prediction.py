"""From what a denoiser predicts (velocity, noise, v) to the denoised sample, and back."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Prediction = Literal["flow", "epsilon", "v_prediction", "edm", "sample"]
Level = float | int | Float[Tensor, ""] | Float[Tensor, " batch"]


def to_denoised(
    prediction: Float[Tensor, "batch *dims"],
    x: Float[Tensor, "batch *dims"],
    *,
    kind: Prediction,
    sigma: Level | None = None,
    alpha_bar: Level | None = None,
) -> Float[Tensor, "batch *dims"]:
    """Turn a denoiser's prediction into its estimate of the clean sample.

        flow:          x̂0 = x - σ v                                   x = (1 - σ) x0 + σ ε
        epsilon:       x̂0 = (x - sqrt(1 - ᾱ) e) / sqrt(ᾱ)             x = sqrt(ᾱ) x0 + sqrt(1 - ᾱ) ε
        v_prediction:  x̂0 = sqrt(ᾱ) x - sqrt(1 - ᾱ) v                 as epsilon; with `sigma` instead of `alpha_bar`
                       x̂0 = x / (σ² + 1) - σ / sqrt(σ² + 1) v         x = x0 + σ ε
        edm:           x̂0 = x - σ e                                   x = x0 + σ ε, not scaled for the model
        sample:        x̂0 = the prediction

    Args:
        prediction: What the denoiser returned.
        x: The latents that the scheduler's step takes. For `edm` and the second v_prediction that is not the input of
            the denoiser, which sees x / sqrt(σ² + 1).
        kind: What the denoiser predicts.
        sigma: Noise level of `flow`, `edm`, and of `v_prediction` in a sigma scheduler.
        alpha_bar: Noise level of `epsilon`, and of `v_prediction` in a timestep scheduler.

    Returns:
        The denoised sample, in float32 or wider.

    Raises:
        ValueError: The kind is unknown, or its noise level is missing, doubled or out of range.

    Example:
        >>> to_denoised(torch.tensor([[2.0]]), torch.tensor([[5.0]]), kind="flow", sigma=0.5)
        tensor([[4.]])

    Reference:
        Ho et al. 2020 (arXiv:2006.11239), eq. 15; Salimans & Ho 2022 (arXiv:2202.00512), appendix D; Karras et al. 2022
        (arXiv:2206.00364), table 1; Lipman et al. 2023 (arXiv:2210.02747).
    """
    on_x, on_prediction = _coefficients(kind, sigma, alpha_bar, x)
    return on_x * _wide(x) + on_prediction * _wide(prediction)


def from_denoised(
    denoised: Float[Tensor, "batch *dims"],
    x: Float[Tensor, "batch *dims"],
    *,
    kind: Prediction,
    sigma: Level | None = None,
    alpha_bar: Level | None = None,
) -> Float[Tensor, "batch *dims"]:
    """Turn a denoised sample into the prediction that a scheduler's step expects: the inverse of `to_denoised`.

        flow:  v = (x - x̂0) / σ                      epsilon:  e = (x - sqrt(ᾱ) x̂0) / sqrt(1 - ᾱ)
        edm:   e = (x - x̂0) / σ                 v_prediction:  v = (sqrt(ᾱ) x - x̂0) / sqrt(1 - ᾱ)

    Args:
        denoised: Estimate of the clean sample.
        x: As in `to_denoised`.
        kind: As in `to_denoised`.
        sigma: As in `to_denoised`.
        alpha_bar: As in `to_denoised`.

    Returns:
        The prediction, in float32 or wider. Differences are divided by the noise level, so at small levels rounding
        grows by as much; the step multiplies by it again.

    Raises:
        ValueError: As in `to_denoised`; also a level without noise, where nothing is left to predict.

    Example:
        >>> from_denoised(torch.tensor([[4.0]]), torch.tensor([[5.0]]), kind="flow", sigma=0.5)
        tensor([[2.]])

    Reference:
        As `to_denoised`: Salimans & Ho 2022 (arXiv:2202.00512), appendix D.
    """
    on_x, on_prediction = _coefficients(kind, sigma, alpha_bar, x)
    if bool((on_prediction == 0).any()):
        raise ValueError(f"at {sigma=}, {alpha_bar=} there is no noise, and no {kind} prediction belongs to a sample.")
    return (_wide(denoised) - on_x * _wide(x)) / on_prediction


def _coefficients(kind: str, sigma: Level | None, alpha_bar: Level | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of x̂0 = a x + b prediction, shaped to multiply latents."""
    match kind:
        case "flow":
            level = _level(kind, "sigma", sigma, alpha_bar, x)
            return torch.ones_like(level), -level
        case "edm":
            level = _level(kind, "sigma", sigma, alpha_bar, x, most=float("inf"))
            return torch.ones_like(level), -level
        case "epsilon":
            level = _level(kind, "alpha_bar", alpha_bar, sigma, x, least=1e-12)
            return 1 / level.sqrt(), -((1 - level) / level).sqrt()
        case "v_prediction" if sigma is None:
            level = _level(kind, "alpha_bar", alpha_bar, sigma, x)
            return level.sqrt(), -(1 - level).sqrt()
        case "v_prediction":
            level = _level(kind, "sigma", sigma, alpha_bar, x, most=float("inf"))
            return 1 / (level**2 + 1), -level / (level**2 + 1).sqrt()
        case "sample":
            one = torch.ones((), dtype=_wide(x).dtype, device=x.device)
            return torch.zeros_like(one), one
    raise ValueError(f"`kind` must be flow, epsilon, v_prediction, edm or sample, got {kind!r}.")


def _level(
    kind: str, name: str, wanted: Level | None, other: Level | None, x: Tensor, least: float = 0.0, most: float = 1.0
) -> Tensor:
    if wanted is None or other is not None:
        raise ValueError(f"a {kind} prediction is converted at one noise level, given as `{name}` alone.")
    level = torch.as_tensor(wanted, dtype=_wide(x).dtype, device=x.device)
    if not bool(((level >= least) & (level <= most)).all()):
        raise ValueError(f"`{name}` of a {kind} prediction must lie in [{least:g}, {most:g}], got {wanted}.")
    return level.reshape(-1, *(1,) * (x.ndim - 1)) if level.ndim else level


def _wide(x: Tensor) -> Tensor:
    # A level that is one number does not promote half-precision latents by itself.
    return x.to(torch.promote_types(x.dtype, torch.float32))
