"""Denoising steps as Gaussian transitions: their means, deviations, densities and gradient scales."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["flow_sde", "dance_sde", "cps"]
Level = float | int | Float[Tensor, ""] | Float[Tensor, " batch"]
"""A noise level: one number for the whole batch, or one per sample."""


def sde_step(
    x: Float[Tensor, "batch *dims"],
    velocity: Float[Tensor, "batch *dims"],
    sigma: Level,
    sigma_next: Level,
    *,
    noise_level: float | int,
    kind: Kind = "flow_sde",
    sigma_max: Level,
) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, "*level"]]:
    """Take one stochastic step of a rectified flow: the Gaussian that the next latents are drawn from.

        x_next = mean + std z,   h = σ - σ_next > 0,   x̂0 = x - σ v,   x̂1 = x + (1 - σ) v
        flow_sde, dance_sde:  mean = x - h v - h σ_t² / (2 σ) x̂1,   std = σ_t sqrt(h)
            flow_sde:   σ_t = a sqrt(σ / (1 - σ)),   with sigma_max for the second σ where σ = 1
            dance_sde:  σ_t = a
        cps:                  mean = (1 - σ_next) x̂0 + cos(aπ/2) σ_next x̂1,   std = sin(aπ/2) σ_next

    Three quantities are called "std" in public code. Here `std` is always the deviation of `x_next`, sqrt(h) included;
    σ_t, the SDE's diffusion coefficient, is not returned.

    Args:
        x: Latents at noise level `sigma`; σ = 1 is noise and σ = 0 is data.
        velocity: The model's v = noise - data at `x`, guidance included.
        sigma: Current noise level, in (0, 1].
        sigma_next: The next one, in [0, sigma).
        noise_level: a >= 0; 0 is the ODE step. In [0, 1] for `cps`.
        kind: Which SDE. `flow_sde` and `dance_sde` keep the flow's marginals as steps shrink, `cps` keeps the noise
            consistent at any number of steps instead.
        sigma_max: The schedule's second level. Only `flow_sde` uses it, at the pole σ = 1.

    Returns:
        Mean, and deviation in the shape of the levels ([B], or none). In float32 or wider: bfloat16 cannot hold h.
        The deviation is 0 with `noise_level=0`, and with `cps` at `sigma_next=0`: such a step has no density.

    Raises:
        ValueError: A level is out of range, the levels do not fall, or the noise level does not fit the kind.

    Example:
        >>> x, v = torch.tensor([[1.0]]), torch.tensor([[2.0]])
        >>> mean, std = sde_step(x, v, 0.5, 0.25, noise_level=1.0, sigma_max=0.9)  # σ_t = 1, x̂1 = 2: 1 - .5 - .25 x 2
        >>> mean, std
        (tensor([[0.]]), tensor(0.5000))

    Reference:
        Liu et al. 2025 (arXiv:2505.05470), Flow-GRPO, with the pole as in yifan123/flow_grpo
        diffusers_patch/sd3_sde_with_logprob.py; Xue et al. 2025 (arXiv:2505.07818), DanceGRPO; Wang & Yu 2025
        (arXiv:2509.05952), coefficients-preserving sampling. flow_grpo returns σ_t for the first and std for the last.
    """
    dtype = _wide(x, velocity)
    on_x, on_velocity, std = _coefficients(*_levels(sigma, sigma_next, x, dtype), noise_level, kind, sigma_max)
    return _along(on_x, x) * x.to(dtype) + _along(on_velocity, x) * velocity.to(dtype), std


def ddim_step(
    x: Float[Tensor, "batch *dims"],
    epsilon: Float[Tensor, "batch *dims"],
    alpha_bar: Level,
    alpha_bar_next: Level,
    *,
    eta: float | int,
) -> tuple[Float[Tensor, "batch *dims"], Float[Tensor, "*level"]]:
    """Take one stochastic DDIM step: the Gaussian that the next latents are drawn from.

        mean = sqrt(ᾱ_next) x̂0 + sqrt(1 - ᾱ_next - std²) ε,   x̂0 = (x - sqrt(1 - ᾱ) ε) / sqrt(ᾱ)
        std  = η sqrt((1 - ᾱ_next) / (1 - ᾱ)) sqrt(1 - ᾱ / ᾱ_next)

    Args:
        x: Latents at `alpha_bar`.
        epsilon: The predicted noise at `x`, guidance included.
        alpha_bar: Cumulative product ᾱ of the current timestep, in (0, 1).
        alpha_bar_next: That of the next, less noisy one, in (alpha_bar, 1].
        eta: 0 is the deterministic DDIM step, 1 the ancestral DDPM step.

    Returns:
        Mean, and deviation in the shape of the levels, in float32 or wider. The deviation is 0 with `eta=0` and at
        `alpha_bar_next=1`: such a step has no density.

    Raises:
        ValueError: ᾱ does not rise, or `eta` lies outside [0, 1].

    Example:
        >>> x, epsilon = torch.tensor([[1.0]]), torch.tensor([[0.5]])
        >>> ddim_step(x, epsilon, 0.25, 1.0, eta=1.0)  # x̂0 = (1 - sqrt(3) / 4) x 2
        (tensor([[1.1340]]), tensor(0.))

    Reference:
        Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16; the policy of DDPO, Black et al. 2023 (arXiv:2305.13301).
    """
    dtype = _wide(x, epsilon)
    on_x, on_epsilon, std = _ddim_coefficients(alpha_bar, alpha_bar_next, eta, x, dtype)
    return _along(on_x, x) * x.to(dtype) + _along(on_epsilon, x) * epsilon.to(dtype), std


def gaussian_log_prob(
    x_next: Float[Tensor, "batch *dims"],
    mean: Float[Tensor, "batch *dims"],
    std: Float[Tensor, ""] | Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Score a denoising step: the log-density of the next latents, in nats per dimension.

        log π = mean_d [ -(x_next - μ)² / (2 std²) ] - log std - log sqrt(2π)

    A mean over the dimensions, not the sum: with 65,536 of them the sum's ratios overflow. Clip ranges that belong to
    it are far smaller than PPO's, and shrink as 1 / sqrt(dimensions).

    Args:
        x_next: The latents that were drawn, rounded to the dtype they are stored in: what is replayed is what is
            scored.
        mean: Mean of the step.
        std: Its deviation > 0, sqrt(h) included, as `sde_step` and `ddim_step` return it.

    Returns:
        One density per sample, over all of its own dimensions. The same density for every kind of step: with `cps` the
        division by 2 std² stays, without which RatioNorm and the KL would be wrong.

    Raises:
        ValueError: A deviation is not positive.

    Example:
        >>> gaussian_log_prob(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2), torch.tensor(1.0))  # -.5 - .9189
        tensor([-1.4189])

    Reference:
        Liu et al. 2025 (arXiv:2505.05470), Flow-GRPO. Flow-CPS's code keeps only -mean (x_next - μ)², which is no
        density (yifan123/flow_grpo diffusers_patch/sd3_sde_with_logprob.py).
    """
    if bool((std <= 0).any()):
        raise ValueError(
            f"`std` must be > 0, got {float(std.min())}: a step without noise (noise_level=0, eta=0, or the last step "
            "of cps and ddim) has no density; leave it out of `scored`."
        )
    dtype = _wide(x_next, mean)
    std = std.to(dtype)
    error = ((x_next.to(dtype) - mean.to(dtype)) ** 2).reshape(x_next.shape[0], -1).mean(1)
    return -error / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


