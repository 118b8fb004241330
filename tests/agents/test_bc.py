"""Behaviour cloning: frequencies of the data, and its mean action."""

import copy

import pytest
import torch

from rlalign.agents.bc import BCLearner
from rlalign.agents.config import AgentOptimConfig
from rlalign.agents.config_offline import BCConfig
from rlalign.nn.policies import Bernoulli, Categorical, Gaussian, MultiCategorical
from tests.agents.offline_data import SMALL, choice, random_batch, same_weights, stitched_chain, train


def learner(distribution, *, seed=0, lr=5e-3):
    cfg = BCConfig(network=SMALL, optim=AgentOptimConfig(learning_rate=lr, eps=1e-8, max_grad_norm=None))
    return BCLearner(cfg, 3, distribution, torch.Generator().manual_seed(seed))


def test_one_update_is_adam_on_the_negative_log_likelihood():
    ours, theirs = learner(Gaussian(2)), learner(Gaussian(2))
    batch = random_batch(0, actions=None)
    adam = torch.optim.Adam(theirs.policy.parameters(), lr=5e-3)
    mean, log_std = theirs.policy(batch.observations).chunk(2, -1)
    loss = -torch.distributions.Normal(mean, log_std.exp()).log_prob(batch.actions).sum(-1).mean()
    loss.backward()
    adam.step()
    assert ours.update(batch)["policy/loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_discrete_actions_reach_the_frequencies_of_the_data():
    data, fork, door = stitched_chain()
    ours = train(learner(Categorical(2)), data, 200)
    assert choice(ours, fork) == pytest.approx(0.3, abs=0.08)
    assert choice(ours, door) == pytest.approx(0.5, abs=0.08)


def test_continuous_actions_reach_the_data_s_mean_and_deviation():
    batch = random_batch(1, rows=400, actions=None)
    ours = train(learner(Gaussian(2), lr=1e-2), batch, 300, rows=400)
    mean, log_std = ours.policy(torch.zeros(1, 3))[0].detach().chunk(2)
    assert mean.abs().max().item() < 0.25  # uniform on [-0.9, 0.9]: mean 0, deviation 0.9 / sqrt(3)
    assert log_std.exp().tolist() == pytest.approx([0.9 / 3**0.5] * 2, abs=0.08)


@pytest.mark.parametrize(
    ("distribution", "actions"),
    [(MultiCategorical([2, 3]), torch.tensor([[1, 2]] * 32)), (Bernoulli(2), torch.tensor([[1, 0]] * 32))],
)
def test_several_choices_at_once(distribution, actions):
    batch = random_batch(0)
    batch = type(batch)(**vars(batch) | {"actions": actions})
    ours = train(learner(distribution), batch, 60)
    params = ours.policy(batch.observations[:1])
    assert ours.policy.distribution.mode(params).tolist() == [actions[0].tolist()]


def test_a_saved_learner_continues_bit_for_bit():
    straight, resumed = learner(Categorical(2)), learner(Categorical(2), seed=3)
    straight.update(random_batch(0))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for one in (straight, resumed):
        one.update(random_batch(1))
    assert same_weights(straight.modules, resumed.modules)
