"""Denoising steps: hand arithmetic, the papers' forms, marginals of a Gaussian, densities, gradient scales."""

import math

import pytest
import torch

from rlalign.functional.divergence import gaussian_kl
from rlalign.functional.flow import (
    ddim_guard_weight,
    ddim_step,
    flow_matching_error,
    gaussian_log_prob,
    guard_weight,
    interpolate,
    sde_step,
)
from rlalign.functional.policy import clipped_surrogate, guarded_log_ratio
from tests.reference import diffusion as reference

KINDS = ["flow_sde", "dance_sde", "cps"]
SD3_SIGMAS = [3 * s / (1 + 2 * s) for s in [1 - (1 - 0.0029940119760479) * i / 9 for i in range(10)]] + [0.0]
"""Stable Diffusion 3's ten steps, shift 3: 1, .9601, ... .2780, .0089, 0."""


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))


# ---------------------------------------------------------------- the step


def test_flow_sde_matches_hand_arithmetic():
    # σ_t = .5 sqrt(.5 / .5) = .5, h = .16, x̂1 = 1 + .5 x 2 = 2: 1 - .32 - .16 (.25 / 1) 2 = .6; std = .5 x .4
    mean, std = sde_step(f64([[1.0]]), f64([[2.0]]), 0.5, 0.34, noise_level=0.5, sigma_max=0.9)
    assert (mean.item(), std.item()) == pytest.approx((0.6, 0.2))


def test_dance_sde_matches_hand_arithmetic():
    # σ_t = .3, h = .25, x̂1 = 2, pull .09 / (2 x .5): 1 - .5 - .25 x .09 x 2 = .455; std = .3 x .5
    mean, std = sde_step(f64([[1.0]]), f64([[2.0]]), 0.5, 0.25, noise_level=0.3, kind="dance_sde", sigma_max=0.9)
    assert (mean.item(), std.item()) == pytest.approx((0.455, 0.15))


def test_cps_matches_hand_arithmetic():
    # a = 1/3: sin 30° = .5, cos = sqrt(3)/2. x̂0 = 1 - .5 x 2 = 0, x̂1 = 2: .25 sqrt(3)/2 x 2; std = .125
    mean, std = sde_step(f64([[1.0]]), f64([[2.0]]), 0.5, 0.25, noise_level=1 / 3, kind="cps", sigma_max=0.9)
    assert (mean.item(), std.item()) == pytest.approx((0.25 * math.sqrt(3), 0.125))


def test_ddim_matches_hand_arithmetic():
    # ᾱ .25 -> .64, η = 1: std² = (.36 / .75)(1 - .25 / .64) = .2925; x̂0 = (1 - .5 sqrt(.75)) 2
    mean, std = ddim_step(f64([[1.0]]), f64([[0.5]]), 0.25, 0.64, eta=1.0)
    denoised = 2 - math.sqrt(0.75)
    assert std.item() ** 2 == pytest.approx(0.2925)
    assert mean.item() == pytest.approx(0.8 * denoised + math.sqrt(0.36 - 0.2925) * 0.5)