def guard_weight(
    sigma: Level,
    sigma_next: Level,
    *,
    noise_level: float | int,
    kind: Kind = "flow_sde",
    sigma_max: Level,
    exact: bool = False,
) -> Float[Tensor, "*level"]:
    """Weigh the objective of each denoising step so that all steps move the velocity alike: GRPO-Guard's δ.

        flow_sde:  δ = 1 / h        dance_sde:  δ = (1 + a² (1 - σ) / (2 σ)) / h        cps:  δ = 1 / |∂mean / ∂v|
        exact:     δ = 1 / |∂mean / ∂v| for every kind

    After the ratio is normalised (`guarded_log_ratio`), the gradient of a step is proportional to |∂mean / ∂v|.

    Args:
        sigma: Current noise level, in (0, 1].
        sigma_next: The next one, in [0, sigma).
        noise_level: As in `sde_step`.
        kind: As in `sde_step`.
        sigma_max: As in `sde_step`.
        exact: Divide by the step's true gradient scale. For `flow_sde` that differs from 1/h by the constant
            1 + a²/2, but for the pole; for `dance_sde` the published form multiplies by 1 + a² (1 - σ) / (2 σ) where
            the exact one divides, so it lets the last steps weigh more.

    Returns:
        δ in the shape of the levels, a weight for `aggregate`. It multiplies the loss by 1/h: learning rates and
        gradient clips of unweighted runs do not carry over.

    Raises:
        ValueError: As in `sde_step`.

    Example:
        >>> guard_weight(0.5, 0.46, noise_level=0.7, sigma_max=0.9)
        tensor(25.0000)

    Reference:
        Wang et al. 2025 (arXiv:2510.22319), eq. 12. The paper treats flow_sde and dance_sde; `cps` is derived here.
    """
    levels = _levels(sigma, sigma_next, None, torch.float32)
    on_velocity = _coefficients(*levels, noise_level, kind, sigma_max)[1]
    if exact or kind == "cps":
        return 1 / on_velocity.abs()
    now, step = levels[0], levels[0] - levels[1]
    return 1 / step if kind == "flow_sde" else (1 + noise_level**2 * (1 - now) / (2 * now)) / step


