"""Natural-gradient steps against linear algebra, analytic Fisher matrices, and one step done by hand."""

import math
from collections.abc import Callable
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from rlalign.nn.policies import Categorical, Gaussian
from rlalign.optim import (
    batched_natural_gradient_step,
    conjugate_gradient,
    fisher_vector_product,
    flat_gradient,
    natural_gradient_step,
)
from tests.reference import hybrid

NAN = math.nan


def f64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def positive_definite(*shape: int, seed: int = 0) -> Tensor:
    """Random, with eigenvalues of at least 1."""
    factor = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.mT + torch.eye(shape[-1], dtype=torch.float64)


def parameter(values) -> Tensor:
    return f64(values).requires_grad_()


# ---------------------------------------------------------------- conjugate gradient


def test_conjugate_gradient_matches_hand_arithmetic():
    # A = diag(1, 3), b = (1, 1): first step 2/4 along b gives (1/2, 1/2) with residual (1/2, -1/2); the second step
    # ends at (1, 1/3)
    matrix, b = f64([[1.0, 0.0], [0.0, 3.0]]), f64([1.0, 1.0])
    once = conjugate_gradient(lambda v: matrix @ v, b, iterations=1)
    twice = conjugate_gradient(lambda v: matrix @ v, b, iterations=2)
    assert once.tolist() == [0.5, 0.5]
    assert twice.tolist() == pytest.approx([1.0, 1 / 3], abs=1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_conjugate_gradient_solves_a_system_in_as_many_steps_as_unknowns(seed):
    matrix = positive_definite(8, seed=seed)
    b = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got = conjugate_gradient(lambda v: matrix @ v, b, iterations=16, tolerance=1e-24)
    torch.testing.assert_close(got, torch.linalg.solve(matrix, b), rtol=1e-9, atol=1e-9)


def test_conjugate_gradient_solves_rows_apart():
    matrices = positive_definite(3, 5)
    matrices[1] = torch.eye(5)  # done after one step, and left alone from then on
    b = torch.arange(15, dtype=torch.float64).reshape(3, 5)
    together = conjugate_gradient(lambda v: (matrices @ v[..., None])[..., 0], b, iterations=3)
    for row in range(3):
        alone = conjugate_gradient(lambda v, row=row: matrices[row] @ v, b[row], iterations=3)
        torch.testing.assert_close(together[row], alone, rtol=1e-12, atol=1e-12)


def test_conjugate_gradient_stops_at_the_tolerance_but_not_before_one_step():
    calls = []

    def matvec(v):
        calls.append(v)
        return 2 * v

    assert conjugate_gradient(matvec, f64([1e-9, 0.0]), tolerance=1e-10).tolist() == [5e-10, 0.0]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("diagonal", "b", "expected"),
    [
        ([-1.0, -1.0], [1.0, 2.0], [0.0, 0.0]),  # negative curvature at once
        ([1.0, 1.0], [NAN, 1.0], [0.0, 0.0]),
        ([1.0, 1.0], [math.inf, 1.0], [0.0, 0.0]),
        ([1.0, NAN], [1.0, 1.0], [0.0, 0.0]),
        ([1.0, 1.0], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_conjugate_gradient_keeps_a_finite_answer_where_there_is_none(diagonal, b, expected):
    good = f64([1.0, 2.0])  # a sound row beside the bad one is solved all the same
    matrix = torch.stack([f64(diagonal), f64([2.0, 2.0])])
    got = conjugate_gradient(lambda v: matrix * v, torch.stack([f64(b), good]))
    assert got.tolist() == [expected, [0.5, 1.0]]


# ---------------------------------------------------------------- Fisher-vector products


def matrix_of(product: Callable[[Tensor], Tensor], size: int) -> Tensor:
    return torch.stack([product(column) for column in torch.eye(size, dtype=torch.float64)], -1)


def test_fisher_of_a_categorical_policy_is_its_covariance():
    # two states visited 1/4 and 3/4 of the time, own logits each: F = blockdiag(d_s (diag(p_s) - p_s p_s'))
    logits = parameter([[0.0, 1.0, -1.0], [2.0, 0.0, 0.5]])
    visits = f64([0.25, 0.75])
    old, policy = logits.detach().clone(), Categorical(3)
    product = fisher_vector_product(lambda: (visits * policy.kl(old, policy(logits))).sum(), [logits], 0.1)
    p = old.softmax(-1)
    blocks = [d * (torch.diag(row) - torch.outer(row, row)) for d, row in zip(visits, p, strict=True)]
    expected = torch.block_diag(*blocks) + 0.1 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(matrix_of(product, 6), expected, rtol=1e-12, atol=1e-12)


def test_fisher_of_a_gaussian_policy_is_its_precision_and_two():
    # F = diag(1/σ², 2) per dimension, for the mean and the log standard deviation
    policy = Gaussian(2).double()
    policy.log_std.data = f64([0.0, math.log(2.0)])
    mean = parameter([0.3, -0.7])
    old = policy(mean).detach()
    product = fisher_vector_product(lambda: policy.kl(old, policy(mean)), [mean, policy.log_std], 0.0)
    torch.testing.assert_close(matrix_of(product, 4), torch.diag(f64([1.0, 0.25, 2.0, 2.0])), rtol=1e-12, atol=1e-12)


def test_fisher_of_a_network_is_the_mean_outer_product_of_scores():
    # F = E_s E_{a~pi} [∇ log π ∇ log π'], expectations taken exactly over 3 actions and 5 states
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    states, policy = torch.randn(5, 2, dtype=torch.float64), Categorical(3)
    parameters = list(net.parameters())
    old = net(states).detach()
    product = fisher_vector_product(lambda: policy.kl(old, net(states)).mean(), parameters, 0.0)
    log_probs = net(states).log_softmax(-1)
    size = sum(p.numel() for p in parameters)
    expected = torch.zeros(size, size, dtype=torch.float64)
    for state in range(5):
        for action in range(3):
            grads = torch.autograd.grad(log_probs[state, action], parameters, retain_graph=True)
            score = torch.cat([g.reshape(-1) for g in grads])
            expected += log_probs[state, action].exp().detach() * torch.outer(score, score) / 5
    torch.testing.assert_close(matrix_of(product, size), expected, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_kl_is_zero_where_old_and_new_agree():
    logits, policy = parameter([[0.0, 1.0, -1.0]]), Categorical(3)
    gradient = flat_gradient(policy.kl(logits.detach().clone(), policy(logits)).mean(), [logits])
    torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)


def test_unused_parameters_have_no_gradient_and_only_damping():
    used, unused = parameter([1.0, 2.0]), parameter([3.0])
    assert flat_gradient(used.sum(), [used, unused]).tolist() == [1.0, 1.0, 0.0]
    product = fisher_vector_product(lambda: (used**2).sum(), [used, unused], 0.5)
    assert product(f64([1.0, 0.0, 1.0])).tolist() == [2.5, 0.0, 0.5]


def test_a_kl_without_gradient_is_refused():
    with pytest.raises(ValueError, match="`kl` does not depend on the parameters"):
        fisher_vector_product(lambda: f64(0.0), [parameter([1.0])], 0.1)


# ---------------------------------------------------------------- the step


def quadratic(theta: Tensor, fisher: Tensor, slope: Tensor):
    """Surrogate g'θ and KL ½ (θ - θ0)' F (θ - θ0): the step's models are exact."""
    start = theta.detach().clone()
    return {
        "surrogate": lambda: slope @ theta,
        "kl": lambda: 0.5 * (theta - start) @ fisher @ (theta - start),
    }


def test_step_reaches_the_optimum_of_a_linear_gain_under_a_quadratic_kl():
    # arg max g'd subject to ½ d'Fd <= δ is d = sqrt(2 δ / g'F⁻¹g) F⁻¹g, with gain sqrt(2 δ g'F⁻¹g)
    fisher, slope, max_kl = positive_definite(4), f64([1.0, -2.0, 0.5, 3.0]), 0.02
    theta = parameter([1.0, 2.0, 3.0, 4.0])
    natural = torch.linalg.solve(fisher, slope)
    size = (2 * max_kl / (slope @ natural)).sqrt()
    result = natural_gradient_step([theta], max_kl=max_kl, damping=0, **quadratic(theta, fisher, slope))
    torch.testing.assert_close(theta.detach(), f64([1.0, 2.0, 3.0, 4.0]) + size * natural, rtol=1e-8, atol=1e-8)
    assert result.accepted
    assert result.kl == pytest.approx(max_kl, rel=1e-8)
    assert result.step_size == pytest.approx(size.item(), rel=1e-8)
    assert result.improvement == pytest.approx(math.sqrt(2 * max_kl * (slope @ natural)), rel=1e-8)
    assert result.expected == pytest.approx(result.improvement, rel=1e-8)
    assert result.grad_norm == pytest.approx(math.sqrt(1 + 4 + 0.25 + 9))
    assert result.backtracks == 0


def test_damping_is_part_of_the_direction_and_of_the_step_size():
    # F = 0, damping ½, g = (3, 4): x = 2 g, x'Fx = 50, step = sqrt(2 * 0.01 / 50) x = 0.02 x
    theta = parameter([0.0, 0.0])
    natural_gradient_step(
        [theta], surrogate=lambda: theta @ f64([3.0, 4.0]), kl=lambda: 0.0 * (theta**2).sum(), damping=0.5, max_kl=0.01
    )
    assert theta.tolist() == pytest.approx([0.12, 0.16], abs=1e-15)


def test_repeated_steps_climb_to_a_known_optimum():
    target = f64([0.3, -0.2])
    theta = parameter([0.0, 0.0])
    for _ in range(40):
        start = theta.detach().clone()
        natural_gradient_step(
            [theta],
            surrogate=lambda: -((theta - target) ** 2).sum(),
            kl=lambda start=start: 0.5 * ((theta - start) ** 2).sum(),
            max_kl=0.005,
        )
    torch.testing.assert_close(theta.detach(), target, rtol=0, atol=1e-2)


def bernoulli_problem():
    """P(a) = sigmoid(θ) = 0.1, advantage 1 for a: gradient and Fisher matrix are both p (1 - p) = 0.09.

    With max_kl = ½ the full step is sqrt(1 / 0.09) = 10/3, which takes p to 0.757 and the true KL to 0.976. Half of it
    takes p to 0.370 and the KL to 0.191.
    """
    theta = parameter([math.log(1 / 9)])
    old = theta.detach().clone()

    def kl():
        p, q = old.sigmoid(), theta.sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()

    return theta, {"surrogate": lambda: theta.sigmoid().sum(), "kl": kl, "max_kl": 0.5, "damping": 0.0}


def test_line_search_keeps_the_true_kl_inside_the_trust_region():
    theta, problem = bernoulli_problem()
    result = natural_gradient_step([theta], **problem)
    assert theta.item() == pytest.approx(-math.log(9) + 5 / 3)
    assert result.backtracks == 1
    assert result.kl == pytest.approx(0.1906, abs=1e-4)
    assert result.step_size == pytest.approx(5 / 3)
    assert result.expected == pytest.approx(0.09 * 5 / 3)
    assert result.improvement == pytest.approx(0.3704 - 0.1, abs=1e-4)


def test_without_the_recheck_the_published_rule_oversteps():
    theta, problem = bernoulli_problem()
    result = natural_gradient_step([theta], **problem, recheck_kl=False)
    assert theta.item() == pytest.approx(-math.log(9) + 10 / 3)
    assert result.backtracks == 0
    assert result.kl == pytest.approx(0.9759, abs=1e-4)
    assert result.kl > problem["max_kl"]


def official_line_search(f, x, full, rate, trials=10, ratio=0.1):
    """The acceptance rule of HNPG's published code, to minimise `f`: gain / (rate * fraction) > ratio and gain > 0."""
    for fraction in 0.5 ** torch.arange(trials).double():
        gain = f(x) - f(x + fraction * full)
        if gain / (rate * fraction) > ratio and gain > 0:
            return x + fraction * full
    return x


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0, 20.0, 100.0, 1e4, 1e7])
def test_without_the_recheck_the_line_search_is_the_published_one(sharpness):
    # gain sin(sharpness θ): the sharper, the more often a step is halved, and at the end none is accepted
    theta = parameter([0.2])
    start = theta.detach().clone()
    result = natural_gradient_step(
        [theta],
        surrogate=lambda: (sharpness * theta).sin().sum(),
        kl=lambda: 0.5 * ((theta - start) ** 2).sum(),
        recheck_kl=False,
    )
    gradient = sharpness * (sharpness * start).cos()
    x = gradient / 1.1
    full = x / (0.5 * x * 1.1 * x / 0.01).sqrt()
    expected = official_line_search(lambda t: -(sharpness * t).sin(), start, full, gradient * full)
    torch.testing.assert_close(theta.detach(), expected, rtol=1e-9, atol=1e-12)
    assert result.accepted == bool(expected != start)


@pytest.mark.parametrize(
    "surrogate",
    [
        lambda theta, start: theta.sum() - 1e6 * (theta - start).abs().sum(),  # a kink: every step is worse
        lambda theta, start: theta.sum() + (NAN if bool((theta != start).any()) else 0.0),
        lambda theta, start: theta.sum() + (math.inf if bool((theta != start).any()) else 0.0),
        lambda theta, start: NAN * theta.sum(),
        lambda theta, start: 0.0 * theta.sum(),
    ],
    ids=["worse", "nan", "inf", "nan gradient", "zero gradient"],
)
def test_a_failed_step_leaves_parameters_bitwise_unchanged(surrogate):
    # -0.0 and a subnormal do not survive "add the step, subtract the step"
    theta = torch.tensor([-0.0, 1e-42, 0.1, 3.0], requires_grad=True)
    start = theta.detach().clone()
    result = natural_gradient_step(
        [theta], surrogate=lambda: surrogate(theta, start), kl=lambda: ((theta - start) ** 2).sum()
    )
    assert theta.detach().view(torch.int32).tolist() == start.view(torch.int32).tolist()
    assert (result.accepted, result.kl, result.improvement, result.step_size) == (False, 0.0, 0.0, 0.0)


def test_a_kl_that_is_no_distance_gives_no_step():
    theta = parameter([1.0, 2.0])
    start = theta.detach().clone()
    result = natural_gradient_step(
        [theta], surrogate=lambda: theta.sum(), kl=lambda: -((theta - start) ** 2).sum(), damping=0.1
    )
    assert not result.accepted
    assert theta.tolist() == [1.0, 2.0]


def test_a_kl_that_turns_nan_is_rejected():
    theta = parameter([1.0])
    start = theta.detach().clone()

    def kl():
        return ((theta - start) ** 2).sum() + (NAN if bool((theta != start).any()) else 0.0)

    assert not natural_gradient_step([theta], surrogate=lambda: theta.sum(), kl=kl).accepted
    assert theta.tolist() == [1.0]


def test_an_error_in_the_line_search_restores_the_parameters():
    theta = parameter([1.0])

    def surrogate():
        if theta.item() != 1.0:
            raise RuntimeError("broken")
        return theta.sum()

    with pytest.raises(RuntimeError, match="broken"):
        natural_gradient_step([theta], surrogate=surrogate, kl=lambda: (theta**2).sum())
    assert theta.tolist() == [1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_kl": 0.0}, "`max_kl` must be positive, got 0.0"),
        ({"damping": -1.0}, "`damping` must not be negative"),
        ({"backtracks": 0}, "`backtracks` must be at least 1"),
        ({"shrink": 1.0}, "`shrink` must lie between 0 and 1"),
        ({"accept_ratio": 1.0}, "`accept_ratio` must lie in"),
        ({"cg_iterations": 0}, "`cg_iterations` must be at least 1"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    theta = parameter([1.0])
    with pytest.raises(ValueError, match=message):
        natural_gradient_step([theta], surrogate=lambda: theta.sum(), kl=lambda: (theta**2).sum(), **settings)


def test_shapes_that_do_not_fit_are_named():
    theta = parameter([[1.0], [2.0]])
    per_row = {"surrogate": lambda: theta[:, 0], "kl": lambda: theta[:, 0] ** 2}
    with pytest.raises(ValueError, match=r"must return one number, got shape \(2,\)"):
        natural_gradient_step([theta], **per_row)
    with pytest.raises(ValueError, match=r"returned shape \(2,\), but a parameter has shape \(3, 1\)"):
        batched_natural_gradient_step([theta, parameter([[0.0]] * 3)], **per_row)
    with pytest.raises(ValueError, match="`surrogate` carries no gradient"):
        natural_gradient_step([theta], surrogate=lambda: f64(1.0), kl=lambda: (theta**2).sum())


# ---------------------------------------------------------------- several policies at once


def stacked_policies(count: int):
    """`count` policies with a hidden layer and a log standard deviation, on data of their own."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(count, *shape, generator=generator, dtype=torch.float64)

    parameters = [draw(3, 5), draw(1, 5), draw(5, 2), draw(2)]
    data = {"states": draw(20, 3), "actions": draw(20, 2), "advantages": draw(20)}
    data["advantages"] *= f64([1.0, 1e-3, 30.0, 1.0, 0.0, 1.0])[:count, None]
    data["advantages"][3] = NAN
    return parameters, data


def closures(parameters: list[Tensor], states: Tensor, actions: Tensor, advantages: Tensor):
    """Works for one policy and for a stack of them: every operation keeps the leading dimensions apart."""
    policy = Gaussian(2)

    def params() -> Tensor:
        weight, bias, head, log_std = parameters
        mean = torch.tanh(states @ weight + bias) @ head
        return torch.cat([mean, log_std.unsqueeze(-2).expand_as(mean)], -1)

    old = params().detach()
    log_prob_old = policy.log_prob(old, actions)
    return {
        "surrogate": lambda: (advantages * (policy.log_prob(params(), actions) - log_prob_old).exp()).mean(-1),
        "kl": lambda: policy.kl(old, params()).mean(-1),
    }


@pytest.mark.parametrize("recheck_kl", [True, False])
def test_policies_stepped_together_equal_policies_stepped_one_by_one(recheck_kl):
    parameters, data = stacked_policies(6)
    # a wide region and a demanding line search, so that the policies shrink their steps a different number of times
    settings = {"max_kl": 1.0, "accept_ratio": 0.8, "backtracks": 6, "recheck_kl": recheck_kl}
    together = [p.clone().requires_grad_() for p in parameters]
    result = batched_natural_gradient_step(together, **closures(together, **data), **settings)
    for row in range(6):
        alone = [p[row].clone().requires_grad_() for p in parameters]
        single = natural_gradient_step(alone, **closures(alone, **{k: v[row] for k, v in data.items()}), **settings)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(b[row], a, rtol=1e-6, atol=1e-6)
        for name, value in asdict(single).items():
            assert vars(result)[name][row].item() == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), name
    # the last one finds no trial good enough, rows 3 and 4 have no direction to try
    assert result.accepted.tolist() == [True, True, True, False, False, False]
    assert result.backtracks[3:].tolist() == [0, 0, 5]
    assert len(set(result.backtracks[result.accepted].tolist())) > 1
    for row in (3, 4, 5):
        assert all(torch.equal(p[row], q[row]) for p, q in zip(parameters, together, strict=True))


@pytest.mark.parametrize("lam", [0.1, 1.0, 10.0])
def test_a_step_on_two_sources_is_the_hybrid_natural_gradient(lam):
    # tabular softmax policy with probabilities in quarters, so that every action can stand with its exact share
    theta = f64([[0.0, 0.0, math.log(2.0)], [math.log(2.0), 0.0, 0.0]])
    policy = hybrid.softmax_policy(theta.numpy())
    f = hybrid.critic(torch.arange(6).double().numpy() ** 2, hybrid.one_hot_features(2, 3))
    offline = hybrid.every_action([0, 1, 1], policy, 4)
    online = hybrid.every_action([0, 0, 1, 0], policy, 4)
    direction = hybrid.union_natural_gradient(offline, online, policy, f, lam=lam, damping=0.1)
    matrix = hybrid.union_fisher(offline, online, policy, lam) + 0.1 * torch.eye(6).numpy()
    expected = hybrid.trust_region_step(direction, matrix, 1e-4)

    states, actions = torch.tensor(offline + online).T
    weights = torch.cat([f64([1 / len(offline)] * len(offline)), f64([lam / len(online)] * len(online))])
    advantages = f64([hybrid.advantage(f, policy, s, a) for s, a in offline + online])
    logits, distribution = theta.clone().requires_grad_(), Categorical(3)
    log_prob_old = distribution.log_prob(theta[states], actions)
    natural_gradient_step(
        [logits],
        surrogate=lambda: (
            weights * advantages * (distribution.log_prob(logits[states], actions) - log_prob_old).exp()
        ).sum(),
        kl=lambda: (weights * distribution.kl(theta[states], logits[states])).sum(),
        max_kl=1e-4,
        recheck_kl=False,
    )
    torch.testing.assert_close((logits - theta).detach().reshape(-1), torch.from_numpy(expected), rtol=1e-6, atol=1e-9)
