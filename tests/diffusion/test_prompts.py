"""Prompts of any kind become arguments of a call and columns of a reward, drawn once per pass in a seeded order."""

import json

import pytest
import torch

from rlalign.config import ConfigError
from rlalign.diffusion.config import PromptsConfig
from rlalign.diffusion.prompts import Prompts, read_prompts
from rlalign.diffusion.tiny import tiny_pipeline
from tests.diffusion.small_runs import points_pipeline


@pytest.fixture(scope="module")
def texts():
    return tiny_pipeline("sd15")


def test_texts_go_to_the_prompt(texts):
    prompts = Prompts.of(["a cube", "a cat", "a ship"], texts)
    assert len(prompts) == 3
    assert prompts.call([2, 0, 2]) == {"prompt": ["a ship", "a cube", "a ship"]}
    assert prompts.texts([1]) == ["a cat"]
    assert prompts.columns([1]) == {}


def test_labels_go_to_the_labels():
    prompts = Prompts.of((1, 0), points_pipeline())
    assert prompts.call([0, 1]) == {"labels": [1, 0]}
    assert prompts.texts([0, 1]) == [1, 0]


def test_rows_are_split_between_the_call_and_the_reward(texts):
    rows = [
        {"prompt": "two cats", "negative_prompt": "dogs", "count": 2},
        {"prompt": "a cat", "negative_prompt": "", "count": 1},
    ]
    prompts = Prompts.of(rows, texts)
    assert prompts.call([0, 1]) == {"prompt": ["two cats", "a cat"], "negative_prompt": ["dogs", ""]}
    assert prompts.columns([1, 0]) == {"count": [1, 2]}
    assert prompts.texts([1]) == ["a cat"]


def test_prompt_is_a_name_for_labels_where_a_pipeline_takes_labels():
    prompts = Prompts.of([{"prompt": 1, "weight": 3.0}], points_pipeline())
    assert prompts.call([0]) == {"labels": [1]}
    assert prompts.columns([0]) == {"weight": [3.0]}
    assert prompts.texts([0]) == [1]


def test_embeddings_are_stacked_and_called_by_their_number():
    rows = [{"prompt_embeds": torch.full((7, 32), float(k))} for k in range(3)]
    prompts = Prompts.of(rows, tiny_pipeline("sd3"))
    assert prompts.call([2, 1])["prompt_embeds"].mean((1, 2)).tolist() == [2, 1]
    assert prompts.texts([2, 1]) == [2, 1]


def test_every_prompt_is_drawn_once_per_pass_in_an_order_of_its_own():
    prompts = Prompts.of(list(range(2)) * 3, points_pipeline())  # six rows
    drawn = [k for step in range(9) for k in prompts.draw(step, count=4, seed=0)]
    passes = [drawn[first : first + 6] for first in range(0, 36, 6)]
    assert [sorted(lap) for lap in passes] == [list(range(6))] * 6
    assert len({tuple(lap) for lap in passes}) > 3
    assert prompts.draw(5, count=4, seed=0) == drawn[20:24]  # a function of (seed, step): nothing to resume
    assert [prompts.draw(step, count=4, seed=1) for step in range(3)] != [drawn[0:4], drawn[4:8], drawn[8:12]]


def test_a_step_may_hold_more_groups_than_there_are_prompts():
    prompts = Prompts.of([0, 1], points_pipeline())
    assert sorted(prompts.draw(0, count=5, seed=0)[:4]) == [0, 0, 1, 1]


class Unconditional:
    def __call__(self, batch_size, num_inference_steps): ...


@pytest.mark.parametrize(
    ("rows", "pipeline", "message"),
    [
        ([], points_pipeline, r"`prompts` must be a list with at least one entry, got \[\]"),
        ("a cat", points_pipeline, "must be a list with at least one entry, got 'a cat'"),
        ([{"labels": 0, "a": 1}, {"labels": 1}], points_pipeline, "must all have the same columns; leave none out"),
        (
            ["a cat"],
            Unconditional,
            "Unconditional takes none of prompt, labels, class_labels; give `prompts` as mappings",
        ),
        (
            [{"text": "a cat"}],
            points_pipeline,
            "the columns text, none of which ConditionalFlowPipeline takes.*such as labels",
        ),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(rows, pipeline, message):
    with pytest.raises(ConfigError, match=message):
        Prompts.of(rows, pipeline())


def test_files_of_lines_and_of_rows(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("a cube\n\n  \na cat\n", encoding="utf-8")
    assert read_prompts(PromptsConfig(file=str(lines))) == ["a cube", "a cat"]
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": p, "k": n}) + "\n" for n, p in enumerate("ab")), encoding="utf-8")
    assert read_prompts(PromptsConfig(file=str(rows))) == [{"prompt": "a", "k": 0}, {"prompt": "b", "k": 1}]
    assert read_prompts(PromptsConfig(values=["a", 3])) == ["a", 3]


def test_a_file_that_cannot_be_read_is_named_with_its_line(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "a"}\n{"prompt": \n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.jsonl, line 2: Expecting value"):
        read_prompts(PromptsConfig(file=str(broken)))
    broken.write_text('["a"]\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 1: a row is a mapping with `prompt`, got"):
        read_prompts(PromptsConfig(file=str(broken)))
    with pytest.raises(ConfigError, match=r"`prompts.file`=nowhere.txt: .*No such file"):
        read_prompts(PromptsConfig(file="nowhere.txt"))
    for both in (PromptsConfig(), PromptsConfig(values=["a"], file="b.txt")):
        with pytest.raises(ConfigError, match=r"give either `prompts.values` or `prompts.file`\."):
            read_prompts(both)