@pytest.mark.parametrize("noise_level", [0.0, 0.3, 0.8, 1.0])
def test_steps_agree_with_the_papers_forms(noise_level):
    sigmas, x, v = SD3_SIGMAS, 0.7, -1.3
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        wanted = {
            "flow_sde": reference.flow_grpo_step(x, v, now, after, noise_level, sigmas[1]),
            "dance_sde": reference.dance_grpo_step(x, v, now, after, noise_level),
            "cps": reference.cps_step(x, v, now, after, noise_level),
        }
        for kind, want in wanted.items():
            got = sde_step(f64([[x]]), f64([[v]]), now, after, noise_level=noise_level, kind=kind, sigma_max=sigmas[1])
            assert [t.item() for t in got] == pytest.approx(want, abs=1e-12)
    alphas = [0.01, 0.1, 0.4, 0.8, 0.99, 1.0]
    for now, after in zip(alphas[:-1], alphas[1:], strict=True):
        got = ddim_step(f64([[x]]), f64([[v]]), now, after, eta=noise_level)
        assert [t.item() for t in got] == pytest.approx(reference.ddim_step(x, v, now, after, noise_level), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_levels_may_differ_per_sample(kind):
    """Replayed minibatches mix steps: each row must be what it would be alone, whatever the latents' dimensions."""
    x, v = random_pair(3, 2, 4, 4)
    now, after = f64([1.0, 0.6, 0.3]), f64([0.8, 0.3, 0.0])
    mean, std = sde_step(x, v, now, after, noise_level=0.7, kind=kind, sigma_max=0.8)
    assert std.shape == (3,)
    for i in range(3):
        one_mean, one_std = sde_step(
            x[i : i + 1], v[i : i + 1], float(now[i]), float(after[i]), noise_level=0.7, kind=kind, sigma_max=0.8
        )
        assert one_std.shape == ()
        torch.testing.assert_close(mean[i : i + 1], one_mean)
        torch.testing.assert_close(std[i], one_std)
    packed, packed_std = sde_step(
        x.reshape(3, 8, 4), v.reshape(3, 8, 4), now, after, noise_level=0.7, kind=kind, sigma_max=0.8
    )
    torch.testing.assert_close(packed.reshape(mean.shape), mean)
    torch.testing.assert_close(packed_std, std)


def test_ddim_levels_may_differ_per_sample():
    x, epsilon = random_pair(2, 3, 4)
    mean, std = ddim_step(x, epsilon, f64([0.1, 0.5]), f64([0.3, 1.0]), eta=0.7)
    one, one_std = ddim_step(x[1:], epsilon[1:], 0.5, 1.0, eta=0.7)
    torch.testing.assert_close(mean[1:], one)
    assert (std[0].item() > 0, std[1].item(), one_std.item()) == (True, 0.0, 0.0)


def test_the_pole_takes_the_schedules_second_sigma():
    """Trap: 1 - σ is 0 at pure noise; flow_grpo puts sigmas[1] there, and only there."""
    x, v = random_pair(1, 4)
    mean, std = sde_step(x, v, 1.0, 0.96, noise_level=0.7, sigma_max=0.96)
    sigma_t = 0.7 * math.sqrt(1 / 0.04)
    assert std.item() == pytest.approx(sigma_t * 0.2)
    torch.testing.assert_close(mean, x - 0.04 * v - 0.04 * sigma_t**2 / 2 * x)
    below = [sde_step(x, v, 0.96, 0.9, noise_level=0.7, sigma_max=second)[1].item() for second in (0.96, 0.1)]
    assert below[0] == below[1] == pytest.approx(0.7 * math.sqrt(0.96 / 0.04) * math.sqrt(0.06))
    with pytest.raises(ValueError, match="pole at sigma = 1, where `sigma_max` stands in: it must be < 1, got 1.0"):
        sde_step(x, v, 1.0, 0.96, noise_level=0.7, sigma_max=1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_no_noise_is_the_ode_step(kind):
    x, v = random_pair(2, 5)
    mean, std = sde_step(x, v, 0.7, 0.4, noise_level=0.0, kind=kind, sigma_max=0.9)
    torch.testing.assert_close(mean, x - 0.3 * v)
    assert std.item() == 0.0


def test_the_last_step_of_cps_and_ddim_adds_no_noise_and_has_no_density():
    """Trap: σ_next = 0 gives a deviation of 0, which must never be scored."""
    x, v = random_pair(2, 5)
    denoised, std = sde_step(x, v, 0.3, 0.0, noise_level=0.8, kind="cps", sigma_max=0.9)
    torch.testing.assert_close(denoised, x - 0.3 * v)
    assert std.item() == 0.0 == ddim_step(x, v, 0.9, 1.0, eta=1.0)[1].item()
    with pytest.raises(ValueError, match="`std` must be > 0, got 0.0: a step without noise .* has no density"):
        gaussian_log_prob(x, denoised, std)


def test_half_precision_is_computed_in_float32():
    """Trap: bfloat16 cannot hold the difference of two sigmas, nor a mean that moves by less than 1/256."""
    x, v = random_pair(2, 64)
    x, v = x.bfloat16(), v.bfloat16()
    now, after = 0.9601, 0.9133
    mean, std = sde_step(x, v, now, after, noise_level=0.7, sigma_max=0.9601)
    assert mean.dtype == std.dtype == torch.float32
    exact, _ = sde_step(x.double(), v.double(), now, after, noise_level=0.7, sigma_max=0.9601)
    assert (mean - exact).abs().max() < 1e-6
    assert ddim_step(x, v, 0.5, 0.6, eta=1.0)[0].dtype == torch.float32
    assert gaussian_log_prob(x, mean, std).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_steps_differentiate(kind):
    x, v = (t.requires_grad_() for t in random_pair(2, 3))
    levels = f64([0.8, 0.3]), f64([0.5, 0.1])
    assert torch.autograd.gradcheck(
        lambda x, v: sde_step(x, v, *levels, noise_level=0.7, kind=kind, sigma_max=0.9), (x, v)
    )
    assert torch.autograd.gradcheck(lambda x, v: ddim_step(x, v, f64([0.2, 0.5]), f64([0.4, 1.0]), eta=0.5), (x, v))


@pytest.mark.parametrize(("now", "after"), [(0.3, 0.5), (0.5, 0.5), (1.2, 0.5), (0.0, 0.0), (0.5, -0.1)])
def test_levels_must_fall_from_noise_to_data(now, after):
    """Trap: with the other time convention every dt changes its sign."""
    x, v = random_pair(1, 2)
    with pytest.raises(ValueError, match="0 <= sigma_next < sigma <= 1 with 1 = noise.*pass 1 - t and the negated"):
        sde_step(x, v, now, after, noise_level=0.7, sigma_max=0.9)
    with pytest.raises(ValueError, match="0 <= sigma_next < sigma <= 1"):
        guard_weight(now, after, noise_level=0.7, sigma_max=0.9)


def test_misuse_is_refused():
    x, v = random_pair(1, 2)
    with pytest.raises(ValueError, match="`sde.noise_level` must be >= 0, and at most 1 for the kind cps"):
        sde_step(x, v, 0.5, 0.4, noise_level=1.2, kind="cps", sigma_max=0.9)
    with pytest.raises(ValueError, match="`sde.noise_level` must be >= 0"):
        sde_step(x, v, 0.5, 0.4, noise_level=-0.1, sigma_max=0.9)
    with pytest.raises(ValueError, match="is eta and must lie in"):
        ddim_step(x, v, 0.4, 0.5, eta=1.5)
    with pytest.raises(ValueError, match="0 < alpha_bar < alpha_bar_next <= 1, got 0.5 -> 0.4"):
        ddim_step(x, v, 0.5, 0.4, eta=1.0)


# ---------------------------------------------------------------- marginals


def final_std(kind, noise_level, steps, *, data_mean=1.5, data_std=0.5):
    """Carry mean and variance of a Gaussian through all steps with its exact velocity: nothing is sampled.

    Velocity and step are affine in x, so the step's map is known from its values at 0 and 1.
    """
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    mean, variance = 0.0, 1.0
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        spread = (1 - now) ** 2 * data_std**2 + now**2
        x = f64([[0.0], [1.0]])
        centred = x - (1 - now) * data_mean
        velocity = now / spread * centred - data_mean - (1 - now) * data_std**2 / spread * centred
        at, std = sde_step(x, velocity, now, after, noise_level=noise_level, kind=kind, sigma_max=sigmas[1])
        slope = (at[1] - at[0]).item()
        mean, variance = at[0].item() + slope * mean, slope**2 * variance + std.item() ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize(("kind", "noise_level"), [("flow_sde", 0.7), ("flow_sde", 0.3), ("dance_sde", 0.3)])
def test_the_sdes_keep_the_marginals_of_a_gaussian(kind, noise_level):
    """Data N(1.5, .5²): the last latents have the data's mean and deviation, at any noise, once steps are small."""
    mean, std = final_std(kind, noise_level, 200)
    assert (mean, std) == pytest.approx((1.5, 0.5), abs=0.006)
    finer = final_std(kind, noise_level, 2000)
    assert finer == pytest.approx((1.5, 0.5), abs=0.001)


def test_known_deviations_at_few_steps():
    """At 10 steps the ODE ends at .43 of .5, the SDE at .48; coefficient-preserving noise never keeps this marginal."""
    assert final_std("flow_sde", 0.0, 10)[1] == pytest.approx(0.429, abs=0.003)
    assert final_std("flow_sde", 0.7, 10)[1] == pytest.approx(0.481, abs=0.003)
    cps = [final_std("cps", 0.8, steps)[1] for steps in (10, 200, 2000)]
    assert cps == pytest.approx([0.353, 0.400, 0.404], abs=0.002)


# ---------------------------------------------------------------- densities and ratios


def test_log_prob_matches_worked_vector_1_and_its_loss():
    """σ_t = .5, h = .04: std = .1. The loss is the clipped surrogate of the guarded ratio, times 1/h."""
    x, std = f64([[0.15, -0.30, 0.35, -0.05]]), f64([0.1])
    old, new = f64([[0.10, -0.20, 0.30, 0.0]]), f64([[0.12, -0.21, 0.27, 0.04]])
    log_old, log_new = gaussian_log_prob(x, old, std), gaussian_log_prob(x, new, std)
    assert (log_old.item(), log_new.item()) == pytest.approx((1.164896560, 1.089896560), abs=1e-9)
    assert (log_new - log_old).exp().item() == pytest.approx(0.927743486, abs=1e-9)
    guarded = guarded_log_ratio(log_new, log_old, new, old, std)
    assert guarded.item() == pytest.approx(-0.00375, abs=1e-12)
    assert guarded.item() == pytest.approx(((new - old) * (x - old) / std).mean().item(), abs=1e-12)
    weight = guard_weight(f64(0.50), f64(0.46), noise_level=0.5, sigma_max=0.9)
    losses = [
        (weight * clipped_surrogate(guarded, f64([advantage]), clip_low=1e-3, clip_high=1e-3)).item()
        for advantage in (1.0, -1.0)
    ]
    assert losses == pytest.approx([-24.906426, 24.975], abs=1e-6)


def test_log_prob_matches_worked_vector_2():
    """Trap: each sample's own drift; the batch's mean drift would give .134 and -.334."""
    old, std = torch.zeros(2, 4, dtype=torch.float64), f64([0.2, 0.2])
    new = f64([[0.1, 0.0, 0.0, 0.0], [0.3, -0.3, 0.3, -0.3]])
    x = f64([[0.2, -0.1, 0.0, 0.1], [-0.1, 0.2, -0.2, 0.1]])
    log_old, log_new = gaussian_log_prob(x, old, std), gaussian_log_prob(x, new, std)
    assert (log_new - log_old).tolist() == pytest.approx([0.09375, -2.25])
    assert guarded_log_ratio(log_new, log_old, new, old, std).tolist() == pytest.approx([0.025, -0.225])


def test_log_prob_is_a_density_and_a_mean_over_each_samples_own_dimensions():
    """Trap: the reduction runs over the latents' dimensions, whatever their number, and never over the batch."""
    x, mean = random_pair(3, 2, 4, 5)
    std = f64([0.1, 0.5, 2.0])
    got = gaussian_log_prob(x, mean, std)
    normal = torch.distributions.Normal(mean, std.reshape(3, 1, 1, 1))
    torch.testing.assert_close(got, normal.log_prob(x).mean((1, 2, 3)))
    torch.testing.assert_close(got, gaussian_log_prob(x.reshape(3, 8, 5), mean.reshape(3, 8, 5), std))
    torch.testing.assert_close(got[1:2], gaussian_log_prob(x[1:2], mean[1:2], std[1:2]))


def test_log_prob_per_dimension_does_not_overflow_where_the_sum_does():
    """Trap: 1 % per dimension is a ratio of 1.01, not of 1.01^16384."""
    x = torch.zeros(1, 4, 64, 64)
    old, new = gaussian_log_prob(x, x + 0.2, torch.tensor(1.0)), gaussian_log_prob(x, x + 0.14, torch.tensor(1.0))
    assert (new - old).exp().item() == pytest.approx(math.exp(0.0102), abs=1e-5)
    assert math.isinf((16384 * (new - old)).float().exp().item())


def test_log_prob_scores_the_rounded_sample():
    """Trap: a sample drawn in float32 and stored in bfloat16 is scored after rounding, as its replay will be."""
    mean, x = (t.float() for t in random_pair(1, 4096))
    std = torch.tensor(0.01)
    drawn = mean + std * x
    stored = drawn.bfloat16()
    scored = gaussian_log_prob(stored, mean, std)
    assert torch.equal(scored, gaussian_log_prob(stored.float(), mean, std))
    assert (gaussian_log_prob(drawn, mean, std) - scored).abs() > 1e-3


def test_log_prob_differentiates():
    x, mean = (t.requires_grad_() for t in random_pair(2, 3))
    std = f64([0.3, 0.8]).requires_grad_()
    assert torch.autograd.gradcheck(gaussian_log_prob, (x, mean, std))


@pytest.mark.parametrize("kind", KINDS)
def test_guarded_ratio_is_the_movement_along_the_noise_for_every_kind(kind):
    """Trap: without 1/(2 std²) in CPS's density this identity, and with it the guard, breaks."""
    x, v = random_pair(3, 4, 4)
    noise, change = random_pair(3, 4, 4, seed=1)
    levels = f64([1.0, 0.6, 0.3]), f64([0.8, 0.3, 0.1])
    settings = {"noise_level": 0.8, "kind": kind, "sigma_max": 0.8}
    old, std = sde_step(x, v, *levels, **settings)
    new, _ = sde_step(x, v + 0.1 * change, *levels, **settings)
    x_next = old + std[:, None, None] * noise
    log_ratio = gaussian_log_prob(x_next, new, std) - gaussian_log_prob(x_next, old, std)
    guarded = guarded_log_ratio(log_ratio, torch.zeros_like(log_ratio), new, old, std)
    torch.testing.assert_close(guarded, ((new - old) * noise).mean((1, 2)), rtol=1e-9, atol=1e-12)
    if kind == "cps":  # the published code's "log_prob" = -mean (x_next - mean)², corrected in the same units
        code = -((x_next - new) ** 2).mean((1, 2)) + ((x_next - old) ** 2).mean((1, 2))
        drift = ((new - old) ** 2).mean((1, 2))
        torch.testing.assert_close(guarded, (code + drift) / (2 * std), rtol=1e-9, atol=1e-12)


def test_expected_log_ratio_is_the_negative_kl():
    """E_old[log π_new - log π_old] = -KL(old | new), per dimension: the left shift that the guard takes out."""
    old, change = random_pair(1, 6)
    new, std = old + 0.1 * change, f64([0.3])
    noise = torch.randn(20000, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = old + 0.3 * noise
    ratio = gaussian_log_prob(x, new.expand_as(x), std[0]) - gaussian_log_prob(x, old.expand_as(x), std[0])
    kl = gaussian_kl(old, std.expand_as(old), new, std.expand_as(new)).mean()
    assert ratio.mean().item() == pytest.approx(-kl.item(), abs=4 * ratio.std().item() / math.sqrt(20000))


# ---------------------------------------------------------------- gradient reweighting


def mean_gradient(kind, now, after, noise_level, sigma_max):
    """|∂mean/∂v| of one dimension, by automatic differentiation."""
    v = f64([[0.3]]).requires_grad_()
    sde_step(f64([[1.0]]), v, now, after, noise_level=noise_level, kind=kind, sigma_max=sigma_max)[0].sum().backward()
    return v.grad.abs().item()


def test_guard_weight_matches_the_published_forms():
    levels = f64([0.8, 0.5]), f64([0.6, 0.4])
    assert guard_weight(*levels, noise_level=0.7, sigma_max=0.9).tolist() == pytest.approx([5.0, 10.0])
    dance = guard_weight(*levels, noise_level=0.4, kind="dance_sde", sigma_max=0.9)
    assert dance.tolist() == pytest.approx([5 * (1 + 0.16 * 0.25 / 2), 10 * 1.08])  # (1 - .8) / .8 = 1/4, (.5 / .5) = 1
    # cps, a = 1/3: .8 x .4 - .6 x .2 x cos 30°
    cps = guard_weight(*levels, noise_level=1 / 3, kind="cps", sigma_max=0.9)
    assert cps[0].item() == pytest.approx(1 / (0.32 - 0.12 * math.sqrt(3) / 2))


@pytest.mark.parametrize("kind", KINDS)
def test_exact_guard_weight_inverts_the_gradient_of_the_mean(kind):
    for now, after in zip(SD3_SIGMAS[:-2], SD3_SIGMAS[1:-1], strict=True):
        weight = guard_weight(
            f64(now), f64(after), noise_level=0.7, kind=kind, sigma_max=SD3_SIGMAS[1], exact=True
        ).item()
        assert weight * mean_gradient(kind, now, after, 0.7, SD3_SIGMAS[1]) == pytest.approx(1)


def test_flow_guard_balances_the_gradients_of_all_steps():
    """SD3, ten steps, a = .7: plain gradients differ 26-fold over steps 0-8, guarded ones 1.25-fold (the pole)."""
    pairs = list(zip(SD3_SIGMAS[:-2], SD3_SIGMAS[1:-1], strict=True))
    assert [round(s, 4) for s in SD3_SIGMAS] == [
        1,
        0.9601,
        0.9133,
        0.8577,
        0.7904,
        0.7073,
        0.6022,
        0.4649,
        0.278,
        0.0089,
        0,
    ]
    x = f64([[0.0]])
    slopes = [mean_gradient("flow_sde", now, after, 0.7, SD3_SIGMAS[1]) for now, after in pairs]
    stds = [sde_step(x, x, now, after, noise_level=0.7, sigma_max=SD3_SIGMAS[1])[1].item() for now, after in pairs]
    plain = [slope / std for slope, std in zip(slopes, stds, strict=True)]
    assert (min(plain), max(plain)) == pytest.approx((0.057, 1.487), abs=6e-4)
    assert max(plain) / min(plain) == pytest.approx(26.1, abs=0.1)
    assert max(slopes) / min(slopes) == pytest.approx(8.4, abs=0.1)
    guarded = [
        slope * guard_weight(now, after, noise_level=0.7, sigma_max=SD3_SIGMAS[1]).item()
        for slope, (now, after) in zip(slopes, pairs, strict=True)
    ]
    assert guarded == pytest.approx([1.0] + [1.245] * 8, abs=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_guard_weight_inverts_the_gradient_of_the_mean(eta):
    now, after = f64([0.1, 0.5, 0.9]), f64([0.2, 0.8, 1.0])
    epsilon = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    ddim_step(torch.ones(3, 1, dtype=torch.float64), epsilon, now, after, eta=eta)[0].sum().backward()
    weight = ddim_guard_weight(now, after, eta=eta)
    assert (weight * epsilon.grad[:, 0].abs()).tolist() == pytest.approx([1.0] * 3)


# ---------------------------------------------------------------- training targets


def test_interpolation_and_matching_error_match_hand_arithmetic():
    data, noise = f64([[4.0, 0.0], [1.0, 1.0]]), f64([[0.0, 2.0], [3.0, 1.0]])
    assert interpolate(data, noise, f64([0.25, 0.5])).tolist() == [[3.0, 0.5], [2.0, 1.0]]
    # noise - data = [-4, 2] and [2, 0]
    error = flow_matching_error(f64([[-4.0, 2.0], [0.0, 1.0]]), data, noise)
    assert error.tolist() == [0.0, 2.5]


def test_the_matching_error_is_zero_at_the_path_that_a_step_follows():
    data, noise = random_pair(2, 3, 4)
    velocity = noise - data
    assert flow_matching_error(velocity, data, noise).tolist() == [0.0, 0.0]
    mean, _ = sde_step(interpolate(data, noise, 0.8), velocity, 0.8, 0.3, noise_level=0, sigma_max=0.9)
    torch.testing.assert_close(mean, interpolate(data, noise, 0.3))
    assert interpolate(data.bfloat16(), noise.bfloat16(), 0.5).dtype == torch.float32


def test_the_matching_error_differentiates():
    data, noise = random_pair(2, 3)
    velocity = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: flow_matching_error(v, data, noise), velocity)
