"""Verifiable text arithmetic: problems with one right number, and reward functions with TRL's signature.

data: {train: {source: "rlalign_envs.arithmetic:problems", args: {count: 2000, digits: 2, operators: "+"}}}
rewards: [{function: "rlalign_envs.arithmetic:exact_match"}]
"""

import hashlib
import random
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

TEMPLATES = {
    "question": "What is {left} {operator} {right}?",
    "answer_only": "Compute {left} {operator} {right}. Answer with the number only.",
    "equation": "{left} {operator} {right} =",
    "examples": "3 + 4 = 7\n9 - 2 = 7\n{left} {operator} {right} =",
}
"""Ways to ask. `equation` and `examples` suit plain text, the others suit a chat model."""

OPERATORS = "+-*"
HELD_OUT_SHARE = 0.3
MINUS = "\N{MINUS SIGN}"

_NUMBER = re.compile(r"(?:(?<![\d)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")

Completion = str | Sequence[dict[str, Any]]


def problems(
    count: int | None = None,
    *,
    seed: int = 0,
    split: str = "train",
    digits: int = 2,
    low: int | None = None,
    high: int | None = None,
    operators: str = "+",
    negative: bool = False,
    held_out_share: float = HELD_OUT_SHARE,
    template: str = "question",
    conversational: bool = True,
) -> list[dict[str, Any]]:
    """Draw distinct problems. No number of the `eval` split is ever an operand in the `train` split.

    A number belongs to one split by its hash, whatever the range, the seed or the operators.

    Args:
        count: How many; None gives all there are, in random order.
        seed: Of the draw.
        split: `train` or `eval`.
        digits: Operands run from 0 to 10 ** digits - 1.
        low: Smallest operand, in place of 0.
        high: Largest operand, in place of 10 ** digits - 1.
        operators: Any of `+`, `-` and `*`, each drawn equally often.
        negative: False puts the larger operand first in differences.
        held_out_share: Share of numbers kept for the eval split, between 0 and 1; the same for both splits.
        template: A name of `TEMPLATES`, or a text with `{left}`, `{operator}` and `{right}`.
        conversational: True wraps the prompt as one user message; False leaves plain text.

    Returns:
        Rows with `prompt`, `answer` (text), `left`, `right` and `operator`.

    Raises:
        ValueError: The range is empty in this split, or holds fewer problems than asked for.
    """
    numbers = _operands(0 if low is None else low, 10**digits - 1 if high is None else high, split, held_out_share)
    if not operators or set(operators) - set(OPERATORS):
        raise ValueError(f"`operators`={operators!r} must be one or more of {' '.join(OPERATORS)}")
    pattern = _pattern(template)
    available = {operator: _available(len(numbers), operator, negative) for operator in dict.fromkeys(operators)}
    wanted = sum(available.values()) if count is None else count
    if not 1 <= wanted <= sum(available.values()):
        raise ValueError(
            f"`count`={count}, but the {split} split has {sum(available.values())} distinct problems with operands "
            f"{numbers[0]} to {numbers[-1]} and {operators!r}; widen the range or add operators"
        )
    drawn = _draw(numbers, available, wanted, negative, random.Random(seed))
    return [_row(left, operator, right, pattern, conversational) for left, operator, right in drawn]


def exact_match(
    completions: Sequence[Completion], answer: Sequence[str], position: Literal["last", "first"] = "last", **_: Any
) -> list[float]:
    """Reward 1 where the last (or first) number of the completion equals the answer, else 0.

    `first` suits plain-text prompts such as `3 + 4 =`, where a model goes on with equations of its own.
    """
    index = {"last": -1, "first": 0}[position]
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        found = numbers_in(_text(completion))
        rewards.append(float(bool(found) and found[index] == Decimal(expected)))
    return rewards


def format_reward(completions: Sequence[Completion], **_: Any) -> list[float]:
    """Reward 1 where the completion is one number and nothing else (a full stop is fine), else 0."""
    texts = (_text(completion).strip().removesuffix(".").replace(MINUS, "-") for completion in completions)
    return [float(_NUMBER.fullmatch(text) is not None) for text in texts]


def numbers_in(text: str) -> list[Decimal]:
    """Every number a text states, in order. In `12-5` the minus is an operator; thousands may have commas."""
    found = _NUMBER.findall(text.replace(MINUS, "-"))
    return [Decimal(number.replace(",", "")) for number in found]


def held_out(number: int, share: float = HELD_OUT_SHARE) -> bool:
    """Whether a number belongs to the eval split: a fixed property of the number and the share."""
    digest = hashlib.sha256(f"arithmetic {number}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _text(completion: Completion) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _operands(low: int, high: int, split: str, share: float) -> list[int]:
    if split not in ("train", "eval"):
        raise ValueError(f"`split`={split!r} must be train or eval")
    numbers = [number for number in range(low, high + 1) if held_out(number, share) == (split == "eval")]
    if not numbers:
        raise ValueError(f"the {split} split has no operands between {low} and {high}; widen the range")
    return numbers


def _pattern(template: str) -> str:
    pattern = TEMPLATES.get(template, template)
    if not all(field in pattern for field in ("{left}", "{operator}", "{right}")):
        names = ", ".join(TEMPLATES)
        raise ValueError(
            f"`template`={template!r} is neither one of {names} nor a text with {{left}}, {{operator}} and {{right}}"
        )
    return pattern


def _available(operands: int, operator: str, negative: bool) -> int:
    ordered = operator == "-" and not negative
    return operands * (operands + 1) // 2 if ordered else operands * operands


def _draw(
    numbers: list[int], available: dict[str, int], wanted: int, negative: bool, rng: random.Random
) -> list[tuple[int, str, int]]:
    """Distinct problems, operators in turn while they last. Rejection keeps ranges of millions cheap."""
    remaining = dict(available)
    seen: dict[tuple[int, str, int], None] = {}
    while len(seen) < wanted:
        for operator in [name for name, left in remaining.items() if left]:
            while len(seen) < wanted:
                left, right = rng.choice(numbers), rng.choice(numbers)
                if operator == "-" and not negative and left < right:
                    left, right = right, left
                if (left, operator, right) not in seen:
                    seen[left, operator, right] = None
                    remaining[operator] -= 1
                    break
    drawn = list(seen)
    rng.shuffle(drawn)
    return drawn


def _row(left: int, operator: str, right: int, pattern: str, conversational: bool) -> dict[str, Any]:
    results = {"+": left + right, "-": left - right, "*": left * right}
    text = pattern.replace("{left}", str(left)).replace("{operator}", operator).replace("{right}", str(right))
    prompt = [{"role": "user", "content": text}] if conversational else text
    return {"prompt": prompt, "answer": str(results[operator]), "left": left, "right": right, "operator": operator}
