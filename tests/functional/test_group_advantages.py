"""Advantages of whole rollouts against the other rollouts of their group, or of the batch."""

import math

import pytest
import torch

from rlalign.functional.advantages import (
    batch_scaled,
    beta_normalized,
    greedy_baseline,
    group_relative,
    leave_one_out,
    length_weighted,
    max_likelihood,
    reinforce_plus_plus_baseline,
)
from tests.reference import advantages as reference

NAN, INF = math.nan, math.inf


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def lengths_of(rewards):
    return (torch.arange(len(rewards)) * 7) % 5 + 1


# Every estimator that compares the rollouts of a group, called as estimator(rewards, group, scored=...).
ESTIMATORS = {
    "group_relative": group_relative,
    "centred": lambda r, g, scored=None: group_relative(r, g, scale=False, scored=scored),
    "leave_one_out": leave_one_out,
    "beta_normalized": lambda r, g, scored=None: beta_normalized(r, g, reward_range=(-10, 10), scored=scored),
    "beta_fixed": lambda r, g, scored=None: beta_normalized(
        r, g, alpha=1.5, beta=1.5, reward_range=(-10, 10), scored=scored
    ),
    "max_likelihood": max_likelihood,
    "length_weighted": lambda r, g, scored=None: length_weighted(r, g, lengths_of(r), scored=scored),
    "batch_scaled": batch_scaled,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "token_whitened": lambda r, g, scored=None: reinforce_plus_plus_baseline(
        r, g, lengths=lengths_of(r), scored=scored
    ),
}
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS.values(), ids=ESTIMATORS.keys())


