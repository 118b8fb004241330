"""Joining what several processes hold, with threads that stand in for the processes."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from rlalign.buffers import Input, Rollout
from rlalign.training.distributed import gather_json, gather_ragged, gather_rollout, own_share, sum_over_processes

T = TypeVar("T")


class Meeting:
    """Where the ranks lay down a tensor each and take away all of them."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.slots = ranks, [torch.empty(0)] * ranks
        self.barrier = threading.Barrier(ranks, timeout=20)

    def exchange(self, rank: int, value: Tensor) -> list[Tensor]:
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class Rank(Accelerator):
    """The parts of an `Accelerator` that joining needs; real collectives demand equal shapes and dtypes."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.meeting, self.rank = meeting, rank

    @property
    def num_processes(self) -> int:
        return self.meeting.ranks

    @property
    def process_index(self) -> int:
        return self.rank

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def gather(self, tensor: Tensor) -> Tensor:
        assert tensor.dtype != torch.bool, "NCCL and gloo cannot gather booleans everywhere"
        found = self.meeting.exchange(self.rank, tensor)
        assert len({(value.shape, value.dtype) for value in found}) == 1, "collectives need one shape and one dtype"
        return torch.cat(found)

    def reduce(self, tensor: Tensor, reduction: str = "mean", scale: float = 1.0) -> Tensor:
        found = self.meeting.exchange(self.rank, tensor)
        assert reduction == "sum"
        return torch.stack(found).sum(0)


def on_ranks(work: Callable[[Rank], T], ranks: int = 2) -> list[T]:
    """Call `work` on every rank at once; what each returned, by rank."""
    meeting, results, errors = Meeting(ranks), dict[int, T](), list[BaseException]()

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(meeting, rank))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [results[rank] for rank in range(ranks)]


def rollout(rows: int, time: int, first: int, **more: Any) -> Rollout:
    """Two rows to a group, values that name their place."""
    ids = first * 100 + torch.arange(rows * time).reshape(rows, time)
    mask = torch.ones(rows, time, dtype=torch.bool)
    return Rollout(
        log_prob_old=-ids.float(),
        rewards=ids.float(),
        mask=mask,
        terminated=torch.zeros_like(mask),
        truncated=torch.zeros_like(mask),
        group=first + torch.arange(rows) // 2,
        prompt_id=first + torch.arange(rows) // 2,
        scored=torch.ones(rows, dtype=torch.bool),
        reward_parts={"right": torch.full((rows,), float(first))},
        inputs={
            "prompt_ids": Input(value=torch.full((rows // 2, first + 1), first), axis="per_group", pad_value=0),
            "completion_ids": Input(value=ids, axis="per_decision"),
        },
        **more,
    )


@pytest.mark.parametrize(
    "values",
    [
        [torch.arange(6.0).reshape(2, 3), torch.arange(4.0).reshape(1, 4)],
        [torch.tensor([True, False, True]), torch.tensor([False])],
        [torch.tensor(3), torch.tensor(4)],
        [torch.zeros(0, 5, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)],
        [torch.tensor([0.1], dtype=torch.float64), torch.tensor([[float("nan"), -0.0]], dtype=torch.float64)],
        [torch.zeros(0), torch.zeros(0, 3)],
    ],
    ids=["floats", "booleans", "scalars", "empty and not", "double", "all empty"],
)
def test_tensors_of_any_shape_come_back_by_rank(values: list[Tensor]):
    for gathered in on_ranks(lambda rank: gather_ragged(values[rank.rank], rank)):
        for got, expected in zip(gathered, values, strict=True):
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_every_rank_gets_the_same_whole_rollout_in_rank_order():
    parts = [rollout(2, 3, 0), rollout(4, 5, 1)]
    gathered = on_ranks(lambda rank: gather_rollout(parts[rank.rank], rank))
    expected = Rollout.concatenate(parts).state_dict()
    for got in gathered:
        state = got.state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=0)
    assert gathered[0].group.tolist() == [0, 0, 1, 1, 2, 2]
    assert gathered[0].mask.sum(1).tolist() == [3, 3, 5, 5, 5, 5]


def test_three_ranks_too():
    parts = [rollout(2, 2, number) for number in (0, 1, 2)]
    for got in on_ranks(lambda rank: gather_rollout(parts[rank.rank], rank), ranks=3):
        assert got.group.tolist() == [0, 0, 1, 1, 2, 2]
        assert got.reward_parts["right"].tolist() == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]


def test_one_process_gets_its_own_rollout_back():
    own = rollout(2, 3, 0)
    (got,) = on_ranks(lambda rank: gather_rollout(own, rank), ranks=1)
    assert got is own
    assert on_ranks(lambda rank: sum_over_processes({"a": 1.5}, rank), ranks=1) == [{"a": 1.5}]


def test_text_and_numbers_come_back_by_rank():
    values = [[{"prompt": "2 + 2 = \u2028 漢字", "reward": None}], []]
    assert on_ranks(lambda rank: gather_json(values[rank.rank], rank)) == [values, values]
    assert on_ranks(lambda rank: gather_json(values[0], rank), ranks=1) == [[values[0]]]


def test_sums_are_by_name_in_double_precision():
    values = [{"b": 1e16, "a": 0.1}, {"a": 0.2, "b": 1.0}]
    for got in on_ranks(lambda rank: sum_over_processes(values[rank.rank], rank)):
        assert got == {"a": 0.1 + 0.2, "b": 1e16 + 1.0}


def test_groups_with_the_same_number_on_two_ranks_are_refused():
    with pytest.raises(ValueError, match="group 0 stands in two rollouts"):
        on_ranks(lambda rank: gather_rollout(rollout(2, 3, 0), rank))


def test_every_process_finds_its_own_share_again():
    shares = on_ranks(lambda rank: own_share(gather_json({"failed": rank.rank}, rank), rank))
    assert shares == [{"failed": 0}, {"failed": 1}]
    # A run that goes on with more processes than it was saved by.
    assert on_ranks(lambda rank: own_share(["a", "b"], rank), ranks=3) == ["a", "b", "a"]
