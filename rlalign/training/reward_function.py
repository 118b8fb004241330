"""A reward function: its name, its weight, and where a fresh process can import it from. Stdlib only."""

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """One reward function, as an object, as a place to import it from, or both."""

    name: str
    """Unique among the functions of a run: the key of `reward/<name>_mean`."""
    call: Callable[..., Any] | None = None
    import_path: str | None = None
    """`package.module:function` or `/path/to/file.py:function`: lets the function run in a process of its own."""
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments bound to the function, or given to the constructor when the target is a class."""

    def __post_init__(self) -> None:
        if self.call is None and self.import_path is None:
            raise ValueError(f"reward '{self.name}' has neither `call` nor `import_path`; give one of them.")
        if not math.isfinite(self.weight):
            raise ValueError(f"`weight` of reward '{self.name}' is {self.weight}; give a finite number.")

    def load(self) -> Callable[..., Any]:
        """The function itself, with `arguments` bound; imports it when it is known only by path."""
        target: Any = self.call if self.call is not None else import_object(str(self.import_path))
        if self.arguments and not isinstance(target, type):
            return partial(target, **self.arguments)
        return target(**self.arguments) if isinstance(target, type) else target


def import_object(path: str) -> Any:
    """Import `package.module:name` or `/path/file.py:name`. The current directory counts, after `sys.path`."""
    place, _, name = path.rpartition(":")
    if not place:
        raise ImportError(f"'{path}' is no import path; write `package.module:function` or `file.py:function`.")
    target: Any = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    for part in name.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            near = difflib.get_close_matches(part, [name for name in dir(target) if not name.startswith("_")], n=1)
            hint = f" (did you mean '{near[0]}'?)" if near else ""
            raise ImportError(f"'{place}' has no '{part}'{hint}") from None
    return target


def _import_module(name: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if str(path.parent) not in sys.path:  # siblings of a reward file are importable, as for a script
        sys.path.append(str(path.parent))
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_reward_file"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"there is no reward file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def importable_path(function: Callable[..., Any]) -> str | None:
    """Where a fresh interpreter finds this very function; None for lambdas, closures, objects and `__main__`.

    `__main__` is out on purpose: importing a script again to get at its reward would start its training again.
    """
    if not isinstance(function, FunctionType) or not function.__qualname__.isidentifier():
        return None
    module = sys.modules.get(function.__module__)
    if module is None or module.__name__ == "__main__" or module.__file__ is None:
        return None
    if vars(module).get(function.__qualname__) is not function:  # a decorator or monkeypatch put another one there
        return None
    if _found_on_path(module.__name__, Path(module.__file__)):
        return f"{module.__name__}:{function.__qualname__}"
    if "." not in module.__name__:  # a single file loaded from somewhere: by its place
        return f"{Path(module.__file__).resolve()}:{function.__qualname__}"
    return None


def _found_on_path(name: str, file: Path) -> bool:
    """Does a plain search of `sys.path` find this file under this name? (`sys.modules` would say yes to anything.)"""
    search: list[str] | None = None
    origin: str | None = None
    parts = name.split(".")
    for depth in range(len(parts)):
        prefix = ".".join(parts[: depth + 1])
        specs = (finder.find_spec(prefix, search) for finder in _finders_of_a_fresh_interpreter())
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None:
            return False
        search = list(spec.submodule_search_locations or [])
        origin = spec.origin
    return origin is not None and Path(origin).resolve() == file.resolve()


def _finders_of_a_fresh_interpreter() -> list[Any]:
    """The path search, and the hooks of editable installs, which every interpreter sets up at its start."""
    return [PathFinder, *(finder for finder in sys.meta_path if finder.__module__.startswith("__editable__"))]


def declared_arguments(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names the function can be called with; None when it takes `**kwargs`, that is, everything."""
    parameters = _parameters(function)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names without a default: if neither the trainer nor the data set provides one, the call cannot work."""
    named = (p for p in _parameters(function) or [] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return [p.name for p in named if p.default is p.empty]


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature; they get what TRL would give them: everything
        return None
