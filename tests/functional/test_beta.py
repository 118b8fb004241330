"""BNPO: the authors' numbers, the cases their function fails in, the family it belongs to, and its two caps."""

import json
import math
from pathlib import Path

import pytest
import torch

from rlalign.advantages.config import BetaNormalized
from rlalign.functional.advantages import (
    beta_normalized,
    beta_parameters,
    group_relative,
    leave_one_out,
    max_likelihood,
)
from rlalign.functional.beta import MAX_CONCENTRATION, MAX_WEIGHT
from tests.reference import beta as reference

NAN = math.nan
AUTHORS = {"max_weight": 1e6, "max_concentration": None}
T1 = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
T1_ADVANTAGES = [
    *(0.68017476, -0.22672492, -0.22672492, -0.22672492),
    *(0.39269908, 0.39269908, -0.39269908, -0.39269908),
    *(0.22672492, 0.22672492, 0.22672492, -0.68017476),
]


def flat(prompts, dtype=torch.float64):
    """Rewards of each prompt to one tensor, and a group id per rollout."""
    rewards = torch.tensor([r for prompt in prompts for r in prompt], dtype=dtype)
    return rewards, torch.tensor([i for i, prompt in enumerate(prompts) for _ in prompt])


def ones_first(counts, group_size):
    return [[1.0] * n + [0.0] * (group_size - n) for n in counts]


def weight(prompts, **options):
    """Weight of each prompt that has signal: advantage over centred reward."""
    rewards, group = flat(prompts)
    advantages, centred = beta_normalized(rewards, group, **options), group_relative(rewards, group, scale=False)
    rows = [next((i for i in range(len(rewards)) if group[i] == g and centred[i] != 0), None) for g in group.unique()]
    return [None if i is None else (advantages[i] / centred[i]).item() for i in rows]


# ---------------------------------------------------------------- the authors' numbers, eight digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [AUTHORS, {}], ids=["authors' caps", "our caps"])
def test_vector_1(dtype, options):
    got = beta_normalized(*flat(T1, dtype), **options)
    assert got.tolist() == pytest.approx(T1_ADVANTAGES, abs=2e-8)
    assert beta_parameters(*flat(T1, dtype), max_concentration=None) == pytest.approx((1.5, 1.5, 1.5, 1.5), abs=1e-8)
    assert weight(T1, **options) == pytest.approx([0.90689968, 0.78539816, 0.90689968], abs=1e-8)


@pytest.mark.parametrize("options", [AUTHORS, {}], ids=["authors' caps", "our caps"])
def test_vector_2(options):
    prompts = ones_first([0, 1, 3, 5, 8], 8)
    rewards, group = flat(prompts)
    fitted = beta_parameters(rewards, group, max_concentration=None)
    assert fitted == pytest.approx((0.22033981, 0.29810680, 1.07344660, 1.09936893), abs=1e-8)
    assert weight(prompts, **options)[1:4] == pytest.approx([0.99592734, 0.94995997, 0.96262280], abs=1e-8)
    got = beta_normalized(rewards, group, **options).view(5, 8)
    assert got[0].tolist() == [0.0] * 8
    assert got[1].tolist() == pytest.approx([0.87143642] + [-0.12449092] * 7, abs=1e-8)
    assert got[2].tolist() == pytest.approx([0.59372498] * 3 + [-0.35623499] * 5, abs=1e-8)
    assert got[3].tolist() == pytest.approx([0.36098355] * 5 + [-0.60163925] * 3, abs=1e-8)
    assert got[4].tolist() == [0.0] * 8


@pytest.mark.parametrize("options", [AUTHORS, {}], ids=["authors' caps", "our caps"])
def test_vector_3(options):
    prompts = ones_first([7, 6, 7, 5], 8)
    rewards, group = flat(prompts)
    fitted = beta_parameters(rewards, group, max_concentration=None)
    assert fitted == pytest.approx((8.54048295, 2.39133523, 3.84682765, 1.79711174), abs=1e-8)
    assert weight(prompts, **options) == pytest.approx([0.53620448, 0.47858807, 0.53620448, 0.58212040], abs=1e-8)
    got = beta_normalized(rewards, group, **options).view(4, 8)
    for row, count, hit, miss in (
        (0, 7, 0.06702556, -0.46917892),
        (1, 6, 0.11964702, -0.35894105),
        (2, 7, 0.06702556, -0.46917892),
        (3, 5, 0.21829515, -0.36382525),
    ):
        assert got[row].tolist() == pytest.approx([hit] * count + [miss] * (8 - count), abs=1e-8)


