"""Rollouts: shapes that must hold, and what selecting, joining and saving may not change."""

import dataclasses

import jaxtyping
import pytest
import torch

from rlalign.buffers import Input, Rollout


def make_rollout(lengths, *, group, time=None, scored=None, **optional):
    """Rows of `lengths` real decisions; decision t of row i has log-probability -(10 i + t), its last one reward i."""
    batch, time = len(lengths), time or max(lengths)
    step = torch.arange(time).expand(batch, time)
    row = torch.arange(batch)[:, None]
    last = step == torch.tensor(lengths)[:, None] - 1
    return Rollout(
        log_prob_old=-(10.0 * row + step),
        rewards=torch.where(last, row.double(), 0.0),
        mask=step < torch.tensor(lengths)[:, None],
        terminated=last,
        truncated=torch.zeros(batch, time, dtype=torch.bool),
        group=torch.tensor(group),
        prompt_id=torch.tensor(group) + 100,
        scored=torch.tensor([True] * batch if scored is None else scored),
        **optional,
    )


@pytest.fixture
def own_checks():
    """Switch jaxtyping off, as it is outside tests, so that the library's own sentences are what fails."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def test_outcome_is_never_masked_and_lengths_count_only_real_decisions():
    rollout = make_rollout([2, 3], group=[4, 4])
    everything_masked = dataclasses.replace(rollout, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert rollout.outcome.tolist() == everything_masked.outcome.tolist() == [0.0, 1.0]
    assert rollout.lengths.tolist() == [2, 3]
    assert everything_masked.lengths.tolist() == [0, 0]
    assert (rollout.batch_size, rollout.time) == (2, 3)


def test_select_takes_rows_in_the_order_given_and_follows_surviving_groups():
    prompts = Input(value=torch.tensor([[3, 3], [5, 5], [9, 9]]), axis="per_group")  # groups 3, 5, 9 ascending
    tokens = Input(value=torch.arange(8).view(4, 2), axis="per_decision")
    latents = Input(value=torch.arange(4.0)[:, None, None].expand(4, 3, 2), axis="per_rollout")
    rollout = make_rollout(
        [2, 2, 2, 2],
        group=[9, 3, 9, 5],
        reward_parts={"a": torch.tensor([0.0, 1.0, 2.0, 3.0])},
        baseline_reward=torch.tensor([5.0, 6.0, 7.0, 8.0]),
        inputs={"prompts": prompts, "tokens": tokens, "latents": latents},
    )
    chosen = rollout.select(torch.tensor([3, 0]))
    assert chosen.group.tolist() == [5, 9]
    assert chosen.log_prob_old[:, 0].tolist() == [-30.0, 0.0]
    assert chosen.reward_parts["a"].tolist() == [3.0, 0.0]
    assert chosen.baseline_reward.tolist() == [8.0, 5.0]
    assert chosen.inputs["tokens"].value.tolist() == [[6, 7], [0, 1]]
    assert chosen.inputs["latents"].value[:, 0, 0].tolist() == [3.0, 0.0]
    assert chosen.inputs["prompts"].value.tolist() == [[5, 5], [9, 9]]  # still ascending by group, not by row
    by_mask = rollout.select(torch.tensor([True, False, False, True]))
    assert by_mask.group.tolist() == [9, 5]
    assert by_mask.inputs["prompts"].value.tolist() == [[5, 5], [9, 9]]


def test_select_none_is_an_empty_rollout():
    empty = make_rollout([2, 1], group=[1, 1]).select(torch.zeros(2, dtype=torch.bool))
    assert (empty.batch_size, empty.time, empty.outcome.tolist()) == (0, 2, [])


def test_concatenate_pads_with_masked_decisions_and_keeps_group_inputs_ascending():
    def part(lengths, group, first):
        prompts = Input(value=torch.tensor([[g] for g in sorted(set(group))]), axis="per_group")
        tokens = Input(value=torch.full((len(lengths), max(lengths)), first), axis="per_decision", pad_value=-7)
        return make_rollout(lengths, group=group, inputs={"prompts": prompts, "tokens": tokens})

    joined = Rollout.concatenate([part([3, 2], [8, 8], 1), part([1, 2], [2, 5], 2)])
    assert joined.group.tolist() == [8, 8, 2, 5]
    assert joined.lengths.tolist() == [3, 2, 1, 2]
    assert joined.outcome.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert joined.mask[3].tolist() == [True, True, False]
    assert not joined.terminated[3, 2] and not joined.truncated[3, 2]
    assert joined.inputs["tokens"].value.tolist() == [[1, 1, 1], [1, 1, 1], [2, 2, -7], [2, 2, -7]]
    assert joined.inputs["prompts"].value.tolist() == [[2], [5], [8]]


def test_concatenate_pads_token_rows_of_different_width_only_when_told_with_what():
    def part(group, width, pad):
        prompts = Input(value=torch.ones(1, width, dtype=torch.int64), axis="per_group", pad_value=pad)
        return make_rollout([1], group=[group], inputs={"prompts": prompts})

    joined = Rollout.concatenate([part(1, 2, 0), part(0, 3, 0)])
    assert joined.inputs["prompts"].value.tolist() == [[1, 1, 1], [1, 1, 0]]
    with pytest.raises(ValueError, match=r"inputs\['prompts'\].*pad_value"):
        Rollout.concatenate([part(1, 2, None), part(0, 3, None)])


def test_concatenate_refuses_a_group_that_stands_in_two_parts():
    with pytest.raises(ValueError, match="group 4 stands in two rollouts"):
        Rollout.concatenate([make_rollout([1, 1], group=[3, 4]), make_rollout([1], group=[4])])


def test_concatenate_refuses_parts_with_different_fields():
    plain = make_rollout([1], group=[1])
    with_values = dataclasses.replace(make_rollout([1], group=[2]), values=torch.zeros(1, 1))
    with_part = dataclasses.replace(make_rollout([1], group=[2]), reward_parts={"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="`values` differs"):
        Rollout.concatenate([plain, with_values])
    with pytest.raises(ValueError, match="`reward_parts` differs"):
        Rollout.concatenate([plain, with_part])
    with pytest.raises(ValueError, match="at least one"):
        Rollout.concatenate([])


def test_state_dict_is_flat_tensors_and_comes_back_equal():
    rollout = make_rollout(
        [2, 1],
        group=[1, 2],
        scored=[True, False],
        log_prob_engine=torch.tensor([[float("nan"), -1.0], [-2.0, 0.0]]),
        reward_parts={"with/slash": torch.tensor([0.5, 2.0]), "plain": torch.zeros(2)},
        inputs={
            "a/b": Input(value=torch.tensor([[4], [5]]), axis="per_group", pad_value=2),
            "noise": Input(value=torch.ones(2, 2, 3), axis="per_decision"),
        },
    )
    state = rollout.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = Rollout.from_state_dict(state)
    assert again.state_dict().keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
        assert again.state_dict()[name].dtype == value.dtype
    assert again.values is None
    assert (again.inputs["a/b"].axis, again.inputs["a/b"].pad_value) == ("per_group", 2)
    assert (again.inputs["noise"].axis, again.inputs["noise"].pad_value) == ("per_decision", None)


def test_from_state_dict_refuses_a_field_it_does_not_know():
    state = make_rollout([1], group=[1]).state_dict() | {"rewards_old": torch.zeros(1, 1)}
    with pytest.raises(ValueError, match="`rewards_old` is no field of Rollout"):
        Rollout.from_state_dict(state)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rewards": torch.zeros(2, 3)}, r"`rewards` must be \[batch, time\] = \[2, 2\], got \[2, 3\]"),
        ({"group": torch.zeros(3, dtype=torch.int64)}, r"`group` must be \[batch\] = \[2\], got \[3\]"),
        ({"group": torch.zeros(2, dtype=torch.int32)}, "`group` must be int64, got int32"),
        ({"mask": torch.ones(2, 2)}, "`mask` must be bool, got float32"),
        ({"scored": torch.ones(2, dtype=torch.int64)}, "`scored` must be bool"),
        ({"values": torch.zeros(2, 2, dtype=torch.int64)}, "`values` must be float, got int64"),
        ({"reward_parts": {"fmt": torch.zeros(3)}}, r"`reward_parts\['fmt'\]` must be \[batch\]"),
        ({"log_prob_old": torch.zeros(2)}, r"`log_prob_old` must be \[batch, time\]"),
        ({"log_prob_old": torch.zeros(2, 2, requires_grad=True)}, "`log_prob_old` requires grad.*detach"),
        ({"rewards": torch.zeros(2, 2, device="meta")}, "`rewards` is on meta, `log_prob_old` on cpu"),
        (
            {"inputs": {"x": Input(value=torch.zeros(2, 2), axis="per_group")}},
            r"`inputs\['x'\]` is per_group: it must start with \(1,\), got \(2,\)",
        ),
        (
            {"inputs": {"x": Input(value=torch.zeros(2, 3), axis="per_decision")}},
            r"`inputs\['x'\]` is per_decision: it must start with \(2, 2\), got \(2, 3\)",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_was_got(own_checks, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(make_rollout([2, 2], group=[1, 1]), **change)


def test_a_rollout_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_rollout([1], group=[1]).mask = torch.zeros(1, 1, dtype=torch.bool)


def test_to_moves_every_tensor():
    rollout = make_rollout(
        [1], group=[1], reward_parts={"a": torch.zeros(1)}, inputs={"x": Input(value=torch.ones(1), axis="per_rollout")}
    )
    # float64 would not do as a probe: `to` takes devices. "meta" is one, and no entry may stay behind.
    moved = rollout.to("meta").state_dict()
    assert {str(value.device) for name, value in moved.items() if not name.endswith("/axis")} == {"meta"}
