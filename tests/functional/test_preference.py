"""Preference objectives on denoising errors: worked vectors, gradients, and what bounds them."""

import math

import pytest
import torch

from rlalign.functional.preference import anchored_dro, floored_dro, flow_dpo, flow_dro, pair_accuracy


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def slope(objective, err, *rest, **knobs):
    err = f64(*err).requires_grad_()
    objective(err, *rest, **knobs).sum().backward()
    return err.grad.tolist()


# ---------------------------------------------------------------- DPO


def test_dpo_matches_the_worked_vector():
    # -250 (.10 - .12) = 5
    got = flow_dpo(f64(0.10), f64(0.12), f64(0.11), f64(0.11), beta=500)
    assert got.item() == pytest.approx(0.006715348, abs=1e-9)


def test_dpo_starts_at_log_two_whatever_the_errors():
    """Trap: .693 at step 0 is right: the policy is the reference."""
    win, lose = f64(0.1, 0.4), f64(0.3, 0.2)
    assert flow_dpo(win, lose, win, lose, beta=500).tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_lowers_the_winner_raises_the_loser_and_fades():
    ref = f64(0.2), f64(0.2)
    pulls = []
    for gap in (0.0, 0.01, 0.02):
        win, lose = f64(0.2 - gap).requires_grad_(), f64(0.2 + gap).requires_grad_()
        flow_dpo(win, lose, *ref, beta=500).backward()
        assert win.grad.item() == -lose.grad.item() > 0
        pulls.append(win.grad.item())
    assert pulls[0] == pytest.approx(500 / 4)  # β/2 sigmoid(0)
    assert pulls[0] > pulls[1] > pulls[2]


def test_dpo_beta_belongs_to_the_reduction_of_the_errors():
    """Trap: β = 500 on means over D dimensions is β = 500 / D on sums."""
    means = [f64(v) for v in (0.10, 0.12, 0.11, 0.11)]
    sums = [30 * m for m in means]
    torch.testing.assert_close(flow_dpo(*means, beta=500), flow_dpo(*sums, beta=500 / 30))
    assert flow_dpo(*sums, beta=500).item() < 1e-9


def test_dpo_does_not_overflow():
    got = flow_dpo(f64(9.0, 0.0), f64(0.0, 9.0), f64(0.0, 0.0), f64(0.0, 0.0), beta=5000)
    assert got.tolist() == pytest.approx([22500.0, 0.0])


def test_dpo_differentiates():
    errors = [f64(a, b).requires_grad_() for a, b in ((0.1, 0.3), (0.2, 0.1), (0.2, 0.2), (0.1, 0.2))]
    assert torch.autograd.gradcheck(lambda *e: flow_dpo(*e, beta=5), errors)


def test_pair_accuracy_counts_margins_against_the_reference():
    """Pair 1 gained, pair 2 lost although its winner is still better, pair 3 is a tie."""
    win, lose = f64(0.1, 0.1, 0.3), f64(0.2, 0.2, 0.4)
    ref_win, ref_lose = f64(0.15, 0.1, 0.3), f64(0.2, 0.9, 0.4)
    assert pair_accuracy(win, lose, ref_win, ref_lose).item() == pytest.approx((1 + 0 + 0.5) / 3)
    assert not pair_accuracy(win.requires_grad_(), lose, ref_win, ref_lose).requires_grad


# ---------------------------------------------------------------- DRO


def test_dro_matches_the_worked_vector():
    """The published paired loss .10 - .12 = -.02 is twice the mean over the two samples."""
    got = flow_dro(f64(0.10, 0.12), torch.tensor([1, -1]))
    assert got.tolist() == [0.10, -0.12]
    assert 2 * got.mean().item() == pytest.approx(-0.02)
    assert slope(flow_dro, [0.10, 0.12], f64(1.0, -1.0)) == [1.0, -1.0]