def test_vector_4_two_rewards_each_with_its_own_rates_and_fit():
    form = [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0]]
    of_form = beta_normalized(*flat(form), **AUTHORS)
    expected = [0.19874686, 0.19874686, -0.59624058, 0.19874686, *[0.0] * 4]
    expected += [-0.43371479, 0.43371479, 0.43371479, -0.43371479]
    assert of_form.tolist() == pytest.approx(expected, abs=1e-8)
    average = (beta_normalized(*flat(T1), **AUTHORS) + of_form) / 2
    assert average.tolist() == pytest.approx(
        [
            *(0.43946081, -0.01398903, -0.41148275, -0.01398903),
            *(0.19634954, 0.19634954, -0.19634954, -0.19634954),
            *(-0.10349494, 0.33021986, 0.33021986, -0.55694478),
        ],
        abs=1e-8,
    )


def test_vector_5_rewards_of_another_range():
    rewards, group = flat(T1)
    plus_minus = beta_normalized(2 * rewards - 1, group, reward_range=(-1, 1), **AUTHORS)
    torch.testing.assert_close(plus_minus, beta_normalized(rewards, group, **AUTHORS), rtol=0, atol=1e-15)


def test_vector_6_a_single_prompt_is_centred_only():
    rewards, group = flat([[1, 1, 0, 0]])
    assert beta_normalized(rewards, group, **AUTHORS).tolist() == [0.5, 0.5, -0.5, -0.5]
    assert beta_parameters(rewards, group) == (0.0, 0.0, 1.0, 1.0)


