"""A reward that has nothing more to teach ends the run, or hands over to a graded one."""

from rlalign.diffusion.config import SampleRewardConfig
from rlalign.diffusion.rewards import Judge
from rlalign.diffusion.saturation import Saturation
from tests.diffusion.small_runs import PretendSimulator


def watch(stop_after, graded=None):
    judge = Judge(PretendSimulator(), SampleRewardConfig(function="given", graded=graded))
    return judge, Saturation(judge, stop_after, graded=graded)


def told(saturation, shares):
    return [saturation.update(k + 1, {"signal/group_frac": s, "reward/mean": 1.0}) for k, s in enumerate(shares)]


def test_it_stops_after_so_many_silent_steps_in_a_row():
    _, saturation = watch(3)
    assert told(saturation, [0.0, 0.1, 0.11, 0.0, 0.0]) == [[]] * 5
    assert saturation.ended == ""
    told(saturation, [0.0])
    assert saturation.ended.startswith("Stopped after step 1: for 3 steps in a row at most 10% of the groups")
    assert "(mean reward 1)" in saturation.ended


def test_without_a_limit_it_says_so_once():
    _, saturation = watch(0)
    notes = told(saturation, [0.0] * 6)
    assert [len(note) for note in notes] == [0, 0, 1, 0, 0, 0]
    assert saturation.ended == ""


def test_a_graded_reward_takes_over_once_and_then_it_stops():
    judge, saturation = watch(2, graded="margin")
    notes = told(saturation, [0.0, 0.0])
    assert notes[1][0].endswith("from now on the reward is `margin`.")
    assert judge.target == "margin" and saturation.ended == ""
    told(saturation, [0.5, 0.0, 0.0])
    assert saturation.ended


def test_its_count_is_resumed():
    _, one = watch(3)
    told(one, [0.0, 0.0])
    _, other = watch(3)
    other.load_state_dict(one.state_dict())
    told(other, [0.0])
    assert other.ended
