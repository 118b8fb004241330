import re
import signal
import threading
import time
from contextlib import suppress

import pytest

from rlalign.training.time_limit import TimeLimitReached, run_limited


def loop():
    while True:
        pass


def stubborn():
    for _ in range(10**9):
        with suppress(Exception):  # what careless rewards do
            loop()


def catastrophic():
    re.match(r"(a+)+$", "a" * 60 + "b")


@pytest.mark.parametrize("action", [loop, stubborn, catastrophic, lambda: time.sleep(1e6), lambda: 3 ** (10**9)])
def test_the_main_thread_is_interrupted(action):
    with pytest.raises(TimeLimitReached, match="longer than 0.1 s"):
        run_limited(action, 0.1)
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_values_and_exceptions_pass():
    assert run_limited(lambda: 5, 60.0) == 5
    with pytest.raises(KeyError, match="x"):
        run_limited(lambda: {}["x"], 60.0)


def test_another_thread_gets_values_exceptions_and_limits_too():
    outcomes = []

    def run():
        outcomes.append(run_limited(lambda: 5, 60.0))
        for action in (loop, lambda: {}["x"]):
            try:
                run_limited(action, 0.1)
            except (TimeLimitReached, KeyError) as error:
                outcomes.append(type(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert outcomes == [5, TimeLimitReached, KeyError]
    for thread in threading.enumerate():  # the abandoned loop was told to end at its next instruction
        if thread.name == "reward-call":
            thread.join(10)
            assert not thread.is_alive()
