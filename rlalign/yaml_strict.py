"""Strict YAML: plain data plus the line of every key; whatever could surprise is an error that names its line.

YAML 1.1 reads `no` as False, `1e-5` as text, `010` as eight, and keeps the last of two equal keys. Here only
`true` and `false` are booleans, `1e-5` is a number, a key written twice is an error, and tags, anchors and aliases
are refused.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 256 * 1024
MAX_DEPTH = 20

Key = tuple[str | int, ...]

_INTEGER = re.compile(r"[-+]?(0|[1-9](_?[0-9])*)")
_FLOAT = re.compile(r"[-+]?(([0-9][0-9_]*)?\.[0-9]+|[0-9][0-9_]*\.)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+")
_NOT_FINITE = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}
_BAD_ENCODING = "is not UTF-8 text; save the file as UTF-8 without a byte order mark"


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or the command line."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config, and where it stands."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class ConfigError(ValueError):
    """A config cannot be used. `problems` holds every reason found, each with file and line."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        self.problems: list[Problem] = [] if isinstance(problems, str) else _in_order(problems)
        if isinstance(problems, str):
            text = problems
        elif len(self.problems) == 1:
            text = str(self.problems[0])
        else:
            text = "\n".join([f"{len(self.problems)} problems:", *(f"  {problem}" for problem in self.problems)])
        super().__init__(text)


@dataclass
class Document:
    """Parsed YAML: `data` is plain Python, `places` says where each key path was written."""

    data: Any
    source: str
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, path: Key) -> Place:
        """Where `path` was written, or its nearest parent that was written at all."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(self.source, 1))


def read_document(path: Path) -> Document:
    """Read a file without ever raising anything but ConfigError."""
    if not path.is_file():
        what = "is a directory, not a config file" if path.is_dir() else "no such file"
        raise ConfigError([Problem(Place(str(path)), what)])
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([Problem(Place(str(path)), f"cannot be read: {error.strerror}")]) from error
    return parse(_decode(raw, str(path)), source=str(path))


def parse(text: str, *, source: str) -> Document:
    """Turn YAML (or JSON) text into plain data with lines.

    Broken syntax raises ConfigError at once. Duplicate keys, non-text keys and tags are collected in `problems`,
    so that the caller can show them together with what else is wrong.

    Example:
        >>> parse("optim: {learning_rate: 1e-5}", source="x.yaml").data
        {'optim': {'learning_rate': 1e-05}}
    """
    if len(text) > MAX_BYTES:
        raise ConfigError([Problem(Place(source, 1), f"is larger than {MAX_BYTES // 1024} KB; that is no config")])
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError([Problem(Place(source, mark.line + 1 if mark else 1), _explain(error))]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        message = f"holds a character that YAML does not allow ({error.character!r:.12})"
        raise ConfigError([Problem(Place(source, line), message)]) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as the escape "\UFFFFFFFF"
        line = 1 if loader is None else loader.line + 1
        raise ConfigError([Problem(Place(source, line), f"is not valid YAML ({error})")]) from error
    document = Document(None, source, places={(): Place(source, 1)})
    for line, tag in loader.tags:
        _complain(document, line, f"the tag `{tag:.60}` is not allowed; write a plain value")
    if node is not None:
        document.data = _construct(node, (), document)
    return document


class _Loader(yaml.SafeLoader):
    """Composes nodes only; refuses what lets a small file mean a huge or surprising document."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.tags: list[tuple[int, str]] = []

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(
                None, None, "anchors (&) and aliases (*) are not allowed; write the value out", event.start_mark
            )
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"is nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        if event.tag is not None:  # a node has a tag in any case; only the event knows whether one was written
            self.tags.append((event.start_mark.line + 1, event.tag))
        return node


def _construct(node: Any, path: Key, document: Document) -> Any:
    line = node.start_mark.line + 1
    document.places.setdefault(path, Place(document.source, line))
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*path, index), document) for index, child in enumerate(node.value)]
    if node.style is None:
        return _plain(node.value, line, document)
    return _text(node.value, line, document)


def _construct_mapping(node: Any, path: Key, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _construct(key_node, (*path, ""), Document(None, document.source, problems=document.problems))
        if not isinstance(key, str):
            _complain(document, line, f"the key {key!r:.40} is not text; put it in quotes")
            continue
        if key in result:
            first = document.places[(*path, key)].line
            _complain(document, line, f"the key `{key}` is written twice (first on line {first}); keep one")
            continue
        document.places[(*path, key)] = Place(document.source, line)
        result[key] = _construct(value_node, (*path, key), document)
    return result


def _plain(text: str, line: int, document: Document) -> Any:
    """Resolve an unquoted scalar: null, true, false, whole number, number; everything else is text."""
    if text in ("", "~", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    digits = text.replace("_", "")
    if _INTEGER.fullmatch(text):
        if len(digits) > 300:
            _complain(document, line, f"the number {text[:20]}... has {len(digits)} digits")
            return 0
        return int(digits)
    if _FLOAT.fullmatch(text):
        return float(digits)
    if text.lower() in _NOT_FINITE:
        return float(_NOT_FINITE[text.lower()])
    return _text(text, line, document)


def _text(text: str, line: int, document: Document) -> str:
    """Join the surrogate pairs that JSON escapes write, refuse halves of one."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        _complain(document, line, "the text holds half of a surrogate pair")
        return ""


def _decode(raw: bytes, source: str) -> str:
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError([Problem(Place(source, 1), f"starts with a byte order mark: {_BAD_ENCODING}")])
    if len(raw) > MAX_BYTES:  # before decoding: the cut may stand inside a character
        raise ConfigError([Problem(Place(source, 1), f"is larger than {MAX_BYTES // 1024} KB; that is no config")])
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([Problem(Place(source, line), _BAD_ENCODING)]) from error


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "cannot be read"
    if "'\\t'" in problem:
        return "a tab stands where YAML wants spaces; indent with spaces"
    if "anchors" in problem or "nested deeper" in problem:
        return problem
    if "expected a single document" in (error.context or ""):
        return "holds a second document (`---`); keep one config per file"
    if problem == "mapping values are not allowed here":
        return "a second `:` on the line, or wrong indentation; put text that contains `: ` in quotes"
    return f"is not valid YAML: {', '.join(part for part in (error.context, problem) if part)}"


def _complain(document: Document, line: int, text: str) -> None:
    document.problems.append(Problem(Place(document.source, line), text))


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    return sorted(problems, key=lambda problem: (problem.place.source, problem.place.line or 0))
