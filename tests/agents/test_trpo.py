"""TRPO's step: inside the trust region by an independent measure, along the natural gradient, the critic apart."""

import math

import pytest
import torch
from torch import distributions
from torch.func import functional_call

from rlalign.agents import TRPO
from rlalign.agents.config import TRPOConfig
from tests.agents.small_agents import decided, in_spaces, iterated, small
from tests.agents.test_ppo import advantages_of
from tests.agents.tiny_environments import ACTIONS


def policy_of(actor, vector, *, continuous):
    params = actor({"vector": vector})
    if not continuous:
        return distributions.Categorical(logits=params)
    mean, log_std = params.chunk(2, -1)
    return distributions.Independent(distributions.Normal(mean, log_std.exp()), 1)


def facts(agent, found):
    rollout = found.rollout
    rows = decided(rollout, advantages=advantages_of(rollout, 0.99, 0.95))
    advantages = (rows["advantages"] - rows["advantages"].mean()) / (rows["advantages"].std() + 1e-8)
    return rows, advantages


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("max_kl", [0.001, 0.05])
def test_a_step_improves_the_surrogate_inside_the_trust_region(env, max_kl):
    agent = small(TRPO, env, max_kl=max_kl, rollout_steps=32)
    found = iterated(agent)
    rows, advantages = facts(agent, found)
    continuous = env == "Pendulum-v1"
    before = policy_of(found.actor.requires_grad_(False), rows["vector"], continuous=continuous)
    after = policy_of(agent.model.actor.double().requires_grad_(False), rows["vector"], continuous=continuous)
    kl = float(distributions.kl_divergence(before, after).mean())
    ratio = (after.log_prob(rows["actions"]) - before.log_prob(rows["actions"])).exp()
    assert found.metrics["policy/step_accepted"] == 1
    assert 0.2 * max_kl < kl <= 1.001 * max_kl
    assert found.metrics["policy/kl"] == pytest.approx(kl, rel=1e-2)
    gain = float((ratio * advantages).mean() - advantages.mean())
    assert gain > 0
    assert found.metrics["policy/improvement"] == pytest.approx(gain, rel=1e-2, abs=1e-6)


def test_the_step_is_along_the_damped_natural_gradient():
    agent = small(TRPO, "Pendulum-v1", network={"hidden": [3]}, cg_iterations=60, damping=0.1, max_kl=1e-4)
    found = iterated(agent)
    rows, advantages = facts(agent, found)
    names = [name for name, _ in found.actor.named_parameters()]
    assert "distribution.log_std" in names  # part of the policy like any other
    start = [p.detach() for p in found.actor.parameters()]
    sizes = [p.numel() for p in start]

    def policy(theta):
        values = {n: t.view_as(p) for n, t, p in zip(names, theta.split(sizes), start, strict=True)}
        params = functional_call(found.actor, values, ({"vector": rows["vector"]},))
        mean, log_std = params.chunk(2, -1)
        return mean, log_std

    def divergence(theta):
        (m0, s0), (m1, s1) = policy(flat.detach()), policy(theta)
        return (s1 - s0 + ((2 * s0).exp() + (m0 - m1) ** 2) / (2 * (2 * s1).exp()) - 0.5).sum(-1).mean()

    def surrogate(theta):
        mean, log_std = policy(theta)
        log_prob = distributions.Normal(mean, log_std.exp()).log_prob(rows["actions"]).sum(-1)
        return ((log_prob - rows["log_prob_old"]).exp() * advantages).mean()

    flat = torch.cat([p.flatten() for p in start])
    fisher = torch.autograd.functional.hessian(divergence, flat)
    gradient = torch.autograd.functional.jacobian(surrogate, flat)
    direction = torch.linalg.solve(fisher + 0.1 * torch.eye(len(flat)), gradient)
    moved = torch.cat([p.detach().double().flatten() for p in agent.model.actor.parameters()]) - flat
    assert float(torch.cosine_similarity(moved, direction, dim=0)) > 0.999
    length = (2e-4 / (direction @ (fisher + 0.1 * torch.eye(len(flat))) @ direction)).sqrt()
    shrunk = 0.8 ** found.metrics["policy/backtracks_count"]
    assert float(moved.norm()) == pytest.approx(float(shrunk * length * direction.norm()), rel=1e-2)


def test_without_an_advantage_the_policy_stays_bit_for_bit():
    agent = small(TRPO, normalize_advantages="none")
    collect, before = agent.collect, [p.detach().clone() for p in agent.model.actor.parameters()]

    def indifferent():
        rollout = collect()
        rollout.rewards.zero_()
        rollout.values.zero_()
        rollout.next_values.zero_()
        return rollout

    agent.collect = indifferent
    metrics = agent.iterate()
    assert metrics["policy/step_accepted"] == 0
    assert all(p.equal(q) for p, q in zip(before, agent.model.actor.parameters(), strict=True))


def test_the_critic_learns_apart_from_the_policy():
    agent = small(TRPO, critic_epochs=20, optim={"learning_rate": 0.02})
    found = iterated(agent)
    rollout = found.rollout
    returns = (advantages_of(rollout, 0.99, 0.95) + rollout.values)[rollout.mask]
    vector = rollout.inputs["vector"].value[rollout.mask].double()
    before = (found.critic({"vector": vector}).squeeze(-1) - returns).square().mean()
    after = (agent.model.critic.double()({"vector": vector}).squeeze(-1) - returns).square().mean()
    assert after < 0.5 * before
    held = {id(p) for p in agent.model.critic.parameters()}
    assert not held & {id(p) for p in agent.model.actor.parameters()}
    assert agent.optimizer.flat.parameter.numel() == sum(p.numel() for p in agent.model.critic.parameters())


@pytest.mark.parametrize("action", ACTIONS)
def test_every_action_space_trains_and_predicts(action):
    agent = in_spaces(TRPO, observation="dict", action=action, critic_epochs=1, network={"hidden": [8]})
    metrics = iterated(agent).metrics
    assert metrics["policy/step_accepted"] == 1
    assert all(math.isfinite(value) for value in metrics.values())
    assert agent.action_space.contains(agent.predict(agent.observation_space.sample())[0])


@pytest.mark.parametrize("mask", ["info", "observation"])
def test_masked_actions_are_never_taken(mask):
    agent = in_spaces(TRPO, mask=mask, critic_epochs=1)
    for _ in range(3):
        metrics = iterated(agent).metrics  # the environment raises at a forbidden action
        assert metrics["policy/step_accepted"] == 1
        assert metrics["policy/kl"] <= 0.01 * 1.001


def test_defaults_are_those_of_sb3_contrib():
    cfg = TRPOConfig()
    assert (cfg.max_kl, cfg.damping, cfg.cg_iterations, cfg.shrink, cfg.backtracks) == (0.01, 0.1, 15, 0.8, 10)
    assert (cfg.minibatch_size, cfg.critic_epochs, cfg.rollout_steps) == (128, 10, 2048)
    assert (cfg.optim.learning_rate, cfg.optim.eps, cfg.optim.max_grad_norm) == (1e-3, 1e-5, None)


def test_normalise_and_project_and_a_classification_head():
    metrics = iterated(small(TRPO, normalize_and_project=True, value_head="hl_gauss")).metrics
    assert metrics["nap/norm_growth"] == pytest.approx(1, abs=1e-5)
    assert all(math.isfinite(value) for value in metrics.values())
