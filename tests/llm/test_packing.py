"""Layouts by hand, and the law that every decision is scored exactly once, from exactly its own context."""

import pytest
import torch

from rlalign.llm.packing import Layout, Segment, micro_batches, pack_padded, pack_prefix_shared, segments
from tests.llm.hand_made import completion_of, hand_made, prompt_of, ragged

# Group 0 has prompt 1 2 and completions 3 4, 5 and 6 7; group 1 has prompt 8 and completion 9.
PROMPTS, GROUPS = [[1, 2], [8]], [[[3, 4], [5], [6, 7]], [[9]]]


def test_a_packed_row_by_hand():
    rollout = hand_made(PROMPTS[:1], GROUPS[:1])
    layout = pack_prefix_shared(segments(rollout, most_tokens=100), rollout)
    assert layout.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 2, 2, 3]]
    # the last prompt token (index 1) predicts the first token of each completion
    assert layout.predictor.tolist() == [1, 2, 1, 1, 5]
    assert layout.chosen.tolist() == [3, 4, 5, 6, 7]
    assert layout.target.tolist() == [0, 1, 2, 4, 5]
    assert layout.attention.dtype == torch.bool
    assert layout.attention[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1, 1],
    ]


def test_a_shorter_packed_row_is_padded_with_tokens_that_only_padding_sees():
    rollout = hand_made(PROMPTS, GROUPS)
    layout = pack_prefix_shared(segments(rollout, most_tokens=100), rollout)
    assert layout.ids[1].tolist() == [8, 9, 0, 0, 0, 0, 0]
    assert layout.predictor.tolist() == [1, 2, 1, 1, 5, 7]
    assert layout.target.tolist() == [0, 1, 2, 4, 5, 6]
    sees = layout.attention[1, 0]
    assert not sees[:2, 2:].any()
    assert sees.diagonal().all()  # a row that sees nothing is NaN in some kernels


def test_padded_rows_by_hand():
    rollout = hand_made(PROMPTS, GROUPS)
    layout = pack_padded(segments(rollout, most_tokens=100), rollout)
    assert layout.ids.tolist() == [[1, 2, 3, 4], [1, 2, 5, 0], [1, 2, 6, 7], [8, 9, 0, 0]]
    assert layout.attention.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert layout.positions.tolist() == [[0, 1, 2, 3]] * 4
    assert layout.predictor.tolist() == [1, 2, 5, 9, 10, 12]
    assert layout.chosen.tolist() == [3, 4, 5, 6, 7, 9]
    assert layout.target.tolist() == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize("pack", [pack_prefix_shared, pack_padded])
def test_tool_tokens_are_context_and_no_decisions(pack):
    rollout = hand_made([[1]], [[[2, 3, 4], [5, 6]]], masked=[(0, 1), (1, 0)])
    layout = pack(segments(rollout, most_tokens=100), rollout)
    assert layout.chosen.tolist() == [2, 4, 6]
    assert layout.target.tolist() == [0, 2, 4]
    assert layout.ids.flatten()[layout.predictor].tolist() == [1, 3, 5]
    assert {2, 3, 4, 5, 6} <= set(layout.ids.flatten().tolist())


