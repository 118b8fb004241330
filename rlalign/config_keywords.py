"""Keyword arguments of a class -> its config: short names find their section, plain values their full form."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from rlalign import config as config_files
from rlalign.config import ConfigError
from rlalign.config_schema import default_of, hints_of, plain


@dataclass(frozen=True, kw_only=True)
class Forms:
    """What a domain lets its callers write short."""

    words: Mapping[str, str] = field(default_factory=dict)
    """Sections that may be given as one word, and the key which that word is the value of."""
    switches: tuple[str, ...] = ()
    """Sections that True turns on with their defaults and False turns off."""
    first: tuple[str, ...] = ()
    """Sections whose keys win over those of the same name elsewhere."""


def config_from_keywords(cls: type, keywords: Mapping[str, Any], forms: Forms) -> Any:
    """Build a config of class `cls` from a caller's keyword arguments.

    `learning_rate=1e-4` finds `optim.learning_rate` when no other section has that name; `value_head="hl_gauss"` means
    `value_head={"type": "hl_gauss"}`; `normalize_and_project=True` turns a section on with its defaults.

    Raises:
        ConfigError: An unknown or ambiguous name, or a value its key does not take.
    """
    data: dict[str, Any] = {"method": default_of(cls, "method")}
    for name, value in keywords.items():
        path = _path(cls, name, forms)
        target = data
        for key in path[:-1]:
            target = target.setdefault(key, {})
        full = _full_form(name, value, forms)
        # A section given whole keeps what a short name has put there.
        target[path[-1]] = {**target.get(path[-1], {}), **full} if isinstance(full, dict) else full
    return config_files.build(data, source=f"{cls.__name__.removesuffix('Config')}(...)")


def _full_form(name: str, value: Any, forms: Forms) -> Any:
    if isinstance(value, str) and name in forms.words:
        return {forms.words[name]: value}
    if isinstance(value, bool) and name in forms.switches:
        return {} if value else None
    return plain(value)


def _path(cls: type, name: str, forms: Forms) -> tuple[str, ...]:
    hints = hints_of(cls)
    if name in hints:
        return (name,)
    found = [path for path in _leaves(cls) if path[-1] == name]
    found = [path for path in found if path[0] in forms.first] or found
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"`{name}` is ambiguous: {' or '.join('.'.join(path) for path in found)}; give the section.")
    known = {*hints, *(path[-1] for path in _leaves(cls))}
    near = difflib.get_close_matches(name, known, n=2)
    hint = f" Did you mean {' or '.join(f'`{other}`' for other in near)}?" if near else ""
    raise ConfigError(f"unknown setting `{name}`.{hint}")


def _leaves(cls: type) -> Iterator[tuple[str, ...]]:
    for name in hints_of(cls):
        default = default_of(cls, name)
        if is_dataclass(default):
            for inner in hints_of(type(default)):
                yield name, inner
