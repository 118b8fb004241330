"""Advantages along time: GAE, returns, REINFORCE++."""

import math

import pytest
import torch

from rlalign.functional.advantages import discounted_returns, gae, reinforce_plus_plus
from tests.reference import advantages as reference

NAN = math.nan


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def flags(rows):
    return torch.tensor(rows, dtype=torch.bool)


def random_episodes(seed, rows=6, time=12):
    """Random facts with terminations, truncations, both at once, and masked rows with and without boundaries."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values, next_values = torch.randn(3, rows, time, generator=generator, dtype=torch.float64)
    terminated, truncated, masked = torch.rand(3, rows, time, generator=generator) < 0.2
    return rewards, values, next_values, terminated, truncated, ~masked


# ---------------------------------------------------------------- GAE


# gamma = lambda = 1/2; rewards 1 2 4; V 2 2 2; V of the true next state 4 8 16
#   no boundary at step 1:  d = 1+2-2 = 1,  2+4-2 = 4,  4+8-2 = 10;  A2 = 10, A1 = 4 + 10/4, A0 = 1 + 6.5/4
#   terminated at step 1:   d1 = 2 - 2 = 0;                          A1 = 0,                 A0 = 1
#   truncated at step 1:    d1 = 4 as without;                       A1 = 4 (no trace),      A0 = 1 + 4/4
@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        (False, False, [1 + 6.5 / 4, 6.5, 10.0]),
        (True, False, [1.0, 0.0, 10.0]),
        (False, True, [2.0, 4.0, 10.0]),
        (True, True, [1.0, 0.0, 10.0]),
    ],
)
def test_gae_matches_hand_arithmetic_at_every_kind_of_boundary(terminated, truncated, expected):
    got = gae(
        f64([[1.0, 2.0, 4.0]]),
        f64([[2.0, 2.0, 2.0]]),
        f64([[4.0, 8.0, 16.0]]),
        flags([[False, terminated, False]]),
        flags([[False, truncated, False]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert got.tolist() == [expected]


@pytest.mark.parametrize("seed", range(8))
def test_gae_agrees_with_the_sum_of_td_errors(seed):
    *facts, real = random_episodes(seed)
    got = gae(*facts, gamma=0.9, gae_lambda=0.8, mask=real)
    for row in range(len(got)):
        expected = reference.gae(*(fact[row].tolist() for fact in facts), 0.9, 0.8, real[row].tolist())
        assert got[row].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("boundary", ["terminated", "truncated", "none"])
def test_gae_is_zero_when_values_are_exact(boundary):
    # reward 1 forever: V = 1 / (1 - gamma). A time limit changes nothing, if V of the true next state is used; at a
    # termination the exact V of the last state is 1.
    gamma, forever = 0.9, 10.0
    values, next_values = torch.full((2, 1, 5), forever, dtype=torch.float64)
    here = flags([[False, False, True, False, False]])
    if boundary == "terminated":
        values[0, :3] = f64([1 + 0.9 * (1 + 0.9), 1 + 0.9, 1.0])
        next_values[0, :2] = values[0, 1:3]
        next_values[0, 2] = NAN  # never looked at
    terminated, truncated = (here if boundary == kind else here & False for kind in ("terminated", "truncated"))
    got = gae(torch.ones(1, 5).double(), values, next_values, terminated, truncated, gamma=gamma, gae_lambda=0.95)
    assert got.tolist()[0] == pytest.approx([0.0] * 5, abs=1e-12)


def test_a_time_limit_taken_for_a_termination_would_bias_the_advantage():
    facts = [torch.ones(1, 1).double(), f64([[10.0]]), f64([[10.0]])]
    yes, no = flags([[True]]), flags([[False]])
    assert gae(*facts, no, yes, gamma=0.9, gae_lambda=1.0).item() == pytest.approx(0.0)
    assert gae(*facts, yes, no, gamma=0.9, gae_lambda=1.0).item() == pytest.approx(-9.0)


def test_lambda_zero_is_the_td_error_and_lambda_one_the_return():
    rewards, values, next_values, terminated, truncated, _ = random_episodes(20)
    facts = (rewards, values, next_values, terminated, truncated)
    td = rewards + 0.9 * next_values * ~terminated - values
    torch.testing.assert_close(gae(*facts, gamma=0.9, gae_lambda=0.0), td)
    # With next_values[t] = values[t+1] inside an episode the values telescope away.
    inside = ~(terminated | truncated)[:, :-1]
    consistent = next_values.clone()
    consistent[:, :-1] = torch.where(inside, values[:, 1:], next_values[:, :-1])
    returns = discounted_returns(rewards, terminated, truncated, gamma=0.9, bootstrap=consistent)
    got = gae(rewards, values, consistent, terminated, truncated, gamma=0.9, gae_lambda=1)
    torch.testing.assert_close(got, returns - values)


def test_masked_rows_pass_the_trace_through_and_nothing_of_theirs():
    rewards, values, next_values, terminated, truncated, _ = random_episodes(21)
    real = torch.ones_like(terminated)
    real[:, 4] = False
    keep = [t for t in range(12) if t != 4]
    boundary_free = terminated.clone(), truncated.clone()
    for fact in boundary_free:
        fact[:, 4] = False
    garbage = [fact.clone() for fact in (rewards, values, next_values)]
    for fact in garbage:
        fact[:, 4] = NAN
    got = gae(*garbage, *boundary_free, gamma=0.9, gae_lambda=0.8, mask=real)
    without = gae(
        *(fact[:, keep] for fact in (rewards, values, next_values, *boundary_free)), gamma=0.9, gae_lambda=0.8
    )
    torch.testing.assert_close(got[:, keep], without)
    assert got[:, 4].tolist() == [0.0] * 6


def test_a_boundary_on_a_masked_row_still_separates_episodes():
    zeros, no = torch.zeros(1, 3).double(), flags([[False] * 3])
    rewards, mask = f64([[0.0, 0.0, 7.0]]), flags([[True, False, True]])
    through = gae(rewards, zeros, zeros, no, no, gamma=1, gae_lambda=1, mask=mask)
    cut = gae(rewards, zeros, zeros, no, flags([[False, True, False]]), gamma=1, gae_lambda=1, mask=mask)
    assert through.tolist() == [[7.0, 0.0, 7.0]]
    assert cut.tolist() == [[0.0, 0.0, 7.0]]


def test_gae_differentiates_and_masked_rows_get_exactly_zero_gradient():
    rewards, values, next_values, terminated, truncated, real = random_episodes(22, rows=2, time=5)
    inputs = [fact.requires_grad_() for fact in (rewards, values, next_values)]
    assert torch.autograd.gradcheck(
        lambda r, v, n: gae(r, v, n, terminated, truncated, gamma=0.9, gae_lambda=0.8, mask=real), inputs
    )
    gae(*inputs, terminated, truncated, gamma=0.9, gae_lambda=0.8, mask=real).square().sum().backward()
    for fact in inputs:
        assert fact.grad[~real].tolist() == [0.0] * int((~real).sum())


def test_gae_of_one_step_of_nothing_and_of_half_precision():
    one = torch.ones(2, 1)
    no = torch.zeros(2, 1, dtype=torch.bool)
    assert gae(3 * one, one, one, no, no, gamma=0.5, gae_lambda=0.9).tolist() == [[2.5], [2.5]]
    empty = torch.zeros(2, 0)
    assert gae(empty, empty, empty, empty.bool(), empty.bool(), gamma=0.9, gae_lambda=0.9).shape == (2, 0)
    half = one.to(torch.bfloat16)
    assert gae(half, half, half, no, no, gamma=0.5, gae_lambda=0.5).dtype == torch.bfloat16


def test_gae_masked_everywhere_is_zero():
    facts = [torch.full((1, 3), NAN)] * 3 + [flags([[False] * 3])] * 2
    assert gae(*facts, gamma=0.9, gae_lambda=0.9, mask=flags([[False] * 3])).tolist() == [[0.0] * 3]


# ---------------------------------------------------------------- returns


def test_returns_match_hand_arithmetic():
    # gamma 1/2. Row 0: terminated at 1, then 8 + 4/2. Row 1: truncated at 1 with V = 6, unfinished with V = 10.
    got = discounted_returns(
        f64([[1.0, 2.0, 8.0, 4.0], [1.0, 2.0, 8.0, 4.0]]),
        flags([[False, True, False, True], [False] * 4]),
        flags([[False] * 4, [False, True, False, False]]),
        gamma=0.5,
        bootstrap=f64([[99.0, 99.0, 99.0, 99.0], [99.0, 6.0, 99.0, 10.0]]),
    )
    assert got.tolist() == [[2.0, 2.0, 10.0, 4.0], [1 + 5 / 2, 5.0, 8 + 9 / 2, 9.0]]


@pytest.mark.parametrize("seed", range(8))
def test_returns_agree_with_loops(seed):
    rewards, _, bootstrap, terminated, truncated, real = random_episodes(seed)
    got = discounted_returns(rewards, terminated, truncated, gamma=0.9, bootstrap=bootstrap, mask=real)
    for row in range(len(got)):
        facts = (fact[row].tolist() for fact in (rewards, terminated, truncated))
        expected = reference.returns(*facts, 0.9, bootstrap[row].tolist(), real[row].tolist())
        assert got[row].tolist() == pytest.approx(expected, abs=1e-12)


def test_an_unfinished_row_bootstraps_at_its_last_real_decision_not_at_padding():
    no = flags([[False] * 4])
    got = discounted_returns(
        f64([[1.0, 1.0, NAN, NAN]]),
        no,
        no,
        gamma=0.5,
        bootstrap=f64([[NAN, 8.0, NAN, NAN]]),
        mask=flags([[True, True, False, False]]),
    )
    assert got.tolist() == [[1 + 5 / 2, 5.0, 0.0, 0.0]]


def test_returns_differentiate():
    rewards, _, bootstrap, terminated, truncated, real = random_episodes(30, rows=2, time=5)
    assert torch.autograd.gradcheck(
        lambda r, b: discounted_returns(r, terminated, truncated, gamma=0.9, bootstrap=b, mask=real),
        (rewards.requires_grad_(), bootstrap.requires_grad_()),
    )


# ---------------------------------------------------------------- REINFORCE++


def test_reinforce_plus_plus_matches_hand_arithmetic():
    # gamma 1/2, returns-to-go 1 2 | -3 (one token, one masked): mean 0, population variance 14/3
    rewards, mask = f64([[0.0, 2.0], [-3.0, NAN]]), flags([[True, True], [True, False]])
    got = reinforce_plus_plus(rewards, mask, gamma=0.5, unbiased=False, eps=0.0)
    torch.testing.assert_close(got, f64([[1.0, 2.0], [-3.0, 0.0]]) / math.sqrt(14 / 3))
    sample = reinforce_plus_plus(rewards, mask, gamma=0.5, eps=0.0)
    torch.testing.assert_close(sample, f64([[1.0, 2.0], [-3.0, 0.0]]) / math.sqrt(7))


def test_reinforce_plus_plus_whitens_over_tokens_so_long_rollouts_weigh_more():
    rewards = f64([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    short = reinforce_plus_plus(rewards, flags([[True, False, False], [True, False, False]]))
    long = reinforce_plus_plus(rewards, flags([[True, False, False], [True, True, True]]))
    assert short[0, 0].item() == pytest.approx(0.5 / math.sqrt(0.5))
    assert long[0, 0].item() == pytest.approx(0.75 / 0.5)  # mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4


def test_reinforce_plus_plus_leaves_unscored_rollouts_out():
    rewards, mask = f64([[1.0], [-1.0], [NAN]]), flags([[True]] * 3)
    got = reinforce_plus_plus(rewards, mask, unbiased=False, eps=0.0, scored=flags([True, True, False]))
    assert got.tolist() == [[1.0], [-1.0], [0.0]]
    with pytest.raises(ValueError, match="rewards of real tokens must be finite.*`scored` = False"):
        reinforce_plus_plus(rewards, mask)


def test_reinforce_plus_plus_of_equal_returns_is_zero():
    rewards = torch.zeros(3, 4)
    rewards[:, -1] = 0.1
    assert reinforce_plus_plus(rewards, torch.ones(3, 4).bool()).tolist() == [[0.0] * 4] * 3
