"""What an estimator refuses to work from, and what it must let pass."""

import math

import pytest
import torch

from rlalign.advantages.requirements import constant, require_one_episode_per_row, require_rewards_on_decisions
from rlalign.buffers import Rollout


def make_rollout(mask, rewards, *, terminated=None, truncated=None, scored=(True,)):
    flags = torch.zeros(1, len(mask), dtype=torch.bool)
    return Rollout(
        log_prob_old=torch.zeros(1, len(mask)),
        rewards=torch.tensor([rewards], dtype=torch.float32),
        mask=torch.tensor([mask], dtype=torch.bool),
        terminated=flags if terminated is None else torch.tensor([terminated], dtype=torch.bool),
        truncated=flags if truncated is None else torch.tensor([truncated], dtype=torch.bool),
        group=torch.tensor([0]),
        prompt_id=torch.tensor([0]),
        scored=torch.tensor(scored),
    )


@pytest.mark.parametrize(
    "rollout",
    [
        make_rollout([1, 1, 1], [0, 1, 0], terminated=[0, 1, 0]),
        make_rollout([1, 1, 1], [0, 1, 0], truncated=[0, 1, 0]),
        make_rollout([1, 1, 0], [0, 1, 5], terminated=[0, 1, 0]),  # no decision behind, but a reward
        make_rollout([0, 0, 1], [0, 0, 0], terminated=[0, 1, 0]),  # nothing in front
    ],
    ids=["terminated", "truncated", "reward", "masked"],
)
def test_anything_behind_a_boundary_is_a_second_episode(rollout):
    with pytest.raises(ValueError, match="row 0 goes on after its episode ended at decision 1"):
        require_one_episode_per_row(rollout)


@pytest.mark.parametrize(
    "rollout",
    [
        make_rollout([1, 1, 1], [0, 0, 1], terminated=[0, 0, 1]),
        make_rollout([1, 1, 1], [0, 0, 1]),  # unfinished
        make_rollout([1, 1, 0], [0, 1, 0], terminated=[0, 1, 0]),  # padding behind
        make_rollout([1, 1, 0], [0, 0, 1], terminated=[0, 0, 1]),  # boundary and outcome on a masked last step
        make_rollout([1, 1, 0], [0, math.nan, math.nan], terminated=[0, 1, 0], scored=[False]),
    ],
    ids=["last", "unfinished", "padding", "masked_end", "failed"],
)
def test_one_episode_per_row_passes(rollout):
    require_one_episode_per_row(rollout)


def test_a_reward_on_a_masked_decision_is_fine_where_nothing_is_learned():
    require_rewards_on_decisions(make_rollout([0, 0], [0, 1]))  # a masked truncation
    require_rewards_on_decisions(make_rollout([1, 0], [0, math.nan], scored=[False]))
    with pytest.raises(ValueError, match="reward on decision 1, which is masked"):
        require_rewards_on_decisions(make_rollout([1, 0], [0, 1]))


def test_constant_looks_at_the_spread_relative_to_the_size():
    assert constant(torch.tensor([3.0]))
    assert constant(torch.tensor([]))
    assert constant(torch.full((7,), 0.1))
    assert constant(torch.tensor([1e6, 1e6 + 0.5], dtype=torch.float64))
    assert not constant(torch.tensor([0.0, 1e-3]))
