"""Doing something before the methods of one object, for as long as a block lasts."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Intercepted:
    """A method whose arguments are seen and may be changed first; its signature is the method's own."""

    def __init__(self, method: Callable[..., Any], before: Callable[[dict[str, Any]], None]) -> None:
        functools.update_wrapper(self, method)
        self._method = method
        self._before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(self._method).bind(*args, **kwargs)
        self._before(bound.arguments)
        return self._method(*bound.args, **bound.kwargs)

    def __deepcopy__(self, _: dict[int, Any]) -> Any:
        # The copy would call the original object's method.
        raise RuntimeError(
            "this scheduler is under `adaptive_projected_guidance` and cannot be copied; samplers that copy it, such "
            "as those for training, belong outside the block."
        )


@contextmanager
def intercepting(target: Any, before: Mapping[str, Callable[[dict[str, Any]], None]]) -> Iterator[None]:
    """Run functions before methods of this one object; afterwards, whatever happened, it is as it was.

    Args:
        target: The object; its class is not touched.
        before: By name of the method, a function of its arguments by name, defaults left out.
    """
    own = {name: value for name, value in vars(target).items() if name in before}
    methods = {name: getattr(target, name) for name in before}
    for name, method in methods.items():
        setattr(target, name, Intercepted(method, before[name]))
    try:
        yield
    finally:
        for name in before:
            delattr(target, name)
        for name, value in own.items():
            setattr(target, name, value)