def test_vector_7_rates_more_dispersed_than_any_beta_are_centred_only():
    # p = 0, 1, 1/4: mean 5/12, variance 13/48 > mean (1 - mean) = 35/144, so k = -4/39
    rewards, group = flat([[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    expected = [0.0] * 8 + [0.75, -0.25, -0.25, -0.25]
    assert beta_normalized(rewards, group, **AUTHORS).tolist() == expected
    assert beta_normalized(rewards, group).tolist() == expected
    a, b, alpha, beta = beta_parameters(rewards, group)
    k = (35 / 144) / (13 / 48) - 1
    assert (a, b) == pytest.approx((k * 5 / 12, k * 7 / 12))
    assert (alpha, beta) == (1.0, 1.0)


@pytest.mark.parametrize("seed", range(10))
def test_the_authors_rule_agrees_with_its_formulas_prompt_by_prompt(seed):
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(6, 1, generator=generator, dtype=torch.float64)
    if seed % 2:  # graded rewards in [0, 1]: no longer the binary theory, but the formulas hold
        prompts = (rates + 0.3 * torch.rand(6, 8, generator=generator, dtype=torch.float64)).clamp(0, 1).tolist()
    else:
        prompts = (torch.rand(6, 8, generator=generator, dtype=torch.float64) < rates).double().tolist()
    got = beta_normalized(*flat(prompts), **AUTHORS)
    assert got.tolist() == pytest.approx(reference.advantages(prompts), rel=1e-9, abs=1e-12)
    fitted = beta_parameters(*flat(prompts), max_concentration=None)
    assert fitted == pytest.approx(reference.parameters([sum(p) / 8 for p in prompts]), rel=1e-9)


# ---------------------------------------------------------------- where the authors' function fails


def test_equal_rates_are_centred_only_where_the_authors_get_nan():
    prompts = [[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0]]
    rewards, group = flat(prompts)
    for options in (AUTHORS, {}):
        assert beta_normalized(rewards, group, **options).tolist() == (rewards - 0.5).tolist()
    assert beta_parameters(rewards, group, max_concentration=None) == (0.0, 0.0, 1.0, 1.0)


def test_equal_rates_are_seen_as_equal_through_rounding():
    # thirds and sevenths: the mean of equal rates misses them in the last digit, and 1 / variance would be 1e32
    for count, size in ((1, 3), (3, 7), (2, 6)):
        prompts = ones_first([count] * 5, size)
        got = beta_normalized(*flat(prompts), **AUTHORS)
        assert got.tolist() == pytest.approx(group_relative(*flat(prompts), scale=False).tolist())


@pytest.mark.parametrize("value", [0, 1])
def test_all_wrong_or_all_right_is_zero_where_the_authors_stop(value):
    for options in (AUTHORS, {}, {"normalize_weights": True}):
        assert beta_normalized(*flat([[value] * 4] * 3), **options).tolist() == [0.0] * 12


def test_all_wrong_beside_all_right_is_zero():
    for options in (AUTHORS, {}):
        assert beta_normalized(*flat([[0] * 4, [1] * 4, [1] * 4]), **options).tolist() == [0.0] * 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompts_at_the_ends_give_exactly_zero_beside_live_ones(dtype):
    """Their weight is 1e6 in the authors' code, times a rounding error of p."""
    prompts = [[0.1] * 7, [0.0] * 7, [1.0] * 7, [0.7] * 7, [0.1, 0.9, 0.4, 0.2, 0.2, 0.6, 0.3]]
    for options in (AUTHORS, {}):
        got = beta_normalized(*flat(prompts, dtype), **options)
        assert got[:28].tolist() == [0.0] * 28
        assert bool((got[28:] != 0).all())


def test_constant_prompts_inside_the_range_still_count_as_pass_rates():
    # [1/2 1/2] has no signal, but its rate is known: rates 1/2 and 1/4, as with [1 0]
    live = [1.0, 0.0, 0.0, 0.0]
    expected = beta_parameters(*flat([[1.0, 1.0, 0.0, 0.0], live]))
    assert beta_parameters(*flat([[0.5] * 4, live])) == pytest.approx(expected)


def test_rewards_outside_their_range_are_refused_with_the_way_out():
    rewards, group = flat([[0.0, 2.0, 1.0, 1.0]])  # accuracy plus format
    with pytest.raises(ValueError, match=r"got 2\.0\.\s+Set `advantage\.reward_range`.*`advantage\.decompose: true`"):
        beta_normalized(rewards, group)
    with pytest.raises(ValueError, match=r"`reward_range` = \[0\.0, 1\.0\], got -1\.0"):
        beta_parameters(rewards - 1, group)
    beta_normalized(rewards, group, reward_range=(0, 2))
    beta_normalized(rewards, group, scored=torch.tensor([True, False, True, True]))


def test_rounding_at_the_ends_of_the_range_is_no_violation():
    top = 0.1 + 0.2  # 0.30000000000000004
    got = beta_normalized(*flat([[top, 0.0, 0.1], [top, top, 0.0]]), reward_range=(0.0, 0.3))
    assert bool(got.isfinite().all())


def test_a_failed_reward_is_out_of_the_pass_rate():
    prompts = [[1, 0, 0, 0, NAN], [1, 1, 0, 0, NAN], [1, 1, 1, 0, NAN]]
    rewards, group = flat(prompts)
    got = beta_normalized(rewards, group, scored=~rewards.isnan(), **AUTHORS).view(3, 5)
    assert got[:, :4].flatten().tolist() == pytest.approx(T1_ADVANTAGES, abs=1e-8)
    assert got[:, 4].tolist() == [0.0] * 3
    with pytest.raises(ValueError, match=r"rollout 4 is nan.*`scored` = False"):
        beta_normalized(rewards, group)


def test_a_prompt_with_one_scored_rollout_has_no_pass_rate():
    rewards, group = flat([*T1, [1, NAN, NAN, NAN]])
    scored = ~rewards.isnan()
    assert beta_parameters(rewards, group, scored=scored) == pytest.approx((1.5, 1.5, 1.5, 1.5))
    got = beta_normalized(rewards, group, scored=scored)
    assert got.tolist() == pytest.approx([*T1_ADVANTAGES, 0, 0, 0, 0], abs=1e-8)


def test_one_odd_prompt_cannot_dominate_the_batch():
    prompts = ones_first([8] * 31 + [1], 16)
    assert weight(prompts, **AUTHORS)[31] == pytest.approx(3741.8, abs=0.05)
    assert weight(prompts, max_concentration=None)[31] == pytest.approx(MAX_WEIGHT)
    assert weight(prompts)[31] <= MAX_WEIGHT
    rms = {
        name: beta_normalized(*flat(prompts), **options).square().mean().sqrt().item()
        for name, options in (("authors", AUTHORS), ("ours", {}))
    }
    assert rms["authors"] == pytest.approx(160, rel=0.01)
    assert rms["ours"] < 0.6


def test_a_tight_cluster_does_not_become_a_spike():
    prompts = ones_first([8, 8, 8, 9], 16)
    rewards, group = flat(prompts)
    _, _, alpha, beta = beta_parameters(rewards, group, max_concentration=None)
    assert (alpha, beta) == pytest.approx((44.8, 42.1), abs=0.05)
    assert beta_normalized(rewards, group, **AUTHORS)[0].item() == pytest.approx(0.070, abs=5e-4)
    a, b, alpha, beta = beta_parameters(rewards, group, max_concentration=30)
    m = 33 / 64
    assert (a, b, alpha, beta) == pytest.approx((30 * m, 30 * (1 - m), 1 + 10 * m, 1 + 10 * (1 - m)))
    assert beta_normalized(rewards, group)[0].item() > 0.15


# ---------------------------------------------------------------- caps, scale, options


def test_the_weight_cap_caps_the_inverse_density():
    prompts = ones_first([1, 4, 8], 16)  # (2, 1): 1 / (2 p) = 8, 2, 1
    assert weight(prompts, alpha=2, beta=1) == pytest.approx([8.0, 2.0, 1.0])
    assert weight(prompts, alpha=2, beta=1, max_weight=3) == pytest.approx([3.0, 2.0, 1.0])
    assert weight(prompts, alpha=2, beta=1, max_weight=0.5) == pytest.approx([0.5] * 3)


def test_normalized_weights_average_one_over_the_prompts_with_signal():
    prompts = ones_first([0, 1, 3, 7, 8, 8], 8)
    plain, normalized = weight(prompts), weight(prompts, normalize_weights=True)
    live = [w for w in plain if w is not None]
    assert [w for w in normalized if w is not None] == pytest.approx([w * len(live) / sum(live) for w in live])
    assert sum(w for w in normalized if w is not None) == pytest.approx(3)


def test_normalized_weights_keep_their_scale_while_pass_rates_drift():
    halfway, late = ones_first([0, 8, 2, 5, 3, 6, 0, 8], 8), ones_first([7, 6, 7, 5, 7, 6, 8, 7], 8)

    def live_rms(prompts, **options):
        got = beta_normalized(*flat(prompts), **options)
        return got[got != 0].square().mean().sqrt().item()

    assert live_rms(halfway) / live_rms(late) > 2
    drift = live_rms(halfway, normalize_weights=True) / live_rms(late, normalize_weights=True)
    assert drift == pytest.approx(1, abs=0.25)


def test_order_of_rollouts_and_prompts_does_not_matter():
    rewards, group = flat(ones_first([1, 4, 6, 7], 8))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        beta_normalized(rewards[order], 9 - group[order]), beta_normalized(rewards, group)[order]
    )


def test_right_and_wrong_are_mirror_images():
    rewards, group = flat(ones_first([1, 2, 6, 7, 7], 8))
    torch.testing.assert_close(beta_normalized(1 - rewards, group), -beta_normalized(rewards, group))


def test_no_rate_however_extreme_overflows():
    # 1 of 100,000 right, beside a spike: the density underflows, its logarithm does not
    rewards = torch.zeros(6, 1000, dtype=torch.float64)
    rewards[:5, :500] = 1
    rewards[5, 0] = 1
    rewards[4, 500] = 1
    group = torch.arange(6).repeat_interleave(1000)
    for options in (AUTHORS, {}):
        got = beta_normalized(rewards.flatten(), group, **options)
        assert bool(got.isfinite().all())
        assert got.abs().max() <= options.get("max_weight", MAX_WEIGHT)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"alpha": 2.0}, "give both `alpha` and `beta`, or neither"),
        ({"beta": 2.0}, "give both `alpha` and `beta`, or neither"),
        ({"alpha": 0.0, "beta": 1.0}, "needs `alpha` > 0 and `beta` > 0"),
        ({"max_weight": 0.0}, "`max_weight` must be > 0"),
        ({"max_weight": NAN}, "`max_weight` must be > 0"),
        ({"max_concentration": -1.0}, "`max_concentration` must be > 0, or None"),
        ({"reward_range": (1.0, 1.0)}, r"`reward_range` must be \(lowest, highest\)"),
    ],
)
def test_options_out_of_their_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        beta_normalized(*flat(T1), **options)


