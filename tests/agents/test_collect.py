"""Rollouts and waves: the same decisions in every restart mode, true next values, and nothing counted that is none."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rlalign.advantages import build_estimator
from rlalign.advantages.config import GAE
from rlalign.agents.actor_critic import ActorCritic
from rlalign.agents.collect import Collector, EpisodeStatistics
from rlalign.agents.config import EnvConfig, NetworkConfig, NormalizeConfig, PPOConfig
from rlalign.agents.envs import Environments, make_environments
from rlalign.agents.waves import WaveCollector
from tests.agents.tiny_environments import ANY, MODES, AnySpaces, scripted

SMALL = NetworkConfig(hidden=[4])


def worth(prepared):
    """A critic that reads the clock: V = 10 episode + t, so that each state's value says which state it is."""
    return prepared["vector"] @ torch.tensor([0.0, 10.0, 1.0])


def parts_of(envs, **config):
    model = ActorCritic(envs, PPOConfig(network=SMALL, **config), gamma=0.9)
    model.critic.values = worth
    return model, Collector(envs, model.parts, model.actions, seed=0, device="cpu")


def rollouts(mode, steps, *, pieces=1, **config):
    envs = Environments(scripted(mode), name="Scripted", seed=0)
    model, collector = parts_of(envs, **config)
    found = []
    for iteration in range(pieces):
        experience = collector.collect(model.actor, model.observations, steps=steps, iteration=iteration)
        found.append(model.rollout(experience, first_group=iteration * 3))
    return found, collector, model


def real_rows(found, fields):
    """Per copy, the named facts of its real decisions in order."""
    return [
        torch.stack([torch.cat([getattr(r, f)[copy][r.mask[copy]].double() for r in found]) for f in fields], -1)
        for copy in range(3)
    ]


FACTS = ("rewards", "terminated", "truncated", "values")


