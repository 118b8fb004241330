"""Errors of values, and the distributions that stand for them."""

import math

import pytest
import torch

from rlalign.functional import value
from tests.reference import value as reference


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


A = {"low": -1, "high": 1, "num_bins": 5}
B = {"low": -10, "high": 10, "num_bins": 51}


def decoded(y, *, edges="range", **support):
    probs = value.hl_gauss_targets(y, **support, edges=edges)
    return value.categorical_mean(probs, low=support["low"], high=support["high"], edges=edges)


# ---------------------------------------------------------------- errors of a number


def test_squared_error_has_no_half():
    values = f64([1.0, -2.0]).requires_grad_()
    error = value.squared_error(values, f64([4.0, -2.0]))
    assert error.tolist() == [9.0, 0.0]
    error.sum().backward()
    assert values.grad.tolist() == [-6.0, 0.0]  # 2 (V - R)


# clip 1, old 0, target 4.  V=0.5: near = 0.5, both 12.25.  V=3: near = 1, (1-4)^2 = 9 > 1.  V=-2: near = -1, 36 > 25.
# V=9 overshot: 25 > 9.
@pytest.mark.parametrize(
    ("v", "expected", "gradient"), [(0.5, 12.25, -7.0), (3.0, 9.0, 0.0), (-2.0, 36.0, -12.0), (9.0, 25.0, 10.0)]
)
def test_clipped_value_takes_the_larger_error(v, expected, gradient):
    values = f64([v]).requires_grad_()
    error = value.clipped_value(values, f64([0.0]), f64([4.0]), clip=1)
    assert error.tolist() == [expected]
    error.sum().backward()
    # In the first case both branches are the same number with the same slope; ties share it.
    assert values.grad.tolist() == [gradient]


def test_clipped_value_with_a_wide_clip_is_the_squared_error():
    values, old, returns = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(
        value.clipped_value(values, old, returns, clip=100.0), value.squared_error(values, returns)
    )
    with pytest.raises(ValueError, match="`value_clip` must be positive, or null.*got 0"):
        value.clipped_value(values, old, returns, clip=0)


def test_expectile_error_weighs_sides():
    # u = 2 and u = -2 with tau 0.9: 0.9 x 4 and 0.1 x 4
    got = value.expectile_error(f64([0.0, 0.0]), f64([2.0, -2.0]), expectile=0.9)
    torch.testing.assert_close(got, f64([3.6, 0.4]))
    half = value.expectile_error(f64([1.0]), f64([4.0]), expectile=0.5)
    assert half.tolist() == [4.5]
    with pytest.raises(ValueError, match="`expectile` must lie between 0 and 1, got 1"):
        value.expectile_error(f64([0.0]), f64([1.0]), expectile=1.0)


def test_the_expectile_of_two_samples_is_where_the_gradient_vanishes():
    # Samples 0 and 1: tau (1 - v) = (1 - tau) v, so v = tau.
    v = f64(0.8).requires_grad_()
    value.expectile_error(v.expand(2), f64([0.0, 1.0]), expectile=0.8).sum().backward()
    assert v.grad.item() == pytest.approx(0.0, abs=1e-12)


# ---------------------------------------------------------------- HL-Gauss


def test_hl_gauss_of_the_middle_of_five_bins():
    # Bins of 0.4, sigma 0.3: the middle one holds P(|z| < 2/3) of P(|z| < 10/3).
    probs = value.hl_gauss_targets(f64(0.0), **A)
    inner, all_ = math.erf(2 / 3 / math.sqrt(2)), math.erf(10 / 3 / math.sqrt(2))
    assert probs[2].item() == pytest.approx(inner / all_, abs=1e-14)
    assert probs.tolist() == pytest.approx([0.02234, 0.22994, 0.49544, 0.22994, 0.02234], abs=5e-6)
    assert decoded(f64(0.0), **A).item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("y", "probs", "mean"),
    [
        (0.3, [0.001356, 0.046901, 0.324842, 0.476585, 0.150316], 0.291042),
        (1.0, [0.0, 0.000063, 0.007597, 0.174762, 0.817578], 0.723941),
        (1.5, None, 0.788640),
        (-3.0, None, -0.799981),
    ],
)
def test_hl_gauss_near_and_beyond_the_ends(y, probs, mean, dtype):
    # Targets are not moved into the support: 1.5 decodes higher than 1.0.
    got = value.hl_gauss_targets(torch.tensor(y, dtype=dtype), **A)
    assert got.dtype == dtype
    if probs is not None:
        assert got.tolist() == pytest.approx(probs, abs=1e-6)
    assert decoded(torch.tensor(y, dtype=dtype), **A).item() == pytest.approx(mean, abs=1e-6)