def test_dro_is_unbounded_and_the_safe_variants_are_not():
    """Trap: nothing stops the faithful objective from raising a bad sample's error for ever."""
    bad, ref = f64(-1.0, -1.0), f64(0.1, 0.1)
    assert flow_dro(f64(10.0, 1e6), bad).tolist() == [-10.0, -1e6]
    assert slope(flow_dro, [10.0, 1e6], bad) == [-1.0, -1.0]
    assert floored_dro(f64(10.0, 1e6), ref, bad, floor=3).tolist() == pytest.approx([-0.3, -0.3])
    assert slope(floored_dro, [10.0, 1e6], ref, bad, floor=3) == [0.0, 0.0]
    assert anchored_dro(f64(1e3, 1e6), ref, bad, beta=5).tolist() == pytest.approx([-0.4, -0.4])  # -2 / β
    assert slope(anchored_dro, [1e3, 1e6], ref, bad, beta=5) == [0.0, 0.0]


def test_floored_dro_is_dro_until_the_floor():
    label = f64(1.0, -1.0, -1.0)
    err, ref = f64(0.9, 0.29, 0.31), f64(0.1, 0.1, 0.1)
    assert floored_dro(err, ref, label, floor=3).tolist() == pytest.approx([0.9, -0.29, -0.3])
    assert slope(floored_dro, [0.9, 0.29, 0.31], ref, label, floor=3) == [1.0, -1.0, 0.0]


def test_anchored_dro_matches_hand_arithmetic_and_fades_symmetrically():
    # 4/5 (sigmoid(5 x 1 x .4) - 1/2) = .8 x .380797
    assert anchored_dro(f64(0.5), f64(0.1), f64(1.0), beta=5).item() == pytest.approx(0.304638, abs=1e-6)
    half = math.log(3 + 2 * math.sqrt(2)) / 5  # sigmoid' is half its peak at 1.763
    ref = f64(1.0, 1.0, 1.0)
    assert slope(anchored_dro, [1.0, 1.0 + half, 1.0 - half], ref, f64(1.0, 1.0, 1.0), beta=5) == pytest.approx(
        [1.0, 0.5, 0.5]
    )
    assert slope(anchored_dro, [1.0, 1.0 + half, 1.0 - half], ref, -ref, beta=5) == pytest.approx([-1.0, -0.5, -0.5])


def test_anchored_dro_becomes_dro_as_beta_goes_to_zero():
    err, ref, label = f64(0.3, 0.5), f64(0.2, 0.1), f64(1.0, -1.0)
    faithful = flow_dro(err, label) - flow_dro(ref, label)
    torch.testing.assert_close(anchored_dro(err, ref, label, beta=1e-4), faithful)


def test_the_reference_is_never_trained():
    ref = f64(0.1, 0.1).requires_grad_()
    err, label = f64(0.2, 0.9).requires_grad_(), f64(1.0, -1.0)
    (anchored_dro(err, ref, label, beta=5) + floored_dro(err, ref, label, floor=3)).sum().backward()
    assert ref.grad is None


def test_dro_objectives_differentiate():
    ref, label = f64(0.1, 0.2, 0.3), f64(1.0, -1.0, -1.0)
    err = f64(0.2, 0.3, 2.0).requires_grad_()
    for objective in (
        lambda e: flow_dro(e, label),
        lambda e: anchored_dro(e, ref, label, beta=5),
        lambda e: floored_dro(e, ref, label, floor=3),
    ):
        assert torch.autograd.gradcheck(objective, err)


def test_labels_of_zero_and_one_are_refused():
    """Trap: outcomes o in {0, 1} as labels would never push a bad sample away."""
    err = f64(0.1, 0.2)
    for objective in (
        lambda label: flow_dro(err, label),
        lambda label: anchored_dro(err, err, label, beta=5),
        lambda label: floored_dro(err, err, label, floor=3),
    ):
        with pytest.raises(
            ValueError, match=r"labels must be 1 or -1, got \[0, 1\]; outcomes o of 0 and 1 are 2 o - 1"
        ):
            objective(torch.tensor([1, 0]))


def test_strengths_out_of_range_are_refused():
    err, label = f64(0.1), f64(1.0)
    with pytest.raises(ValueError, match="`beta` must be > 0, got 0"):
        flow_dpo(err, err, err, err, beta=0)
    with pytest.raises(ValueError, match="`beta` must be > 0, got -1"):
        anchored_dro(err, err, label, beta=-1)
    with pytest.raises(ValueError, match="`floor` must be above 1, got 1.0"):
        floored_dro(err, err, label, floor=1.0)
