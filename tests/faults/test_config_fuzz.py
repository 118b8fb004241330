"""Thousands of broken configs: each loads or is refused with file and line; nothing else ever comes out."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import config
from rlalign.config import ConfigError
from rlalign.yaml_strict import parse

BASE = """\
# Every section of a language-model config.
method: bnpo
seed: 3
total_steps: 100
model: {name: smollm2-135m, dtype: float32, gradient_checkpointing: false}
data:
  train: {source: "rlalign_envs.arithmetic:train", args: {size: 100, digits: [1, 2]}}
  eval:
    source: rlalign_envs.arithmetic:heldout
    limit: 500
  template: |
    Question: {prompt}
    Answer:
rewards:
  - function: rlalign_envs.arithmetic:exact
    weight: 1.0
  - {function: my_rewards.py:short, weight: 2e-1}
peft: null
guard: {isolation: thread, timeout_s: 30, error_budget: 0.05}
rollout:
  prompts_per_step: 8
  group_size: 8
  max_completion_tokens: 16
  temperature: 1.0
advantage:
  type: beta_normalized
  reward_range: [0, 1]
  max_concentration: null
objective: {type: clipped_surrogate, clip_low: 0.2, clip_high: 0.28}
aggregation: sequence_sum
kl: {coef: 0.0, where: loss}
optim:
  learning_rate: 1e-5
  betas: [0.9, 0.999]
  warmup_steps: 5
  schedule: cosine
eval: {every: 20, before: true}
checkpoint: {every: 10}
log: {trackers: []}
"""

NASTY = r"""
null ~ true yes off -1 0 0.5 1e999 -.inf .nan 1e-5 1_000 010 0x10 99999999999999999999999999 '' "" '1e-5' text [] {}
[1,2,3] {a:1} {type:gae} &x *x !!int !!python/object:os.system ! | > % @ ` - ? : --- ... "\x" "\ud800" 2020-01-01 1:30
<<: # ((((( }{ ][ "unclosed 'unclosed a:b:c a=b ../../etc/passwd 1.0.0 +1 ++1 1e 1e+ . .. infinity
"""
VALUES = [*NASTY.split(), "{a: 1}", "{type: gae}", "a: b", "\t", "\x00", "\ufeff", "\u2028", "\U0001f600"]
CHARACTERS = [*"{}[]:,#&*!|>'\"%@`-?=~\\\n\t\r 0aZ", "\x00", "\x85", "\u2028", "\ufeff", "\U0001f600", "\x7f"]


def replace_value(rng: random.Random, lines: list[str]) -> None:
    row = rng.randrange(len(lines))
    key, colon, _ = lines[row].partition(":")
    lines[row] = f"{key}{colon} {rng.choice(VALUES)}"


def misspell(rng: random.Random, lines: list[str]) -> None:
    row = rng.randrange(len(lines))
    at = rng.randrange(len(lines[row]) + 1)
    lines[row] = lines[row][:at] + rng.choice("aeqz_") + lines[row][at + 1 :]


def insert_character(rng: random.Random, lines: list[str]) -> None:
    row = rng.randrange(len(lines))
    at = rng.randrange(len(lines[row]) + 1)
    lines[row] = lines[row][:at] + rng.choice(CHARACTERS) + lines[row][at:]


def repeat_line(rng: random.Random, lines: list[str]) -> None:
    lines.insert(rng.randrange(len(lines)), rng.choice(lines))


def drop_line(rng: random.Random, lines: list[str]) -> None:
    lines.pop(rng.randrange(len(lines)))


def change_indent(rng: random.Random, lines: list[str]) -> None:
    row = rng.randrange(len(lines))
    lines[row] = rng.choice(["", " ", "  ", "   ", "\t", "    - "]) + lines[row].lstrip()


def swap_lines(rng: random.Random, lines: list[str]) -> None:
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]


def cut_off(rng: random.Random, lines: list[str]) -> None:
    del lines[rng.randrange(len(lines)) + 1 :]
    lines[-1] = lines[-1][: rng.randrange(len(lines[-1]) + 1)]


MUTATIONS: list[Callable[[random.Random, list[str]], None]] = [
    replace_value,
    misspell,
    insert_character,
    repeat_line,
    drop_line,
    change_indent,
    swap_lines,
    cut_off,
]


def refusal(path: Path, overrides: list[str]) -> ConfigError | None:
    """The only two ways out of `load` are a config and a ConfigError; anything else fails the test."""
    try:
        loaded = config.load(path, overrides)
    except ConfigError as error:
        return error
    assert loaded.method in config.METHODS
    return None


def test_base_is_a_good_config(tmp_path: Path):
    path = tmp_path / "x.yaml"
    path.write_text(BASE)
    assert refusal(path, []) is None


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutated_files_load_or_are_refused_with_file_and_line(tmp_path: Path, mutate: Callable[..., None]):
    rng = random.Random(mutate.__name__)
    path, refused = tmp_path / "x.yaml", 0
    for _ in range(125):
        lines = BASE.split("\n")
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            mutate(rng, lines)
        text = "\n".join(lines)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        error = refusal(path, [])
        if error is not None:
            refused += 1
            assert error.problems, text
            for problem in error.problems:
                assert problem.place.source == str(path), text
                assert problem.place.line is not None, text
                assert 1 <= problem.place.line <= text.count("\n") + 2, text
                assert 10 < len(problem.text) < 600, text
    assert refused >= 15  # the mutations do break configs


def test_random_bytes_are_refused(tmp_path: Path):
    rng = random.Random(0)
    path = tmp_path / "x.yaml"
    for _ in range(125):
        raw = bytearray(BASE.encode())
        for _ in range(rng.randrange(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        path.write_bytes(raw)
        error = refusal(path, [])
        assert error is None or all(problem.place.line for problem in error.problems)


def test_mutated_overrides_load_or_are_refused_by_name(tmp_path: Path):
    rng = random.Random(0)
    path, refused = tmp_path / "x.yaml", 0
    path.write_text(BASE)
    keys = ["seed", "optim.learning_rate", "rewards.0.weight", "optim.betas.1", "advantage.type", "data.eval", "peft.r"]
    for _ in range(150):
        key = rng.choice(keys)
        if rng.random() < 0.4:
            at = rng.randrange(len(key))
            key = key[:at] + rng.choice([".", "x", "=", "-", " ", "0", "é", "²"]) + key[at + 1 :]
        error = refusal(path, [f"{key}={rng.choice(VALUES)}"])
        if error is not None:
            refused += 1
            # A new `type` or section can also orphan settings that the file holds.
            assert {problem.place.source for problem in error.problems} <= {"command line", str(path)}
    assert refused >= 75


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(CHARACTERS), max_size=60))
def test_any_text_is_plain_data_or_refused(text: str):
    try:
        outcome = parse(text, source="x.yaml").data
    except ConfigError as error:
        outcome = str(error)
        assert outcome.startswith("x.yaml:")
    assert outcome is None or type(outcome) in (bool, int, float, str, list, dict)
