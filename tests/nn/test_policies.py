"""Action distributions against `torch.distributions`, their samples against their probabilities."""

import math

import pytest
import torch
from torch import distributions as reference
from torch import nn

from rlalign.nn.policies import ActionDistribution, Bernoulli, Categorical, Gaussian, MultiCategorical, gumbel

DRAWS = 40_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def f64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def gaussian_params(rows, dims):
    return torch.cat([f64(rows, dims), 0.5 * f64(rows, dims)], -1)


def normal(params):
    mean, log_std = params.chunk(2, -1)
    return reference.Independent(reference.Normal(mean, log_std.exp()), 1)


def squashed(params):
    return reference.TransformedDistribution(normal(params), reference.TanhTransform(cache_size=1))


# Each case: our distribution, random params, torch's distribution of them.
CASES = {
    "categorical": (
        lambda: Categorical(5),
        lambda: f64(7, 5),
        lambda p: reference.Categorical(logits=p),
    ),
    "bernoulli": (
        lambda: Bernoulli(4),
        lambda: f64(7, 4),
        lambda p: reference.Independent(reference.Bernoulli(logits=p), 1),
    ),
    "gaussian": (lambda: Gaussian(3), lambda: gaussian_params(7, 3), normal),
}
ALL = {
    **{name: make for name, (make, _, _) in CASES.items()},
    "multi_categorical": lambda: MultiCategorical([2, 3]),
    "squashed": lambda: Gaussian(3, squash=True),
}


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_every_distribution_has_the_whole_interface(make):
    assert isinstance(make(), ActionDistribution)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_log_prob_entropy_and_kl_are_those_of_torch(case):
    make, draw, torch_form = case
    ours, params, other = make(), draw(), draw()
    theirs = torch_form(params)
    actions = theirs.sample()
    stored = actions if isinstance(ours, Gaussian) else actions.to(torch.int64)
    torch.testing.assert_close(ours.log_prob(params, stored), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(params), theirs.entropy())
    torch.testing.assert_close(ours.kl(params, other), reference.kl_divergence(theirs, torch_form(other)))
    torch.testing.assert_close(ours.kl(params, params), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0)


def test_multi_categorical_is_the_product_of_its_parts():
    ours, params, other = MultiCategorical([2, 3, 4]), f64(7, 9), f64(7, 9)
    parts = [reference.Categorical(logits=logits) for logits in params.split([2, 3, 4], -1)]
    others = [reference.Categorical(logits=logits) for logits in other.split([2, 3, 4], -1)]
    actions = torch.stack([part.sample() for part in parts], -1)
    expected = sum(part.log_prob(action) for part, action in zip(parts, actions.unbind(-1), strict=True))
    torch.testing.assert_close(ours.log_prob(params, actions), expected)
    torch.testing.assert_close(ours.entropy(params), sum(part.entropy() for part in parts))
    kls = [reference.kl_divergence(part, after) for part, after in zip(parts, others, strict=True)]
    torch.testing.assert_close(ours.kl(params, other), sum(kls))
    assert ours.size == 9
    assert ours.mode(params).tolist() == torch.stack([part.probs.argmax(-1) for part in parts], -1).tolist()


def test_a_squashed_gaussian_corrects_for_the_slope_of_tanh():
    ours, params = Gaussian(3, squash=True), gaussian_params(50, 3)
    theirs = squashed(params)
    actions = theirs.sample()
    torch.testing.assert_close(ours.log_prob(params, actions.clone()), theirs.log_prob(actions), rtol=1e-6, atol=1e-6)


def test_a_squashed_density_integrates_to_one_and_samples_stay_inside():
    ours = Gaussian(1, squash=True)
    params = torch.tensor([[0.4, -0.5]], dtype=torch.float64)
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)[1:-1, None]
    density = ours.log_prob(params.expand(len(grid), 2), grid).exp()
    assert density.sum().item() * 1e-5 == pytest.approx(1.0, abs=1e-6)
    far = torch.tensor([[50.0, 1.0], [-50.0, 1.0]])
    drawn = ours.sample(far, ours.noise([2], generator()))
    assert drawn.abs().max() <= 1
    assert ours.log_prob(far, drawn).isfinite().all()
    assert ours.mode(far).tolist() == [[1.0], [-1.0]]


def test_a_squashed_gaussian_has_the_kl_of_the_normals():
    ours, params, other = Gaussian(3, squash=True), gaussian_params(7, 3), gaussian_params(7, 3)
    torch.testing.assert_close(ours.kl(params, other), reference.kl_divergence(normal(params), normal(other)))
    torch.testing.assert_close(ours.entropy(params), normal(params).entropy())


# ---------------------------------------------------------------- samples


