"""Read prompts from wherever they are: `prompt` as text or messages, and every other column for the rewards."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from rlalign.config import ConfigError
from rlalign.llm.config import DatasetConfig
from rlalign.llm.data_files import read_file
from rlalign.llm.data_wording import Prompt, Row, converse, fill_template
from rlalign.llm.user_code import check_arguments, import_function, is_reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALIASES = ("question", "problem", "instruction", "query", "input")
"""Columns that stand in for a missing `prompt`, in this order."""
NOT_FOR_REWARDS = ("prompt", "completion", "completion_ids")
"""Columns that reward functions do not get as arguments (TRL's rule)."""
FILES = (".jsonl", ".json", ".csv", ".parquet")


class DataError(ConfigError):
    """A dataset cannot be used as it is."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Prompts(Sequence[Row]):
    """Rows with a `prompt` each. Index it for one row; `columns(rows)` gives what reward functions receive."""

    rows: Sequence[Row]
    name: str
    """The configuration key or argument it came from, for messages."""
    notes: tuple[str, ...] = ()
    """What was mapped or dropped on the way in; printed once."""
    origin: str = ""
    """The file or function they were read from."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def reward_columns(self) -> list[str]:
        """Names of the extra columns, in the order of their first appearance."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name not in NOT_FOR_REWARDS]

    def columns(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """The extra columns of some rows, as reward functions take them; a cell that a row lacks is None."""
        return {name: [self.rows[index].get(name) for index in indices] for name in self.reward_columns}


def load_prompts(
    source: Any, *, name: str = "data.train", template: str | None = None, system_prompt: str | None = None
) -> Prompts:
    """Read a dataset and bring it into the shape the trainer uses.

    Args:
        source: A `DatasetConfig`; or a list of rows or of texts, a dict of columns, a `datasets.Dataset`.
        name: What to call it in messages.
        template: Text around every plain prompt, `{prompt}` and other columns in braces.
        system_prompt: Turns plain prompts into a conversation that starts with this system message.

    Raises:
        DataError: The source does not exist, cannot be read, or has no column that holds prompts.
        ConfigError: The template is not well formed, or names a column that a row lacks.
    """
    rows = _read(source, name) if isinstance(source, DatasetConfig) else _rows_of(source, name)
    if isinstance(source, DatasetConfig) and source.limit is not None:
        rows = rows[: source.limit]
    if not rows:
        raise DataError(f"`{name}` has no rows. {_origin(source)}")
    prompts = _with_prompt_column(rows, name)
    if isinstance(source, DatasetConfig):
        prompts = replace(prompts, origin=source.source)
    if template is not None:
        prompts = replace(
            prompts, rows=[fill_template(row, template, number, name) for number, row in enumerate(prompts.rows, 1)]
        )
    if system_prompt is not None:
        prompts = replace(prompts, rows=[converse(row, system_prompt) for row in prompts.rows])
    return prompts


def is_local(source: str) -> bool:
    """Whether `DatasetConfig.source` is a file, a function or a task generator: no network and no framework needed."""
    return source.startswith("reasoning_gym:") or is_reference(source) or source.lower().endswith(FILES)


def encode_prompt(prompt: Prompt, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids the model continues: plain text as it is, messages through the chat template.

    A conversation that ends with the user (or a tool) gets the assistant's header; one that ends with the
    assistant is continued where it stops.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    continued = prompt[-1]["role"] == "assistant"
    try:
        encoded: Any = tokenizer.apply_chat_template(
            prompt,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            tokenize=True,
            return_dict=True,
        )
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in prompt]
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} refuses the roles {roles}: {error}."
        ) from error
    return list(encoded["input_ids"])


def as_completion(prompt: Prompt, text: str) -> Any:
    """A completion in the form reward functions expect: text for a text prompt, one assistant message otherwise."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _read(config: DatasetConfig, name: str) -> list[Row]:
    source = config.source
    if source.startswith("reasoning_gym:"):
        return _reasoning_gym(source.partition(":")[2], config, name)
    if is_reference(source):
        return _generated(source, config, name)
    _no_arguments(config, name)
    if source.lower().endswith(FILES):
        return read_file(Path(source).expanduser(), name)
    if source.startswith((".", "/", "~")) or Path(source).exists():
        raise DataError(f"`{name}.source`={source!r} is not a {', '.join(FILES)} file.")
    return _hub(config, name)


def _generated(reference: str, config: DatasetConfig, name: str) -> list[Row]:
    function = import_function(reference, key=f"{name}.source")
    arguments = dict(config.args)
    if "split" in inspect.signature(function).parameters:
        arguments.setdefault("split", config.split)
    check_arguments(function, arguments, key=f"{name}.args")
    return _rows_of(_call(function, arguments, f"`{name}.source`={reference!r}"), name)


def _call(function: Callable[..., Any], arguments: Mapping[str, Any], what: str) -> Any:
    try:
        made = function(**arguments)
        return list(made) if isinstance(made, Iterator) else made
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's generator raises
        raise DataError(f"{what} failed: {type(error).__name__}: {error}") from error


def _reasoning_gym(task: str, config: DatasetConfig, name: str) -> list[Row]:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise DataError(
            f"`{name}.source`: the package reasoning-gym is missing. Run: pip install reasoning-gym"
        ) from error
    try:
        entries = list(reasoning_gym.create_dataset(task, **config.args))
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"`{name}`: reasoning_gym cannot make {task!r} with args {config.args}: {error}") from error
    return [
        {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]} for entry in entries
    ]


