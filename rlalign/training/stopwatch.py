"""Seconds spent in each named phase of a step."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter


class Stopwatch:
    """Add up phases until they are read.

    Example:
        >>> clock = Stopwatch()
        >>> with clock("generate"):
        ...     pass
        >>> sorted(clock.lap())
        ['time/generate_s', 'time/step_s']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start

    def restart(self) -> None:
        """Forget everything so far; time between steps (evaluation, saving) is no step time."""
        self.seconds, self.started = {}, perf_counter()

    def lap(self) -> dict[str, float]:
        """Metrics of the step that ends now."""
        metrics = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        return metrics | {"time/step_s": perf_counter() - self.started}