def within(found, probability):
    """A frequency may miss its probability by 4.5 standard errors."""
    return abs(found - probability) <= 4.5 * math.sqrt(probability * (1 - probability) / DRAWS) + 1e-12


def test_categorical_samples_come_as_often_as_their_probabilities_say():
    ours, logits = Categorical(4), torch.tensor([1.0, 0.0, -1.0, -4.0])
    drawn = ours.sample(logits.expand(DRAWS, 4), ours.noise([DRAWS], generator()))
    for action, probability in enumerate(logits.softmax(-1).tolist()):
        assert within((drawn == action).double().mean().item(), probability)
    assert drawn.dtype == torch.int64


def test_multi_categorical_samples_are_independent_draws_of_each_part():
    ours, logits = MultiCategorical([2, 3]), torch.tensor([0.0, 1.0, -1.0, 0.0, 1.0])
    drawn = ours.sample(logits.expand(DRAWS, 5), ours.noise([DRAWS], generator(1)))
    first, second = logits[:2].softmax(-1).tolist(), logits[2:].softmax(-1).tolist()
    for i in range(2):
        for j in range(3):
            together = ((drawn[:, 0] == i) & (drawn[:, 1] == j)).double().mean().item()
            assert within(together, first[i] * second[j])


def test_bernoulli_samples_come_as_often_as_their_probabilities_say():
    ours, logits = Bernoulli(3), torch.tensor([-2.0, 0.0, 2.0])
    drawn = ours.sample(logits.expand(DRAWS, 3), ours.noise([DRAWS], generator(2)))
    assert set(drawn.unique().tolist()) == {0, 1}
    for switch, probability in enumerate(logits.sigmoid().tolist()):
        assert within(drawn[:, switch].double().mean().item(), probability)


def test_gaussian_samples_have_the_mean_and_the_deviation():
    ours, params = Gaussian(2), torch.tensor([1.0, -2.0, 0.0, math.log(0.5)])
    drawn = ours.sample(params.expand(DRAWS, 4), ours.noise([DRAWS], generator(3)))
    mean, std = drawn.mean(0), drawn.std(0)
    for found, true, spread in zip(mean.tolist(), (1.0, -2.0), (1.0, 0.5), strict=True):
        assert abs(found - true) < 4.5 * spread / math.sqrt(DRAWS)
    torch.testing.assert_close(std, torch.tensor([1.0, 0.5]), rtol=0.02, atol=0)
    torch.testing.assert_close(
        Gaussian(2, squash=True).sample(params.expand(DRAWS, 4), ours.noise([DRAWS], generator(3))), drawn.tanh()
    )


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_noise_is_the_generators_and_covers_a_whole_rollout(make):
    ours = make()
    noise = ours.noise((6, 4), generator(5))
    assert noise.shape == (6, 4, ours.size)
    assert noise.equal(ours.noise((6, 4), generator(5)))
    assert not noise.equal(ours.noise((6, 4), generator(6)))
    params = ours(torch.randn(6, 4, ours.size))
    rows = torch.stack([ours.sample(params[t], noise[t]) for t in range(6)])
    assert ours.sample(params, noise).equal(rows)


def test_gumbel_noise_has_its_mean_and_variance_and_is_finite():
    noise = gumbel([200_000], generator(7))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.577216, abs=0.015)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


# ---------------------------------------------------------------- masks


def test_forbidden_actions_are_never_drawn_and_the_others_share_their_probability():
    ours = Categorical(4)
    allowed = torch.tensor([True, False, True, False])
    logits = torch.tensor([0.0, 9.0, 1.0, 30.0])
    masked = ours.masked(logits.expand(DRAWS, 4), allowed.expand(DRAWS, 4))
    drawn = ours.sample(masked, ours.noise([DRAWS], generator(8)))
    assert set(drawn.unique().tolist()) == {0, 2}
    assert within((drawn == 2).double().mean().item(), math.e / (1 + math.e))
    assert set(ours.mode(masked).tolist()) == {2}
    torch.testing.assert_close(
        ours.log_prob(masked[:1], torch.tensor([2])), torch.log(torch.tensor([math.e / (1 + math.e)]))
    )


@pytest.mark.parametrize("make", [lambda: Categorical(4), lambda: MultiCategorical([2, 2]), lambda: Bernoulli(4)])
def test_a_mask_keeps_entropy_kl_and_gradients_finite(make):
    ours, allowed = make(), torch.tensor([[True, False, True, True]])
    logits, other = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4)
    params = ours.masked(logits, allowed)
    total = ours.entropy(params) + ours.kl(ours.masked(other, allowed), params)
    assert total.isfinite().all()
    total.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1].item() == 0.0


