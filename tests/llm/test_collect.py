"""Which prompts a step sees, which random numbers its completions get, and how rewards become a rollout."""

import math
from collections import Counter

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlalign.buffers import Rollout
from rlalign.llm.collect import Scored, assemble_rollout, prompt_rows, row_uniforms, score_completions
from rlalign.llm.data import load_prompts
from rlalign.llm.generate import Generations
from rlalign.training.guard import RewardError, RewardFunction, RewardGuard


@pytest.mark.parametrize(("count", "size"), [(4, 12), (5, 12), (12, 12), (7, 3), (1, 1)])
def test_every_row_comes_once_per_pass_over_the_data(count, size):
    steps = 3 * size  # count passes of `size` positions each, three times over
    rows = [row for step in range(steps) for row in prompt_rows(step, count=count, dataset_size=size, seed=3)]
    for epoch in range(3 * count):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_the_rows_of_a_step_depend_on_nothing_but_the_step_and_the_seed():
    def rows(step: int, seed: int = 0) -> list[int]:
        return prompt_rows(step, count=5, dataset_size=50, seed=seed)

    later = rows(7)
    torch.rand(3)
    in_order = [rows(step) for step in range(10)]
    assert in_order[7] == later == rows(7)
    assert rows(7, seed=1) != later
    first_pass = [row for step in in_order for row in step]
    second_pass = [row for step in range(10, 20) for row in rows(step)]
    assert sorted(first_pass) == sorted(second_pass)
    assert first_pass != second_pass  # each pass has an order of its own
    assert first_pass != sorted(first_pass)


def test_random_numbers_belong_to_step_place_and_member():
    whole = row_uniforms(4, range(6), group_size=3, time=5, seed=0)
    assert whole.shape == (18, 5)
    assert len({tuple(row) for row in whole.tolist()}) == 18
    dealt = [row_uniforms(4, places, group_size=3, time=5, seed=0) for places in (range(2), range(2, 4), range(4, 6))]
    assert torch.equal(torch.cat(dealt), whole)
    assert not torch.equal(row_uniforms(5, range(6), group_size=3, time=5, seed=0), whole)
    assert not torch.equal(row_uniforms(4, range(6), group_size=3, time=5, seed=1), whole)
    assert torch.equal(row_uniforms(4, range(6), group_size=3, time=3, seed=0), whole[:, :3])
    many = row_uniforms(0, range(200), group_size=4, time=8, seed=0)
    assert many.min() >= 0
    assert many.max() < 1
    assert float(many.mean()) == pytest.approx(0.5, abs=0.01)


def test_random_numbers_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    row_uniforms(0, range(2), group_size=2, time=2, seed=0)
    prompt_rows(0, count=2, dataset_size=5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def generations(ids: list[list[int]], lengths: list[int], truncated: list[bool]) -> Generations:
    width = max(lengths)
    return Generations(
        ids=torch.tensor([row + [258] * (width - len(row)) for row in ids]),
        log_prob=-(torch.arange(len(ids) * width).view(len(ids), width) + 1.0)
        * (torch.arange(width) < torch.tensor(lengths)[:, None]),
        lengths=torch.tensor(lengths),
        truncated=torch.tensor(truncated),
    )


@pytest.fixture
def four(tiny_tokenizer: PreTrainedTokenizerFast) -> Generations:
    """Two groups of two: "ab" and its end, "c" and its end, "dd" cut, the end alone."""
    a, b, c, d = (tiny_tokenizer(letter)["input_ids"][0] for letter in "abcd")
    return generations([[a, b, 258], [c, 258], [d, d, d], [258]], [3, 2, 3, 1], [False, False, True, False])


def score(four: Generations, tokenizer, *functions, rows=(0, 0, 1, 1), data=None, **options) -> Scored:
    data = load_prompts(data or [{"prompt": "p", "answer": "ab"}, {"prompt": "q", "answer": "x"}])
    named = [RewardFunction(name=f"f{place}", call=call) for place, call in enumerate(functions)]
    with RewardGuard(named, isolation="none", **options) as guard:
        return score_completions(guard, data, rows, four, tokenizer, step=5)


def rollout_of(four: Generations, scored: Scored, **changes) -> Rollout:
    return assemble_rollout(
        four,
        scored,
        **{
            "prompt_tokens": [[5, 6, 7], [8]],
            "prompt_ids": [40, 41],
            "first_group": 100,
            "group_size": 2,
            "mask_truncated": False,
            **changes,
        },
    )


def test_rewards_see_text_without_end_tokens_ids_with_them_and_their_rows_columns(four, tiny_tokenizer):
    seen = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, state=trainer_state)
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    scored = score(four, tiny_tokenizer, reward)
    assert seen["completions"] == scored.texts == ["ab", "c", "ddd", ""]
    assert [len(ids) for ids in seen["ids"]] == [3, 2, 3, 1]
    assert seen["ids"][3] == [258]
    assert seen["prompts"] == ["p", "p", "q", "q"]
    assert scored.outcome.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert scored.scored.tolist() == [True] * 4


