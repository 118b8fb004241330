"""Functions and simulators judge samples; what they do wrong is one sentence, and one bad sample is left out."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from rlalign.config import ConfigError
from rlalign.diffusion.config import SampleRewardConfig
from rlalign.diffusion.rewards import Judge, Simulator, load_object
from rlalign.training.reward_call import RewardError
from tests.diffusion.small_runs import PretendSimulator

POINTS = np.array([[[-2.0, 0.0]], [[0.25, 0.0]], [[1.0, 0.0]]])


def settings(**more):
    return SampleRewardConfig(function="given from Python", **more)


def test_a_function_gets_samples_prompts_and_the_columns_it_names():
    seen = {}

    def reward(samples, prompts, weight):
        seen.update(samples=samples, prompts=prompts, weight=weight)
        return [w * float(s.sum()) for s, w in zip(samples, weight, strict=True)]

    judged = Judge(reward)(POINTS, ["a", "b", "c"], {"weight": [1, 2, 3], "unused": [0, 0, 0]})
    assert judged.outcome.tolist() == [-2.0, 0.5, 3.0]
    assert judged.scored.tolist() == [True] * 3
    assert judged.parts["reward"].tolist() == [-2.0, 0.5, 3.0]
    assert seen["prompts"] == ["a", "b", "c"] and len(seen["samples"]) == 3
    assert Judge(reward).gold == "reward"


def test_a_function_that_takes_anything_gets_all_columns_and_nothing_of_language_models():
    seen = {}

    def reward(samples, prompts, **columns):
        seen.update(columns)
        return [1.0] * len(samples)

    Judge(reward)(POINTS, ["a"] * 3, {"k": [1, 2, 3]})
    assert seen == {"k": [1, 2, 3]}


def test_none_leaves_a_sample_out():
    judged = Judge(lambda samples, prompts: [1.0, None, 3.0])(POINTS, ["a"] * 3)
    assert judged.scored.tolist() == [True, False, True]
    assert judged.outcome.tolist() == [1.0, 0.0, 3.0]
    assert math.isnan(judged.parts["reward"][1])


def test_images_reach_the_reward_as_they_are():
    images = [Image.new("RGB", (4, 4), (level, 0, 0)) for level in (0, 255)]
    judged = Judge(lambda samples, prompts: [s.getpixel((0, 0))[0] for s in samples])(images, ["a", "b"])
    assert judged.outcome.tolist() == [0.0, 255.0]


def test_a_simulators_proxy_is_the_reward_and_all_outcomes_are_kept():
    simulator = PretendSimulator()
    assert isinstance(simulator, Simulator)
    judge = Judge(simulator)
    judged = judge(POINTS, [0, 0, 0])
    assert judged.outcome.tolist() == [0.0, 1.0, 1.0]
    assert judged.parts["robust"].tolist() == [0.0, 0.0, 1.0]
    assert sorted(judged.parts) == ["margin", "robust", "stable"]
    assert judge.gold == "robust"
    judge.turn_to("robust")
    assert judge(POINTS, [0, 0, 0]).outcome.tolist() == [0.0, 0.0, 1.0]
    again = Judge(PretendSimulator())
    again.load_state_dict(judge.state_dict())
    assert again.target == "robust"
    judge.close()
    assert simulator.closed


def test_another_outcome_may_be_the_reward():
    judged = Judge(PretendSimulator(), settings(outcome="margin"))(POINTS, [0] * 3)
    assert judged.outcome.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (-2, 0.25, 1)], abs=1e-6)


def test_unknown_outcomes_and_infinities_leave_the_sample_out():
    judged = Judge(PretendSimulator(unknown_below=-1.0))(POINTS, [0] * 3)
    assert judged.scored.tolist() == [False, True, True]

    class Overflows(PretendSimulator):
        def simulate(self, samples):
            return {**super().simulate(samples), "stable": np.array([np.inf, 1.0, -np.inf])}

    assert Judge(Overflows())(POINTS, [0] * 3).scored.tolist() == [False, True, False]


def test_latents_reach_a_simulator_as_an_array():
    seen = []

    class Looks(PretendSimulator):
        def simulate(self, samples):
            seen.append(samples)
            return super().simulate(samples)

    Judge(Looks())(torch.from_numpy(POINTS).bfloat16(), [0] * 3)
    assert isinstance(seen[0], np.ndarray) and seen[0].dtype == np.float32


class Short(PretendSimulator):
    def simulate(self, samples):
        return {**super().simulate(samples), "stable": np.ones(2)}


class NoGold(PretendSimulator):
    gold = "truth"


def test_a_simulator_that_answers_wrongly_is_told_so():
    with pytest.raises(
        RewardError, match=r"returned `stable` of shape \[2\] for 3 samples; return one number per sample"
    ):
        Judge(Short())(POINTS, [0] * 3)
    with pytest.raises(RewardError, match="`gold`='truth' is none of margin, robust, stable"):
        Judge(NoGold())(POINTS, [0] * 3)
    with pytest.raises(RewardError, match=r"judged none of 3 samples \(`stable` is NaN for all\); look at the samples"):
        Judge(PretendSimulator(unknown_below=np.inf))(POINTS, [0] * 3)
    with pytest.raises(ConfigError, match="`reward.outcome`='height' is none of margin, robust, stable"):
        Judge(PretendSimulator(), settings(outcome="height"))(POINTS, [0] * 3)
    # Known at once, not when the reward saturates after hours.
    with pytest.raises(ConfigError, match="`reward.graded`='height' is none of margin, robust, stable"):
        Judge(PretendSimulator(), settings(graded="height"))(POINTS, [0] * 3)


def raises(samples, prompts):
    raise KeyError("colour")


BAD = {
    "raises": (raises, r"raised KeyError: 'colour'.*An error in the first batch stops the run"),
    "returns_none": (
        lambda samples, prompts: None,
        r"returned None for the whole batch.*\(or None\) per sample, 3 here",
    ),
    "too_few": (lambda samples, prompts: [1.0], "returned 1 rewards for 3 samples; return a list with one number"),
    "nan": (
        lambda samples, prompts: [1.0, float("nan"), 1.0],
        "returned nan; return None where the reward is undefined",
    ),
    "text": (lambda samples, prompts: ["good"] * 3, "returned str 'good'; return a float, a bool or None"),
    "silent": (lambda samples, prompts: [None] * 3, "returned None for all 3 rows of the first batch.*it can judge"),
    "asks": (lambda samples, prompts, answer: [1.0] * 3, "missing 1 required positional argument: 'answer'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_function_that_fails_is_told_in_words_of_samples(tmp_path, name):
    reward, message = BAD[name]
    with pytest.raises(RewardError, match=message) as caught:
        Judge(reward, errors_dir=tmp_path)(POINTS, ["a red cube"] * 3)
    assert "completion" not in str(caught.value) and "rlalign check" not in str(caught.value)
    if name == "raises":
        assert "a red cube" in str(caught.value)
        assert (tmp_path / "reward-reward-raised.json").exists()


def test_later_failures_abstain_until_the_budget_of_the_reward_is_spent():
    def reward(samples, prompts):
        if -2.0 in [float(s[0, 0]) for s in samples]:
            raise ValueError("left")
        return [1.0] * len(samples)

    good = np.zeros((20, 1, 2))
    judge = Judge(reward, settings(error_budget=0.01))
    judge(good, [0] * 20)
    judged = judge(POINTS, [0] * 3)
    assert judged.scored.tolist() == [False, True, True]
    judge(POINTS, [0] * 3)
    with pytest.raises(RewardError, match=r"`reward.error_budget`=0.01"):
        judge(POINTS, [0] * 3)
    strict = Judge(reward, settings(on_error="raise"))
    strict(good, [0] * 20)
    with pytest.raises(RewardError, match=r"`reward.on_error=raise` stops the run"):
        strict(POINTS, [0] * 3)
    soft = Judge(reward, settings(on_error="penalty", penalty=-1.0))
    soft(good, [0] * 20)
    assert soft(POINTS, [0] * 3).outcome.tolist() == [-1.0, 1.0, 1.0]


def test_neither_a_function_nor_a_simulator():
    with pytest.raises(
        ConfigError, match=r"`reward` must be a function of \(samples, prompts\) or a Simulator, got int"
    ):
        Judge(3)
    with pytest.raises(ConfigError, match=r"`reward` is the class PretendSimulator; pass one of its objects: Pretend"):
        Judge(PretendSimulator)


def test_rewards_are_imported_by_name(tmp_path):
    here = "tests.diffusion.small_runs"
    judge = Judge(SampleRewardConfig(function=f"{here}:PretendSimulator", args={"threshold": 0.5}))
    assert judge(POINTS, [0] * 3).outcome.tolist() == [0.0, 0.0, 1.0]
    judge = Judge(SampleRewardConfig(function=f"{here}:to_the_right"))
    assert judge(POINTS, [0] * 3).outcome.tolist() == [-2.0, 0.25, 1.0]
    with pytest.raises(ConfigError, match=f"`reward.function`={here}:nothing: '{here}' has no 'nothing'"):
        Judge(SampleRewardConfig(function=f"{here}:nothing"))
    with pytest.raises(ConfigError, match="has no 'PretendSimulater' .did you mean 'PretendSimulator'"):
        Judge(SampleRewardConfig(function=f"{here}:PretendSimulater"))
    with pytest.raises(ConfigError, match=r"`reward.function`=.*PretendSimulator: .*unexpected keyword"):
        Judge(SampleRewardConfig(function=f"{here}:PretendSimulator", args={"limit": 1}))
    with pytest.raises(ConfigError, match=r"`eval.watch`=nowhere:at_all: No module named 'nowhere'"):
        load_object("nowhere:at_all", "eval.watch")
