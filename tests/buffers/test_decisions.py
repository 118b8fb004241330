"""Decisions of a batch, dealt into minibatches."""

import torch

from rlalign.buffers import Input, Rollout, TrainBatch
from rlalign.buffers.decisions import Decisions


def batch():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    numbers = torch.arange(6.0).reshape(2, 3)
    rollout = Rollout(
        log_prob_old=-numbers,
        rewards=numbers,
        mask=mask,
        terminated=mask & False,
        truncated=mask & False,
        group=torch.tensor([0, 1]),
        prompt_id=torch.tensor([0, 1]),
        scored=torch.tensor([True, True]),
        values=10 * numbers,
        inputs={
            "vector": Input(value=torch.stack([numbers, -numbers], -1), axis="per_decision"),
            "task": Input(value=torch.tensor([7.0, 8.0]), axis="per_rollout"),
        },
    )
    return TrainBatch.from_rollout(rollout, advantages=100 * numbers)


def test_masked_decisions_are_gone_and_the_rest_stays_in_order():
    decisions = Decisions.of(batch())
    assert len(decisions) == 4
    assert decisions["advantages"].tolist() == [0, 200, 300, 400]
    assert decisions["log_prob_old"].tolist() == [0, -2, -3, -4]
    assert decisions["values"].tolist() == [0, 20, 30, 40]
    assert decisions["vector"].tolist() == [[0, 0], [2, -2], [3, -3], [4, -4]]
    assert decisions["weights"].tolist() == [1, 1, 1, 1]
    assert decisions.get("returns") is None
    assert decisions.get("task") is None  # belongs to rollouts


def test_extra_fields_are_masked_too():
    decisions = Decisions.of(batch(), {"more": torch.arange(6).reshape(2, 3)})
    assert decisions["more"].tolist() == [0, 2, 3, 4]


def test_a_pass_deals_every_decision_once_and_keeps_its_fields_together():
    count = 23
    decisions = Decisions({"a": torch.arange(count), "b": 10 * torch.arange(count)[:, None]})
    dealt = list(decisions.minibatches(5, torch.Generator().manual_seed(0)))
    assert [len(part) for part in dealt] == [5, 5, 5, 5, 3]
    assert sorted(torch.cat([part["a"] for part in dealt]).tolist()) == list(range(count))
    assert all(part["b"].equal(10 * part["a"][:, None]) for part in dealt)


def test_the_order_is_the_generator_s_and_new_in_every_pass():
    decisions = Decisions({"a": torch.arange(50)})

    def order(generator):
        return torch.cat([part["a"] for part in decisions.minibatches(8, generator)]).tolist()

    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    first = order(one)
    assert first == order(other) == torch.randperm(50, generator=torch.Generator().manual_seed(3)).tolist()
    assert first != order(one)


def test_a_last_minibatch_of_one_is_left_out():
    # A deviation of one advantage does not exist.
    decisions = Decisions({"a": torch.arange(9)})
    assert [len(part) for part in decisions.minibatches(4, torch.Generator())] == [4, 4]


def test_replacing_a_field_leaves_the_original():
    decisions = Decisions({"a": torch.arange(3), "b": torch.zeros(3)})
    other = decisions.replaced(b=torch.ones(3))
    assert other["b"].tolist() == [1, 1, 1]
    assert decisions["b"].tolist() == [0, 0, 0]
    assert other["a"] is decisions["a"]
