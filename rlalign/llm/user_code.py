"""Resolve `module:function` and `path/file.py:function`, the one way a configuration names a user's own code."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rlalign.config import ConfigError


def is_reference(text: str) -> bool:
    """Whether `text` has the form `module:function` or `file.py:function`."""
    place, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and (place.endswith(".py") or place.replace(".", "_").isidentifier())


def import_function(reference: str, *, key: str) -> Callable[..., Any]:
    """Import the function a configuration names.

    Args:
        reference: `package.module:function` or `path/to/file.py:function`.
        key: The configuration key that holds it, for messages.

    Raises:
        ConfigError: The module, file or function does not exist, or fails while it is imported.
    """
    place, _, name = reference.rpartition(":")
    if not is_reference(reference):
        raise ConfigError(
            f"`{key}`={reference!r} names no function: write package.module:function or path/file.py:function."
        )
    try:
        module = (
            _import_file(Path(place).expanduser(), key) if place.endswith(".py") else importlib.import_module(place)
        )
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        hint = (
            f"name its file instead: path/to/{place.split('.')[-1]}.py:{name}"
            if error.name and place.startswith(error.name)
            else ""
        )
        raise ConfigError(f"`{key}`={reference!r}: {error}. {hint or 'Install what is missing.'}") from error
    except Exception as error:  # whatever a user's module does while it is imported
        raise ConfigError(
            f"`{key}`={reference!r} fails while it is imported: {type(error).__name__}: {error}"
        ) from error
    function = vars(module).get(name)
    if not callable(function):
        functions = sorted(
            key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")
        )
        raise ConfigError(f"`{key}`: {place} has no function {name!r}; it has {', '.join(functions) or 'none'}.")
    return function


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], *, key: str) -> None:
    """Refuse keyword arguments the function does not take, and name those it does.

    Raises:
        ConfigError: The call would not bind.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"`{key}`: {error}. The function takes {signature}.") from error


def _import_file(path: Path, key: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"`{key}`: there is no file {path.absolute()}.")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"rlalign_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path  # the name ends in .py
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and type hints in the file look themselves up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
