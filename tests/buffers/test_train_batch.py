"""Training batches: default weights, and minibatches that lose nothing and split no group."""

import pytest
import torch

from rlalign.buffers import Input, Rollout, TrainBatch


def make_batch(group, *, weights=None):
    rows = len(group)
    ids = sorted(set(group))
    rollout = Rollout(
        log_prob_old=-torch.arange(rows).double()[:, None].expand(rows, 2),
        rewards=torch.zeros(rows, 2),
        mask=torch.ones(rows, 2, dtype=torch.bool),
        terminated=torch.zeros(rows, 2, dtype=torch.bool),
        truncated=torch.zeros(rows, 2, dtype=torch.bool),
        group=torch.tensor(group),
        prompt_id=torch.zeros(rows, dtype=torch.int64),
        scored=torch.ones(rows, dtype=torch.bool),
        inputs={"group_id": Input(value=torch.tensor(ids), axis="per_group")},
    )
    return TrainBatch.from_rollout(rollout, torch.arange(rows).double()[:, None].expand(rows, 2), weights=weights)


def rows_of(batch):
    return batch.advantages[:, 0].int().tolist()


def test_weights_are_one_unless_given():
    assert make_batch([1, 1]).weights.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    given = make_batch([1, 1], weights=torch.tensor([[0.0, 2.0], [1.0, 1.0]]))
    assert given.select(torch.tensor([0])).weights.tolist() == [[0.0, 2.0]]


@pytest.mark.parametrize("weight", [-0.5, float("nan")])
def test_negative_or_undefined_weights_are_refused(weight):
    with pytest.raises(ValueError, match="`weights` must be >= 0"):
        make_batch([1], weights=torch.tensor([[1.0, weight]]))


def test_advantages_with_a_graph_are_refused():
    rollout = make_batch([1])
    with pytest.raises(ValueError, match="`advantages` requires grad"):
        TrainBatch.from_rollout(rollout, torch.zeros(1, 2, requires_grad=True))


def test_minibatches_deal_every_row_once_and_in_another_order_each_call():
    batch, generator = make_batch([0] * 7), torch.Generator().manual_seed(0)
    epochs = [[rows_of(part) for part in batch.minibatches(3, generator)] for _ in range(2)]
    for parts in epochs:
        assert [len(part) for part in parts] == [3, 3, 1]
        assert sorted(sum(parts, [])) == list(range(7))
    assert epochs[0] != epochs[1]
    again = torch.Generator().manual_seed(0)
    assert [rows_of(part) for part in batch.minibatches(3, again)] == epochs[0]


def test_minibatches_keep_rows_and_their_facts_together():
    for part in make_batch(list(range(5))).minibatches(2, torch.Generator().manual_seed(1)):
        assert isinstance(part, TrainBatch)
        assert (-part.log_prob_old[:, 0]).int().tolist() == rows_of(part) == part.group.tolist()
        assert part.inputs["group_id"].value.tolist() == sorted(part.group.tolist())


def test_groups_are_never_split_when_they_are_to_be_kept():
    group = [5, 1, 5, 2, 1, 2, 9, 5, 1, 2]  # sizes 3, 3, 3, 1, interleaved
    for seed in range(20):
        parts = list(make_batch(group).minibatches(4, torch.Generator().manual_seed(seed), keep_groups=True))
        assert sorted(sum((rows_of(part) for part in parts), [])) == list(range(10))
        homes = [set(part.group.tolist()) for part in parts]
        assert sum(len(home) for home in homes) == 4  # every group in one minibatch only
        assert all(part.batch_size <= 4 for part in parts)


def test_kept_groups_are_packed_as_many_as_fit():
    group = [0, 0, 1, 1, 2, 2, 3, 3]
    for seed in range(5):
        parts = list(make_batch(group).minibatches(5, torch.Generator().manual_seed(seed), keep_groups=True))
        assert [part.batch_size for part in parts] == [4, 4]


def test_a_group_larger_than_the_minibatch_comes_whole_and_alone():
    parts = list(make_batch([0, 0, 0, 1]).minibatches(2, torch.Generator().manual_seed(0), keep_groups=True))
    assert sorted(part.group.tolist() for part in parts) == [[0, 0, 0], [1]]


def test_a_size_below_one_is_refused_at_the_call():
    with pytest.raises(ValueError, match="`size`=0"):
        make_batch([0]).minibatches(0, torch.Generator())


def test_state_dict_of_a_batch_comes_back_as_a_batch():
    batch = make_batch([3, 3], weights=torch.tensor([[0.5, 1.0], [1.0, 2.0]]))
    again = TrainBatch.from_state_dict(batch.state_dict())
    assert again.weights.tolist() == [[0.5, 1.0], [1.0, 2.0]]
    assert again.returns is None
