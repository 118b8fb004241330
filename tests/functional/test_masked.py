"""Masked statistics and the one reduction to a loss."""

import inspect
import math

import pytest
import torch

from rlalign.functional.masked import (
    aggregate,
    aggregate_denominator,
    masked_mean,
    masked_var,
    spread,
    whiten,
)
from tests.reference import objectives as reference

MODES = ["token", "sequence_mean", "sequence_sum", "group", "constant"]
NAN, INF = math.nan, math.inf


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def ragged(seed=0, rows=8, time=6):
    """A random batch: objective, mask with one empty row, weights, four groups of two."""
    generator = torch.Generator().manual_seed(seed)
    objective = torch.randn(rows, time, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, time, generator=generator) < 0.6
    mask[2] = False
    weights = torch.rand(rows, time, generator=generator, dtype=torch.float64)
    return objective, mask, weights, torch.arange(rows) // 2 + 5


def loss_of(objective, mask, mode, *, weights=None, group=None, denominator=None):
    denominator = 48.0 if mode == "constant" and denominator is None else denominator
    return aggregate(objective, mask, weights=weights, mode=mode, group=group, denominator=denominator)


# ---------------------------------------------------------------- mean, variance, whitening


def test_masked_moments_match_hand_arithmetic():
    # 1, 3, 8 count: mean 4, squared deviations 9 + 1 + 16 = 26
    x, mask = f64([[1.0, NAN, 3.0], [8.0, INF, -INF]]), torch.tensor([[True, False, True], [True, False, False]])
    assert masked_mean(x, mask).item() == 4.0
    assert masked_var(x, mask).item() == 13.0
    assert masked_var(x, mask, unbiased=False).item() == pytest.approx(26 / 3)
    assert masked_mean(x, mask, dim=1).tolist() == [2.0, 8.0]
    assert masked_var(x, mask, dim=1).tolist() == [2.0, 0.0]
    assert masked_mean(x, mask, dim=(0, 1)).item() == 4.0


def test_masked_moments_of_nothing_are_zero():
    x, nothing = f64([NAN, 2.0]), torch.tensor([False, False])
    assert [masked_mean(x, nothing).item(), masked_var(x, nothing).item()] == [0, 0]
    assert whiten(x, nothing).tolist() == [0.0, 0.0]


def test_a_large_offset_costs_the_variance_no_digits():
    # E[x²] - E[x]² in float32 would be off by thousands here
    x = torch.tensor([10000.0, 10001.0, 10002.0])
    assert masked_var(x, torch.ones(3).bool()).item() == 1.0


def test_whiten_matches_hand_arithmetic():
    # 1, 3 and a masked one: mean 2, population variance 1, sample variance 2
    x, mask = f64([1.0, 3.0, NAN]), torch.tensor([True, True, False])
    assert whiten(x, mask, unbiased=False, eps=0.0).tolist() == [-1.0, 1.0, 0.0]
    assert whiten(x, mask, eps=0.0).tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, 0.0])
    assert whiten(x, mask, unbiased=False, eps=3.0).tolist() == pytest.approx([-0.5, 0.5, 0.0])
    assert whiten(x, mask, unbiased=False, eps=0.0, shift_mean=False).tolist() == [1.0, 3.0, 0.0]


@pytest.mark.parametrize("value", [0.1, -7.3, 0.0, 1e6])
def test_equal_values_whiten_to_zero_not_to_noise(value):
    # The float32 mean of seven equal values misses them by rounding; over sqrt(eps) = 1e-4 that would be a signal.
    x = torch.full((7,), value)
    assert whiten(x, torch.ones(7).bool()).tolist() == [0.0] * 7


def test_whiten_ignores_offset_and_scale():
    x, mask, _, _ = ragged(1)
    expected = whiten(x, mask, eps=0.0)
    torch.testing.assert_close(whiten(5 * x - 3, mask, eps=0.0), expected)
    assert masked_mean(expected, mask).item() == pytest.approx(0, abs=1e-12)
    assert masked_var(expected, mask).item() == pytest.approx(1)


def test_masked_statistics_differentiate():
    x, mask, _, _ = ragged(2)
    x.requires_grad_()
    for function in (masked_mean, masked_var, whiten):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, mask), x)


@pytest.mark.parametrize("function", [masked_mean, masked_var, whiten])
def test_masked_values_get_exactly_zero_gradient(function):
    x, mask, _, _ = ragged(3)
    x = x.masked_fill(~mask, NAN).requires_grad_()
    function(x, mask).square().sum().backward()
    assert x.grad[~mask].tolist() == [0.0] * int((~mask).sum())
    assert bool((x.grad[mask] != 0).any())
    assert bool(x.grad.isfinite().all())


