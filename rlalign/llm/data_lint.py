"""Look over prompts before any model is loaded: what cannot be trained on, and what probably should not."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rlalign.llm.data import DataError, Prompts, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
REWARD_ARGUMENTS = ("prompts", "completions", "trainer_state", "log_extra", "log_metric")
"""Arguments every reward function gets; a column of the same name would hide one."""

_NO_PROMPT = "prompt is None"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One kind of problem, and the rows it was found in (counted from 1)."""

    level: Literal["error", "warning"]
    message: str
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.rows:
            return self.message
        shown = ", ".join(map(str, self.rows[:5])) + (", ..." if len(self.rows) > 5 else "")
        return (
            f"{self.message} (row{'s' if len(self.rows) > 1 else ''} {shown}; {len(self.rows)} in all, counted from 1)"
        )


def lint(
    prompts: Prompts,
    *,
    held_out: Prompts | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    max_prompt_tokens: int | None = None,
) -> list[Finding]:
    """List what is wrong with a dataset. Errors make training impossible; warnings name what usually is a mistake.

    Args:
        prompts: The training prompts (or any others).
        held_out: Evaluation prompts: those that training also sees are reported.
        tokenizer: With it, a missing chat template and prompts longer than `max_prompt_tokens` are found too.
    """
    findings = _column_findings(prompts) + _prompt_findings(prompts)
    if not any(finding.level == "error" for finding in findings):
        findings += _repeats(prompts)
        findings += _leaks(prompts, held_out) if held_out is not None else []
        findings += _token_findings(prompts, tokenizer, max_prompt_tokens) if tokenizer is not None else []
    return findings


def check_prompts(prompts: Prompts, **options: Any) -> list[str]:
    """Run `lint` and return its warnings as text.

    Raises:
        DataError: With every error that was found.
    """
    findings = lint(prompts, **options)
    errors = [str(finding) for finding in findings if finding.level == "error"]
    if errors:
        raise DataError("\n".join(errors))
    return [*prompts.notes, *(str(finding) for finding in findings)]


def _column_findings(prompts: Prompts) -> list[Finding]:
    hidden = [name for name in prompts.reward_columns if name in REWARD_ARGUMENTS]
    if not hidden:
        return []
    message = f"`{prompts.name}`: column {hidden[0]!r} has the name of an argument that reward functions get; rename it"
    return [Finding(level="error", message=message)]


def _prompt_findings(prompts: Prompts) -> list[Finding]:
    problems: dict[str, list[int]] = {}
    kinds: dict[type, int] = {}
    for number, row in enumerate(prompts, 1):
        problem = _problem(row.get("prompt"))
        if problem is not None:
            problems.setdefault(problem, []).append(number)
        else:
            kinds.setdefault(type(row["prompt"]), number)
    missing = problems.pop(_NO_PROMPT, None)
    findings = [
        Finding(level="error", message=f"`{prompts.name}`: {problem}; correct or remove", rows=tuple(rows))
        for problem, rows in problems.items()
    ]
    if missing is not None:
        message = f"`{prompts.name}`: row {missing[0]}{prompts.origin and f' of {prompts.origin}'} has no prompt"
        findings.append(Finding(level="error", message=message, rows=tuple(missing) if len(missing) > 1 else ()))
    if len(kinds) > 1:
        message = (
            f"`{prompts.name}` mixes text prompts (first in row {kinds[str]}) and conversations "
            f"(first in row {kinds[list]}); use one"
        )
        findings.append(Finding(level="error", message=message))
    return findings


def _problem(prompt: Any) -> str | None:
    if prompt is None:
        return _NO_PROMPT
    if isinstance(prompt, str):
        return _text_problem(prompt) if prompt.strip() else "prompt is empty"
    if not isinstance(prompt, list):
        return f"prompt is a {type(prompt).__name__}, not text or a list of messages"
    if not prompt:
        return "prompt is a conversation without messages"
    return next((problem for problem in map(_message_problem, prompt) if problem is not None), None)


def _message_problem(message: Any) -> str | None:
    if not isinstance(message, dict) or "role" not in message:
        return "prompt is a list, but its items are not messages such as {'role': 'user', 'content': '...'}"
    if message["role"] not in ROLES:
        return f"message role {str(message['role'])[:40]!r} is not one of {', '.join(ROLES)}"
    content = message.get("content")
    if isinstance(content, list) and any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
        return "message content holds something other than text"
    if message["role"] == "user" and not (content.strip() if isinstance(content, str) else content):
        return "user message is empty"
    if not isinstance(content, str | list) and not message.get("tool_calls"):
        return f"message content is a {type(content).__name__}, not text"
    return _text_problem(content) if isinstance(content, str) else None


def _text_problem(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell it, as in "\ud800"; no tokenizer and no file can hold it
        return "text holds half of a surrogate pair"
    return None


def _key(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else repr(prompt)


def _repeats(prompts: Prompts) -> list[Finding]:
    first: set[str] = set()
    rows = tuple(_numbers(prompts, lambda key: key in first or bool(first.add(key))))
    if not rows:
        return []
    message = f"`{prompts.name}`: {len(rows)} of {len(prompts)} prompts repeat an earlier one"
    return [Finding(level="warning", message=message, rows=rows)]


def _leaks(prompts: Prompts, held_out: Prompts) -> list[Finding]:
    seen = {_key(row["prompt"]) for row in prompts}
    rows = tuple(_numbers(held_out, seen.__contains__))
    if not rows:
        return []
    message = (
        f"`{held_out.name}`: {len(rows)} of {len(held_out)} prompts are also in `{prompts.name}`, "
        "so the evaluation is not held out"
    )
    return [Finding(level="warning", message=message, rows=rows)]


def _numbers(prompts: Prompts, condition: Callable[[str], bool]) -> Iterable[int]:
    return (number for number, row in enumerate(prompts, 1) if condition(_key(row.get("prompt"))))


def _token_findings(prompts: Prompts, tokenizer: "PreTrainedTokenizerBase", limit: int | None) -> list[Finding]:
    if not isinstance(prompts[0]["prompt"], str) and not tokenizer.chat_template:
        message = (
            f"`{prompts.name}` holds conversations, but the tokenizer of {tokenizer.name_or_path!r} has no "
            "chat template; "
            "set `model.chat_template`, or use text prompts"
        )
        return [Finding(level="error", message=message)]
    lengths = [len(encode_prompt(row["prompt"], tokenizer)) for row in prompts]
    findings = []
    if 0 in lengths:
        rows = tuple(number for number, length in enumerate(lengths, 1) if length == 0)
        findings.append(Finding(level="error", message=f"`{prompts.name}`: prompt has no tokens", rows=rows))
    if limit is not None and max(lengths) > limit:
        rows = tuple(number for number, length in enumerate(lengths, 1) if length > limit)
        message = (
            f"`{prompts.name}`: {len(rows) / len(lengths):.1%} of the prompts are longer than "
            f"`rollout.max_prompt_tokens`={limit}; the "
            f"longest has {max(lengths)} tokens. Raise the limit or remove them"
        )
        findings.append(Finding(level="error", message=message, rows=rows))
    return findings
