"""The words around a prompt: `data.template` and `data.system_prompt`."""

import string
from typing import Any

from rlalign.config import ConfigError

Prompt = str | list[dict[str, Any]]
Row = dict[str, Any]


def in_training_form(prompt: str, example: Prompt, *, template: str | None, system_prompt: str | None) -> Prompt:
    """Put a question of a person's in the words that training prompts have.

    Args:
        example: A prompt of the data. Where that was messages from the start, both settings leave it alone.

    Raises:
        ConfigError: The template needs columns that a question alone does not have.
    """
    if not isinstance(example, str) and example[0] != {"role": "system", "content": system_prompt}:
        return [{"role": "user", "content": prompt}]
    if template is not None:
        fields = [field for _, field, _, _ in _parsed(template, "data.train")]
        if columns := [field for field in fields if field not in (None, "prompt")]:
            raise ConfigError(
                f"`data.template` needs the columns {', '.join(map(str, columns))}, which a prompt of yours does not "
                "have. Leave PROMPT out to sample rows of the data."
            )
        prompt = fill_template({"prompt": prompt}, template, 1, "data.train")["prompt"]
    return prompt if system_prompt is None else converse({"prompt": prompt}, system_prompt)["prompt"]


def fill_template(row: Row, template: str, number: int, name: str) -> Row:
    """Put a row's plain prompt, and other columns, in the braces of `data.template`; messages stay as they are."""
    if not isinstance(row.get("prompt"), str):
        return row
    parts = []
    for text, field, _, _ in _parsed(template, name):
        parts.append(text)
        if field is None:
            continue
        if field not in row:
            raise ConfigError(
                f"`data.template` names {{{field}}}, but `{name}` row {number} has only {', '.join(row)}."
            )
        parts.append(str(row[field]))
    return {**row, "prompt": "".join(parts)}


def converse(row: Row, system_prompt: str) -> Row:
    """Make a row's plain prompt the user's message after a system message."""
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        return row
    messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": prompt}]
    return {**row, "prompt": messages}


def _parsed(template: str, name: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"`data.template` is not well formed: {error}. Write {{{{ and }}}} for literal braces."
        ) from error
    fields = [field for _, field, _, _ in parsed if field is not None]
    if any(
        not field.isidentifier() or form or conversion for _, field, form, conversion in parsed if field is not None
    ):
        raise ConfigError(
            f"`data.template` takes plain column names in braces, got {fields}. Write {{{{ and }}}} for literal braces."
        )
    if "prompt" not in fields:
        raise ConfigError(f"`data.template` has no {{prompt}}, so every row of `{name}` would ask the same.")
    return parsed
