"""Group estimators on whole episodes."""

import math

import pytest
import torch
from torch import distributions

from rlalign.agents import PolicyGradientAgent
from rlalign.config import ConfigError
from tests.agents.small_agents import in_spaces, iterated, small
from tests.agents.tiny_environments import ACTIONS

FOUR = {"num_envs": 8, "group_size": 4}
RLOO = {**FOUR, "advantage": "leave_one_out"}


def test_one_step_equals_a_slow_one():
    # One pass, one minibatch: the ratio is 1, so the loss is the plain policy gradient over all decisions.
    agent = small(PolicyGradientAgent, **RLOO, update_epochs=1, optim={"max_grad_norm": None})
    found = iterated(agent)
    rollout, actor = found.rollout, found.actor
    returns = rollout.mask.sum(1).double()  # CartPole pays 1 per step
    baseline = torch.cat([(group.sum() - group) / 3 for group in returns.split(4)])
    advantages = (returns - baseline)[:, None].expand(rollout.mask.shape)[rollout.mask]
    vector = rollout.inputs["vector"].value[rollout.mask].double()
    policy = distributions.Categorical(logits=actor({"vector": vector}))
    log_prob = policy.log_prob(rollout.inputs["actions"].value[rollout.mask])
    parameters = list(actor.parameters())
    gradients = torch.autograd.grad(-(log_prob * advantages).mean(), parameters)
    for p, g, got in zip(parameters, gradients, agent.actor.parameters(), strict=True):
        # Adam's first step: lr g / (|g| + eps)
        torch.testing.assert_close(got.double(), p.detach() - 3e-4 * g / (g.abs() + 1e-5), rtol=0, atol=1e-5)


def test_groups_that_agree_teach_nothing():
    agent = small(PolicyGradientAgent, **RLOO, success_threshold=1e6)
    before = [p.detach().clone() for p in agent.actor.parameters()]
    metrics = iterated(agent).metrics
    assert metrics["reward/mean"] == metrics["signal/group_frac"] == 0
    assert "policy/kl" not in metrics
    assert all(p.equal(q) for p, q in zip(before, agent.actor.parameters(), strict=True))


def test_an_iteration_without_signal_reports_nothing_of_the_one_before():
    agent = small(PolicyGradientAgent, **RLOO)
    assert "policy/kl" in iterated(agent).metrics
    object.__setattr__(agent.config, "success_threshold", 1e6)
    assert "policy/kl" not in iterated(agent).metrics


@pytest.mark.parametrize("estimator", ["group_relative", "leave_one_out", "beta_normalized"])
def test_outcomes_are_whether_the_return_reached_the_threshold(estimator):
    agent = small(PolicyGradientAgent, **{**FOUR, "advantage": estimator}, success_threshold=20.0)
    found = iterated(agent)
    lengths = found.rollout.mask.sum(1)
    assert found.rollout.outcome.tolist() == (lengths >= 20).float().tolist()
    last = found.rollout.rewards.gather(1, lengths[:, None] - 1).squeeze(1)
    assert last.equal(found.rollout.outcome)
    assert found.metrics["episode/return_mean"] == pytest.approx(float(lengths.float().mean()))
    assert found.metrics["reward/mean"] == pytest.approx(float((lengths >= 20).float().mean()))


def test_the_clock_counts_decisions_of_first_episodes_only():
    agent = small(PolicyGradientAgent, **RLOO)
    found = iterated(agent)
    assert agent.step == int(found.rollout.mask.sum())


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_space_trains_and_predicts(action):
    agent = in_spaces(PolicyGradientAgent, observation="dict", action=action, **RLOO, update_epochs=1)
    metrics = iterated(agent).metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert agent.action_space.contains(agent.predict(agent.observation_space.sample())[0])


@pytest.mark.parametrize("mask", ["info", "observation"])
def test_masked_actions_are_never_taken(mask):
    agent = in_spaces(PolicyGradientAgent, mask=mask, **RLOO, entropy_coef=0.01)
    for _ in range(3):
        iterated(agent)


def test_minibatches_keep_groups_whole():
    agent = small(PolicyGradientAgent, num_envs=16, group_size=4, advantage="leave_one_out", minibatches=2)
    found = iterated(agent)
    batch = agent.estimator(found.rollout)
    dealt = list(agent.minibatches(batch))
    assert len(dealt) == 2 * 4
    for minibatch in dealt:
        assert minibatch.group.bincount().unique().tolist() in ([4], [0, 4])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 6, "group_size": 4}, "`env.num_envs`=6 must be a multiple of `group_size`=4"),
        ({**FOUR, "advantage": "gae"}, "`advantage.type`=gae needs more than episode outcomes"),
        ({**FOUR, "vectorization": "native"}, "seeded one by one"),
        ({**FOUR, "normalize": {"rewards": True}}, "`normalize.rewards` has no meaning here"),
    ],
)
def test_contradictions(settings, message):
    with pytest.raises(ConfigError, match=message):
        small(PolicyGradientAgent, **settings)
