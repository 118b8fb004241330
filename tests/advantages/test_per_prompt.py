"""Statistics that outlive a rollout: running baselines per prompt, and prompts that are solved for good."""

import math

import pytest
import torch

from rlalign.advantages import PassRateHistory, PerPromptRunning, build_estimator
from rlalign.buffers import Rollout

COUNTER = iter(range(10**6))


def make_rollout(outcomes, prompts, *, scored=None, group=None):
    """One decision per rollout; every prompt is a new group, as in every collection."""
    first = {prompt: next(COUNTER) for prompt in prompts}
    rows = len(outcomes)
    flags = torch.zeros(rows, 1, dtype=torch.bool)
    return Rollout(
        log_prob_old=torch.zeros(rows, 1, dtype=torch.float64),
        rewards=torch.tensor(outcomes, dtype=torch.float64)[:, None],
        mask=~flags,
        terminated=~flags,
        truncated=flags,
        group=torch.tensor([first[prompt] for prompt in prompts] if group is None else group),
        prompt_id=torch.tensor(prompts),
        scored=torch.ones(rows, dtype=torch.bool) if scored is None else torch.tensor(scored),
    )


def advantages(estimator, *args, **kwargs):
    return estimator(make_rollout(*args, **kwargs)).advantages[:, 0].tolist()


def test_a_prompt_is_compared_with_its_own_past():
    estimator = build_estimator(PerPromptRunning(window=4, min_count=2, eps=0.0))
    # 1 0: mean 1/2, population deviation 1/2
    assert advantages(estimator, [1, 0], [7, 7]) == [1.0, -1.0]
    # 1 1 after 1 0: mean 3/4, deviation sqrt(3)/4; a group alone would have no signal here
    assert advantages(estimator, [1, 1], [7, 7]) == pytest.approx([1 / math.sqrt(3)] * 2)
    # the window of 4 has forgotten the failure: nothing varies any more
    assert advantages(estimator, [1, 1], [7, 7]) == [0.0, 0.0]
    assert estimator.metrics["advantage/groups_without_signal"] == 1
    assert estimator.metrics["advantage/prompts_remembered"] == 1


def test_a_prompt_with_little_past_uses_the_batch():
    estimator = build_estimator(PerPromptRunning(window=8, min_count=3, eps=0.0))
    # prompt 1 has three outcomes 0 0 3: mean 1, deviation sqrt(2). Prompt 2 has one: the batch 0 0 3 5 has mean 2 and
    # variance (4 + 4 + 1 + 9) / 4 = 4.5
    got = advantages(estimator, [0, 0, 3, 5], [1, 1, 1, 2])
    assert got == pytest.approx([-1 / math.sqrt(2), -1 / math.sqrt(2), 2 / math.sqrt(2), 3 / math.sqrt(4.5)])


def test_the_deviation_of_the_batch_can_divide_instead():
    estimator = build_estimator(PerPromptRunning(window=8, min_count=2, scale="batch", eps=0.0))
    # means 1 and 6; the batch 0 2 4 8 has mean 3.5 and variance (12.25 + 2.25 + .25 + 20.25) / 4 = 8.75
    got = advantages(estimator, [0, 2, 4, 8], [1, 1, 2, 2])
    assert got == pytest.approx([value / math.sqrt(8.75) for value in (-1, 1, -2, 2)])


def test_a_failed_rollout_is_not_remembered():
    estimator = build_estimator(PerPromptRunning(window=4, min_count=2, eps=0.0))
    assert advantages(estimator, [1, 0, math.nan], [7, 7, 7], scored=[True, True, False]) == [1.0, -1.0, 0.0]
    assert estimator.state_dict()["outcomes"].tolist() == [1.0, 0.0]


def test_equal_outcomes_have_no_advantage_however_they_round():
    estimator = build_estimator(PerPromptRunning(window=16, min_count=2, eps=0.0))
    assert advantages(estimator, [0.1] * 9, [7] * 9) == [0.0] * 9


def test_a_reward_that_is_not_finite_is_refused_before_it_is_remembered():
    estimator = build_estimator(PerPromptRunning())
    with pytest.raises(ValueError, match="not finite"):
        estimator(make_rollout([1, math.inf], [7, 7]))
    assert estimator.state_dict()["outcomes"].tolist() == []


def test_a_restored_estimator_goes_on_as_if_nothing_happened():
    cfg = PerPromptRunning(window=4, min_count=2)
    estimator, restored = build_estimator(cfg), build_estimator(cfg)
    estimator(make_rollout([1, 0, 0.3, 0.7, 0.1], [7, 7, 2, 2, 2]))
    restored(make_rollout([5, 6], [99, 99]))  # replaced by the load
    restored.load_state_dict(estimator.state_dict())
    rollout = make_rollout([0.25, 0.5, 1.0], [2, 7, 2])
    assert restored(rollout).advantages.tolist() == estimator(rollout).advantages.tolist()
    assert 99 not in restored.state_dict()["prompt_id"].tolist()
    assert all(isinstance(value, torch.Tensor) for value in estimator.state_dict().values())


# ---------------------------------------------------------------- No-Positive-Resampling


def test_a_prompt_solved_at_the_threshold_is_not_sampled_again():
    history = PassRateHistory(threshold=0.9)
    history.update(make_rollout([1] * 9 + [0] + [1] * 8 + [0] * 2, [4] * 10 + [5] * 10))
    assert history.keep([4, 5, 6]).tolist() == [False, True, True]  # 6 was never seen
    history.update(make_rollout([0] * 10, [4] * 10))
    assert history.keep([4]).tolist() == [False]  # for good


def test_the_pass_rate_is_of_one_collection_and_of_scored_rollouts():
    history = PassRateHistory(threshold=0.9)
    # the same prompt twice in a batch, 1 1 and 0 0: two groups; pooled it would be 1/2, but one was solved
    history.update(make_rollout([1, 1, 0, 0], [4, 4, 4, 4], group=[0, 0, 1, 1]))
    # 1 of 1 scored
    history.update(make_rollout([1, math.nan], [5, 5], scored=[True, False]))
    assert history.keep([4, 5]).tolist() == [False, False]


def test_the_pass_rate_follows_the_range_of_the_reward():
    history = PassRateHistory(threshold=0.9, reward_range=(-1.0, 1.0))
    history.update(make_rollout([1, 1, 1, -1] + [1, 1, 1, 1], [1] * 4 + [2] * 4))
    assert history.state_dict()["pass_rate"].tolist() == [0.75, 1.0]
    assert history.keep([1, 2]).tolist() == [True, False]


def test_a_restored_history_keeps_the_same_prompts():
    history, restored = PassRateHistory(), PassRateHistory()
    history.update(make_rollout([1, 1, 0, 1], [1, 1, 2, 2]))
    restored.load_state_dict(history.state_dict())
    assert restored.keep([1, 2, 3]).tolist() == history.keep([1, 2, 3]).tolist() == [False, True, True]
