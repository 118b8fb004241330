"""Ratios: per sequence, per token of a sequence, guarded per denoising step, and against the engine that sampled."""

import math

import pytest
import torch

from rlalign.functional.masked import aggregate, spread
from rlalign.functional.policy import (
    clipped_surrogate,
    guarded_log_ratio,
    masked_correction,
    sequence_ratio,
    sequence_token_ratio,
    step_clip,
    truncated_correction,
)
from rlalign.functional.ratios import bounded_ratio
from tests.reference import objectives as reference

NAN = math.nan


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_bounded_ratio_matches_exp_inside_the_bounds():
    log_ratio = f64([0.0, 1.0, -20.0, 25.0, -1000.0]).requires_grad_()
    ratio = bounded_ratio(log_ratio)
    assert ratio.tolist() == pytest.approx([1.0, math.e, math.exp(-20), math.exp(20), math.exp(-20)])
    ratio.sum().backward()
    assert log_ratio.grad[3:].tolist() == [0.0, 0.0]


# ---------------------------------------------------------------- GSPO


def test_sequence_ratio_is_the_mean_over_real_tokens():
    """Trap: the mean, not the sum: a sum grows with length and every long rollout ends up clipped."""
    log_ratio = f64([[0.2, 0.4, NAN], [0.5, NAN, NAN], [NAN, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    got = sequence_ratio(log_ratio, mask)
    assert got.shape == (3, 1)
    assert got[:, 0].tolist() == pytest.approx([0.3, 0.5, 0.0])
    long = sequence_ratio(torch.full((1, 1000), 0.01, dtype=torch.float64), torch.ones(1, 1000).bool())
    assert long.item() == pytest.approx(0.01)


def test_sequence_ratio_differentiates_and_skips_masked_tokens():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    log_ratio = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sequence_ratio(x, mask), log_ratio)
    sequence_ratio(log_ratio, mask).sum().backward()
    assert log_ratio.grad.tolist()[0] == [0.5, 0.0, 0.5]


def test_token_level_ratio_has_the_sequences_value_and_each_tokens_gradient():
    log_ratio = f64([[0.25, 0.75, NAN]]).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    got = sequence_token_ratio(log_ratio, mask)
    assert got.tolist() == [[0.5, 0.5, 0.0]]
    (got * f64([[3.0, 5.0, 7.0]])).sum().backward()
    assert log_ratio.grad.tolist() == [[3.0, 5.0, 0.0]]


def test_both_sequence_ratios_give_the_same_gradient_for_one_advantage_per_rollout():
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    advantages = spread(f64([1.5, -0.5]), mask)
    start = 0.1 * torch.randn(2, 4, dtype=torch.float64)
    gradients = []
    for ratio in (sequence_ratio, sequence_token_ratio):
        log_prob = start.clone().requires_grad_()
        objective = clipped_surrogate(ratio(log_prob, mask), advantages, clip_low=0.5, clip_high=0.5)
        aggregate(objective, mask, mode="sequence_mean").backward()
        gradients.append(log_prob.grad)
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- engine corrections


def test_truncated_correction_matches_hand_arithmetic():
    old, engine = f64([[-1.0, -1.0, -2.0, -1.0]]), f64([[-1.0, -2.0, -1.0, -9.0]])
    got = truncated_correction(old, engine, torch.tensor([[True] * 4]), cap=2.0)
    assert got.tolist()[0] == pytest.approx([1.0, 2.0, math.exp(-1), 2.0])


def test_masked_correction_matches_hand_arithmetic():
    old, engine = f64([[-1.0, -1.0, -2.0, -1.0]]), f64([[-1.0, -2.0, -1.0, -9.0]])
    got = masked_correction(old, engine, torch.tensor([[True] * 4]), low=0.5, high=5.0)
    assert got.tolist()[0] == pytest.approx([1.0, math.e, 0.0, 0.0])  # ratio, ratio, below, above


@pytest.mark.parametrize(
    "correct",
    [lambda *facts: truncated_correction(*facts, cap=2.0), lambda *facts: masked_correction(*facts, low=0.5, high=2.0)],
)
def test_corrections_are_detached_neutral_without_report_and_zero_where_masked(correct):
    """Trap: an engine that reports nothing (NaN) means ratio 1; tool tokens never reach the ratio."""
    old = f64([[-1.0, -1.0, 5.0, NAN]]).requires_grad_()
    got = correct(old, f64([[NAN, -1.0, -900.0, NAN]]), torch.tensor([[True, True, False, False]]))
    assert got.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert not got.requires_grad


def test_corrections_do_not_overflow():
    old, engine = f64([[0.0, -800.0]]), f64([[-800.0, 0.0]])
    got = truncated_correction(old, engine, torch.tensor([[True, True]]), cap=1e30)
    assert got.tolist()[0] == pytest.approx([math.exp(20), math.exp(-20)])


def test_corrections_refuse_bounds_that_leave_out_one():
    facts = f64([[0.0]]), f64([[0.0]]), torch.tensor([[True]])
    with pytest.raises(ValueError, match="largest ratio itself and must be >= 1"):
        truncated_correction(*facts, cap=0.5)
    for low, high in ((1.5, 2.0), (0.1, 0.9), (-1.0, 2.0)):
        with pytest.raises(ValueError, match="the band of kept ratios must hold 1"):
            masked_correction(*facts, low=low, high=high)


# ---------------------------------------------------------------- GRPO-Guard


def test_guard_matches_worked_vector_1():
    old, new = f64([[0.10, -0.20, 0.30, 0.0]]), f64([[0.12, -0.21, 0.27, 0.04]])
    got = guarded_log_ratio(f64([1.089896560]), f64([1.164896560]), new, old, f64([0.1]))
    assert got.item() == pytest.approx(-0.00375, abs=1e-12)
    assert got.exp().item() == pytest.approx(0.996257022, abs=1e-9)
    good = clipped_surrogate(got, f64([1.0]), clip_low=1e-3, clip_high=1e-3)
    bad = clipped_surrogate(got, f64([-1.0]), clip_low=1e-3, clip_high=1e-3)
    assert (good.item() / 0.04, bad.item() / 0.04) == pytest.approx((-24.906426, 24.975), abs=1e-6)


def test_guard_takes_each_samples_own_drift_not_the_batchs():
    old = torch.zeros(2, 4, dtype=torch.float64)
    new = f64([[0.1, 0.0, 0.0, 0.0], [0.3, -0.3, 0.3, -0.3]])
    x = f64([[0.2, -0.1, 0.0, 0.1], [-0.1, 0.2, -0.2, 0.1]])
    std = f64([0.2, 0.2])
    log_prob, log_prob_old = (-((x - mean) ** 2).mean(1) / (2 * 0.2**2) for mean in (new, old))
    assert (log_prob - log_prob_old).tolist() == pytest.approx([0.09375, -2.25])
    got = guarded_log_ratio(log_prob, log_prob_old, new, old, std)
    assert got.tolist() == pytest.approx([0.025, -0.225])  # the batch's drift 0.578125 would give .134375, -.334375


@pytest.mark.parametrize("shape", [(7,), (2, 3), (3, 2, 2)])
def test_guard_is_the_mean_of_movement_times_noise(shape):
    generator = torch.Generator().manual_seed(3)
    old, noise = torch.randn(2, 5, *shape, generator=generator, dtype=torch.float64)
    new = old + 0.1 * torch.randn(5, *shape, generator=generator, dtype=torch.float64)
    std = 0.05 + torch.rand(5, generator=generator, dtype=torch.float64)
    x = old + std.view(-1, *[1] * len(shape)) * noise
    rows = [[t[i].flatten().tolist() for t in (x, new, old)] for i in range(5)]
    log_prob = f64([reference.gaussian_log_prob(x, new, s) for (x, new, _), s in zip(rows, std.tolist(), strict=True)])
    log_old = f64([reference.gaussian_log_prob(x, old, s) for (x, _, old), s in zip(rows, std.tolist(), strict=True)])
    expected = [reference.guarded(*row, s) for row, s in zip(rows, std.tolist(), strict=True)]
    assert guarded_log_ratio(log_prob, log_old, new, old, std).tolist() == pytest.approx(expected, abs=1e-12)


def test_guard_has_mean_zero_and_one_spread_at_every_noise_level():
    generator = torch.Generator().manual_seed(4)
    samples, dims = 50_000, 16
    movement = 0.02 * torch.randn(dims, generator=generator, dtype=torch.float64)
    spreads = []
    for level in (0.05, 0.5):
        noise = torch.randn(samples, dims, generator=generator, dtype=torch.float64)
        old = torch.zeros(samples, dims, dtype=torch.float64)
        new = movement.expand(samples, dims)
        std = torch.full((samples,), level, dtype=torch.float64)
        log_prob, log_old = (-((level * noise - mean) ** 2).mean(1) / (2 * level**2) for mean in (new, old))
        got = guarded_log_ratio(log_prob, log_old, new, old, std)
        spreads.append(got.std().item())
        assert abs(got.mean().item()) < 4 * spreads[-1] / math.sqrt(samples)
        assert (log_prob - log_old).mean().item() < 0  # the plain ratio drifts to the left
    assert spreads == pytest.approx([float(movement.norm()) / dims] * 2, rel=0.02)


def test_guard_differentiates_and_is_zero_where_nothing_moved():
    generator = torch.Generator().manual_seed(5)
    mean, old = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    log_prob, log_old = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    std = 0.5 + torch.rand(3, generator=generator, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (log_prob, log_old, mean, old, std)]
    assert torch.autograd.gradcheck(guarded_log_ratio, inputs)
    assert guarded_log_ratio(log_old, log_old, old, old, std).tolist() == [0.0] * 3


def test_a_step_without_noise_has_no_ratio():
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="`std` must be > 0 at every step, got 0.0; mask the steps that add no noise"):
        guarded_log_ratio(torch.zeros(2), torch.zeros(2), zeros, zeros, torch.tensor([0.1, 0.0]))


def test_the_authors_average_of_the_drift_mixes_samples():
    """yifan123/flow_grpo issue 244: drifts .03125 and 1.125 become .578125 for both."""
    mean = f64([[0.1, 0.0, 0.0, 0.0], [0.3, -0.3, 0.3, -0.3]])
    log_ratio, std = f64([0.09375, -2.25]), f64([0.2, 0.2])
    arguments = (log_ratio, torch.zeros_like(log_ratio), mean, torch.zeros_like(mean), std)
    assert guarded_log_ratio(*arguments).tolist() == pytest.approx([0.025, -0.225], abs=1e-12)
    assert guarded_log_ratio(*arguments, drift_over="batch").tolist() == pytest.approx([0.134375, -0.334375], abs=1e-12)


@pytest.mark.parametrize(
    ("dimensions", "guard", "plain"),
    [
        (16384, 4e-6, 2e-4),  # Stable Diffusion 1.5 at 512
        (65536, 2e-6, 1e-4),  # Stable Diffusion 3.5 at 512: the authors' own
        (262144, 1e-6, 5e-5),  # Flux at 1024
        (4096, 8e-6, 4e-4),  # 16 x 16 x 16 voxels
        (64, 6.4e-5, 3.2e-3),
        (30, 9.3e-5, 4.7e-3),
    ],
)
def test_step_clips_of_common_sizes(dimensions, guard, plain):
    assert step_clip(dimensions, normalized=True) == pytest.approx(guard, rel=0.02)
    assert step_clip(dimensions, normalized=False) == pytest.approx(plain, rel=0.02)


def test_a_step_clip_needs_dimensions():
    with pytest.raises(ValueError, match="`dimensions` must be >= 1, got 0"):
        step_clip(0, normalized=True)
