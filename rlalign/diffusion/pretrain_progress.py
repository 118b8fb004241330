"""How far pretraining is: a bar on a terminal, a line per quarter everywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int, float], None]
"""Called as (step, steps, loss)."""


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """Yield the caller's own function, or one that shows the progress on standard error."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, loss=float("nan"))
        yield lambda step, steps, loss: bar.update(task, completed=step, total=steps, loss=loss)


def _lines() -> Progress:
    told = 0

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal told
        if (quarter := 4 * step // steps) > told:
            told = quarter
            print(f"pretraining: step {step} of {steps}, loss {loss:.3f}", file=sys.stderr, flush=True)

    return report