def _hub(config: DatasetConfig, name: str) -> list[Row]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise DataError(
            f"`{name}.source`={config.source!r} needs the package datasets. Run: pip install 'rlalign[llm]'"
        ) from error
    try:
        loaded = datasets.load_dataset(config.source, split=config.split, revision=config.revision)
    except Exception as error:  # datasets raises OSError, ValueError, ConnectionError, its own and those of its readers
        text = " ".join(str(error).split())[:300]
        raise DataError(
            f"`{name}.source`={config.source!r} (split {config.split!r}) cannot be loaded: {text}. It is "
            f"read as a Hub dataset, since "
            f"it is neither a {', '.join(FILES)} file nor module:function. "
            "Offline, use one of those, or a dataset already in the cache."
        ) from error
    return _rows_of(loaded, name)


def _no_arguments(config: DatasetConfig, name: str) -> None:
    if config.args:
        raise DataError(
            f"`{name}.args` is for module:function and reasoning_gym: sources; {config.source!r} takes none."
        )


def _rows_of(source: Any, name: str) -> list[Row]:
    if isinstance(source, Mapping):
        return _from_columns(source, name)
    if isinstance(source, str | bytes) or not isinstance(source, Iterable):
        raise DataError(f"`{name}` must be rows, a dict of columns or a datasets.Dataset, got {type(source).__name__}.")
    if not isinstance(source, Sized):
        raise DataError(f"`{name}` is a stream without a length; take its first rows: list(dataset.take(1000)).")
    rows = [{"prompt": row} if isinstance(row, str) else row for row in source]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(
                f"`{name}` row {number} is a {type(row).__name__}, not a mapping of columns such as {{'prompt': ...}}."
            )
    return [dict(row) for row in rows]


def _from_columns(columns: Mapping[str, Any], name: str) -> list[Row]:
    for column, values in columns.items():
        if isinstance(values, str | bytes | Mapping) or not isinstance(values, Sequence):
            raise DataError(
                f"`{name}` column {column!r} must be a list of values, got {type(values).__name__} "
                "(of a DatasetDict, pass one split)."
            )
    lengths = {column: len(values) for column, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"`{name}` has columns of different lengths: {lengths}.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _with_prompt_column(rows: list[Row], name: str) -> Prompts:
    names = dict.fromkeys(column for row in rows for column in row)
    if "prompt" in names:
        return Prompts(rows=rows, name=name)
    alias = next((column for column in ALIASES if column in names), None)
    if alias is None:
        hint = (
            " `messages` holds whole conversations: keep the turns before the answer as `prompt`."
            if "messages" in names
            else ""
        )
        raise DataError(
            f"`{name}` has no column `prompt` (nor {', '.join(ALIASES)}); its columns are "
            f"{', '.join(names) or 'none'}.{hint}"
        )
    with_input = alias == "instruction" and "input" in names
    note = f"`{name}`: column {alias!r} is used as the prompt" + (
        ", followed by 'input' where there is one" if with_input else ""
    )
    return Prompts(rows=[_renamed(row, alias, with_input) for row in rows], name=name, notes=(note,))


def _renamed(row: Row, alias: str, with_input: bool) -> Row:
    prompt = row.get(alias)
    if with_input and isinstance(prompt, str) and row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    # The original column stays: reward functions written for the dataset may name it.
    return {"prompt": prompt, **row}


def _origin(source: Any) -> str:
    return f"It was read from {source.source!r}, split {source.split!r}." if isinstance(source, DatasetConfig) else ""
