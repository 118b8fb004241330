"""Estimates of the KL divergence, and its closed form for Gaussians."""

import math

import pytest
import torch

from rlalign.functional.divergence import gaussian_kl, kl_k1, kl_k2, kl_k3
from rlalign.functional.masked import aggregate


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


POLICY, REFERENCE = f64([0.5, 0.3, 0.2]), f64([0.2, 0.2, 0.6])
KL = float((POLICY * (POLICY / REFERENCE).log()).sum())


def test_estimates_match_hand_arithmetic():
    # d = log 2: k1 = log 2, k2 = (log 2)² / 2, k3 = 1/2 - 1 + log 2
    log_prob, reference = f64([0.6]).log(), f64([0.3]).log()
    assert kl_k1(log_prob, reference).item() == pytest.approx(math.log(2))
    assert kl_k2(log_prob, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(log_prob, reference).item() == pytest.approx(0.5 - 1 + math.log(2))
    assert kl_k3(reference, log_prob).item() == pytest.approx(2 - 1 - math.log(2))


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    means = [float((POLICY * estimate(POLICY.log(), REFERENCE.log())).sum()) for estimate in (kl_k1, kl_k2, kl_k3)]
    assert means[0] == pytest.approx(KL)
    assert means[2] == pytest.approx(KL)
    assert abs(means[1] - KL) > 1e-3


def test_k2_and_k3_are_never_negative_and_k3_varies_least():
    difference = torch.linspace(-3, 3, 61, dtype=torch.float64)
    zero = torch.zeros_like(difference)
    assert bool((kl_k2(difference, zero) >= 0).all())
    assert bool((kl_k3(difference, zero) >= 0).all())
    k1, k3 = kl_k1(POLICY.log(), REFERENCE.log()), kl_k3(POLICY.log(), REFERENCE.log())
    assert float((POLICY * (k3 - KL) ** 2).sum()) < float((POLICY * (k1 - KL) ** 2).sum())


def gradient_of(loss):
    """Gradient of `loss(log-probabilities)` with respect to the logits of a three-way policy."""
    logits = POLICY.log().clone().requires_grad_()
    loss(logits.log_softmax(0)).backward()
    return logits.grad


def test_which_gradient_each_estimate_has_as_a_loss():
    """Trap: the right value is not the right gradient. Expectations over the policy are taken exactly."""
    right = gradient_of(lambda lp: (lp.exp() * (lp - REFERENCE.log())).sum())
    reverse = gradient_of(lambda lp: (REFERENCE * (REFERENCE.log() - lp)).sum())
    k1, k2, k3 = (
        gradient_of(lambda lp, e=estimate: (POLICY * e(lp, REFERENCE.log())).sum())
        for estimate in (kl_k1, kl_k2, kl_k3)
    )
    torch.testing.assert_close(k1, torch.zeros(3, dtype=torch.float64))  # no gradient at all: k1 belongs in the reward
    torch.testing.assert_close(k2, right)
    torch.testing.assert_close(k3, reverse)  # of KL(reference || policy)
    assert not torch.allclose(k3, right, atol=0.05)


def test_k1_in_the_reward_has_the_right_gradient():
    right = gradient_of(lambda lp: (lp.exp() * (lp - REFERENCE.log())).sum())
    penalty = kl_k1(POLICY.log(), REFERENCE.log())  # detached, as a reward is; minimising E[penalty log pi]
    torch.testing.assert_close(gradient_of(lambda lp: (POLICY * penalty * lp).sum()), right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_given_up_by_the_policy_does_not_overflow(dtype):
    """Trap: k3 of a log difference of 30 is e^30."""
    log_prob = torch.tensor([-30.0, -200.0, -1.0], dtype=dtype, requires_grad=True)
    estimate = kl_k3(log_prob, torch.tensor([0.0, 0.0, -1.5], dtype=dtype))
    expected = torch.tensor([math.exp(20) - 21, math.exp(20) - 21, math.exp(-0.5) - 0.5], dtype=dtype)
    torch.testing.assert_close(estimate, expected)
    estimate.sum().backward()
    assert log_prob.grad[:2].tolist() == [0.0, 0.0]
    assert log_prob.grad[2].item() == pytest.approx(1 - math.exp(-0.5))


def test_a_token_the_policy_is_far_too_sure_of_keeps_its_pull():
    log_prob = f64([0.0]).requires_grad_()
    estimate = kl_k3(log_prob, f64([-50.0]))
    assert estimate.item() == pytest.approx(49)
    estimate.backward()
    assert log_prob.grad.item() == pytest.approx(1)


def test_k3_keeps_its_digits_near_the_reference():
    # exp(-d) - 1 + d loses everything below 1e-7 in float32; the value is d²/2
    assert kl_k3(torch.tensor([1e-4]), torch.tensor([0.0])).item() == pytest.approx(5e-9, rel=0.01)


def test_gaussian_kl_matches_hand_arithmetic():
    # N(0, 1) to N(2, 2²): log 2 + (1 + 4) / 8 - 1/2
    one, two = f64([1.0]), f64([2.0])
    assert gaussian_kl(f64([0.0]), one, two, two).item() == pytest.approx(math.log(2) + 5 / 8 - 0.5)
    assert gaussian_kl(two, one, f64([0.0]), one).item() == pytest.approx(2.0)
    assert gaussian_kl(one, two, one, two).item() == 0.0


def test_gaussian_kl_agrees_with_torch_and_with_sampling():
    generator = torch.Generator().manual_seed(0)
    mean_p, mean_q = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    std_p, std_q = 0.3 + torch.rand(2, 5, generator=generator, dtype=torch.float64)
    p, q = torch.distributions.Normal(mean_p, std_p), torch.distributions.Normal(mean_q, std_q)
    torch.testing.assert_close(gaussian_kl(mean_p, std_p, mean_q, std_q), torch.distributions.kl_divergence(p, q))
    x = mean_p + std_p * torch.randn(200_000, 5, generator=generator, dtype=torch.float64)
    sampled = kl_k1(p.log_prob(x), q.log_prob(x)).mean(0)
    torch.testing.assert_close(sampled, gaussian_kl(mean_p, std_p, mean_q, std_q), rtol=0.05, atol=0.02)


def test_divergences_differentiate():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    for estimate in (kl_k1, kl_k2, kl_k3):
        assert torch.autograd.gradcheck(estimate, (x, y))
    std_p, std_q = ((0.5 + torch.rand(2, 3, generator=generator, dtype=torch.float64)).requires_grad_() for _ in "pq")
    assert torch.autograd.gradcheck(gaussian_kl, (x, std_p, y, std_q))


@pytest.mark.parametrize("estimate", [kl_k1, kl_k2, kl_k3])
def test_masked_tokens_get_exactly_zero_gradient(estimate):
    log_prob = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]])
    aggregate(estimate(log_prob, torch.zeros(2, 4, dtype=torch.float64)), mask, mode="token").backward()
    assert log_prob.grad[~mask].tolist() == [0.0] * 4
    assert bool((log_prob.grad[mask] != 0).all())
