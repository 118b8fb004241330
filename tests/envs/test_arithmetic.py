"""The arithmetic task: answers are right, splits never share an operand, rewards read numbers as people do."""

from decimal import Decimal

import pytest

from rlalign_envs.arithmetic import TEMPLATES, exact_match, format_reward, held_out, numbers_in, problems


def operands(rows: list[dict]) -> set[int]:
    return {row[side] for row in rows for side in ("left", "right")}


@pytest.mark.parametrize("operators", ["+", "-", "*", "+-*"])
def test_answers_are_the_results(operators: str):
    results = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    rows = problems(300, operators=operators)
    assert {row["operator"] for row in rows} == set(operators)
    for row in rows:
        assert int(row["answer"]) == results[row["operator"]](row["left"], row["right"])
        assert f"{row['left']} {row['operator']} {row['right']}" in row["prompt"][0]["content"]


def test_no_held_out_operand_is_ever_trained_on_whatever_the_range_and_seed():
    trained = operands(problems(2000, seed=1, high=60)) | operands(problems(2000, seed=2, digits=3))
    evaluated = operands(problems(500, split="eval", seed=7)) | operands(problems(500, split="eval", digits=3))
    assert trained.isdisjoint(evaluated)
    assert all(map(held_out, evaluated))
    assert not any(map(held_out, trained))


def test_two_digit_sums_offer_at_least_500_held_out_problems():
    rows = problems(split="eval")
    assert len(rows) >= 500
    assert len({(row["left"], row["right"]) for row in rows}) == len(rows)


def test_the_split_is_frozen():
    # Published numbers depend on it: the held-out operands up to 20, worked out once from sha256.
    assert [number for number in range(21) if held_out(number)] == [5, 6, 12, 16, 20]


def test_all_problems_are_there_exactly_once_and_differences_are_not_negative():
    # Held out below 21: 5, 6, 12, 16, 20. Ordered pairs with left >= right: 5 * 6 / 2 = 15; all sums: 25.
    rows = problems(split="eval", high=20, operators="+-")
    found = [(row["left"], row["operator"], row["right"]) for row in rows]
    assert len(found) == len(set(found)) == 40
    assert all(int(row["answer"]) >= 0 for row in rows)
    assert len(problems(split="eval", high=20, operators="-", negative=True)) == 25


def test_the_same_seed_draws_the_same_problems_and_another_does_not():
    assert problems(50, seed=3) == problems(50, seed=3)
    assert problems(50, seed=3) != problems(50, seed=4)


@pytest.mark.parametrize("template", sorted(TEMPLATES))
def test_templates_state_the_problem_once_and_never_the_answer(template: str):
    row = problems(1, low=700, high=900, template=template, conversational=False)[0]
    assert row["prompt"].count(f"{row['left']} {row['operator']} {row['right']}") == 1
    assert row["answer"] not in row["prompt"]


def test_own_template():
    row = problems(1, template="{right}{operator}{left}?", conversational=False)[0]
    assert row["prompt"] == f"{row['right']}{row['operator']}{row['left']}?"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 26, "split": "eval", "high": 20}, "`count`=26, but the eval split has 25 distinct problems"),
        ({"count": 0}, "`count`=0"),
        ({"low": 5, "high": 6}, "train split has no operands between 5 and 6"),
        ({"split": "test"}, "`split`='test' must be train or eval"),
        ({"operators": "+/"}, "`operators`='\\+/'"),
        ({"operators": ""}, "`operators`=''"),
        ({"template": "what?"}, "`template`='what\\?'"),
    ],
)
def test_impossible_requests_say_what_to_change(arguments: dict, words: str):
    with pytest.raises(ValueError, match=words):
        problems(**arguments)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("2 + 3 = 5", ["2", "3", "5"]),
        ("12-5=7", ["12", "5", "7"]),
        ("(4)-9 = -5.", ["4", "9", "-5"]),
        ("3 \N{MINUS SIGN} 4 = \N{MINUS SIGN}1", ["3", "4", "-1"]),
        ("1,234,567.50 and 1,2,3", ["1234567.50", "1", "2", "3"]),
        ("no digits", []),
        ("**81**\n", ["81"]),
    ],
)
def test_numbers_in_text(text: str, numbers: list[str]):
    assert numbers_in(text) == [Decimal(number) for number in numbers]


def test_exact_match_reads_the_last_number_or_the_first():
    completions = ["12 + 7 = 19", "19 or maybe 20", "nothing", "19.0", "-19", "5\n3 + 4 = 7"]
    assert exact_match(completions, ["19"] * 6) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert exact_match(["5\n3 + 4 = 7", "19 or maybe 20"], ["5", "19"], position="first") == [1.0, 1.0]


def test_rewards_take_conversations_and_extra_columns():
    completions = [[{"role": "assistant", "content": "It is 42."}], [{"role": "assistant", "content": "42."}]]
    given = {"prompts": ["", ""], "completion_ids": [[1], [2]], "left": [1, 2]}
    assert exact_match(completions=completions, answer=["42", "42"], **given) == [1.0, 1.0]
    assert format_reward(completions=completions, answer=["42", "42"], **given) == [0.0, 1.0]


def test_format_reward_wants_the_number_alone():
    assert format_reward([" 42\n", "-7.", "\N{MINUS SIGN}7", "42 apples", "4 2", "", "1,200", "=3"]) == [
        1,
        1,
        1,
        0,
        0,
        0,
        1,
        0,
    ]