def test_hl_gauss_with_the_bins_of_the_atari_experiments():
    probs = value.hl_gauss_targets(f64(3.3), **B)
    assert probs.argmax().item() == 33
    assert probs[30:37].tolist() == pytest.approx(
        [0.000051, 0.005284, 0.105898, 0.433884, 0.380888, 0.071277, 0.002698], abs=1e-6
    )
    assert -(probs * probs.clamp(min=1e-300).log()).sum().item() == pytest.approx(1.200342, abs=1e-6)
    assert (probs > 1e-3).sum().item() == 6
    means = decoded(f64([3.3, 9.9, 10.0, 12.0]), **B)
    assert means.tolist() == pytest.approx([3.29999904, 9.69837, 9.72935, 9.80390], abs=6e-6)


def test_hl_gauss_with_the_ends_on_bin_centers():
    support = {"low": -10, "high": 10, "num_bins": 101}
    probs = value.hl_gauss_targets(f64(3.3), **support, edges="centers")
    assert probs[66:71].tolist() == pytest.approx([0.408789, 0.408789, 0.087381, 0.003799, 0.000032], abs=1e-6)
    means = decoded(f64([3.3, 9.9, 10.0]), **support, edges="centers")
    assert means.tolist() == pytest.approx([3.3, 9.86904, 9.92624], abs=6e-6)


@pytest.mark.parametrize(
    ("ratio", "worst"), [(0.25, 3.6e-2), (0.5, 9e-4), (0.75, 1.9e-6), (1.0, 3.7e-7), (2.0, 1.2e-2)]
)
def test_decoding_error_depends_on_sigma_as_measured(ratio, worst):
    y = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    probs = value.hl_gauss_targets(y, **B, sigma_ratio=ratio)
    error = (value.categorical_mean(probs, low=-10, high=10) - y).abs().max().item()
    assert error == pytest.approx(worst, rel=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hl_gauss_far_outside_is_the_outer_bin_and_never_nan(dtype):
    # As printed in the paper this is 0/0 from 11.7 (float32) and 13 (float64) on.
    far = torch.tensor([11.7, 13.0, 20.0, 50.0, 1e4, 1e20, math.inf], dtype=dtype)
    probs = value.hl_gauss_targets(torch.cat([far, -far]), **B)
    assert probs.isfinite().all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(14, dtype=dtype))
    assert (probs[:7, -1] > 0.99).all()
    assert (probs[7:, 0] > 0.99).all()
    assert probs[[4, 5, 6], -1].tolist() == [1.0, 1.0, 1.0]
    assert (probs[:7, -1].diff() >= 0).all()


@pytest.mark.parametrize("ratio", [0.1, 0.75, 2.0, 20.0])
@pytest.mark.parametrize("centers", [False, True])
def test_hl_gauss_agrees_with_tail_areas(ratio, centers):
    for y in (-10.5, -10.0, -9.97, 0.0, 0.013, 3.3, 9.9, 10.4):
        got = value.hl_gauss_targets(f64(y), **B, sigma_ratio=ratio, edges="centers" if centers else "range")
        assert got.tolist() == pytest.approx(reference.hl_gauss(y, -10, 10, 51, ratio, centers), abs=1e-11)


def test_hl_gauss_moves_and_scales_with_the_support():
    y = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(
        value.hl_gauss_targets(y, low=-4, high=4, num_bins=21),
        value.hl_gauss_targets(1000 + 3 * y, low=988, high=1012, num_bins=21),
    )
    mirrored = value.hl_gauss_targets(-y, low=-4, high=4, num_bins=21).flip(-1)
    torch.testing.assert_close(value.hl_gauss_targets(y, low=-4, high=4, num_bins=21), mirrored)


def test_a_narrow_support_far_from_zero_keeps_its_digits_in_single_precision():
    y = torch.tensor([1000.25, 1000.5])
    exact = value.hl_gauss_targets(y.double(), low=1000, high=1001, num_bins=101)
    torch.testing.assert_close(
        value.hl_gauss_targets(y, low=1000, high=1001, num_bins=101).double(), exact, atol=1e-4, rtol=0
    )


def test_hl_gauss_takes_tensors_as_ends_and_half_precision_values():
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    expected = value.hl_gauss_targets(torch.tensor([0.25]), **A)
    assert value.hl_gauss_targets(torch.tensor([0.25]), low=low, high=high, num_bins=5).equal(expected)
    half = value.hl_gauss_targets(torch.tensor([0.25], dtype=torch.bfloat16), **A)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=4e-3, rtol=0)


def test_hl_gauss_differentiates_inside_and_in_the_tails():
    y = f64([0.3, -0.7, 1.4, 5.0]).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: value.hl_gauss_targets(y, **A), y)


def test_bad_supports_are_refused_with_the_names_to_change():
    y = torch.zeros(2)
    with pytest.raises(ValueError, match="`low` must be below `high`, got low=1, high=1"):
        value.hl_gauss_targets(y, low=1, high=1, num_bins=5)
    with pytest.raises(ValueError, match="`num_bins` >= 2, got 1"):
        value.two_hot_targets(y, low=0, high=1, num_bins=1)
    with pytest.raises(ValueError, match="`sigma_ratio` must be positive, got 0"):
        value.hl_gauss_targets(y, **A, sigma_ratio=0)
    with pytest.raises(ValueError, match="`low` must be below `high`"):
        value.categorical_mean(torch.ones(2) / 2, low=1, high=0)


