"""What a reward's file says of it without being run: the functions it defines and the arguments they ask for."""

import ast
import importlib.util
from pathlib import Path

from rlalign.training.reward_function import RewardFunction


def names_in(path: Path) -> list[str]:
    """Everything that the file binds at its top level; `*` for an import of all that another module has.

    Raises:
        SyntaxError: It is not valid Python.
        ValueError: It holds null bytes or is not text.
    """
    return [name for node in _parse(path).body for name in _names_bound_by(node)]


def functions_in(path: Path) -> list[str]:
    """The public functions that the file defines, in its order.

    Raises:
        SyntaxError: It is not valid Python.
        ValueError: It holds null bytes or is not text.
    """
    functions = (node for node in _parse(path).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [function.name for function in functions if not function.name.startswith("_")]


def module_file(module: str) -> Path | None:
    """The source of a module that can be imported; None of one without, such as one written in C."""
    spec = importlib.util.find_spec(module)
    origin = None if spec is None else spec.origin
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def required_parameters(function: RewardFunction) -> list[str]:
    """Parameters without a default that its source shows; none where it does not (decorators, C code, an import)."""
    place, _, name = (function.import_path or "").rpartition(":")
    path = Path(place) if place.endswith(".py") else module_file(place) if place else None
    if path is None:
        return []
    for node in reversed(_parse(path).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            found = [] if node.decorator_list else _without_default(node.args)
            return [parameter for parameter in found if parameter not in function.arguments]
        if isinstance(node, ast.ClassDef) and node.name == name:  # its arguments are the constructor's
            calls = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__call__"]
            return [] if not calls or calls[-1].decorator_list else _without_default(calls[-1].args)[1:]
    return []


def _without_default(arguments: ast.arguments) -> list[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    named = positional[: len(positional) - len(arguments.defaults)]
    named += [one for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None]
    return [one.arg for one in named]


def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), filename=str(path))


def _names_bound_by(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
        case ast.Name():
            return [node.id] if isinstance(node.ctx, ast.Store) else []
        case _:  # an assignment; or `if`, `try` and their like, with statements inside
            return [name for part in ast.iter_child_nodes(node) for name in _names_bound_by(part)]