def random_rewards(seed, groups=5, size=4):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.rand(groups * size, generator=generator, dtype=torch.float64) + 0.1
    group = (torch.arange(groups * size) // size)[torch.randperm(groups * size, generator=generator)] * 3 + 11
    return rewards, group


# ---------------------------------------------------------------- hand arithmetic


def test_group_relative_matches_hand_arithmetic():
    # groups {1,0} and {0,1}: mean 1/2, sample deviation sqrt(1/2), so (1 - 1/2) / sqrt(1/2) = sqrt(1/2)
    got = group_relative(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([7, 7, 9, 9]), eps=0.0)
    torch.testing.assert_close(got, torch.tensor([1.0, -1.0, -1.0, 1.0]) * 2**-0.5)


def test_sample_and_population_deviation_differ_by_root_two_for_pairs():
    """Trap: which deviation. G = 2 is where it matters most."""
    rewards, group = f64([1.0, 0.0]), torch.tensor([0, 0])
    sample, population = (group_relative(rewards, group, unbiased=u, eps=0.0) for u in (True, False))
    assert population.tolist() == [1.0, -1.0]
    torch.testing.assert_close(population / sample, f64([2.0**0.5] * 2))


def test_the_default_eps_is_the_one_of_trl():
    # 1e-4 beside a deviation of 1e-3 sqrt(1/2) takes an eighth off; 1e-6 would not show
    got = group_relative(f64([1e-3, 0.0]), torch.tensor([0, 0]))
    assert got[0].item() == pytest.approx(5e-4 / (1e-3 * 0.5**0.5 + 1e-4))


def test_leave_one_out_matches_hand_arithmetic():
    # 3 against mean(1, 2), 1 against mean(3, 2), 2 against mean(3, 1)
    assert leave_one_out(f64([3.0, 1.0, 2.0]), torch.tensor([0, 0, 0])).tolist() == [1.5, -1.5, 0.0]


def test_max_likelihood_matches_hand_arithmetic():
    rewards = f64([1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0])
    got = max_likelihood(rewards, torch.arange(12) // 4)
    assert got.tolist() == [3, -1, -1, -1, 1, 1, -1, -1, 0, 0, 0, 0]


def test_max_likelihood_refuses_negative_rewards_unless_they_are_unscored():
    # 1 and -0.9 average to 0.05, which would give advantages of +-19
    rewards, group = f64([1.0, -0.9, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"needs rewards >= 0, got -0.9.*`advantage.type`"):
        max_likelihood(rewards, group)
    assert max_likelihood(rewards, group, scored=torch.tensor([True, False, True, True])).tolist() == [0, 0, 1, -1]


def test_length_weighted_matches_hand_arithmetic():
    # lengths 1 and 3: baseline (1 x 1 + 3 x 0) / 4
    got = length_weighted(f64([1.0, 0.0]), torch.tensor([2, 2]), torch.tensor([1, 3]))
    assert got.tolist() == [0.75, -0.25]
    assert length_weighted(f64([1.0, 0.0]), torch.tensor([2, 2]), f64([2.0, 2.0])).tolist() == [0.5, -0.5]


def test_length_weighted_baseline_is_the_one_of_least_variance():
    # With ||score||² = length, E[l (r - b)²] is least at b = Σ l r / Σ l.
    rewards, lengths = f64([1.0, 0.2, 0.0, 0.7]), f64([4.0, 9.0, 1.0, 2.0])
    baseline = (rewards - length_weighted(rewards, torch.zeros(4).long(), lengths))[0]
    best = (lengths * (rewards - baseline) ** 2).sum()
    for shift in (-1e-3, 1e-3):
        assert (lengths * (rewards - baseline - shift) ** 2).sum() > best


def test_greedy_baseline_matches_hand_arithmetic_and_keeps_constant_groups():
    rewards, greedy = f64([1.0, 1.0, 0.0, NAN]), f64([0.0, 0.0, 0.25, 0.25])
    got = greedy_baseline(rewards, greedy, scored=torch.tensor([True, True, True, False]))
    assert got.tolist() == [1.0, 1.0, -0.25, 0.0]
    with pytest.raises(ValueError, match="reward of rollout 3 is nan"):
        greedy_baseline(rewards, greedy)
    with pytest.raises(ValueError, match="reward of rollout 1 is inf"):
        greedy_baseline(f64([1.0, 1.0]), f64([0.0, INF]))


def test_batch_scaled_matches_hand_arithmetic():
    # centred 1/2 -1/2 | 2 -2 | 0 0: sum of squares 8.5 over 6 - 1
    got = batch_scaled(f64([1.0, 0.0, 4.0, 0.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1, 2, 2]), eps=0.0)
    torch.testing.assert_close(got, f64([0.5, -0.5, 2.0, -2.0, 0.0, 0.0]) / math.sqrt(8.5 / 5))


def test_batch_scaling_is_not_what_trl_calls_batch():
    """Trap: TRL's scale_rewards="batch" divides by the deviation of the rewards, not of the centred ones."""
    rewards, group = f64([1.0, 0.0, 11.0, 10.0]), torch.tensor([0, 0, 1, 1])  # prompts of different difficulty
    ours = batch_scaled(rewards, group, eps=0.0)
    trl = group_relative(rewards, group, scale=False) / (rewards.std() + 1e-4)
    assert ours[0].item() == pytest.approx(0.5 / math.sqrt(1 / 3))
    assert trl[0].item() == pytest.approx(0.5 / 5.8028, rel=1e-3)
    # Equally hard prompts: the same number, but for eps.
    same = f64([1.0, 0.0, 0.0, 1.0])
    torch.testing.assert_close(
        batch_scaled(same, group, eps=1e-4), group_relative(same, group, scale=False) / (same.std() + 1e-4)
    )


def test_reinforce_plus_plus_baseline_matches_hand_arithmetic():
    # centred 1 -1 | 3 -3: mean 0, variance 20/3. With lengths 1 1 1 3: mean (1 - 1 + 3 - 9)/6 = -1,
    # deviations 2 0 4 -2 squared and repeated: (4 + 0 + 16 + 3 x 4) / 5 = 6.4
    rewards, group = f64([2.0, 0.0, 6.0, 0.0]), torch.tensor([0, 0, 1, 1])
    whole = reinforce_plus_plus_baseline(rewards, group, eps=0.0)
    torch.testing.assert_close(whole, f64([1.0, -1.0, 3.0, -3.0]) / math.sqrt(20 / 3))
    tokens = reinforce_plus_plus_baseline(rewards, group, lengths=torch.tensor([1, 1, 1, 3]), eps=0.0)
    torch.testing.assert_close(tokens, f64([2.0, 0.0, 4.0, -2.0]) / math.sqrt(6.4))


def test_a_group_without_signal_is_not_pushed_by_the_mean_of_the_batch():
    # Whitening by tokens shifts by a mean that is not 0; a group of equal rewards must stay at 0 all the same.
    rewards, group = f64([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    got = reinforce_plus_plus_baseline(rewards, group, lengths=torch.tensor([1, 4, 2, 2]))
    assert got[2:].tolist() == [0.0, 0.0]
    assert got[0].item() != pytest.approx(-got[1].item())  # the mean did shift the others


# ---------------------------------------------------------------- agreement with loops


@pytest.mark.parametrize("seed", range(5))
def test_estimators_agree_with_loops(seed):
    rewards, group = random_rewards(seed)
    r, g, lengths = rewards.tolist(), group.tolist(), lengths_of(rewards)
    pairs = [
        (group_relative(rewards, group), reference.group_relative(r, g, unbiased=True, eps=1e-4)),
        (
            group_relative(rewards, group, unbiased=False, eps=0.0),
            reference.group_relative(r, g, unbiased=False, eps=0.0),
        ),
        (leave_one_out(rewards, group), reference.leave_one_out(r, g)),
        (max_likelihood(rewards, group), reference.max_likelihood(r, g)),
        (length_weighted(rewards, group, lengths), reference.length_weighted(r, g, lengths.tolist())),
        (batch_scaled(rewards, group, eps=0.0), reference.batch_scaled(r, g)),
        (
            reinforce_plus_plus_baseline(rewards, group, lengths=lengths, eps=0.0),
            reference.token_whitened(r, g, lengths.tolist()),
        ),
    ]
    for got, expected in pairs:
        assert got.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_leave_one_out_is_centring_times_g_over_g_minus_one():
    rewards, group = random_rewards(6)
    torch.testing.assert_close(leave_one_out(rewards, group), group_relative(rewards, group, scale=False) * 4 / 3)


def test_groups_of_different_sizes():
    rewards, group = f64([1.0, 0.0, 3.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1, 1])
    assert leave_one_out(rewards, group).tolist() == [1.0, -1.0, 1.5, -1.5, 0.0]


# ---------------------------------------------------------------- laws of all of them


@every_estimator
def test_order_and_names_of_groups_do_not_matter(estimator):
    """Trap: whatever shuffles rows must not change which rollouts are compared. (Lengths travel with the rows.)"""
    rewards, group = random_rewards(7)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    if estimator in (ESTIMATORS["length_weighted"], ESTIMATORS["token_whitened"]):
        order = torch.arange(len(rewards))
    torch.testing.assert_close(estimator(rewards[order], group[order] * -5 + 2), estimator(rewards, group)[order])


@every_estimator
def test_groups_of_other_ids_are_other_groups(estimator):
    """Trap: duplicates of a prompt in one batch have ids of their own. Merging two groups must change the numbers."""
    rewards, group = random_rewards(8)
    merged = torch.where(group == group.max(), group.min(), group)
    assert not torch.allclose(estimator(rewards, merged), estimator(rewards, group))


@pytest.mark.parametrize(
    "name", [n for n in ESTIMATORS if n not in ("max_likelihood", "beta_normalized", "beta_fixed")]
)
def test_an_offset_of_all_rewards_changes_nothing(name):
    rewards, group = random_rewards(9)
    torch.testing.assert_close(ESTIMATORS[name](rewards + 50, group), ESTIMATORS[name](rewards, group))


@pytest.mark.parametrize("name", ["batch_scaled", "reinforce_plus_plus_baseline", "token_whitened", "max_likelihood"])
def test_the_unit_of_the_rewards_changes_nothing_where_they_are_normalised(name):
    rewards, group = random_rewards(10)
    torch.testing.assert_close(
        ESTIMATORS[name](40 * rewards, group), ESTIMATORS[name](rewards, group), rtol=1e-6, atol=1e-6
    )


@every_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.1, 0.7, 1.0, 0.0, -0.3, 9.9])
def test_equal_rewards_give_exactly_zero(estimator, dtype, value):
    """Trap: the float32 mean of rewards of 0.1 misses 0.1; a tiny eps then makes advantages of about 1 of it."""
    value = abs(value) if estimator is max_likelihood else value  # which takes no negative ones
    for size in (3, 7, 8):
        rewards, group = torch.full((2 * size,), value, dtype=dtype), torch.arange(2 * size) // size
        got = estimator(rewards, group)
        assert got.tolist() == [0.0] * 2 * size
        assert got.dtype == dtype


@every_estimator
def test_rewards_that_differ_by_rounding_only_give_exactly_zero(estimator):
    rewards = f64([0.3, 0.1 + 0.2, 0.3 + 1e-7, 1.0, 0.5, 0.2])
    got = estimator(rewards, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert got[:3].tolist() == [0.0] * 3
    assert bool((got[3:] != 0).any())


@every_estimator
def test_unscored_rollouts_are_as_if_they_were_not_there(estimator):
    """Trap: a reward that failed is no 0. Rows are put last, so that lengths stay with theirs."""
    rewards, group = f64([1.0, 0.25, 0.5, 0.0, 1.0, 0.75]), torch.tensor([0, 0, 0, 1, 1, 1])
    with_failed = torch.cat([rewards, f64([NAN, INF])])
    scored = torch.tensor([True] * 6 + [False] * 2)
    got = estimator(with_failed, torch.cat([group, torch.tensor([0, 1])]), scored=scored)
    torch.testing.assert_close(got[:6], estimator(rewards, group))
    assert got[6:].tolist() == [0.0, 0.0]


@every_estimator
def test_one_scored_rollout_has_nothing_to_be_compared_with(estimator):
    rewards, group = f64([1.0, 0.0, 1.0, NAN, NAN, NAN]), torch.tensor([0, 0, 1, 1, 2, 2])
    scored = torch.tensor([True, True, True, False, False, False])
    got = estimator(rewards, group, scored=scored)
    assert got[2:].tolist() == [0.0] * 4
    assert bool((got[:2] != 0).all())
    assert bool(got.isfinite().all())


@every_estimator
def test_nothing_scored_at_all_is_zero(estimator):
    got = estimator(f64([NAN] * 4), torch.tensor([0, 0, 1, 1]), scored=torch.zeros(4).bool())
    assert got.tolist() == [0.0] * 4


@every_estimator
def test_a_group_of_one_is_a_mistake_of_the_configuration(estimator):
    rewards, group = f64([1.0, 0.0, 1.0]), torch.tensor([4, 4, 6])
    for scored in (None, torch.ones(3).bool(), torch.tensor([True, True, False])):
        with pytest.raises(ValueError, match=r"group 6 holds 1\. Raise `rollout\.group_size`"):
            estimator(rewards, group, scored=scored)


@every_estimator
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_scored_reward_must_be_finite(estimator, bad):
    with pytest.raises(ValueError, match=r"reward of rollout 1 is (nan|inf|-inf); rewards must be finite.*`scored`"):
        estimator(f64([1.0, bad]), torch.tensor([0, 0]))


@every_estimator
def test_float32_agrees_with_float64(estimator):
    rewards, group = random_rewards(12)
    narrow = estimator(rewards.float(), group)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), estimator(rewards, group), rtol=1e-5, atol=1e-6)


def test_centred_advantages_of_a_group_add_up_to_zero():
    rewards, group = random_rewards(13)
    for name in ("group_relative", "leave_one_out", "beta_normalized", "max_likelihood", "batch_scaled"):
        sums = torch.zeros(30, dtype=torch.float64).index_add(0, group, ESTIMATORS[name](rewards, group))
        assert sums.abs().max().item() < 1e-12
