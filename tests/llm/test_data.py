"""Datasets: every source gives the same rows, and what is wrong is said with row numbers before a model is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from rlalign.config import ConfigError
from rlalign.llm.config import DatasetConfig
from rlalign.llm.data import Prompts, as_completion, encode_prompt, load_prompts
from rlalign.llm.data_lint import check_prompts, lint
from rlalign.llm.data_wording import in_training_form

ROWS = [{"prompt": "2+3?", "answer": "5"}, {"prompt": "zwölf \u2028 +1?", "answer": "13"}]
CHAT = [{"prompt": [{"role": "user", "content": "2+3?"}], "answer": "5"}]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    match kind:
        case "jsonl":
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n"
            path.write_text("\ufeff" + text, encoding="utf-8")
        case "json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case "parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_files_give_the_rows_they_hold(tmp_path: Path, kind: str):
    prompts = load_prompts(DatasetConfig(source=str(written(tmp_path, kind))))
    assert list(prompts) == ROWS


def test_csv_gives_text_columns(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,answer\n"two, plus\nthree?",5\n', encoding="utf-8")
    assert list(load_prompts(DatasetConfig(source=str(path)))) == [{"prompt": "two, plus\nthree?", "answer": "5"}]


@pytest.mark.parametrize(
    "source",
    [
        ROWS,
        {"prompt": [row["prompt"] for row in ROWS], "answer": ["5", "13"]},
        datasets.Dataset.from_list(ROWS),
    ],
    ids=["rows", "columns", "Dataset"],
)
def test_python_objects_give_the_same_rows(source: object):
    assert list(load_prompts(source)) == ROWS


def test_a_list_of_texts_is_a_list_of_prompts():
    assert list(load_prompts(["a", "b"])) == [{"prompt": "a"}, {"prompt": "b"}]


def test_a_generator_function_gets_its_args_and_the_split():
    config = DatasetConfig(source="rlalign_envs.arithmetic:problems", split="eval", args={"count": 3, "high": 20})
    prompts = load_prompts(config)
    assert len(prompts) == 3
    assert {row["left"] for row in prompts} <= {5, 6, 12, 16, 20}
    assert prompts.reward_columns == ["answer", "left", "right", "operator"]


def test_a_function_of_a_plain_file(tmp_path: Path):
    path = tmp_path / "my task.py"
    path.write_text("def rows(n):\n    for i in range(n):\n        yield {'prompt': str(i)}\n")
    prompts = load_prompts(DatasetConfig(source=f"{path}:rows", args={"n": 4}, limit=2))
    assert [row["prompt"] for row in prompts] == ["0", "1"]


def test_reasoning_gym_tasks_carry_what_their_scorer_needs():
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")
    prompts = load_prompts(DatasetConfig(source="reasoning_gym:chain_sum", args={"size": 3, "seed": 1}))
    task = reasoning_gym.create_dataset("chain_sum", size=3, seed=1)
    for row in prompts:
        entry = {"question": row["prompt"], "answer": row["answer"], "metadata": row["metadata"]}
        assert task.score_answer(row["answer"], entry) == 1.0


def test_a_dataset_in_the_hub_format_of_a_local_folder(tmp_path: Path):
    written(tmp_path, "parquet").rename(tmp_path / "train.parquet")
    config = DatasetConfig(source=str(tmp_path / "train.parquet"))
    assert list(load_prompts(config)) == ROWS


def test_aliases_are_mapped_with_a_note_and_the_column_stays_for_rewards():
    prompts = load_prompts([{"question": "2+3?", "answer": "5"}])
    assert prompts[0] == {"prompt": "2+3?", "question": "2+3?", "answer": "5"}
    assert prompts.notes == ("`data.train`: column 'question' is used as the prompt",)
    assert check_prompts(prompts) == list(prompts.notes)


def test_instruction_is_followed_by_its_input():
    prompts = load_prompts([{"instruction": "Add.", "input": "2 3"}, {"instruction": "Greet.", "input": ""}])
    assert [row["prompt"] for row in prompts] == ["Add.\n\n2 3", "Greet."]


def test_columns_for_rewards_leave_out_prompt_and_completion_and_fill_gaps_with_none():
    prompts = load_prompts([{"prompt": "a", "completion": "x", "hard": True}, {"prompt": "b", "answer": 3}])
    assert prompts.columns([1, 0, 1]) == {"hard": [None, True, None], "answer": [3, None, 3]}


def test_template_fills_columns_and_keeps_braces_of_the_data():
    rows = [{"prompt": "{x}", "unit": "cm"}]
    prompts = load_prompts(rows, template="In {unit}: {prompt} {{end}}")
    assert prompts[0]["prompt"] == "In cm: {x} {end}"


def test_system_prompt_makes_a_conversation_and_leaves_conversations_alone():
    prompts = load_prompts([{"prompt": "2+3?"}], system_prompt="Be short.")
    assert prompts[0]["prompt"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "2+3?"},
    ]
    assert load_prompts(CHAT, system_prompt="Be short.")[0] == CHAT[0]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{prompt} {level}", r"`data.template` names {level}, but `data.train` row 1 has only prompt, answer"),
        ("no prompt", r"has no {prompt}"),
        ("{prompt.__class__}", "plain column names"),
        ("{prompt!r}", "plain column names"),
        ("{prompt", "not well formed"),
    ],
)
def test_bad_templates(template: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_prompts(ROWS, template=template)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": "\xff"}\n', r"a.jsonl:3: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl", b'{"prompt": "a"}\n3\n', "row 2 is a int"),
        ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}', "belongs in a .jsonl file"),
        ("a.json", b'{"prompt": ["a", "b"], "answer": [1]}', "lists of one length"),
        ("a.json", b"3", "expected a list of objects, got int"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.csv", b"prompt,answer\na\n", "data row 1 does not have the 2 fields"),
        ("a.csv", b"prompt,answer\na,1,2\n", "data row 1 does not have the 2 fields"),
        ("a.parquet", b"PAR1nope", "not a readable parquet file"),
        ("a.jsonl", b"", "`data.train` has no rows"),
    ],
)
def test_broken_files_name_the_place(tmp_path: Path, name: str, content: bytes, words: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_prompts(DatasetConfig(source=str(path)))


def broken_module(folder: Path) -> Path:
    path = folder / "broken.py"
    path.write_text("def fails():\n    raise KeyError('x')\nrows = 3\n1 / len(__name__ * 0)\n")
    return path


@pytest.mark.parametrize(
    ("source", "args", "words"),
    [
        ("missing.jsonl", {}, "there is no file .*missing.jsonl"),
        ("./folder", {}, "is not a .jsonl, .json, .csv, .parquet file"),
        ("rlalign_envs.arithmetic:problem", {}, "has no 'problem' .did you mean 'problems'... It has .*problems"),
        ("rlalign_envs.arithmetics:problems", {}, "No module named 'rlalign_envs.arithmetics'.*or name its file"),
        (
            "rlalign_envs.arithmetic:problems",
            {"cuont": 3},
            "unexpected keyword argument 'cuont'. The function takes .*count",
        ),
        ("rlalign_envs.arithmetic:problems", {"digits": -1}, "failed: "),
        ("nowhere/rows.py:make", {}, "there is no .*nowhere/rows.py"),
        ("rlalign_envs.arithmetic:TEMPLATES", {}, "is a dict, not a function"),
        ("some.jsonl", {"count": 1}, "`data.train.args` is for module:function"),
        ("some-org/no-such-dataset", {}, "cannot be loaded.*module:function"),
    ],
)
def test_sources_that_do_not_exist_say_what_was_meant(source: str, args: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        load_prompts(DatasetConfig(source=source, args=args))


def test_a_question_of_ones_own_takes_the_form_of_the_data():
    words = {"template": "Q: {prompt}", "system_prompt": None}
    assert in_training_form("a", "Q: b", **words) == "Q: a"
    messages = [{"role": "user", "content": "b"}]
    brief = {"role": "system", "content": "Be brief."}
    # Neither setting touches rows that came as messages, whatever they begin with.
    for example in (messages, [{"role": "system", "content": "Hm."}, *messages]):
        for system_prompt in (None, "Be brief."):
            got = in_training_form("a", example, template="Q: {prompt}", system_prompt=system_prompt)
            assert got == [{"role": "user", "content": "a"}]
    got = in_training_form("a", [brief, *messages], template="Q: {prompt}", system_prompt="Be brief.")
    assert got == [brief, {"role": "user", "content": "Q: a"}]


@pytest.mark.parametrize(
    ("task", "args", "words"), [("no_such_task", {}, "cannot make 'no_such_task'"), ("chain_sum", {"sise": 1}, "sise")]
)
def test_tasks_that_do_not_exist_say_what_was_meant(task: str, args: dict, words: str):
    pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")
    with pytest.raises(ConfigError, match=words):
        load_prompts(DatasetConfig(source=f"reasoning_gym:{task}", args=args))


def test_a_module_that_fails_on_import_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="fails while it is imported: ZeroDivisionError"):
        load_prompts(DatasetConfig(source=f"{broken_module(tmp_path)}:fails"))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "`data.train` has no rows"),
        ({}, "`data.train` has no rows"),
        ("prompt", "got str"),
        (3, "got int"),
        ([1, 2], "row 1 is a int"),
        ({"prompt": "text"}, "column 'prompt' must be a list of values, got str"),
        ({"prompt": ["a"], "answer": [1, 2]}, "columns of different lengths"),
        ([{"text": "a"}], "no column `prompt` .*its columns are text"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "keep the turns before the answer as `prompt`"),
        ((row for row in ROWS), "stream without a length"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), "of a DatasetDict, pass one split"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "stream without a length"),
    ],
)
def test_objects_that_are_no_dataset(source: object, words: str):
    with pytest.raises(ConfigError, match=words):
        load_prompts(source)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (None, "`data.train`: row 2 has no prompt$"),
        (7, "prompt is a int"),
        (" \n", "prompt is empty"),
        ([], "conversation without messages"),
        (["hello"], "items are not messages"),
        ([{"role": "human", "content": "x"}], "role 'human' is not one of system"),
        ([{"role": "user", "content": ""}], "user message is empty"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": None}], "content is a NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "something other than text"),
        ([{"role": "user", "content": "x"}], "mixes text prompts .first in row 1. and conversations .first in row 2."),
    ],
)
def test_prompts_that_cannot_be_trained_on_are_errors_with_their_row(bad: object, words: str):
    prompts = load_prompts([{"prompt": "fine"}, {"prompt": bad}, {"prompt": "fine too"}])
    with pytest.raises(ConfigError, match=words):
        check_prompts(prompts)


def test_every_kind_of_problem_is_reported_at_once_with_its_rows():
    prompts = load_prompts([{"prompt": value} for value in ["a", None, "", None, 3]])
    found = {finding.message.split(": ")[1].split(";")[0]: finding.rows for finding in lint(prompts)}
    assert found == {
        "row 2 has no prompt": (2, 4),
        "prompt is empty": (3,),
        "prompt is a int, not text or a list of messages": (5,),
    }


def test_repeats_and_leaks_are_warnings_with_counts():
    train = load_prompts(["a", "b", "a", "a"])
    held_out = load_prompts(["c", "b"], name="data.eval")
    findings = lint(train, held_out=held_out)
    assert [(finding.level, finding.rows) for finding in findings] == [("warning", (3, 4)), ("warning", (2,))]
    assert "2 of 4 prompts repeat" in str(findings[0])
    assert "`data.eval`: 1 of 2 prompts are also in `data.train`" in str(findings[1])
    assert lint(load_prompts(["a", "b"]), held_out=load_prompts(["c"])) == []


@pytest.mark.parametrize("name", ["prompts", "completions", "trainer_state", "log_metric", "log_extra"])
def test_a_column_that_would_hide_a_reward_argument_is_an_error(name: str):
    with pytest.raises(ConfigError, match=f"column '{name}' has the name of an argument"):
        check_prompts(load_prompts([{"prompt": "a", name: 1}]))


def test_long_prompts_are_refused_never_cut(tiny_tokenizer: PreTrainedTokenizerFast):
    # One token per byte: lengths 3, 5, 9.
    prompts = load_prompts(["abc", "abcde", "abcdefghi"])
    assert lint(prompts, tokenizer=tiny_tokenizer, max_prompt_tokens=9) == []
    with pytest.raises(
        ConfigError, match=r"66.7% of the prompts are longer than `rollout.max_prompt_tokens`=4; the longest has 9"
    ):
        check_prompts(prompts, tokenizer=tiny_tokenizer, max_prompt_tokens=4)


def test_conversations_need_a_chat_template(tiny_tokenizer: PreTrainedTokenizerFast):
    tiny_tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template; set `model.chat_template`"):
        check_prompts(load_prompts(CHAT), tokenizer=tiny_tokenizer)


def test_prompts_are_encoded_as_text_or_through_the_template(tiny_tokenizer: PreTrainedTokenizerFast):
    assert tiny_tokenizer.decode(encode_prompt("2+3?", tiny_tokenizer)) == "2+3?"
    asked = encode_prompt(CHAT[0]["prompt"], tiny_tokenizer)
    assert tiny_tokenizer.decode(asked) == "<|start|>user\n2+3?<|end|>\n<|start|>assistant\n"
    started = encode_prompt([*CHAT[0]["prompt"], {"role": "assistant", "content": "It is"}], tiny_tokenizer)
    assert tiny_tokenizer.decode(started) == "<|start|>user\n2+3?<|end|>\n<|start|>assistant\nIt is"


def test_a_template_that_refuses_a_role_says_so(tiny_tokenizer: PreTrainedTokenizerFast):
    tiny_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match="refuses the roles \\['user'\\]: no system role"):
        encode_prompt(CHAT[0]["prompt"], tiny_tokenizer)


def test_completions_take_the_form_of_their_prompt():
    assert as_completion("2+3?", "5") == "5"
    assert as_completion(CHAT[0]["prompt"], "5") == [{"role": "assistant", "content": "5"}]


def test_prompts_are_a_sequence():
    prompts = load_prompts(["a", "b", "c"])
    assert isinstance(prompts, Prompts)
    assert len(prompts) == 3
    assert [row["prompt"] for row in prompts[1:]] == ["b", "c"]


def test_reading_and_checking_a_dataset_imports_no_torch():
    code = (
        "import sys; from rlalign.llm.config import DatasetConfig; from rlalign.llm.data import load_prompts\n"
        "from rlalign.llm.data_lint import check_prompts\n"
        "rows = load_prompts(DatasetConfig(source='rlalign_envs.arithmetic:problems', args={'count': 9}))\n"
        "check_prompts(rows); print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ".:envs"})
    assert done.stdout.strip() == "[]", done.stderr