def ddim_guard_weight(alpha_bar: Level, alpha_bar_next: Level, *, eta: float | int) -> Float[Tensor, "*level"]:
    """Weigh the objective of each DDIM step so that all steps move the predicted noise alike.

        δ = 1 / |∂mean / ∂ε|,   ∂mean / ∂ε = sqrt(1 - ᾱ_next - std²) - sqrt(ᾱ_next (1 - ᾱ) / ᾱ)

    Args:
        alpha_bar: As in `ddim_step`.
        alpha_bar_next: As in `ddim_step`.
        eta: As in `ddim_step`.

    Returns:
        δ in the shape of the levels, a weight for `aggregate`.

    Raises:
        ValueError: As in `ddim_step`.

    Example:
        >>> ddim_guard_weight(0.2, 1.0, eta=1.0)  # std = 0, and sqrt(0.8 / 0.2) = 2
        tensor(0.5000)

    Reference:
        The rule of Wang et al. 2025 (arXiv:2510.22319), applied to the step of Song et al. 2021
        (arXiv:2010.02502).
    """
    return 1 / _ddim_coefficients(alpha_bar, alpha_bar_next, eta, None, torch.float32)[1].abs()


def interpolate(
    data: Float[Tensor, "batch *dims"], noise: Float[Tensor, "batch *dims"], sigma: Level
) -> Float[Tensor, "batch *dims"]:
    """Noise data to a level of the rectified flow.

        x_σ = (1 - σ) x0 + σ ε

    Args:
        data: Clean latents x0.
        noise: Standard normal ε.
        sigma: In [0, 1].

    Returns:
        The latents that a flow model is asked about at `sigma`, in float32 or wider.

    Example:
        >>> interpolate(torch.tensor([[4.0]]), torch.tensor([[0.0]]), 0.25)
        tensor([[3.]])

    Reference:
        Liu et al. 2023 (arXiv:2209.03003), rectified flow; Lipman et al. 2023 (arXiv:2210.02747).
    """
    dtype = _wide(data, noise)
    level = _along(torch.as_tensor(sigma, dtype=dtype, device=data.device), data)
    return (1 - level) * data.to(dtype) + level * noise.to(dtype)


def flow_matching_error(
    velocity: Float[Tensor, "batch *dims"], data: Float[Tensor, "batch *dims"], noise: Float[Tensor, "batch *dims"]
) -> Float[Tensor, " batch"]:
    """Measure how far a predicted velocity is from the straight path between data and noise.

        ℓ = mean_d (v - (ε - x0))²

    Args:
        velocity: The model's prediction at `interpolate(data, noise, sigma)`.
        data: Clean latents x0.
        noise: The ε they were noised with.

    Returns:
        One error per sample, a mean over its dimensions: the constants of `flow_dpo` and `floored_dro` refer to it.

    Example:
        >>> flow_matching_error(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([[1.0, 1.0]]))
        tensor([2.])

    Reference:
        Liu et al. 2023 (arXiv:2209.03003); Lipman et al. 2023 (arXiv:2210.02747).
    """
    dtype = _wide(velocity, data)
    target = noise.to(dtype) - data.to(dtype)
    return ((velocity.to(dtype) - target) ** 2).reshape(velocity.shape[0], -1).mean(1)


