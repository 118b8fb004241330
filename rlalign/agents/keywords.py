"""Keyword arguments of an agent -> its config: short names find their section, plain values their full form."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from rlalign import config as config_files
from rlalign.config import ConfigError
from rlalign.config_schema import default_of, hints_of, plain

SHORT_FORMS = {"value_head": "type", "advantage": "type", "env": "id"}
"""Sections that may be given as one word, and the key which that word is the value of."""


def config_from_keywords(cls: type, keywords: Mapping[str, Any]) -> Any:
    """Build a config of class `cls` from a caller's keyword arguments.

    `learning_rate=1e-4` finds `optim.learning_rate` when no other section has that name; `value_head="hl_gauss"` means
    `value_head={"type": "hl_gauss"}`; `normalize_and_project=True` turns a section on with its defaults.

    Raises:
        ConfigError: An unknown or ambiguous name, or a value its key does not take.
    """
    data: dict[str, Any] = {"method": default_of(cls, "method")}
    for name, value in keywords.items():
        path = _path(cls, name)
        target = data
        for key in path[:-1]:
            target = target.setdefault(key, {})
        full = _full_form(name, value)
        # A section given whole keeps what a short name has put there.
        target[path[-1]] = {**target.get(path[-1], {}), **full} if isinstance(full, dict) else full
    return config_files.build(data, source=f"{cls.__name__.removesuffix('Config')}(...)")


def _full_form(name: str, value: Any) -> Any:
    if isinstance(value, str) and name in SHORT_FORMS:
        return {SHORT_FORMS[name]: value}
    if name == "normalize_and_project" and isinstance(value, bool):
        return {} if value else None
    return plain(value)


def _path(cls: type, name: str) -> tuple[str, ...]:
    hints = hints_of(cls)
    if name in hints:
        return (name,)
    found = [path for path in _leaves(cls) if path[-1] == name]
    found = [path for path in found if path[0] == "env"] or found  # `num_envs` is that of training, not of evaluation
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
