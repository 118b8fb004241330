"""Stop a run between two steps when the user or the cluster asks for it."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_STOPPING_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class Interrupted(Exception):
    """The run stopped early, on request, with a checkpoint that `rlalign resume` continues from."""

    exit_code = 75


class GracefulStop:
    """Turn the first SIGINT, SIGTERM or SIGUSR1 into a flag that is polled; a second SIGINT stops at once.

    A session polls `requested` after the first evaluation and after every step: what happens inside a step, generation
    and evaluation included, is finished first. The former handlers come back on exit. Outside the main thread, where
    Python forbids handlers, nothing is installed.

    Example:
        >>> with GracefulStop() as stop:
        ...     stop.requested
        False
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """True once a signal, or `request`, asked the run to stop."""
        return self._signal is not None

    @property
    def reason(self) -> str | None:
        """Name of the signal that asked first, such as "SIGTERM"; None while nothing has."""
        return None if self._signal is None else self._signal.name

    def request(self, number: int = signal.SIGTERM) -> None:
        """Ask for the stop without a signal, for instance because another process of the job received one."""
        if self._signal is None:
            self._signal = signal.Signals(number)

    def __enter__(self) -> "GracefulStop":
        if threading.current_thread() is threading.main_thread():
            # Windows has no SIGUSR1.
            for number in (s for s in signal.Signals if s.name in _STOPPING_NAMES):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that C code installed, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        first = not self.requested
        self.request(number)
        if first:
            _print_to_terminal(f"\n{self.reason}: finishing this step, then saving. Ctrl-C again stops at once.\n")


def _print_to_terminal(message: str) -> None:
    # os.write is safe inside a handler, where print() may re-enter a locked buffer; the terminal may be gone.
    try:
        os.write(2, message.encode())
    except OSError:
        return
