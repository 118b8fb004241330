"""O-DICE's equations: conjugates, weights, residuals of both directions, and the orthogonal combination."""

import inspect
import math

import pytest
import torch

from rlalign.functional.dice import (
    dice_weight,
    f_conjugate,
    odice_residuals,
    odice_value_terms,
    orthogonal_combine,
)
from tests.reference import dice as reference

NAN = math.nan
Y = [-5.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_grads(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (4,), (1, 4), (1,)]
    return tuple([torch.randn(s, generator=generator, dtype=dtype) for s in shapes] for _ in range(2))


def dot(left, right):
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


# ---------------------------------------------------------------- conjugates and weights


def test_conjugate_slope_and_weights_match_the_published_vectors():
    y = f64(Y).requires_grad_()
    conjugate = f_conjugate(y)
    assert conjugate.tolist() == [-1, -1, -1, -0.75, 0, 1.25, 3, 8]
    conjugate.sum().backward()
    assert y.grad.tolist() == [0, 0, 0, 0.5, 1, 1.5, 2, 3]
    assert dice_weight(f64(Y)).tolist() == [0, 0, 0, 0, 0, 1, 2, 4]


def test_the_exact_weight_is_the_slope_of_the_conjugate_and_relu_is_not():
    for divergence in ("chi_square", "reverse_kl"):
        y = f64(Y).requires_grad_()
        f_conjugate(y, divergence=divergence).sum().backward()
        torch.testing.assert_close(dice_weight(y, divergence=divergence, rule="exact"), y.grad)
    assert dice_weight(f64([-1.0]), rule="exact").item() == 0.5
    assert dice_weight(f64([-1.0]), rule="relu").item() == 0.0


@pytest.mark.parametrize("divergence", ["chi_square", "reverse_kl"])
def test_conjugates_are_the_supremum(divergence):
    for y in Y:
        got = f_conjugate(f64([y]), divergence=divergence).item()
        assert got == pytest.approx(reference.conjugate(y, divergence), abs=1e-12)
        ratios = torch.linspace(1e-6, 30, 20_001, dtype=torch.float64)
        f = ratios * ratios.log() if divergence == "reverse_kl" else (ratios - 1) ** 2
        assert got == pytest.approx((ratios * y - f).max().item(), abs=1e-3)


def test_reverse_kl_matches_hand_arithmetic():
    assert f_conjugate(f64([1.0, 2.0]), divergence="reverse_kl").tolist() == pytest.approx([1.0, math.e])
    for rule in ("relu", "exact"):  # the rule is a matter of chi-square alone
        assert dice_weight(f64([1.0, 0.0]), divergence="reverse_kl", rule=rule).tolist() == pytest.approx(
            [1, 1 / math.e]
        )


def test_weights_are_capped_and_detached():
    """Trap: without the cap one residual owns the batch; with a graph behind it the policy's loss trains V."""
    residual = f64([99.0, 101.0, 1e9, math.inf]).requires_grad_()
    weight = dice_weight(residual)
    assert weight.tolist() == [99.0, 100.0, 100.0, 100.0]
    assert not weight.requires_grad
    assert dice_weight(f64([800.0]), divergence="reverse_kl").item() == 100.0  # exp overflows
    assert dice_weight(f64([8.0]), max_weight=5).item() == 5.0


# ---------------------------------------------------------------- residuals and terms


def test_residuals_match_hand_arithmetic_for_one_critic_and_two():
    # gamma 1/2; r 1 2; V 3 4; V' 6 8; target V 5 7; target V' 10 12; the second transition terminates
    facts = f64([1.0, 2.0]), f64([3.0, 4.0]), f64([6.0, 8.0]), f64([5.0, 7.0]), f64([10.0, 12.0])
    terminated = torch.tensor([False, True])
    forward, backward = odice_residuals(*facts, terminated, gamma=0.5)
    assert forward.tolist() == [1 + 5 - 3, 2 - 4]
    assert backward.tolist() == [1 + 3 - 5, 2 - 7]
    rewards, values, next_values, *targets = facts
    twin = torch.stack([values, values + 1]), torch.stack([next_values, next_values + 2])
    forward, backward = odice_residuals(rewards, *twin, *targets, terminated, gamma=0.5)
    assert forward.tolist() == [[3.0, -2.0], [2.0, -3.0]]
    assert backward.tolist() == [[-1.0, -5.0], [0.0, -5.0]]


def test_each_residual_carries_the_gradient_of_its_own_side_only():
    """Trap: a target with a graph turns the semi-gradient into a true one."""
    sides = [f64([0.3, -0.2]).requires_grad_() for _ in range(4)]
    values, next_values, target_values, target_next_values = sides
    no = torch.tensor([False, True])
    forward, backward = odice_residuals(f64([1.0, 1.0]), *sides, no, gamma=0.9)
    (forward.sum() + 10 * backward.sum()).backward()
    assert values.grad.tolist() == [-1.0, -1.0]
    assert next_values.grad.tolist() == pytest.approx([9.0, 0.0])  # terminated: nothing flows
    assert target_values.grad is None
    assert target_next_values.grad is None


def test_nothing_is_read_beyond_a_termination():
    one, yes = f64([1.0]), torch.tensor([True])
    forward, backward = odice_residuals(one, one, f64([NAN]), one, f64([NAN]), yes, gamma=0.9)
    assert (forward.item(), backward.item()) == (0.0, 0.0)


def test_terms_match_hand_arithmetic_and_eta_scales_the_backward_one_only():
    # L 0.75, eta 0.5: 0.25 x 2; 0.75 x f*(2) = 0.75 x 3; 0.375 x f*(4) = 0.375 x 8
    terms = odice_value_terms(f64([2.0]), f64([2.0]), f64([4.0]), conjugate_weight=0.75, backward_weight=0.5)
    assert [term.item() for term in terms] == [0.5, 2.25, 3.0]
    without = odice_value_terms(f64([2.0]), f64([2.0]), f64([4.0]), conjugate_weight=0.75, backward_weight=0)
    assert [term.item() for term in without] == [0.5, 2.25, 0.0]


def test_terms_differentiate():
    values, forward, backward = (f64([[0.4, -1.2], [2.0, 0.3]]).requires_grad_() for _ in range(3))
    assert torch.autograd.gradcheck(
        lambda v, f, b: odice_value_terms(v, f, b, conjugate_weight=0.6, backward_weight=1.0),
        (values, forward, backward),
    )


# ---------------------------------------------------------------- orthogonal combination


def test_combination_matches_the_published_vector():
    # k = (-3 + 2 - 2) / 6 = -1/2; g_b - k g_f = (-2.5, 2, 1.5)
    (got,) = orthogonal_combine([f64([1.0, 2.0, -1.0])], [f64([-3.0, 1.0, 2.0])])
    assert got.tolist() == [-1.5, 4.0, 0.5]


def test_an_antiparallel_backward_gradient_vanishes():
    (got,) = orthogonal_combine([f64([1.0, -2.0])], [f64([-3.0, 6.0])])
    assert got.tolist() == [1.0, -2.0]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_added_is_orthogonal_to_the_forward_gradient_and_not_the_reverse(seed):
    """Trap: projecting the forward gradient instead leaves something orthogonal to the backward one."""
    forward, backward = random_grads(seed)
    added = [g - f for g, f in zip(orthogonal_combine(forward, backward), forward, strict=True)]
    assert float(dot(forward, added)) == pytest.approx(0.0, abs=1e-12)
    assert abs(float(dot(backward, added))) > 0.1


def test_the_projection_is_over_the_whole_vector_and_not_per_parameter():
    # per tensor both pieces are parallel and everything would vanish; together <g_f, g_b> = 1 - 1 = 0
    forward, backward = [f64([1.0]), f64([1.0])], [f64([1.0]), f64([-1.0])]
    assert [g.item() for g in orthogonal_combine(forward, backward)] == [2.0, 0.0]


def test_a_batch_without_forward_gradient_passes_the_backward_one():
    """Trap: f*' = 0 on a whole batch gives 0 / 0."""
    zero, backward = [torch.zeros(2).double()], [f64([3.0, -1.0])]
    assert orthogonal_combine(zero, backward)[0].tolist() == [3.0, -1.0]
    assert orthogonal_combine(zero, zero)[0].tolist() == [0.0, 0.0]
    # below eps the products are scaled by it: k = 1e-6 / 1e-2
    (got,) = orthogonal_combine([f64([1e-3])], [f64([1e-3])], eps=1e-2)
    assert got.item() == pytest.approx(1e-3 + 1e-3 - 1e-4 * 1e-3)


def test_combining_commutes_with_the_backward_weight():
    forward, backward = random_grads(9)
    once = orthogonal_combine(forward, [3.0 * b for b in backward])
    added = [f + 3.0 * (g - f) for f, g in zip(forward, orthogonal_combine(forward, backward), strict=True)]
    torch.testing.assert_close(once, added)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("critics", [1, 2])
def test_gradient_equals_three_backward_calls(dtype, critics):
    torch.manual_seed(3)
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)) for _ in range(critics)]
    nets = [net.to(dtype) for net in nets]
    parameters = [p for net in nets for p in net.parameters()]
    states, following, rewards = (
        torch.randn(16, 3, dtype=dtype),
        torch.randn(16, 3, dtype=dtype),
        torch.randn(16).to(dtype),
    )
    targets = torch.randn(2, 16, dtype=dtype)
    terminated = torch.arange(16) % 5 == 0

    def values(x):
        return torch.stack([net(x).squeeze(-1) for net in nets])

    def terms():
        forward, backward = odice_residuals(rewards, values(states), values(following), *targets, terminated, gamma=0.9)
        return odice_value_terms(values(states), forward, backward, conjugate_weight=0.6, backward_weight=0.7)

    expected = reference.three_backwards(
        parameters,
        linear=lambda: (0.4 * values(states)).mean(),
        forward=lambda: terms()[1].mean(),
        backward=lambda: terms()[2].mean(),
    )
    linear, forward, backward = (
        torch.autograd.grad(term.mean(), parameters, retain_graph=True, materialize_grads=True) for term in terms()
    )
    got = [g + h for g, h in zip(linear, orthogonal_combine(forward, backward), strict=True)]
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=1e-6, rtol=0)


def test_gradients_of_other_parameters_are_refused():
    combine = inspect.unwrap(orthogonal_combine)
    with pytest.raises(ValueError, match=r"same parameters.*\[\[2\]\] and \[\[3\]\]"):
        combine([torch.zeros(2)], [torch.zeros(3)])
    with pytest.raises(ValueError, match="same parameters"):
        combine([], [])
