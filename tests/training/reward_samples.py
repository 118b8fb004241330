"""Well-behaved rewards that a worker process imports by the path of this file. No test stands here."""

import os
import random
import signal
import sys


def length(completions):
    return [float(len(text)) for text in completions]


def matches(completions, answer):
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


def what_it_gets(**given):
    return [float(len(given)) for _ in given["completions"]]


def none_for_empty(completions):
    return [len(text) if text else None for text in completions]


async def asynchronous(completions):
    return [1.0 for _ in completions]


def logs(completions, log_metric, log_extra, trainer_state):
    log_metric("my/metric", trainer_state.global_step + 0.5)
    log_extra("shout", [text.upper() for text in completions])
    return [0.0 for _ in completions]


def process_id(completions):
    return [os.getpid() for _ in completions]


def draws(completions):
    return [random.random() for _ in completions]


def has_torch(completions):
    return ["torch" in sys.modules for _ in completions]


def is_tuple(completions, grid):
    return [isinstance(value, tuple) and isinstance(value[0], list) for value in grid]


def needs_alarm(completions):
    """As math-verify does: a time limit of its own on SIGALRM, possible in a main thread only."""

    def ring(*_):
        raise TimeoutError

    scores = []
    for text in completions:
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05 if text == "slow" else 60)
        try:
            while text == "slow":
                pass
            scores.append(1.0)
        except TimeoutError:
            scores.append(0.0)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    return scores


def rank_in_batch(completions):
    """Compares the rows of a batch, and cannot stand the completion "bad"."""
    lengths = [len(text) for text in completions]
    if "bad" in completions:
        raise ValueError("bad row")
    return [sum(other < mine for other in lengths) / len(lengths) for mine in lengths]


class Scaled:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, completions):
        return [self.scale * len(text) for text in completions]


def scaled(completions, scale=1.0):
    return [scale * len(text) for text in completions]