def test_a_conversation_gets_its_completion_as_a_message(four, tiny_tokenizer):
    seen = []

    def reward(completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    chat = [{"prompt": [{"role": "user", "content": "?"}]}, {"prompt": "plain"}]
    score(four, tiny_tokenizer, reward, data=chat)
    assert seen == [
        [{"role": "assistant", "content": "ab"}],
        [{"role": "assistant", "content": "c"}],
        "ddd",
        "",
    ]


def test_time_is_tokens_and_the_outcome_stands_on_the_last_one(four, tiny_tokenizer):
    scored = score(four, tiny_tokenizer, lambda completions, **columns: [1.0, 2.0, 3.0, 4.0])
    rollout = rollout_of(four, scored)
    assert rollout.rewards.tolist() == [[0, 0, 1], [0, 2, 0], [0, 0, 3], [4, 0, 0]]
    assert rollout.outcome.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert rollout.terminated.tolist() == [
        [False, False, True],
        [False, True, False],
        [False] * 3,
        [True, False, False],
    ]
    assert rollout.truncated.tolist() == [[False] * 3, [False] * 3, [False, False, True], [False] * 3]
    assert rollout.lengths.tolist() == [3, 2, 3, 1]  # the end token is a decision like any other
    assert rollout.log_prob_old.tolist() == [[-1, -2, -3], [-4, -5, 0], [-7, -8, -9], [-10, 0, 0]]
    assert rollout.log_prob_engine is None
    assert rollout.group.tolist() == [100, 100, 101, 101]
    assert rollout.prompt_id.tolist() == [40, 40, 41, 41]
    inputs = {name: entry.value.tolist() for name, entry in rollout.inputs.items()}
    assert inputs["prompt_ids"] == [[5, 6, 7], [8, 0, 0]]
    assert inputs["prompt_length"] == [3, 1]
    assert inputs["completion_ids"] == four.ids.tolist()
    assert inputs["completion_length"] == [3, 2, 3, 1]


def test_masked_truncation_leaves_the_loss_and_stays_in_the_outcome(four, tiny_tokenizer):
    scored = score(four, tiny_tokenizer, lambda completions, **columns: [1.0, 2.0, 3.0, 4.0])
    rollout = rollout_of(four, scored, mask_truncated=True)
    assert rollout.lengths.tolist() == [3, 2, 0, 1]
    assert rollout.outcome.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert rollout.scored.all()
    assert rollout.inputs["completion_length"].value.tolist() == [3, 2, 3, 1]


def test_a_prompt_that_comes_twice_in_a_step_has_two_groups(four, tiny_tokenizer):
    rows = prompt_rows(0, count=2, dataset_size=1, seed=0)
    assert rows == [0, 0]
    scored = score(four, tiny_tokenizer, lambda completions, **columns: [0.0] * 4, rows=[0] * 4)
    rollout = rollout_of(four, scored, prompt_ids=rows, prompt_tokens=[[5], [5]])
    assert rollout.prompt_id.tolist() == [0, 0, 0, 0]
    assert Counter(rollout.group.tolist()) == {100: 2, 101: 2}


def test_a_row_that_no_reward_applies_to_is_not_scored(four, tiny_tokenizer):
    def first(completions, **columns):
        return [None, 0.5, None, 1.0]

    def second(completions, **columns):
        return [None, None, 2.0, 1.0]

    scored = score(four, tiny_tokenizer, first, second)
    assert scored.scored.tolist() == [False, True, True, True]
    assert scored.outcome.tolist() == [0.0, 0.5, 2.0, 2.0]
    rollout = rollout_of(four, scored)
    assert rollout.scored.tolist() == [False, True, True, True]
    assert rollout.rewards.isfinite().all()
    assert rollout.reward_parts["f0"].tolist() == pytest.approx([math.nan, 0.5, math.nan, 1.0], nan_ok=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, "good"])
def test_what_is_no_number_stops_the_first_batch_and_is_left_out_later(four, tiny_tokenizer, value):
    def reward(completions, **columns):
        return [1.0, value if broken else 0.0, 0.0, 1.0]

    broken = True
    with pytest.raises(RewardError, match="f0"):
        score(four, tiny_tokenizer, reward, on_error="abstain")
    data = load_prompts([{"prompt": "p"}, {"prompt": "q"}])
    broken = False
    with RewardGuard(
        [RewardFunction(name="f0", call=reward)], isolation="none", on_error="abstain", error_budget=0.9
    ) as guard:
        score_completions(guard, data, [0, 0, 1, 1], four, tiny_tokenizer, step=0)
        broken = True
        scored = score_completions(guard, data, [0, 0, 1, 1], four, tiny_tokenizer, step=1)
    assert scored.scored.tolist() == [True, False, True, True]
    assert rollout_of(four, scored).rewards.isfinite().all()
