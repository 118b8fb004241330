"""`rlalign check CONFIG`: everything that training would stop at, found in a moment and without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlalign import config
from rlalign.config import ConfigError
from rlalign.llm.run import check

ROOT = Path(__file__).parents[2]
REWARDS = """
def exact(completions, answer, **columns):
    return [float(text == gold) for text, gold in zip(completions, answer)]

def graded(completions, solution):
    return [1.0 for _ in completions]

def marks(completions, **columns):
    return [10.0 if text.isdigit() else 0.0 for text in completions]

def breaks(completions, **columns):
    return [{}["gold"] for _ in completions]

def picky(completions, **columns):
    return [float(int(text)) / 100 for text in completions]

def short(completions, **columns):
    return [0.0 for _ in completions]
"""
SOURCE = """
def problems(split="train", count=3):
    return [{"prompt": f"{split} {n}", "answer": str(n)} for n in range(count)]

def broken():
    raise KeyError("no such table")
"""
YAML: dict[str, Any] = {
    "method": "bnpo",
    "model": {"name": "a/model-that-nobody-loads"},
    "data": {"train": {"source": "train.jsonl"}},
    "rewards": [{"function": "rewards.py:exact"}],
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_completion_tokens": 9},
    "total_steps": 20,
}


HELD_OUT = {"data": {"train": {"source": "train.jsonl"}, "eval": {"source": "train.jsonl"}}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARDS)
    Path("source.py").write_text(SOURCE)
    write("train.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "1 + 2 =", "answer": "3"}])
    return tmp_path


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def notes(**changes: Any) -> list[str]:
    return check(config.build(YAML | changes))


def train_on(source: str, **more: Any) -> dict[str, Any]:
    return {"train": {"source": source, **more}}


def test_data_and_rewards_are_described():
    found = notes(rewards=[{"function": "rewards.py:exact"}, {"function": "rewards.py:short", "weight": 0.5}])
    assert "`rewards`: exact (weight 1), short (weight 0.5)" in found
    assert "`data.train`: 2 prompts; the rewards get answer" in found
    assert any("2 prompts x 2 completions = 4 rollouts" in note for note in found)


def test_what_evaluation_uses_is_checked_too():
    write("eval.jsonl", [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "4 + 4 =", "answer": "8"}])
    found = notes(
        data={"train": {"source": "train.jsonl"}, "eval": {"source": "eval.jsonl"}},
        eval={"metrics": [{"function": "rewards.py:short"}], "baselines": [{"data": {"source": "eval.jsonl"}}]},
    )
    assert "`eval.metrics`: short (weight 1)" in found
    assert "`data.eval`: 2 prompts; the rewards get answer" in found
    assert "`eval.baselines.0.data`: 2 prompts; the rewards get answer" in found
    assert [note for note in found if "1 of 2 prompts are also in `data.train`" in note]


def test_a_function_of_the_user_is_called_with_its_arguments():
    assert "`data.train`: 7 prompts; the rewards get answer" in notes(
        data=train_on("source.py:problems", args={"count": 7})
    )


def test_a_task_generator_is_asked_for_its_problems():
    pytest.importorskip("reasoning_gym")
    found = notes(data=train_on("reasoning_gym:basic_arithmetic", args={"size": 5, "seed": 1}))
    assert "`data.train`: 5 prompts; the rewards get answer, metadata" in found


def test_what_is_on_the_hub_is_left_to_training():
    found = notes(data=train_on("someone/some-dataset"))
    assert "`data.train`: someone/some-dataset is not read here; training loads it" in found


def test_rewards_are_tried_on_answers_of_the_data():
    assert "rewards of sample completions: 1 for '2', 1 for '3', 0 for 'I do not know.'" in notes()
    found = notes(rewards=[{"function": "rewards.py:picky"}])
    assert "rewards of sample completions: 0.02 for '2', 0.03 for '3', None for 'I do not know.'" in found
    (told,) = [note for note in found if "ValueError" in note]
    assert told.startswith("`rewards.0.function`: on 'I do not know.' it raised ValueError: invalid literal")
    assert told.endswith("at rewards.py:15")


def test_a_weight_can_bring_the_reward_back_into_the_range():
    assert "rewards of sample completions: 1 for '2', 1 for '3', 0 for 'I do not know.'" in notes(
        rewards=[{"function": "rewards.py:marks", "weight": 0.1}]
    )


def test_sizes_for_gpus_are_noticed_on_a_cpu():
    limit = "a completion ends after 9 tokens at the latest (`rollout.max_completion_tokens`)"
    small = notes(model={"name": "a/model", "device": "cpu"})
    assert limit in small
    assert not [note for note in small if "sized for GPUs" in note]
    sizes = {"prompts_per_step": 32, "group_size": 16, "max_completion_tokens": 3072}
    (told,) = [note for note in notes(rollout=sizes, model={"name": "a/model", "device": "cpu"}) if "GPUs" in note]
    assert told.startswith("up to 1,572,864 tokens a step: this is sized for GPUs")
    assert not [note for note in notes(rollout=sizes, model={"name": "a/m", "device": "cuda"}) if "GPUs" in note]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [{"function": "rewards.py:exakt"}]}, r"`rewards.0.function`.*no 'exakt'. Did you mean exact\?"),
        ({"rewards": [{"function": "nowhere:exact"}]}, "`rewards.0.function`=nowhere:exact names no importable module"),
        ({"eval": {"metrics": [{"function": "gone.py:f"}]}}, r"`eval.metrics.0.function`: there is no file .*gone\.py"),
        ({"data": train_on("tarin.jsonl")}, r"`data.train.source`: there is no file .*Beside it: .*train\.jsonl"),
        ({"data": train_on("bad.jsonl")}, r"bad\.jsonl:2: not valid JSON"),
        ({"data": train_on("empty.jsonl")}, "`data.train`: prompt is empty; correct or remove .row 2;"),
        ({"data": train_on("source.py:broken")}, "'source.py:broken' failed: KeyError: 'no such table'"),
        ({"data": train_on("source.py:problem")}, "`data.train.source`='source.py:problem'"),
        ({"data": train_on("source.py:problems", args={"cuont": 2})}, "`data.train.args`.*'cuont'"),
        ({"data": train_on("train.jsonl") | {"template": "{prompt} {hint}"}}, "names {hint}, but `data.train` row 1"),
        (
            {"eval": {"baselines": [{"data": {"source": "gone.csv"}}]}},
            r"`eval.baselines.0.data.source`: there is no file",
        ),
        ({"rewards": []}, "`rewards` must be set"),
        ({"model": {"name": "smolm2-135m"}}, "did you mean `smollm2-135m`"),
        ({"model": {"name": "./nowhere"}}, "`model.name`: there is no checkpoint directory"),
        ({"model": {"name": "gone.gguf"}}, r"`model.name`: there is no file .*gone\.gguf"),
        (
            {"rewards": [{"function": "rewards.py:graded"}]},
            "`rewards.0.function` with `data.train`: reward 'graded' asks for `solution`, but the rows have only",
        ),
        (
            {"eval": {"metrics": [{"function": "rewards.py:graded"}]}} | HELD_OUT,
            "`eval.metrics.0.function` with `data.eval`",
        ),
        ({"data": train_on("gap.jsonl")}, "`data.train`: row 3 of gap.jsonl has no prompt$"),
        (
            {"rewards": [{"function": "rewards.py:breaks"}]},
            r"fails on every sample completion: it raised KeyError: 'gold' .* at rewards\.py:12",
        ),
        (
            {"rewards": [{"function": "rewards.py:marks"}]},
            r"completion '2' is rewarded with 10, .*`advantage: beta_normalized` takes rewards in \[0, 1\]",
        ),
    ],
)
def test_what_training_would_stop_at_is_found(changes, message):
    Path("bad.jsonl").write_text('{"prompt": "1"}\n{"prompt": \n')
    write("gap.jsonl", [{"prompt": "1"}, {"prompt": "2"}, {"answer": "3"}])
    write("empty.jsonl", [{"prompt": "1 + 1 ="}, {"prompt": "  "}])
    with pytest.raises(ConfigError, match=message):
        notes(**changes)


def test_the_command_needs_no_torch_and_no_model(folder: Path):
    Path("run.yaml").write_text(json.dumps(YAML))
    code = (
        "import sys\n"
        "from rlalign.cli import app\n"
        "app(['check', 'run.yaml'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'trl', 'accelerate', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("run.yaml: ok (method bnpo)\n")
    assert "  `data.train`: 2 prompts; the rewards get answer\n" in done.stdout


def test_training_refuses_before_torch_and_before_there_is_a_directory(folder: Path):
    Path("run.yaml").write_text(json.dumps(YAML | {"model": {"name": "smolm2-135m"}}))
    code = (
        "import sys\n"
        "from rlalign.cli import app\n"
        "try:\n"
        "    app(['train', 'run.yaml'])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "did you mean `smollm2-135m`?" in done.stderr
    assert not (folder / "runs").exists()
