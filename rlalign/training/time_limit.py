"""Interrupt a call in this process after some seconds, as far as one process can interrupt itself."""

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class TimeLimitReached(Exception):
    """The call took longer than it may."""


class _Interrupt(BaseException):
    """Raised inside the call. Not an `Exception`, so that its `except Exception` does not swallow it."""


def run_limited(action: Callable[[], T], seconds: float) -> T:
    """Call `action`, interrupting it after `seconds`.

    In the main thread the call stays there (graders built on `signal.alarm` work) and a signal interrupts it: this
    ends sleeps, reads, Python loops, regular expressions and other C code that polls for signals. In any other thread
    the call moves to a helper thread, which is abandoned: Python loops end, a sleep or read ends when it ends.

    What neither ends: C code that polls no signals (`sum(range(10**11))`), and nothing here survives a crash.

    Raises:
        TimeLimitReached: The limit passed.
    """
    if sys.platform != "win32" and threading.current_thread() is threading.main_thread():
        return _in_main_thread(action, seconds)
    return _in_helper_thread(action, seconds)


def _in_main_thread(action: Callable[[], T], seconds: float) -> T:
    deadline = time.perf_counter() + seconds
    active = [True]

    def interrupt(*_: object) -> None:
        if active[0] and time.perf_counter() >= deadline:
            raise _Interrupt

    previous = signal.signal(signal.SIGVTALRM, interrupt)
    # Two clocks, because SIGALRM belongs to the graders. Sleeping code burns no CPU, so a thread wakes it by the wall
    # clock; busy C code holds the interpreter lock, no thread can run, and the kernel's CPU clock strikes instead.
    finished = threading.Event()
    ticker = threading.Thread(target=_tick, args=(finished, seconds), daemon=True)
    ticker.start()
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        try:
            return action()
        finally:
            active[0] = False
    except _Interrupt:
        raise TimeLimitReached(f"took longer than {seconds:g} s") from None
    finally:
        active[0] = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        finished.set()
        ticker.join()
        signal.signal(signal.SIGVTALRM, previous if previous is not None else signal.SIG_DFL)


def _tick(finished: threading.Event, seconds: float) -> None:
    main, wait = threading.main_thread().ident, seconds
    while main is not None and not finished.wait(wait):
        signal.pthread_kill(main, signal.SIGVTALRM)
        wait = 0.1  # again, in case a bare `except:` inside the call caught the first one


def _in_helper_thread(action: Callable[[], T], seconds: float) -> T:
    values: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(action())
        except BaseException as error:  # carried to the calling thread and raised there
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="reward-call")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        # Takes effect at its next Python instruction; until then it is abandoned, not stopped.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Interrupt))
        raise TimeLimitReached(f"took longer than {seconds:g} s; its thread is abandoned")
    if errors:
        raise errors[0]
    return values[0]
