"""The live board of a run: a rich panel on a terminal, one compact line per step everywhere else."""

import os
import sys
from collections.abc import Mapping
from math import inf, isfinite, nan
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from rlalign.training.board_panel import (
    REWARD,
    BoardState,
    clock_speed,
    evaluation_words,
    first_of,
    panel,
    step_line,
)
from rlalign.training.report_data import as_number
from rlalign.training.terminal_stream import EnduringStream, TextStream
from rlalign.training.untrusted_text import as_text, excerpt, one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live

_REDRAW_S = 0.5
"""An agent's iterations take milliseconds: its board shows one of them this often."""


class Board:
    """Shows how training goes. Every method is safe on missing or strange values and on a closed terminal.

    Args:
        total_steps: Where the progress bar ends.
        title: Shown in the frame, for example the run's name.
        console: Where to draw; standard output unless given.
        enabled: True for the live panel, False for plain lines; None takes the panel on a terminal.
        quiet: Show nothing at all (all but the first process of a distributed run).

    Example:
        >>> with Board(2, "demo", enabled=False) as board:
        ...     board.step(1, {"reward/mean": 0.25, "time/step_s": 4.0})
        step       1/2  reward 0.250  4.0 s/step  ETA 4.0 s
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        console: "Console | None" = None,
        enabled: bool | None = None,
        quiet: bool = False,
    ) -> None:
        self.state = BoardState(title=one_line(title, limit=80), total_steps=max(int(total_steps), 0))
        self._console = console
        self._given_file = console.file if console is not None else None
        self._stream = EnduringStream(cast(TextStream, console.file) if console is not None else sys.stdout)
        self._wants_panel = not quiet and (self._on_terminal() if enabled is None else enabled)
        self._quiet = quiet
        self._live: Live | None = None
        self._last_call, self._last_shown = perf_counter(), -inf

    def __enter__(self) -> "Board":
        self._last_call = perf_counter()
        if self._wants_panel:
            self._live = self._start_live()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the panel down where it stands; what comes after are plain lines."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._console is not None and self._given_file is not None:
            self._console.file = self._given_file

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a finished training step."""
        now, state = perf_counter(), self.state
        state.step, state.metrics = int(step), _numbers(metrics)
        logged = state.metrics.get("time/step_s", nan)
        state.step_seconds.append(logged if isfinite(logged) and logged >= 0 else now - self._last_call)
        speed = clock_speed(state.metrics)
        state.step_counts.append(1.0 if speed is None else max(speed * state.step_seconds[-1], 1.0))
        state.rewards.append(first_of(state.metrics, REWARD))
        self._last_call = now
        if speed is None or state.step >= state.total_steps or now - self._last_shown >= _REDRAW_S:
            self._last_shown = now
            self._show(step_line(state))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show a held-out evaluation."""
        numbers = _numbers(metrics)
        self.state.evaluations.append((int(step), numbers))
        self._last_call = perf_counter()  # evaluation time is not step time
        self._show(f"eval  {int(step):>6}  {evaluation_words(numbers)}")

    def doing(self, text: str) -> None:
        """Say what goes on before the first step: on the panel until there are numbers, or as a plain line."""
        self.state.doing = one_line(text, limit=160)
        self._show(self.state.doing)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        line = excerpt(text, limit=2_000)
        if self._live is not None:
            from rich.text import Text

            self._live.console.print(Text(line))
        self._show(line)

    def sample(self, prompt: Any, completion: Any, reward: float | None = None) -> None:
        """Show a recent prompt and completion on the panel; plain lines leave it out."""
        texts = [excerpt(as_text(value), limit=400) for value in (prompt, completion)]
        self.state.sample = (texts[0], texts[1], _number(reward))
        if self._live is not None:
            self._live.update(panel(self.state), refresh=True)

    def _on_terminal(self) -> bool:
        if os.environ.get("TERM") in ("dumb", "unknown"):
            return False
        return self._console.is_terminal if self._console is not None else self._stream.isatty()

    def _start_live(self) -> "Live":
        from rich.console import Console
        from rich.live import Live

        if self._console is None:
            self._console = Console(file=self._stream)  # pyright: ignore[reportArgumentType]  # it quacks like a TextIO
        else:
            self._console.file = self._stream  # pyright: ignore[reportAttributeAccessIssue]
        # No refresh thread: the panel changes when a step ends, and a thread would touch the stream at any time.
        live = Live(panel(self.state), console=self._console, auto_refresh=False)
        live.start(refresh=True)
        return live

    def _show(self, line: str) -> None:
        if self._live is not None:
            self._live.update(panel(self.state), refresh=True)
        elif not self._quiet:
            self._stream.write(line + "\n")
            self._stream.flush()


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    found = {one_line(str(name), limit=80): _number(value) for name, value in metrics.items()}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    """NumPy scalars and one-element tensors convert themselves; what does not is not a number to show."""
    if value is None or isinstance(value, bool | int | float | str):
        return as_number(value)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        return None