def test_the_entropy_of_a_masked_choice_counts_the_allowed_actions():
    ours = Categorical(5)
    masked = ours.masked(torch.zeros(1, 5), torch.tensor([[True, True, True, False, False]]))
    assert ours.entropy(masked).item() == pytest.approx(math.log(3))
    single = ours.masked(torch.randn(1, 5), torch.tensor([[False, False, True, False, False]]))
    assert ours.entropy(single).item() == pytest.approx(0.0, abs=1e-6)


def test_masks_forbid_parts_of_multi_categorical_and_switches():
    multi = MultiCategorical([2, 3])
    allowed = torch.tensor([True, False, False, True, True]).expand(500, 5)
    drawn = multi.sample(multi.masked(torch.zeros(500, 5), allowed), multi.noise([500], generator(9)))
    assert drawn[:, 0].unique().tolist() == [0]
    assert drawn[:, 1].unique().tolist() == [1, 2]
    switches = Bernoulli(2)
    off = switches.masked(torch.full((500, 2), 9.0), torch.tensor([True, False]).expand(500, 2))
    assert switches.sample(off, switches.noise([500], generator(9)))[:, 1].sum().item() == 0


def test_continuous_actions_refuse_masks():
    with pytest.raises(ValueError, match="action masks need discrete actions"):
        Gaussian(2).masked(torch.zeros(1, 4), torch.ones(1, 4).bool())


# ---------------------------------------------------------------- parameters and gradients


def test_the_gaussian_puts_its_own_log_std_beside_the_means_and_clamps_it():
    ours = Gaussian(2, log_std=5.0, log_std_range=(-5, 2))
    params = ours(torch.tensor([[[1.0, 2.0]]]))
    assert params.tolist() == [[[1.0, 2.0, 2.0, 2.0]]]
    assert [name for name, _ in ours.named_parameters()] == ["log_std"]
    assert Gaussian(3).log_std.tolist() == [0.0] * 3


def test_the_learned_log_std_gets_the_gradient_of_the_likelihood():
    # d/dlog_std log N(a; 0, 1) = (a - mean)^2 - 1
    ours = Gaussian(2)
    ours.log_prob(ours(torch.zeros(1, 2)), torch.tensor([[2.0, 0.5]])).sum().backward()
    torch.testing.assert_close(ours.log_std.grad, torch.tensor([3.0, -0.75]))


@pytest.mark.parametrize("name", ALL)
def test_log_prob_entropy_and_kl_differentiate(name):
    ours = ALL[name]()
    width = 2 * ours.size if isinstance(ours, Gaussian) else ours.size
    params, old = 0.5 * f64(3, width), 0.5 * f64(3, width)
    noise = ours.noise([3], generator(1)).double()
    actions = ours.sample(params, noise)
    params.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: ours.log_prob(p, actions), params)
    assert torch.autograd.gradcheck(ours.entropy, params)
    assert torch.autograd.gradcheck(lambda p: ours.kl(old, p), params)


def test_the_score_has_mean_zero_under_the_policy():
    ours, logits = Categorical(4), torch.tensor([0.5, 0.0, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    score = torch.stack([torch.autograd.grad(ours.log_prob(logits, torch.tensor(a)), logits)[0] for a in range(4)])
    mean = logits.softmax(-1).detach() @ score
    torch.testing.assert_close(mean, torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("logit", "action"), [(300.0, 1), (300.0, 0), (-300.0, 1), (-300.0, 0)])
def test_extreme_logits_stay_finite(logit, action):
    switch, params = Bernoulli(1), torch.tensor([[logit]], requires_grad=True)
    found = switch.log_prob(params, torch.tensor([[action]]))
    assert found.item() == pytest.approx(0.0 if (logit > 0) == (action == 1) else -300.0)
    (found.sum() + switch.entropy(params).sum() + switch.kl(-params, params).sum()).backward()
    assert params.grad.isfinite().all()
    choice = Categorical(2)
    pair = torch.tensor([[logit, 0.0]])
    assert choice.entropy(pair).item() == pytest.approx(0.0, abs=1e-6)
    assert choice.kl(pair, -pair).isfinite().all()


def test_actions_of_any_integer_kind_are_read_alike():
    params = f64(3, 2)
    ints = torch.tensor([[0, 1], [1, 1], [0, 0]])
    switches = Bernoulli(2)
    expected = switches.log_prob(params, ints)
    assert switches.log_prob(params, ints.to(torch.int8)).equal(expected)
    assert switches.log_prob(params, ints.double()).equal(expected)


def test_distributions_without_weights_have_none():
    for ours in (Categorical(3), MultiCategorical([2, 2]), Bernoulli(2)):
        assert list(ours.parameters()) == []
        assert isinstance(ours, nn.Module)
