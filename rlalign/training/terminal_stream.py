"""A stream that outlives its terminal: a closed pipe or a lost terminal silences it, it never raises."""

import os
import sys
from typing import Protocol, runtime_checkable


@runtime_checkable
class TextStream(Protocol):
    """What is asked of the stream: sys.stdout, an open file and io.StringIO all fit."""

    @property
    def encoding(self) -> str | None: ...
    def write(self, text: str, /) -> int: ...
    def flush(self) -> None: ...
    def isatty(self) -> bool: ...
    def fileno(self) -> int: ...


class EnduringStream:
    """Wraps a text stream; after the first failed write everything is dropped.

    A run of hours must not die because `| head` went away or the terminal was closed (EPIPE, EIO).
    """

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self.broken = False

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        if not self.broken:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._write_replaced(text)
            except (OSError, ValueError):  # ValueError: the stream was closed under us
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if not self.broken:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def isatty(self) -> bool:
        try:
            return not self.broken and self._stream.isatty()
        except ValueError:
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def _write_replaced(self, text: str) -> None:
        try:
            self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        self.broken = True
        if self._stream not in (sys.stdout, sys.__stdout__):
            return
        # What is left in the buffer would be flushed at interpreter exit and turn exit code 0 into 120:
        # https://docs.python.org/3/library/signal.html#note-on-sigpipe
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        except (OSError, ValueError):  # not backed by a file descriptor: nothing is buffered that could fail
            return
