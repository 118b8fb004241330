"""TD3+BC: one update by hand, the delay, noise inside its bounds, C51, and what it refuses."""

import copy

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rlalign.agents.config import NetworkConfig
from rlalign.agents.config_offline import TD3BCConfig
from rlalign.agents.td3_bc import TD3BCLearner
from rlalign.nn.config import C51, HLGauss
from rlalign.nn.policies import Categorical, Gaussian
from tests.agents.offline_data import random_batch, same_weights, small, train

BOUNDED = NetworkConfig(hidden=[16, 16], activation="relu", squash=True)


def learner(*, seed=0, lr=1e-3, **changes):
    cfg = TD3BCConfig(**small(lr=lr) | {"network": BOUNDED}, **changes)
    return TD3BCLearner(cfg, 3, Gaussian(2, squash=True), torch.Generator().manual_seed(seed))


def test_updates_equal_the_authors():
    options = {"policy_noise": 0.0, "policy_delay": 2, "target_tau": 0.1}
    ours, theirs = learner(**options), learner(**options)
    nets = {name: copy.deepcopy(vars(theirs)[name]) for name in ("policy", "q", "target", "slow_policy")}
    adam = {name: torch.optim.Adam(nets[name].parameters(), lr=1e-3) for name in ("policy", "q")}

    def act(name, x):
        return nets[name].network(x).tanh()

    for number in range(1, 5):
        batch = random_batch(number, actions=None)
        pair = torch.cat([batch.observations, batch.actions], -1)
        after = torch.cat([batch.next_observations, act("slow_policy", batch.next_observations)], -1)
        slow = torch.min(*(member.network(after).squeeze(-1) for member in nets["target"]))
        target = (batch.rewards + 0.99 * (1 - batch.terminated.float()) * slow).detach()
        adam["q"].zero_grad()
        (sum(((member.network(pair).squeeze(-1) - target) ** 2).mean() for member in nets["q"]) / 2).backward()
        adam["q"].step()
        if number % 2 == 0:
            actions = act("policy", batch.observations)
            q = next(iter(nets["q"])).network(torch.cat([batch.observations, actions], -1))
            loss = -2.5 / q.abs().mean().detach() * q.mean() + torch.nn.functional.mse_loss(actions, batch.actions)
            adam["policy"].zero_grad()
            loss.backward()
            adam["policy"].step()
            for slow_name, name in (("target", "q"), ("slow_policy", "policy")):
                for old, new in zip(nets[slow_name].parameters(), nets[name].parameters(), strict=True):
                    old.data.mul_(0.9).add_(new.data, alpha=0.1)
        ours.update(batch)
    for name, net in nets.items():
        for a, b in zip(vars(ours)[name].parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_the_policy_and_the_slow_copies_move_every_other_update():
    ours = learner()
    frozen = [copy.deepcopy(net) for net in (ours.policy, ours.target, ours.slow_policy)]
    assert "policy/loss" not in ours.update(random_batch(0, actions=None))
    assert all(same_weights(*pair) for pair in zip(frozen, (ours.policy, ours.target, ours.slow_policy), strict=True))
    assert "policy/loss" in ours.update(random_batch(1, actions=None))
    assert not any(same_weights(*p) for p in zip(frozen, (ours.policy, ours.target, ours.slow_policy), strict=True))


def test_target_actions_are_noisy_within_clip_and_bounds():
    ours = learner(policy_noise=10.0, noise_clip=0.3)
    observations = torch.randn(500, 3)
    plain = ours.act(ours.slow_policy, observations).detach()
    noisy = ours.target_actions(observations)
    assert (noisy - plain).abs().max().item() == pytest.approx(0.3, abs=1e-6)
    assert noisy.abs().max().item() <= 1.0
    assert (noisy - plain).mean().abs().item() < 0.03
    assert not torch.equal(noisy, ours.target_actions(observations))


def test_the_policy_loss_leaves_the_critic_alone():
    ours = learner(policy_delay=1)
    ours.update(random_batch(0, actions=None))
    assert all(p.grad.abs().max() == 0.0 for p in ours.q.parameters())


@pytest.mark.learning
@pytest.mark.parametrize("head", [None, HLGauss(low=-3.0, high=3.0, num_bins=41), C51(low=-3.0, high=3.0, num_bins=41)])
def test_the_policy_moves_from_the_data_towards_the_reward(head):
    # One-step episodes, actions uniform in [-0.9, 0.9], reward = first dimension: Q = a_0. Imitation alone would stay
    # at 0; with mean |Q| about 0.45 the optimum lies beyond the bounds, so dimension 0 climbs and dimension 1 stays.
    batch = random_batch(0, rows=512, actions=None, terminated=True)
    batch = batch.with_rewards(batch.actions[:, 0].clone())
    options = {} if head is None else {"value_head": head}
    ours = train(learner(lr=5e-3, **options), batch, 300, rows=128)
    with torch.no_grad():
        actions = ours.act(ours.policy, batch.observations).mean(0)
    assert actions[0].item() > 0.6
    assert abs(actions[1].item()) < 0.3


def test_unbounded_or_discrete_actions_are_refused_with_the_reason():
    cfg = TD3BCConfig(**small() | {"network": BOUNDED})
    for distribution in (Categorical(2), Gaussian(2)):
        with pytest.raises(ValueError, match=r"needs a `Box` action space with bounds.*Use odice, iql or bc"):
            TD3BCLearner(cfg, 3, distribution, torch.Generator())
    with pytest.raises(ValidationError, match="`network.squash` must be true"):
        TypeAdapter(TD3BCConfig).validate_python({"network": {"squash": False}})


def test_a_saved_learner_continues_bit_for_bit():
    straight, resumed = learner(seed=0), learner(seed=1)
    straight.update(random_batch(0, actions=None))  # an odd number of updates: the delay is part of the state
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    resumed.generator.set_state(straight.generator.get_state())
    for one in (straight, resumed):
        for number in range(1, 4):
            one.update(random_batch(number, actions=None))
    assert same_weights(straight.modules, resumed.modules)