def test_scatter_puts_each_value_at_its_decision_and_passes_its_gradient():
    rollout = hand_made([[1]], [[[2, 3, 4], [5, 6]]], masked=[(0, 1)])
    layout = pack_padded(segments(rollout, most_tokens=100), rollout)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    placed = layout.scatter(values, (2, 3))
    assert placed.tolist() == [[1.0, 0.0, 2.0], [3.0, 4.0, 0.0]]
    (placed * torch.tensor([[1.0, 10.0, 100.0], [5.0, 6.0, 7.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 100.0, 5.0, 6.0]


# Of the rows with decisions: prompts of 3, 9 and 1 tokens with completions of 7 4 1, 2 3 6 and 1 5 4.
@pytest.mark.parametrize(
    ("most_tokens", "rows"),
    [
        (1, [(0,), (1,), (2,), (4,), (5,), (6,), (9,), (10,), (11,)]),
        (8, [(0,), (1, 2), (4,), (5,), (6,), (9, 10), (11,)]),  # 3 + 4 + 1; 9 alone is too much; 1 + 1 + 5
        (13, [(0,), (1, 2), (4,), (5,), (6,), (9, 10, 11)]),  # 3 + 7 + 4 is 14
        (16, [(0, 1, 2), (4, 5), (6,), (9, 10, 11)]),
        (1000, [(0, 1, 2), (4, 5, 6), (9, 10, 11)]),
    ],
)
def test_segments_stay_within_the_budget_or_hold_one_completion(most_tokens, rows):
    rollout = ragged()
    parts = segments(rollout, most_tokens=most_tokens)
    assert [part.rows for part in parts] == rows
    for part in parts:
        assert part.tokens <= most_tokens or len(part.rows) == 1
        assert part.tokens == len(part.prompt) + sum(part.lengths)
        for row, length in zip(part.rows, part.lengths, strict=True):
            assert list(part.prompt) == prompt_of(rollout, row)
            assert length == len(completion_of(rollout, row))


def test_groups_are_found_wherever_their_rows_stand():
    rollout = ragged()
    order = torch.tensor([11, 5, 0, 9, 2, 6, 10, 1, 4])
    shuffled = rollout.select(order)
    for part in segments(shuffled, most_tokens=1000):
        for row in part.rows:
            assert list(part.prompt) == prompt_of(rollout, int(order[row]))


def a_segment(tokens: int, row: int = 0) -> Segment:
    return Segment(prompt=(1,), rows=(row,), lengths=(tokens - 1,))


def test_micro_batches_count_padding_and_put_the_longest_first():
    parts = [a_segment(tokens, row) for row, tokens in enumerate((3, 10, 4, 9, 2, 5))]
    dealt = micro_batches(parts, most_tokens=19)
    # 2 x 10 and 3 x 9 are too much, 2 x 9 and 3 x 4 fit: a shorter row costs as much as the longest beside it
    assert [[part.tokens for part in batch] for batch in dealt] == [[10], [9, 5], [4, 3, 2]]
    assert [[part.tokens for part in batch] for batch in micro_batches(parts, most_tokens=20)] == [
        [10, 9],
        [5, 4, 3, 2],
    ]
    assert [[part.tokens for part in batch] for batch in micro_batches(parts, most_tokens=1)] == [
        [10],
        [9],
        [5],
        [4],
        [3],
        [2],
    ]
    assert micro_batches([], most_tokens=20) == []


@pytest.mark.parametrize("pack", [pack_prefix_shared, pack_padded])
@pytest.mark.parametrize("most_tokens", [1, 16, 30, 1000])
def test_every_decision_is_laid_out_once_before_its_own_token(pack, most_tokens):
    rollout = ragged()
    batches = micro_batches(segments(rollout, most_tokens=most_tokens), most_tokens=most_tokens)
    seen = torch.zeros(rollout.batch_size, rollout.time)
    for parts in batches:
        layout = pack(parts, rollout)
        seen += layout.scatter(torch.ones(len(layout.target)), (rollout.batch_size, rollout.time))
        for predictor, chosen, target in zip(
            layout.predictor.tolist(), layout.chosen.tolist(), layout.target.tolist(), strict=True
        ):
            row, token = divmod(target, rollout.time)
            written = completion_of(rollout, row)
            assert chosen == written[token]
            assert context(layout, predictor) == [*prompt_of(rollout, row), *written[:token]]
    assert torch.equal(seen, rollout.mask.float())


def context(layout: Layout, place: int) -> list[int]:
    """What the model knows at a position, in the order of positions."""
    line, column = divmod(place, layout.ids.shape[1])
    if layout.attention.ndim == 4:
        sees = layout.attention[line, 0, column]
    else:
        sees = layout.attention[line].bool() & (torch.arange(layout.ids.shape[1]) <= column)
    positions = layout.positions[line][sees]
    assert positions.tolist() == list(range(len(positions)))
    return layout.ids[line][sees].tolist()


def test_layouts_move_whole():
    rollout = ragged()
    layout = pack_padded(segments(rollout, most_tokens=100), rollout).to(torch.device("meta"))
    assert {value.device.type for value in vars(layout).values()} == {"meta"}
