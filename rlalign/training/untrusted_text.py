"""Text that a model, a dataset or a reward wrote, made fit to show: bounded, with nothing hidden in it."""

import json
import re
from typing import Any

# Everything a terminal or a browser would act on instead of showing: C0/C1 controls, lone surrogates,
# direction overrides and invisible spaces. Joiners (U+200C/D) stay: scripts and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Replace every character that hides or acts by one that shows.

    The escape byte becomes `\\x1b`, a direction override `[U+202E]`.
    """
    return _HIDDEN.sub(_picture, text.replace("\r\n", "\n"))


def excerpt(text: str, *, limit: int) -> str:
    """Keep at most about `limit` characters, head and tail, and say how many were left out.

    The tail is kept because that is where an answer usually stands.
    """
    if len(text) <= limit:
        return visible(text)
    head = limit * 3 // 5
    tail = limit - head
    left_out = len(text) - limit
    return f"{visible(text[:head])} … [{left_out:,} characters left out] … {visible(text[-tail:])}"


def one_line(text: str, *, limit: int) -> str:
    """Collapse white space and cut to `limit` characters."""
    flat = " ".join(visible(text[: 4 * limit]).split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def as_text(value: Any) -> str:
    """Render a prompt or completion: a string, a list of chat messages, or any JSON value."""
    try:
        return _as_text(value)
    except RecursionError:
        return "(nested too deeply to show)"


def _as_text(value: Any) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case [{"role": "user" | "assistant", "content": content}]:
            return _as_text(content)
        case [{"content": _}, *_]:
            return "\n".join(_message(item) for item in value)
        case {"content": content}:
            return _as_text(content)
        case {"type": "text", "text": str(text)}:
            return text
        case _:
            return json.dumps(value, ensure_ascii=False, default=str)


def _message(message: Any) -> str:
    if not isinstance(message, dict):
        return _as_text(message)
    content = message.get("content")
    body = "".join(_as_text(part) for part in content) if isinstance(content, list) else _as_text(content)
    return f"{message.get('role', 'message')}: {body}"


def _picture(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x100:
        return f"\\x{code:02x}"
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else f"[U+{code:04X}]"