def test_spread_gives_real_decisions_their_rollouts_value():
    mask = torch.tensor([[True, True, False], [False, True, True]])
    assert spread(torch.tensor([2.0, -1.0]), mask).tolist() == [[2.0, 2.0, 0.0], [0.0, -1.0, -1.0]]
    assert spread(torch.tensor([3, 4]), mask).dtype == torch.int64
    assert spread(f64([NAN, 1.0]), ~mask & False).tolist() == [[0.0] * 3] * 2


# ---------------------------------------------------------------- aggregate


def test_aggregate_matches_hand_arithmetic():
    # rows (1, 3), (6), () of two groups {row 0, row 1}, {row 2}; 99 is masked
    objective = f64([[1.0, 3.0], [6.0, 99.0], [99.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    group = torch.tensor([4, 4, 9])
    assert loss_of(objective, mask, "token").item() == pytest.approx(10 / 3)
    assert loss_of(objective, mask, "sequence_mean").item() == pytest.approx((2 + 6 + 0) / 3)  # the empty row counts
    assert loss_of(objective, mask, "sequence_sum").item() == pytest.approx((4 + 6 + 0) / 3)
    assert loss_of(objective, mask, "group", group=group).item() == pytest.approx((10 / 3 + 0) / 2)
    assert loss_of(objective, mask, "constant", denominator=3 * 5).item() == pytest.approx(10 / 15)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_aggregate_agrees_with_loops(mode, seed):
    objective, mask, weights, group = ragged(seed)
    got = loss_of(objective, mask, mode, weights=weights, group=group)
    loops = (objective.tolist(), mask.tolist(), weights.tolist(), mode, group.tolist(), 48.0)
    assert got.item() == pytest.approx(reference.aggregate(*loops), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_to_the_step(mode):
    """Trap: averaging the means of micro-batches is not the mean of the step. 1 x 8 = 2 x 4 = 4 x 2 = 8 x 1."""
    objective, mask, weights, group = ragged(7)
    whole = loss_of(objective, mask, mode, weights=weights, group=group)
    count = 48 if mode == "constant" else aggregate_denominator(mask, mode=mode, group=group)
    sizes = (4, 2) if mode == "group" else (4, 2, 1)  # a prompt mean needs whole groups, which hold two rows
    for size in sizes:
        pieces = zip(objective.split(size), mask.split(size), weights.split(size), group.split(size), strict=True)
        losses = [loss_of(o, m, mode, weights=w, group=g, denominator=count) for o, m, w, g in pieces]
        assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-12)
    if mode in ("token", "sequence_mean"):
        own = [loss_of(o, m, "token") for o, m in zip(objective.split(2), mask.split(2), strict=True)]
        assert sum(own).item() / 4 != pytest.approx(loss_of(objective, mask, "token").item(), rel=1e-3)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_average_gradients_need_world_size_times_local_sums(world):
    """Trap: DDP divides by the number of ranks, so each passes denominator = tokens of all ranks / ranks."""
    objective, mask, _, _ = ragged(8)
    count = aggregate_denominator(mask, mode="token")
    local = [
        loss_of(o, m, "token", denominator=count / world)
        for o, m in zip(objective.chunk(world), mask.chunk(world), strict=True)
    ]
    assert sum(local).item() / world == pytest.approx(loss_of(objective, mask, "token").item(), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_masked_decisions_get_exactly_zero_gradient_whatever_stands_there(mode):
    objective, mask, weights, group = ragged(9)
    clean = loss_of(objective, mask, mode, weights=weights, group=group)
    for poison in (NAN, INF, -INF):
        poisoned = objective.masked_fill(~mask, poison).requires_grad_()
        poisoned_weights = weights.masked_fill(~mask, poison)
        loss = loss_of(poisoned, mask, mode, weights=poisoned_weights, group=group)
        assert loss.item() == clean.item()
        loss.backward()
        assert poisoned.grad[~mask].tolist() == [0.0] * int((~mask).sum())
        assert bool((poisoned.grad[mask] > 0).all())


@pytest.mark.parametrize("mode", MODES)
def test_everything_masked_is_a_loss_of_zero_with_a_graph(mode):
    """Trap: 0 / 0. A rank without tokens must still run backward."""
    objective = torch.full((2, 3), NAN, requires_grad=True)
    loss = loss_of(objective, torch.zeros(2, 3).bool(), mode, group=torch.tensor([0, 1]))
    assert loss.item() == 0.0
    loss.backward()
    assert objective.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("mode", MODES)
def test_aggregate_differentiates(mode):
    objective, mask, weights, group = ragged(10)
    objective.requires_grad_()
    weights.requires_grad_()
    assert torch.autograd.gradcheck(lambda o, w: loss_of(o, mask, mode, weights=w, group=group), (objective, weights))


@pytest.mark.parametrize("mode", MODES)
def test_rows_may_stand_in_any_order(mode):
    objective, mask, weights, group = ragged(11)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    got = loss_of(objective[order], mask[order], mode, weights=weights[order], group=group[order])
    expected = loss_of(objective, mask, mode, weights=weights, group=group)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode):
    objective, mask, weights, group = ragged(12)
    pad = torch.nn.functional.pad
    padded = [pad(objective, (0, 4), value=NAN), pad(mask, (0, 4), value=False), pad(weights, (0, 4), value=1.0)]
    got = loss_of(padded[0], padded[1], mode, weights=padded[2], group=group)
    assert got.item() == loss_of(objective, mask, mode, weights=weights, group=group).item()


def test_weights_multiply_the_numerator_only():
    objective, mask, weights, group = ragged(13)
    for mode in MODES:
        once = loss_of(objective, mask, mode, weights=weights, group=group)
        thrice = loss_of(objective, mask, mode, weights=3 * weights, group=group)
        assert thrice.item() == pytest.approx(3 * once.item(), rel=1e-12)


def test_length_bias_of_each_aggregation():
    """Trap: a right answer of 1 token and a wrong one of 3, advantages +1 and -1: which of them wins the update."""
    mask = torch.tensor([[True, False, False], [True, True, True]])
    objective = spread(f64([-1.0, 1.0]), mask)
    group = torch.tensor([0, 0])
    assert loss_of(objective, mask, "sequence_mean").item() == 0.0  # a token of the short one weighs three times more
    assert loss_of(objective, mask, "sequence_sum").item() == 1.0  # the long one has three times the say
    assert loss_of(objective, mask, "token").item() == 0.5
    assert loss_of(objective, mask, "group", group=group).item() == 0.5
    assert loss_of(objective, mask, "constant", denominator=2 * 3).item() == pytest.approx(2 / 6)


def test_a_masked_truncation_leaves_the_divisor():
    """Trap: the mean divides by the tokens that remain."""
    objective = f64([[2.0, 4.0], [7.0, 7.0]])
    kept = torch.tensor([[True, True], [False, False]])
    assert loss_of(objective, kept, "token").item() == 3.0
    assert loss_of(objective, kept, "sequence_mean").item() == 1.5  # the dropped rollout still is a rollout
    assert loss_of(objective, kept, "sequence_mean", denominator=1).item() == 3.0  # unless the caller says otherwise


def test_denominators_are_clamped_at_one_and_may_be_tensors():
    objective, mask = f64([[6.0, 2.0]]), torch.tensor([[True, True]])
    assert loss_of(objective, mask, "token", denominator=0).item() == 8.0
    assert loss_of(objective, mask, "token", denominator=torch.tensor(0)).item() == 8.0
    assert loss_of(objective, mask, "token", denominator=torch.tensor(4)).item() == 2.0
    assert loss_of(objective, mask, "token", denominator=torch.tensor(16.0)).item() == 0.5


def test_half_precision_objectives_are_summed_in_float32():
    # 4,096 ones: in bfloat16 the count alone would round, and 4097 is not representable at all
    objective = torch.ones(1, 4097, dtype=torch.bfloat16, requires_grad=True)
    loss = aggregate(objective, torch.ones(1, 4097).bool(), mode="sequence_sum")
    assert loss.dtype == torch.float32
    assert loss.item() == 4097.0
    loss.backward()
    assert objective.grad.dtype == torch.bfloat16


def test_counts_of_an_optimizer_step():
    _, mask, _, group = ragged(14)
    assert aggregate_denominator(mask, mode="token") == int(mask.sum())
    assert aggregate_denominator(mask, mode="sequence_mean") == 8
    assert aggregate_denominator(mask, mode="sequence_sum") == 8
    assert aggregate_denominator(mask, mode="group", group=group) == 4
    assert aggregate_denominator(mask & False, mode="token") == 1


def test_errors_say_what_is_missing():
    objective, mask = f64([[1.0]]), torch.tensor([[True]])
    with pytest.raises(
        ValueError, match=r"`constant` aggregation divides by a number of your choice: pass `denominator`"
    ):
        aggregate(objective, mask, mode="constant")
    with pytest.raises(ValueError, match="pass `group`, one id per rollout"):
        aggregate(objective, mask, mode="group")
    with pytest.raises(ValueError, match="pass `group`, one id per rollout"):
        aggregate(objective, mask, mode="group", denominator=3)
    with pytest.raises(ValueError, match=r"objective \[1, 2\] and mask \[1, 1\] must have one shape"):
        inspect.unwrap(aggregate)(f64([[1.0, 2.0]]), mask, mode="token")


@pytest.mark.parametrize("values", [[1.0, 3.0, 8.0], [2.0, 2.0, 2.0 + 1e-8], [5.0], []])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [True, False])
def test_whitening_without_a_mask_counts_everything(values, shift_mean, unbiased):
    x = torch.tensor(values, dtype=torch.float64)
    options = {"shift_mean": shift_mean, "unbiased": unbiased}
    torch.testing.assert_close(whiten(x, **options), whiten(x, torch.ones(len(x), dtype=torch.bool), **options))