# ---------------------------------------------------------------- two-hot and C51


def test_two_hot_matches_hand_arithmetic():
    got = value.two_hot_targets(f64([0.3, 1.7, -1.0, -9.0]), **A)
    expected = [[0, 0, 0.4, 0.6, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    torch.testing.assert_close(got, f64(expected))


def test_two_hot_agrees_with_interpolation_and_decodes_exactly():
    y = torch.linspace(-12, 12, 97, dtype=torch.float64)
    got = value.two_hot_targets(y, **B)
    for row, one in zip(got.tolist(), y.tolist(), strict=True):
        assert row == pytest.approx(reference.two_hot(one, -10, 10, 51), abs=1e-12)
    torch.testing.assert_close(value.categorical_mean(got, low=-10, high=10, edges="centers"), y.clamp(-10, 10))


def test_c51_matches_hand_arithmetic():
    # -1..1 in halves: r + 0.9 z = -.6 -.15 .3 .75 1.2, at positions .8 1.7 2.6 3.5 and 4 (cut)
    probs = f64([0.1, 0.2, 0.4, 0.2, 0.1])
    got = value.categorical_projection(probs, f64(0.3), f64(0.9), low=-1, high=1)
    torch.testing.assert_close(got, f64([0.02, 0.14, 0.30, 0.34, 0.20]))


def test_c51_agrees_with_loops_and_keeps_the_mean_inside():
    probs = torch.randn(16, 51, dtype=torch.float64).softmax(-1)
    rewards, discounts = torch.randn(16, dtype=torch.float64), torch.rand(16, dtype=torch.float64)
    got = value.categorical_projection(probs, rewards, discounts, low=-10, high=10)
    for row, p, r, d in zip(got.tolist(), probs.tolist(), rewards.tolist(), discounts.tolist(), strict=True):
        assert row == pytest.approx(reference.c51(p, r, d, -10, 10), abs=1e-12)
    small = discounts * 0.5
    moved = value.categorical_projection(probs, rewards, small, low=-10, high=10)
    mean = value.categorical_mean(probs, low=-10, high=10, edges="centers")
    torch.testing.assert_close(value.categorical_mean(moved, low=-10, high=10, edges="centers"), rewards + small * mean)


def test_c51_at_a_terminal_state_is_two_hot_of_the_reward():
    probs = torch.randn(3, 5, dtype=torch.float64).softmax(-1)
    rewards = f64([0.3, -7.0, 1.0])
    got = value.categorical_projection(probs, rewards, torch.zeros_like(rewards), low=-1, high=1)
    torch.testing.assert_close(got, value.two_hot_targets(rewards, **A))


# ---------------------------------------------------------------- cross-entropy, decoding, coverage


def test_cross_entropy_of_equal_logits_is_log_of_the_bins_and_its_slope_is_the_difference():
    targets = value.hl_gauss_targets(f64(0.3), **A)
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    loss = value.cross_entropy(logits, targets)
    assert loss.item() == pytest.approx(math.log(5), abs=1e-12)
    loss.backward()
    torch.testing.assert_close(logits.grad, 0.2 - targets)


def test_cross_entropy_is_least_at_the_target_and_ignores_a_shift_of_the_logits():
    targets = value.hl_gauss_targets(f64([3.3, -2.0]), **B)
    own = value.cross_entropy((targets + 1e-12).log(), targets)
    assert own[0].item() == pytest.approx(1.200342, abs=1e-5)
    torch.testing.assert_close(value.cross_entropy((targets + 1e-12).log() + 7, targets), own)
    assert (value.cross_entropy(torch.randn(2, 51, dtype=torch.float64), targets) > own).all()


def test_means_of_bins_and_of_locations():
    probs = f64([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0], [0.25] * 4])
    assert value.categorical_mean(probs, low=0, high=8).tolist() == [1.0, 7.0, 4.0]
    assert value.categorical_mean(probs, low=0, high=9, edges="centers").tolist() == [0.0, 9.0, 4.5]
    assert value.categorical_mean(probs, low=3, high=3).tolist() == [3.0] * 3  # an empty support


def test_the_share_outside():
    targets = torch.tensor([-1.0, 1.0, 1.01, -7.0, math.nan])
    assert value.outside_share(targets, low=-1, high=1).item() == pytest.approx(0.6)
    mask = torch.tensor([True, True, True, False, False])
    assert value.outside_share(targets, low=-1, high=1, mask=mask).item() == pytest.approx(1 / 3)
    assert value.outside_share(torch.zeros(0), low=-1, high=1).item() == 0.0
