"""Rewards that misbehave in every way we know, imported by worker processes from the path of this file. No test here.

Each is harmless until a completion says "bad", so that the first batch of a run can pass.
"""

import asyncio
import ctypes
import math
import os
import random
import re
import sys
import time
from fractions import Fraction


def _good(completions):
    return [float(len(text)) for text in completions]


def _replaced(value):
    """A reward that returns `value` for bad rows and the length for the others."""
    return lambda completions: [value if text == "bad" else float(len(text)) for text in completions]


# What is returned for a row.
def nan(completions):
    return _replaced(math.nan)(completions)


def inf(completions):
    return _replaced(math.inf)(completions)


def minus_inf(completions):
    return _replaced(-math.inf)(completions)


def huge(completions):
    return _replaced(1e38)(completions)


def huge_int(completions):
    return _replaced(10**5000)(completions)


def text_value(completions):
    return _replaced("0.5")(completions)


def nested_list(completions):
    return _replaced([1.0])(completions)


def mapping(completions):
    return _replaced({"score": 1.0})(completions)


def complex_value(completions):
    return _replaced(1j)(completions)


def numpy_nan(completions):
    import numpy as np

    return np.array(_replaced(np.nan)(completions))


# What is returned as a whole, when any row is bad.
def _whole(completions, value):
    return value if "bad" in completions else _good(completions)


def too_short(completions):
    return _whole(completions, [1.0])


def too_long(completions):
    return _whole(completions, [1.0] * (len(completions) + 1))


def empty(completions):
    return _whole(completions, [])


def scalar(completions):
    return _whole(completions, 1.0)


def nothing(completions):
    return _whole(completions, None)


def text(completions):
    return _whole(completions, "1" * len(completions))


def dictionary(completions):
    return _whole(completions, dict.fromkeys(completions, 1.0))


def generator(completions):
    return _whole(completions, (1.0 for _ in completions))


def mapped(completions):
    return _whole(completions, map(len, completions))


def a_set(completions):
    return _whole(completions, set(completions))


def numpy_matrix(completions):
    import numpy as np

    return _whole(completions, np.ones((len(completions), 1)))


def zero_dimensional(completions):
    import numpy as np

    return _whole(completions, np.float64(1.0))


def endless_generator(completions):
    import itertools

    return _whole(completions, itertools.repeat(1.0))


# What is raised.
def _on_bad(completions, action):
    for text in completions:
        if text == "bad":
            action()
    return _good(completions)


def _raise(error):
    raise error


def raises(completions):
    return _on_bad(completions, lambda: _raise(RuntimeError("on purpose\nwith a second line")))


def key_error(completions):
    return _on_bad(completions, lambda: {}["answer"])


def exits(completions):
    return _on_bad(completions, sys.exit)


def interrupts(completions):
    return _on_bad(completions, lambda: _raise(KeyboardInterrupt()))


def recursion(completions):
    def deeper():
        deeper()

    return _on_bad(completions, deeper)


async def async_raises(completions):
    await asyncio.sleep(0)
    return _on_bad(completions, lambda: _raise(RuntimeError("on purpose")))


# What never ends.
def sleeps(completions):
    return _on_bad(completions, lambda: time.sleep(1e6))


def loops(completions):
    def forever():
        while True:
            pass

    return _on_bad(completions, forever)


def loops_and_catches(completions):
    def forever():
        while True:
            try:
                while True:
                    pass
            except BaseException:
                pass

    return _on_bad(completions, forever)


def regex(completions):
    return _on_bad(completions, lambda: re.match(r"(a+)+$", "a" * 60 + "b"))


def power(completions):
    return _on_bad(completions, lambda: 3 ** (10**9))


def c_loop(completions):
    return _on_bad(completions, lambda: sum(range(10**13)))


async def async_sleeps(completions):
    if "bad" in completions:
        await asyncio.sleep(1e6)
    return _good(completions)


def reads_stdin(completions):
    return _on_bad(completions, input)


# What ends the process.
def exits_hard(completions):
    return _on_bad(completions, lambda: os._exit(0))


def segfault(completions):
    return _on_bad(completions, lambda: ctypes.string_at(0))


def aborts(completions):
    return _on_bad(completions, os.abort)


def kills_itself(completions):
    return _on_bad(completions, lambda: os.kill(os.getpid(), 9))


def memory_hog(completions):
    def eat():
        hoard = []
        while True:
            hoard.append(bytearray(2**26))

    return _on_bad(completions, eat)


def closes_everything(completions):
    return _on_bad(completions, lambda: os.closerange(0, 100))


# What is odd, but no failure.
def forks_and_both_return(completions):
    os.fork()
    return _good(completions)


def forks_a_sleeper_then_dies(completions):
    def go():
        if os.fork() == 0:
            time.sleep(1e6)
        os._exit(1)

    return _on_bad(completions, go)


def mutates(prompts, completions, answer):
    scores = _good(completions)
    for column in (prompts, completions, answer):
        column.clear()
    return scores


def mutates_deep(completions, metadata):
    for entry in metadata:
        entry["seen"] = True
        entry["list"].append(1)
    return _good(completions)


def prints_a_megabyte(completions):
    print("x" * 2**20)
    os.write(1, b"y" * 2**20)
    sys.__stdout__.write('{"results": [[9, "ok", "", ""]]}\n')
    return _good(completions)


def closes_stdout(completions):
    sys.stdout.close()
    return _good(completions)


def seeds(completions):
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    return _good(completions)


def changes_directory(completions):
    os.chdir("/")
    return _good(completions)


def fractions_and_bools(completions):
    return [Fraction(1, 2) if i % 2 else True for i, _ in enumerate(completions)]


def all_none(completions):
    return [None for _ in completions]


def constant(completions):
    return [1.0 for _ in completions]


def flaky(completions, _calls=[]):  # noqa: B006
    """Fails once as a whole, then never again: a network that hiccups."""
    _calls.append(1)
    if "bad" in completions and not os.environ.get("_FLAKED"):
        os.environ["_FLAKED"] = "1"
        raise ConnectionError("hiccup")
    return _good(completions)


def only_alone(completions):
    """Fails on every batch of more than one row once a bad one has been seen."""
    if "bad" in completions or os.environ.get("_BROKEN"):
        os.environ["_BROKEN"] = "1"
        if len(completions) > 1:
            raise RuntimeError("cannot batch")
    return _good(completions)
