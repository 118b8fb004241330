"""Learning-rate schedules against arithmetic."""

import math

import pytest

from rlalign.training.schedules import lr_scale


def scales(steps: int, **settings) -> list[float]:
    return [lr_scale(step, total_steps=steps, **settings) for step in range(steps)]


def test_linear_by_hand() -> None:
    # warm-up 1/2, 2/2; then p = 0, 1/4, 2/4, 3/4
    assert scales(6, warmup_steps=2, schedule="linear") == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_linear_with_a_floor_by_hand() -> None:
    # 0.2 + 0.8 (1 - p), p = 0, 1/4, 1/2, 3/4
    assert scales(4, warmup_steps=0, schedule="linear", floor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_cosine_by_hand() -> None:
    # (1 + cos(pi p)) / 2 at p = 0, 1/3, 2/3 is 1, 3/4, 1/4
    assert scales(3, warmup_steps=0, schedule="cosine") == pytest.approx([1.0, 0.75, 0.25])
    assert lr_scale(0, warmup_steps=0, total_steps=3, schedule="cosine", floor=0.1) == 1.0


def test_constant_only_warms_up() -> None:
    assert scales(5, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_floor_holds_past_the_end(schedule) -> None:
    for step in (10, 11, 10**9):
        scale = lr_scale(step, warmup_steps=2, total_steps=10, schedule=schedule, floor=0.1)
        assert math.isclose(scale, 0.1)


def test_no_update_of_a_run_has_rate_zero() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert min(scales(7, warmup_steps=3, schedule=schedule)) > 0.0


def test_a_run_that_is_all_warm_up() -> None:
    assert scales(2, warmup_steps=2, schedule="cosine") == [0.5, 1.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"step": -1, "warmup_steps": 0, "total_steps": 1},
        {"step": 0, "warmup_steps": 0, "total_steps": 0},
        {"step": 0, "warmup_steps": 0, "total_steps": 1, "floor": 1.5},
        {"step": 0, "warmup_steps": 0, "total_steps": 1, "floor": math.nan},
        {"step": 0, "warmup_steps": 2, "total_steps": 1},
        {"step": 0, "warmup_steps": -1, "total_steps": 1},
    ],
)
def test_bad_arguments_are_refused(settings) -> None:
    with pytest.raises(ValueError, match="must lie between|need step"):
        lr_scale(**settings)
