"""The stopwatch, on a clock that the test turns."""

import pytest

from rlalign.training import stopwatch
from rlalign.training.stopwatch import Stopwatch


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stopwatch, "perf_counter", clock)
    return clock


def test_phases_add_up_and_the_step_is_all_of_it(clock):
    watch = Stopwatch()
    for seconds in (1.0, 2.5):
        with watch("generate"):
            clock.now += seconds
    clock.now += 0.25
    with watch("train"):
        clock.now += 4.0
    assert watch.lap() == {"time/generate_s": 3.5, "time/train_s": 4.0, "time/step_s": 7.75}


def test_restart_forgets_what_lies_between_steps(clock):
    watch = Stopwatch()
    with watch("generate"):
        clock.now += 5.0
    clock.now += 60.0  # an evaluation
    watch.restart()
    with watch("reward"):
        clock.now += 0.5
    assert watch.lap() == {"time/reward_s": 0.5, "time/step_s": 0.5}


def test_a_phase_that_fails_is_counted_until_it_failed(clock):
    watch = Stopwatch()

    def fail() -> None:
        with watch("reward"):
            clock.now += 2.0
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert watch.lap()["time/reward_s"] == 2.0


def test_nested_phases_each_count_their_own_time(clock):
    watch = Stopwatch()
    with watch("score"):
        clock.now += 1.0
        with watch("generate"):
            clock.now += 2.0
    assert watch.lap() == {"time/generate_s": 2.0, "time/score_s": 3.0, "time/step_s": 3.0}