def test_the_defaults_are_the_ones_the_benchmark_chose_everywhere():
    results = Path(__file__).parents[2] / "benchmarks/results/bnpo_caps.json"
    chosen = json.loads(results.read_text(encoding="utf-8"))["chosen"]
    assert chosen == {"max_weight": MAX_WEIGHT, "max_concentration": MAX_CONCENTRATION}
    assert (BetaNormalized().max_weight, BetaNormalized().max_concentration) == (MAX_WEIGHT, MAX_CONCENTRATION)


# ---------------------------------------------------------------- the family


RATES = ones_first([1, 2, 4, 5, 7, 8, 0], 8)


def test_one_one_is_reinforce_with_a_baseline():
    rewards, group = flat(RATES)
    got = beta_normalized(rewards, group, alpha=1, beta=1)
    torch.testing.assert_close(got, group_relative(rewards, group, scale=False))  # Dr. GRPO
    torch.testing.assert_close(got * 8 / 7, leave_one_out(rewards, group))  # RLOO


def test_three_halves_is_grpo_with_the_population_deviation_up_to_eight_over_pi():
    rewards, group = flat(RATES)
    got = beta_normalized(rewards, group, alpha=1.5, beta=1.5)
    population = group_relative(rewards, group, unbiased=False, eps=0.0)
    torch.testing.assert_close(got, math.pi / 8 * population)
    torch.testing.assert_close(got, math.pi / 8 * math.sqrt(8 / 7) * group_relative(rewards, group, eps=0.0))


