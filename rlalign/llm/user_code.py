"""Import a user's own function named in a configuration, and say in the configuration's terms why it cannot be done."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from rlalign.config import ConfigError
from rlalign.training.reward_function import import_object


def is_reference(text: str) -> bool:
    """Whether `text` has the form `module:function` or `file.py:function`."""
    place, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and (place.endswith(".py") or place.replace(".", "_").isidentifier())


def import_function(reference: str, *, key: str) -> Callable[..., Any]:
    """Import the function a configuration names.

    Args:
        reference: `package.module:function` or `path/to/file.py:function`; the current directory counts.
        key: The configuration key that holds it, for messages.

    Raises:
        ConfigError: The module, file or function does not exist, or fails while it is imported.
    """
    try:
        function = import_object(reference)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`{key}`={reference!r}: {error}. Install it, or name its file: path/to/file.py:function."
        ) from error
    except ImportError as error:
        raise ConfigError(f"`{key}`={reference!r}: {error}.{_functions_beside(reference)}") from error
    except Exception as error:  # whatever a user's module does while it is imported
        raise ConfigError(
            f"`{key}`={reference!r} fails while it is imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(function):
        raise ConfigError(f"`{key}`={reference!r} is a {type(function).__name__}, not a function.")
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


def _functions_beside(reference: str) -> str:
    module = sys.modules.get(reference.rpartition(":")[0])
    if module is None:
        return ""
    members = vars(module).items()
    names = sorted(name for name, value in members if inspect.isfunction(value) and not name.startswith("_"))
    return f" It has {', '.join(names) or 'no functions'}."
