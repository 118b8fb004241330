"""The buffer between collection and update: it keeps order, forgets on drain and survives a checkpoint."""

import pytest
import torch

from rlalign.buffers import Rollout, RolloutBuffer


def make_rollout(group, *, time=2):
    rows = len(group)
    zeros = torch.zeros(rows, time, dtype=torch.bool)
    return Rollout(
        log_prob_old=torch.tensor(group).double()[:, None].expand(rows, time),
        rewards=torch.ones(rows, time),
        mask=~zeros,
        terminated=zeros,
        truncated=zeros,
        group=torch.tensor(group),
        prompt_id=torch.tensor(group),
        scored=torch.ones(rows, dtype=torch.bool),
    )


def test_drain_returns_everything_in_order_and_forgets_it():
    buffer = RolloutBuffer()
    assert len(buffer) == 0
    buffer.add(make_rollout([3, 3], time=2))
    buffer.add(make_rollout([1], time=3))
    assert len(buffer) == 3
    rollout = buffer.drain()
    assert rollout.group.tolist() == [3, 3, 1]
    assert rollout.outcome.tolist() == [2.0, 2.0, 3.0]
    assert rollout.lengths.tolist() == [2, 2, 3]
    assert len(buffer) == 0
    with pytest.raises(ValueError, match="empty"):
        buffer.drain()


def test_a_repeated_group_is_refused_when_it_is_added_and_nothing_is_lost():
    buffer = RolloutBuffer()
    buffer.add(make_rollout([3, 3]))
    with pytest.raises(ValueError, match="group 3"):
        buffer.add(make_rollout([3]))
    assert buffer.drain().group.tolist() == [3, 3]


@pytest.mark.parametrize("adds", [0, 1, 2])
def test_a_restored_buffer_drains_the_same(adds):
    buffer, restored = RolloutBuffer(), RolloutBuffer()
    for index in range(adds):
        buffer.add(make_rollout([index, index], time=index + 1))
    restored.add(make_rollout([77]))  # must be replaced, not kept
    restored.load_state_dict(buffer.state_dict())
    assert len(restored) == len(buffer)
    if adds:
        expected, got = buffer.drain().state_dict(), restored.drain().state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