@pytest.mark.parametrize("pieces", [1, 10, 40])
def test_every_mode_and_every_cut_into_rollouts_tells_the_same(pieces):
    expected = real_rows(rollouts(AutoresetMode.SAME_STEP, 40)[0], FACTS)
    for mode in MODES:
        rows = real_rows(rollouts(mode, 40 // pieces, pieces=pieces)[0], FACTS)
        for got, whole in zip(rows, expected, strict=True):
            assert len(got) > 25
            assert got.equal(whole[: len(got)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pieces", [1, 40])
def test_next_values_are_those_of_the_true_next_states(mode, pieces):
    found, _, _ = rollouts(mode, 40 // pieces, pieces=pieces)
    for rows in real_rows(found, ("values", "next_values", "terminated", "truncated")):
        value, following, terminated, truncated = rows.unbind(-1)
        # One step later the clock shows one more, also in the last state of a truncated episode.
        assert (following - value)[terminated == 0].unique().tolist() == [1.0]
        assert truncated.sum() > 3
        assert not (terminated * truncated).any()  # both at once is a termination


@pytest.mark.parametrize("mode", MODES)
def test_td_errors_by_hand_in_every_mode(mode):
    # lambda = 0: A = r + 0.9 V(next) - V. Copy 0, episode 0: states 0 1 2, rewards 1 2 3, then terminated;
    # episode 1: states worth 10 11, rewards 11 12, then truncated in a state worth 12.
    rollout = rollouts(mode, 30)[0][0]
    batch = build_estimator(GAE(gamma=0.9, gae_lambda=0.0))(rollout)
    got = batch.advantages[0][batch.mask[0]][:5]
    expected = [1 + 0.9 * 1 - 0, 2 + 0.9 * 2 - 1, 3 - 2, 11 + 0.9 * 11 - 10, 12 + 0.9 * 12 - 11]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_restarts_are_masked_and_no_decision_besides():
    rollout = rollouts(AutoresetMode.NEXT_STEP, 8)[0][0]
    assert rollout.mask[0].tolist() == [True, True, True, False, True, True, False, True]
    for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED):
        assert rollouts(mode, 8)[0][0].mask.all()


@pytest.mark.parametrize("mode", MODES)
def test_only_decisions_are_counted(mode):
    found, collector, model = rollouts(mode, 5, pieces=8, normalize=NormalizeConfig(observations=True, rewards=True))
    real = sum(int(r.mask.sum()) for r in found)
    assert (real < 120) == (mode is AutoresetMode.NEXT_STEP)
    assert collector.env_steps == real
    assert int(model.observations.moments["observation"].count) == real
    assert int(model.rewards.moments.count) == real


@pytest.mark.parametrize("mode", MODES)
def test_returns_and_lengths_of_episodes_by_hand(mode):
    _, collector, _ = rollouts(mode, 1, pieces=7)
    # Copy 0: 1+2+3 in 3 steps, then 11+12 in 2. Copy 1: 101+102 in 2, 111 in 1, ... Copy 2: 201 in 1, 211+..+214 in 4.
    statistics = collector.episodes
    assert {(6.0, 3), (203.0, 2), (111.0, 1), (201.0, 1)} <= set(
        zip(statistics.returns, statistics.lengths, strict=True)
    )
    assert statistics.metrics()["episode/count"] == len(statistics.returns)


def test_episode_statistics_restore_into_a_used_object():
    one, other = EpisodeStatistics(1), EpisodeStatistics(1)
    yes = np.ones((1, 1), dtype=bool)
    one.update(np.array([[2.0]]), yes, yes)
    other.update(np.array([[7.0]]), yes, yes)
    other.load_state_dict(one.state_dict())
    assert other.metrics() == {"episode/return_mean": 2.0, "episode/length_mean": 1.0, "episode/count": 1.0}


def test_log_probabilities_are_those_of_the_actions_taken():
    envs = make_environments(EnvConfig(id=ANY, num_envs=3, kwargs={"action": "box"}), seed=0)
    model = ActorCritic(envs, PPOConfig(network=SMALL), gamma=0.9)
    collector = Collector(envs, model.parts, model.actions, seed=0, device="cpu")
    found = collector.collect(model.actor, model.observations, steps=5, iteration=0)
    rollout = model.rollout(found, first_group=0)
    mean = model.actor({"vector": found.before()["observation"]}).chunk(2, -1)[0]
    expected = torch.distributions.Normal(mean, 1.0).log_prob(found.actions).sum(-1)
    torch.testing.assert_close(rollout.log_prob_old, expected.detach())
    assert (found.actions.abs() > 1).any()  # kept as drawn, not as clipped


@pytest.mark.parametrize("mask", ["info", "observation"])
@pytest.mark.parametrize("mode", MODES)
def test_forbidden_actions_are_never_taken(mask, mode):
    copies = [lambda: AnySpaces(mask=mask)] * 4  # they raise at a forbidden action
    envs = Environments(SyncVectorEnv(copies, autoreset_mode=mode), name="Any", seed=0)
    model = ActorCritic(envs, PPOConfig(network=SMALL), gamma=0.9)
    collector = Collector(envs, model.parts, model.actions, seed=0, device="cpu")
    found = collector.collect(model.actor, model.observations, steps=60, iteration=0)
    assert (found.allowed.sum(-1)[found.mask] == 2).all()
    taken = found.allowed.gather(-1, found.actions[..., None]).squeeze(-1)
    assert taken[found.mask].all()
    log_prob = model.rollout(found, first_group=0).log_prob_old[found.mask]
    torch.testing.assert_close(log_prob.exp(), torch.full_like(log_prob, 0.5), atol=0.05, rtol=0)


def test_a_rollout_is_a_function_of_seed_and_iteration():
    def actions(seed, iteration):
        envs = make_environments(EnvConfig(id=ANY, num_envs=3), seed=0)
        torch.manual_seed(0)
        model = ActorCritic(envs, PPOConfig(network=SMALL), gamma=0.9)
        collector = Collector(envs, model.parts, model.actions, seed=seed, device="cpu")
        return collector.collect(model.actor, model.observations, steps=20, iteration=iteration).actions

    assert actions(0, 0).equal(actions(0, 0))
    assert not actions(0, 0).equal(actions(0, 1))
    assert not actions(0, 0).equal(actions(1, 0))


# ---------------------------------------------------------------- waves


def wave(iteration=0, *, seed=0, mask=""):
    envs = make_environments(EnvConfig(id=ANY, num_envs=6, kwargs={"mask": mask, "episode_steps": 5}), seed=seed)
    torch.manual_seed(0)
    model = ActorCritic(envs, PPOConfig(network=SMALL), gamma=0.9)
    collector = WaveCollector(envs, model.parts, model.actions, group_size=3, seed=seed, device="cpu")
    return collector.collect(model.actor, model.observations, iteration=iteration), collector


def test_copies_of_a_group_start_alike_and_groups_do_not():
    starts = wave()[0].observations["observation"][:, 0]
    assert starts[0].equal(starts[1]) and starts[1].equal(starts[2])
    assert starts[3].equal(starts[5])
    assert not starts[0].equal(starts[3])


def test_rows_hold_one_episode_each():
    found, collector = wave()
    boundary = found.terminated | found.truncated
    assert found.mask.sum(1).tolist() == [5] * 6
    assert boundary.sum(1).tolist() == [1] * 6
    assert boundary[:, 4].all()
    assert (found.rewards[~found.mask] == 0).all()
    assert (collector.env_steps, collector.episodes) == (30, 6)


def test_rows_of_unequal_length_end_where_their_episode_ends():
    envs = make_environments(EnvConfig(id="CartPole-v1", num_envs=4), seed=0)
    model = ActorCritic(envs, PPOConfig(network=SMALL), gamma=0.9)
    found = WaveCollector(envs, model.parts, model.actions, group_size=2, seed=0, device="cpu").collect(
        model.actor, model.observations, iteration=0
    )
    lengths = found.mask.sum(1)
    assert len(lengths.unique()) > 1
    for row, length in enumerate(lengths.tolist()):
        assert found.mask[row, :length].all() and not found.mask[row, length:].any()
        assert found.terminated[row].nonzero().tolist() == [[length - 1]]
        assert found.rewards[row].sum() == length


def test_a_wave_is_a_function_of_seed_and_iteration():
    one, again, later = wave(3)[0], wave(3)[0], wave(4)[0]
    assert one.actions.equal(again.actions) and one.rewards.equal(again.rewards)
    assert not one.observations["observation"].equal(later.observations["observation"])


def test_masks_reach_waves():
    found, _ = wave(mask="info")
    assert (found.allowed.sum(-1)[found.mask] == 2).all()
