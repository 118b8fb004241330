"""Running statistics of observations and rewards."""

import numpy as np
import pytest
import torch

from rlalign.agents.config import NormalizeConfig
from rlalign.agents.normalize import ObservationNormalizer, RewardNormalizer
from rlalign.agents.spaces import ObservationParts
from tests.agents.tiny_environments import OBSERVATIONS

ON = NormalizeConfig(observations=True, rewards=True)


def observations(cfg=ON, space="dict"):
    return ObservationNormalizer(ObservationParts(OBSERVATIONS[space]), cfg)


def test_numbers_are_centred_and_scaled_and_cut():
    normalizer = observations(NormalizeConfig(observations=True, clip=1.5), "number")
    normalizer.update({"observation": torch.tensor([[1.0, 3.0]])}, torch.tensor([[True, True]]))
    # mean 2, population deviation 1
    got = normalizer.apply({"observation": torch.tensor([1.0, 2.5, 9.0])})["observation"]
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.5, 1.5]))


def test_only_numbers_have_statistics():
    normalizer = observations()
    assert set(normalizer.moments) == {"position"}
    assert not observations(NormalizeConfig()).moments
    camera = torch.zeros(1, 8, 8, 2, dtype=torch.uint8)
    seen = {"position": torch.ones(1, 2), "inventory": torch.tensor([2]), "camera": camera}
    assert normalizer.apply(seen)["camera"] is camera
    assert normalizer.apply(seen)["inventory"].tolist() == [2]


def test_masked_observations_leave_no_trace():
    normalizer = observations(space="number")
    values = torch.tensor([[1.0, float("nan"), 3.0]])
    normalizer.update({"observation": values}, torch.tensor([[True, False, True]]))
    moments = normalizer.moments["observation"]
    assert (float(moments.mean), int(moments.count)) == (2.0, 2)


def test_applying_changes_nothing():
    normalizer = observations(space="box")
    normalizer.update({"observation": torch.randn(4, 5, 3)}, torch.ones(4, 5, dtype=torch.bool))
    before = normalizer.state_dict()
    normalizer.apply({"observation": torch.randn(7, 3)})
    after = normalizer.state_dict()
    assert all(before["observation"][name].equal(after["observation"][name]) for name in before["observation"])


# ---------------------------------------------------------------- rewards


def facts(rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_rewards_are_divided_by_the_deviation_of_the_discounted_return():
    normalizer = RewardNormalizer(NormalizeConfig(rewards=True), gamma=0.5, num_envs=1)
    # R: 1, 2 + 1/2, (restart) 4, 8 + 4/2
    returns = np.array([1.0, 2.5, 4.0, 10.0])
    got = normalizer(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), facts([[0, 1, 0, 0]]), facts([[1, 1, 1, 1]]))
    np.testing.assert_allclose(got, np.array([[1.0, 2.0, 4.0, 8.0]]) / returns.std(), rtol=1e-6)
    assert float(normalizer.running) == 10.0


def test_the_sum_goes_on_over_the_edge_of_a_rollout():
    rewards, boundary, mask = torch.randn(3, 20), torch.rand(3, 20) < 0.2, torch.ones(3, 20, dtype=torch.bool)
    whole = RewardNormalizer(NormalizeConfig(rewards=True), gamma=0.9, num_envs=3)
    pieces = RewardNormalizer(NormalizeConfig(rewards=True), gamma=0.9, num_envs=3)
    whole(rewards, boundary, mask)
    for t in range(20):
        got = pieces(rewards[:, t : t + 1], boundary[:, t : t + 1], mask[:, t : t + 1])
    torch.testing.assert_close(whole.moments.squares, pieces.moments.squares)
    torch.testing.assert_close(whole.running, pieces.running)
    torch.testing.assert_close(got.squeeze(1), (rewards[:, -1] / whole.moments.std(unbiased=False)).float())


def test_restart_rows_are_as_if_they_were_not_there():
    rewards = torch.tensor([[1.0, 2.0, 99.0, 4.0, 8.0]])
    boundary, mask = facts([[0, 1, 0, 0, 0]]), facts([[1, 1, 0, 1, 1]])
    keep = [0, 1, 3, 4]
    with_junk = RewardNormalizer(NormalizeConfig(rewards=True), gamma=0.5, num_envs=1)
    without = RewardNormalizer(NormalizeConfig(rewards=True), gamma=0.5, num_envs=1)
    got = with_junk(rewards, boundary, mask)
    expected = without(rewards[:, keep], boundary[:, keep], mask[:, keep])
    assert got[:, keep].equal(expected)
    assert int(with_junk.moments.count) == 4


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_rewards_that_never_change_stay_finite(value):
    normalizer = RewardNormalizer(NormalizeConfig(rewards=True, clip=10.0), gamma=0.0, num_envs=2)
    got = normalizer(torch.full((2, 3), value), facts([[0] * 3] * 2), facts([[1] * 3] * 2))
    assert got.isfinite().all()
    assert (got.abs() <= 10).all()


def test_off_means_untouched():
    normalizer = RewardNormalizer(NormalizeConfig(), gamma=0.5, num_envs=1)
    rewards = torch.tensor([[1.0, 200.0]])
    assert normalizer(rewards, facts([[0, 0]]), facts([[1, 1]])) is rewards
    assert normalizer.state_dict() == {}


def test_state_comes_back_exactly():
    one = RewardNormalizer(NormalizeConfig(rewards=True), gamma=0.9, num_envs=2)
    args = torch.randn(2, 6), torch.rand(2, 6) < 0.3, torch.ones(2, 6, dtype=torch.bool)
    one(*args)
    other = RewardNormalizer(NormalizeConfig(rewards=True), gamma=0.9, num_envs=2)
    other.load_state_dict(one.state_dict())
    assert one(*args).equal(other(*args))
