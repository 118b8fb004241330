"""O-DICE's update: the authors' to 1e-6, its traps, and a fork that imitation takes the wrong way."""

import copy

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rlalign.agents.bc import BCLearner
from rlalign.agents.config import NormalizeAndProject
from rlalign.agents.config_offline import BCConfig, ODICEConfig
from rlalign.agents.odice import ODICELearner
from rlalign.functional.dice import dice_weight
from rlalign.nn.policies import Categorical, Gaussian
from tests.agents.offline_data import choice, random_batch, same_weights, small, stitched_chain, train
from tests.reference import dice as reference


def learner(distribution=None, *, seed=0, lr=1e-3, **changes):
    cfg = ODICEConfig(**small(lr=lr), **changes)
    return ODICELearner(cfg, 3, distribution or Categorical(2), torch.Generator().manual_seed(seed))


def residuals(ours, batch):
    """Forward, backward, and the values they come from, for the authors' formulas."""
    cfg, alive = ours.cfg, 1 - batch.terminated.float()
    both = [lambda x, net=member.network: net(x).squeeze(-1) for member in ours.value]
    slow = [lambda x, net=member.network: net(x).squeeze(-1) for member in ours.target]
    with torch.no_grad():
        now = torch.stack([net(batch.observations) for net in slow]).min(0)[0]
        then = torch.stack([net(batch.next_observations) for net in slow]).min(0)[0]
    v = torch.stack([net(batch.observations) for net in both])
    v_next = torch.stack([net(batch.next_observations) for net in both])
    return batch.rewards + alive * cfg.gamma * then - v, batch.rewards + alive * cfg.gamma * v_next - now, v, v_next


def conjugate(y):
    w = torch.max(y / 2 + 1, torch.zeros_like(y))
    return y * w - (w - 1) ** 2


def authors_gradient(ours, batch):
    cfg, parameters = ours.cfg, list(ours.value.parameters())
    alive = 1 - batch.terminated.float()
    if cfg.gradient == "orthogonal":
        return reference.three_backwards(
            parameters,
            linear=lambda: ((1 - cfg.conjugate_weight) * residuals(ours, batch)[2]).mean(),
            forward=lambda: (cfg.conjugate_weight * conjugate(residuals(ours, batch)[0])).mean(),
            backward=lambda: (cfg.conjugate_weight * cfg.backward_weight * conjugate(residuals(ours, batch)[1])).mean(),
        )
    forward, _, v, v_next = residuals(ours, batch)
    residual = forward if cfg.gradient == "semi" else batch.rewards + alive * cfg.gamma * v_next - v
    loss = ((1 - cfg.conjugate_weight) * v + cfg.conjugate_weight * conjugate(residual)).mean()
    return torch.autograd.grad(loss, parameters)


def authors_update(ours, batch, value_adam, policy_adam):
    """One step on `ours`' own networks, with optimizers and order of the authors' script."""
    cfg = ours.cfg
    forward, _, v, v_next = (x.detach() for x in residuals(ours, batch))
    alive = 1 - batch.terminated.float()
    weigh = batch.rewards + alive * cfg.gamma * v_next - v if cfg.gradient == "true" else forward
    for parameter, gradient in zip(ours.value.parameters(), authors_gradient(ours, batch), strict=True):
        parameter.grad = gradient.clone()
    value_adam.step()
    for slow, fast in zip(ours.target.parameters(), ours.value.parameters(), strict=True):
        slow.data.mul_(1 - cfg.target_tau).add_(fast.data, alpha=cfg.target_tau)
    weight = torch.clamp_max(torch.max(weigh, torch.zeros_like(weigh)), 100.0)
    log_prob = ours.policy.distribution.log_prob(ours.policy(batch.observations), batch.actions)
    policy_adam.zero_grad()
    (weight * -log_prob).mean().backward()
    policy_adam.step()


@pytest.mark.parametrize("gradient", ["orthogonal", "true", "semi"])
@pytest.mark.parametrize("twin", [False, True])
def test_updates_equal_the_authors(gradient, twin):
    options = {"gradient": gradient, "twin": twin, "target_tau": 0.1, "backward_weight": 0.7}
    ours = learner(Gaussian(2), **options)
    theirs = learner(Gaussian(2), **options)
    # Their optimizers hold the parameters of a copy that no buffer of ours is behind.
    theirs.value, theirs.policy = copy.deepcopy(theirs.value), copy.deepcopy(theirs.policy)
    theirs.target = copy.deepcopy(theirs.target)
    adams = [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (theirs.value, theirs.policy)]
    for number in range(4):
        batch = random_batch(number, actions=None)
        ours.update(batch)
        authors_update(theirs, batch, *adams)
    for name in ("value", "target", "policy"):
        for a, b in zip(vars(ours)[name].parameters(), vars(theirs)[name].parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("twin", [False, True])
def test_the_value_gradient_equals_the_authors_formula(twin):
    ours = learner(twin=twin, backward_weight=0.5)
    torch.manual_seed(1)
    for parameter in ours.target.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))  # a slow copy that differs
    batch = random_batch(5)
    found, _, _ = ours.value_gradient(batch)
    expected = torch.cat([part.flatten() for part in authors_gradient(ours, batch)])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_the_three_gradients_are_three():
    batch = random_batch(3)
    flat = {kind: learner(gradient=kind).value_gradient(batch)[0] for kind in ("orthogonal", "true", "semi")}
    assert (flat["orthogonal"] - flat["true"]).norm() > 1e-3
    assert (flat["orthogonal"] - flat["semi"]).norm() > 1e-3
    without = learner(gradient="orthogonal", backward_weight=0.0).value_gradient(batch)[0]
    torch.testing.assert_close(without, flat["semi"])