def test_two_one_is_half_of_maxrl():
    rewards, group = flat(RATES)
    torch.testing.assert_close(2 * beta_normalized(rewards, group, alpha=2, beta=1), max_likelihood(rewards, group))


def test_bnpo_is_grpo_when_rates_spread_like_a_semicircle():
    # vector 1: mean 1/2, variance 1/16, so a = b = 3/2 and alpha = beta = 3/2
    rewards, group = flat(T1)
    grpo = group_relative(rewards, group, unbiased=False, eps=0.0)
    torch.testing.assert_close(beta_normalized(rewards, group), grpo / 2.546479, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- why thirds


@pytest.mark.parametrize(("a", "b"), [(1.5, 1.5), (2.0, 5.0), (0.3, 0.6), (8.0, 3.0)])
def test_thirds_minimise_the_variance_of_the_gradient(a, b):
    best = reference.gradient_variance(a, b, 1 + a / 3, 1 + b / 3)
    shares = [0.05 * i for i in range(1, 10)]  # alpha < (a + 3) / 2 only up to u = 1/2 + 1/(2a)
    for u in shares:
        for v in shares:
            assert reference.gradient_variance(a, b, 1 + u * a, 1 + v * b) > best
    for step in (-1e-3, 1e-3):  # and it is the minimum, not a neighbour of it
        assert reference.gradient_variance(a, b, 1 + a / 3 + step, 1 + b / 3) > best
        assert reference.gradient_variance(a, b, 1 + a / 3, 1 + b / 3 + step) > best


def test_the_gain_in_variance_has_the_size_it_should():
    assert reference.gradient_variance(2, 5, 1 + 2 / 3, 1 + 5 / 3) == pytest.approx(0.09465676, abs=1e-8)
    assert reference.gradient_variance(2, 5, 1, 1) == pytest.approx(0.17857143, abs=1e-8)  # REINFORCE
    assert reference.gradient_variance(2, 5, 1.5, 1.5) == pytest.approx(0.15421257, abs=1e-8)  # GRPO


def test_thirds_minimise_the_variance_of_our_advantages_too():
    # One group for each of 399 pass rates, mean A² per group, averaged under Beta(2, 5): the closed form again.
    size = 400
    rates = torch.arange(1, size, dtype=torch.float64) / size
    rewards = (torch.arange(size)[None, :] < torch.arange(1, size)[:, None]).double().flatten()
    group = torch.arange(size - 1).repeat_interleave(size)
    law = rates * (1 - rates) ** 4 * 30 / size

    def variance(alpha, beta):
        found = beta_normalized(rewards, group, alpha=alpha, beta=beta, max_weight=1e6).view(-1, size)
        return (law * found.square().mean(1)).sum().item()

    best = variance(1 + 2 / 3, 1 + 5 / 3)
    assert best == pytest.approx(0.09465676, rel=1e-3)
    assert variance(1, 1) == pytest.approx(0.17857143, rel=1e-3)
    for alpha, beta in (
        (1 + 0.25 * 2, 1 + 5 / 3),
        (1 + 0.42 * 2, 1 + 5 / 3),
        (1 + 2 / 3, 1 + 1.25),
        (1 + 2 / 3, 1 + 2.1),
    ):
        assert variance(alpha, beta) > best
