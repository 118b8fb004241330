import warnings

import pytest

from rlalign.training.no_signal import NoSignalError, NoSignalWarning, SignalWatch, cause


def run(watch: SignalWatch, steps: list[int]) -> list[bool]:
    """Which steps warned; each entry says how many of 10 groups had no signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [watch.update(i, groups=10, groups_without_signal=n) is not None for i, n in enumerate(steps)]


def test_warns_after_patience_then_after_twice_and_four_times_as_many():
    # over 90 % means 10 of 10; at exactly 9 of 10 the streak ends
    assert run(SignalWatch(patience=2), [10] * 8) == [False, True, False, True, False, False, False, True]
    assert run(SignalWatch(patience=2), [10, 9, 10, 10]) == [False, False, False, True]
    assert run(SignalWatch(patience=1, threshold=0.5), [5, 6]) == [False, True]


def test_the_warning_names_cause_and_fix():
    with pytest.warns(NoSignalWarning, match=r"step 4: for 1 steps .* \(8 of 8 groups now\).*too hard.*samples/"):
        SignalWatch(patience=1).update(4, groups=8, groups_without_signal=8, rewards=[0.0] * 8)
    assert "task is solved" in cause([1.0, 1.0])
    assert "Every reward is 0.3" in cause([0.3, 0.3])
    assert "prompts differ" in cause([0.0, 1.0])
    assert "No row was scored" in cause([float("nan")])


def test_stops_when_asked():
    watch = SignalWatch(patience=100, stop_after=3)
    assert run(watch, [10, 10]) == [False, False]
    with pytest.raises(NoSignalError, match="for 3 steps in a row .* Stopped by `stop_without_signal`=3"):
        watch.update(2, groups=10, groups_without_signal=10)


def test_state_survives_a_checkpoint():
    watch = SignalWatch(patience=2)
    run(watch, [10, 10, 10])
    resumed = SignalWatch(patience=2)
    resumed.load_state_dict(watch.state_dict())
    assert run(resumed, [10]) == [True]


@pytest.mark.parametrize("options", [{"patience": 0}, {"threshold": 1.0}, {"stop_after": -1}])
def test_settings_are_checked(options):
    with pytest.raises(ValueError, match="are needed, got"):
        SignalWatch(**options)