# ---------------------------------------------------------------- traps


def test_a_time_limit_bootstraps_and_a_termination_does_not():
    """Trap: (1 - done) in place of (1 - terminated)."""
    batch = random_batch(1, terminated=False)
    cut = type(batch)(**vars(batch) | {"truncated": torch.ones_like(batch.truncated)})
    ended = type(batch)(**vars(batch) | {"terminated": torch.ones_like(batch.truncated)})
    plain, limited, over = (learner().value_gradient(b)[1] for b in (batch, cut, ended))
    assert torch.equal(plain, limited)
    assert (plain - over).abs().max() > 1e-3


def test_left_over_gradients_change_nothing():
    """Trap: gradients accumulated from somewhere else."""
    clean, dirty = learner(), learner()
    for parameter in [*dirty.value.parameters(), *dirty.policy.parameters()]:
        parameter.grad.fill_(7.0)
    for one in (clean, dirty):
        one.update(random_batch(0))
    assert same_weights(clean.modules, dirty.modules)


def test_the_slow_copy_follows_the_new_value_before_the_policy_moves():
    ours, batch = learner(target_tau=0.25), random_batch(0)
    before = [p.clone() for p in ours.target.parameters()]
    ours.update(batch)
    for slow, old, new in zip(ours.target.parameters(), before, ours.value.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.75 * old + 0.25 * new)
        assert not slow.requires_grad


def test_twin_weights_are_averaged_over_critics():
    """Trap: [2, B] weights against [B] log-probabilities."""
    ours, batch = learner(twin=True), random_batch(2)
    _, residual, _ = ours.value_gradient(batch)
    assert residual.shape == (2, 32)
    log_prob = ours.policy.distribution.log_prob(ours.policy(batch.observations), batch.actions).detach()
    expected = (dice_weight(residual) * -log_prob).mean()  # broadcast as the authors do
    torch.testing.assert_close(ours.update(batch)["policy/loss"], expected)


def test_the_policy_loss_does_not_train_the_value():
    ours, batch = learner(), random_batch(2)
    ours.update(batch)
    for parameter in ours.value.parameters():
        assert parameter.grad.abs().max() == 0.0


def test_metrics_count_capped_and_dropped_weights():
    batch = random_batch(0, terminated=True)
    batch = batch.with_rewards(torch.tensor([1e4, -1e4] * 16))
    metrics = learner().update(batch)
    assert metrics["policy/weight_capped_frac"].item() == 0.5
    assert metrics["policy/weight_zero_frac"].item() == 0.5
    assert metrics["policy/weight_mean"].item() == 50.0
    assert not any(value.requires_grad for value in metrics.values())


def test_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    one, state = learner(seed=4), torch.get_rng_state()
    assert torch.equal(state, torch.random.manual_seed(1).get_state())
    assert same_weights(one.modules, learner(seed=4).modules)
    assert not same_weights(one.modules, learner(seed=5).modules)


@pytest.mark.parametrize("nap", [None, NormalizeAndProject()])
def test_a_saved_learner_continues_bit_for_bit(nap):
    straight = learner(twin=True, normalize_and_project=nap)
    for number in range(3):
        straight.update(random_batch(number))
    resumed = learner(seed=9, twin=True, normalize_and_project=nap)
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for one in (straight, resumed):
        for number in range(3, 6):
            one.update(random_batch(number), progress=0.5)
    assert same_weights(straight.modules, resumed.modules)


def test_reverse_kl_learns_too():
    ours = learner(divergence="reverse_kl")
    metrics = ours.update(random_batch(0))
    assert all(bool(value.isfinite()) for value in metrics.values())
    assert metrics["policy/weight_mean"] > 0


def test_a_classifying_head_is_refused_with_the_reason():
    with pytest.raises(ValidationError, match="f-divergence's dual, which has no target to classify"):
        TypeAdapter(ODICEConfig).validate_python({"value_head": {"type": "hl_gauss"}})


# ---------------------------------------------------------------- a known answer


@pytest.mark.parametrize("gradient", ["orthogonal", "semi"])
def test_pieces_of_a_path_are_joined_where_imitation_follows_the_crowd(gradient):
    # At the door half the decisions earn 10: (1 - L) = L f*'(10 - V) / 2 gives V = 28/3 for L = 0.6; others fall away.
    # At the fork 3 in 10 lead there: 2/3 = 0.3 ((0.99 x 28/3 - V) / 2 + 1) gives V = 6.80, above the 3 of the rest.
    data, fork, door = stitched_chain()
    dice = train(learner(lr=5e-3, gradient=gradient, target_tau=0.05), data, 300)
    cloned = BCLearner(
        BCConfig(network=dice.cfg.network, optim=dice.cfg.optim), 3, Categorical(2), torch.Generator().manual_seed(0)
    )
    train(cloned, data, 300)
    assert choice(cloned, fork) == pytest.approx(0.3, abs=0.08)
    assert choice(cloned, door) == pytest.approx(0.5, abs=0.08)
    assert choice(dice, fork) > 0.9
    assert choice(dice, door) > 0.95
    if gradient == "semi":  # the other gradient weighs a state by how it is reached, too
        with torch.no_grad():
            assert dice.value.smallest(torch.stack([door, fork])).tolist() == pytest.approx([28 / 3, 6.80], abs=0.5)