def _coefficients(
    now: Tensor, after: Tensor, noise_level: float | int, kind: str, sigma_max: Level
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x and of v in the step's mean, and its deviation."""
    if noise_level < 0 or (kind == "cps" and noise_level > 1):
        raise ValueError(
            f"`sde.noise_level` must be >= 0, and at most 1 for the kind cps (an angle of aπ/2), got {noise_level}."
        )
    match kind:
        case "flow_sde":
            diffusion = noise_level * (now / (1 - _off_pole(now, sigma_max))).sqrt()
        case "dance_sde":
            diffusion = torch.full_like(now, noise_level)
        case "cps":
            kept, fresh = math.cos(noise_level * math.pi / 2) * after, math.sin(noise_level * math.pi / 2) * after
            return (1 - after) + kept, kept * (1 - now) - now * (1 - after), fresh
        case _:
            raise ValueError(f"`sde.kind` must be flow_sde, dance_sde or cps, got {kind!r}.")
    step = now - after
    pull = diffusion**2 / (2 * now)
    return 1 - pull * step, -step * (1 + pull * (1 - now)), diffusion * step.sqrt()


def _off_pole(now: Tensor, sigma_max: Level) -> Tensor:
    """The level that stands in the denominator 1 - σ."""
    replaced = torch.where(now >= 1, torch.as_tensor(sigma_max, dtype=now.dtype, device=now.device), now)
    if bool((replaced >= 1).any()):
        raise ValueError(
            f"flow_sde has a pole at sigma = 1, where `sigma_max` stands in: it must be < 1, got {sigma_max}. "
            "Pass the schedule's second sigma."
        )
    return replaced


def _ddim_coefficients(
    alpha_bar: Level, alpha_bar_next: Level, eta: float | int, like: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x and of ε in the step's mean, and its deviation."""
    now, after = _pair(alpha_bar, alpha_bar_next, like, dtype)
    if not bool(((now > 0) & (now < after) & (after <= 1)).all()):
        raise ValueError(
            f"ddim steps need 0 < alpha_bar < alpha_bar_next <= 1, got {alpha_bar} -> {alpha_bar_next}; timesteps must "
            "fall, and after the last one alpha_bar_next is the scheduler's `final_alpha_cumprod`."
        )
    if not 0 <= eta <= 1:
        raise ValueError(f"`sde.noise_level` of the kind ddim is eta and must lie in [0, 1], got {eta}.")
    variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
    # Rounding can bring the remainder below 0 at eta = 1.
    direction = (1 - after - variance).clamp(min=0).sqrt()
    on_x = (after / now).sqrt()
    return on_x, direction - on_x * (1 - now).sqrt(), variance.sqrt()


def _levels(sigma: Level, sigma_next: Level, like: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    now, after = _pair(sigma, sigma_next, like, dtype)
    if not bool(((now > 0) & (now <= 1) & (after >= 0) & (after < now)).all()):
        raise ValueError(
            f"flow steps need 0 <= sigma_next < sigma <= 1 with 1 = noise, got {sigma} -> {sigma_next}. For a model "
            "whose time runs from noise at 0 to data at 1, pass 1 - t and the negated velocity."
        )
    return now, after


def _pair(first: Level, second: Level, like: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both levels as tensors of one shape, on the latents' device where there are any, else in their own precision."""
    given = [one for one in (like, first, second) if isinstance(one, Tensor)]
    device = given[0].device if given else None
    if like is None:
        for one in given:
            dtype = torch.promote_types(dtype, one.dtype)
    now, after = (torch.as_tensor(level, dtype=dtype, device=device) for level in (first, second))
    now, after = torch.broadcast_tensors(now, after)
    return now, after


def _along(level: Tensor, x: Tensor) -> Tensor:
    """A level per sample, shaped to multiply latents."""
    return level.reshape(-1, *(1,) * (x.ndim - 1)) if level.ndim else level


def _wide(a: Tensor, b: Tensor) -> torch.dtype:
    # Steps are differences of nearly equal numbers: never computed in half precision.
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
