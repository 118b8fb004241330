import math

import numpy as np
import pytest

from rlalign.training.intervals import (
    bootstrap_interval,
    difference_interval,
    interquartile_mean,
    paired_bootstrap,
    standard_error,
    wilson_interval,
)


def test_standard_error_matches_hand_arithmetic():
    # 0,1,0,1: mean 1/2, squared deviations sum to 1, sample variance 1/3, divided by n = 4
    assert standard_error([0.0, 1.0, 0.0, 1.0]) == pytest.approx(math.sqrt(1 / 12))
    assert math.isnan(standard_error([3.0]))


def test_interquartile_mean_keeps_exactly_the_middle_half():
    assert interquartile_mean([100.0, 0.0, 3.0, 1.0]) == pytest.approx(2.0)
    # n = 5: the middle half spans positions 1.25 to 3.75, so weights 0, 3/4, 1, 3/4, 0 over 2.5
    assert interquartile_mean([0.0, 1.0, 2.0, 4.0, 1e9]) == pytest.approx((0.75 * 1 + 2 + 0.75 * 4) / 2.5)
    np.testing.assert_allclose(interquartile_mean(np.array([[0.0, 1.0, 3.0, 9.0], [4.0] * 4])), [2.0, 4.0])
    assert interquartile_mean([7.0]) == 7.0


def test_bootstrap_matches_the_normal_interval_where_that_is_right():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    found = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(size=40), resamples=400, level=0.9) for _ in range(400)]
    covered = sum(one.low <= 0.0 <= one.high for one in intervals) / 400
    assert 0.84 <= covered <= 0.94  # 0.9 up to the small-sample deficit of percentiles and 400 draws' noise


def test_bootstrap_is_seeded_and_does_not_depend_on_the_chunking(monkeypatch):
    values = np.random.default_rng(2).exponential(size=50)
    whole = bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) == whole
    assert bootstrap_interval(values, seed=4) != whole
    monkeypatch.setattr("rlalign.training.intervals._MAX_DRAWN", 777)
    assert bootstrap_interval(values, seed=3) == whole


def test_bootstrap_of_another_statistic():
    values = np.array([*range(100), 1e6])
    assert bootstrap_interval(values, statistic=interquartile_mean).high < 100
    assert bootstrap_interval(values).high > 1000


def test_pairing_removes_the_difficulty_of_the_problems():
    difficulty = np.random.default_rng(5).normal(0, 10, size=200)
    after = difficulty + 1.0 + np.random.default_rng(6).normal(0, 0.1, size=200)
    paired = paired_bootstrap(difficulty, after)
    assert paired.estimate == pytest.approx(1.0, abs=0.02)
    assert paired.high - paired.low < 0.05
    assert paired.sign == 1
    flipped = paired_bootstrap(after, difficulty)
    assert flipped.sign == -1
    loose = difference_interval(difficulty.mean(), standard_error(difficulty), after.mean(), standard_error(after))
    assert loose.sign == 0


def test_no_change_has_no_sign():
    rng = np.random.default_rng(8)
    assert paired_bootstrap(rng.normal(size=100), rng.normal(size=100)).sign == 0


def test_one_value_gives_no_interval():
    found = bootstrap_interval([2.0])
    assert found.estimate == 2.0
    assert not found.defined
    assert found.sign == 0


def test_difference_interval_matches_hand_arithmetic():
    # standard errors 0.03 and 0.04 combine to 0.05
    found = difference_interval(0.2, 0.03, 0.5, 0.04)
    assert found.estimate == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - 1.959964 * 0.05)
    assert not difference_interval(0.2, math.nan, 0.5, 0.04).defined


def test_wilson_interval_matches_the_closed_forms():
    # at 0 successes the upper end is z^2 / (n + z^2)
    z = 1.9599639845
    assert wilson_interval(0, 10).low == pytest.approx(0.0, abs=1e-12)
    assert wilson_interval(0, 10).high == pytest.approx(z**2 / (10 + z**2))
    assert wilson_interval(10, 10).low == pytest.approx(10 / (10 + z**2))
    assert wilson_interval(50, 100).low == pytest.approx(0.4038, abs=1e-4)  # Brown, Cai and DasGupta's form by hand


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "at least one value"),
        (lambda: bootstrap_interval([1.0, math.nan]), "1 of 2 values are NaN or infinite"),
        (lambda: bootstrap_interval([1.0, 2.0], level=95.0), "between 0 and 1"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "1 before and 2 after"),
        (lambda: wilson_interval(3, 2), "3 of 2"),
        (lambda: interquartile_mean([]), "at least one value"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
