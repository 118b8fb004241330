"""Estimators: the right equation on the right numbers, decomposition over rewards, and what they report."""

import math

import pytest
import torch

from rlalign.advantages import (
    GAE,
    BatchScaled,
    BetaNormalized,
    Estimator,
    GreedyBaseline,
    GroupRelative,
    LeaveOneOut,
    LengthWeighted,
    MaxLikelihood,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    build_estimator,
)
from rlalign.advantages.metrics import groups_that_differ
from rlalign.buffers import Rollout
from rlalign.functional import advantages as equations

NAN = math.nan
SQRT_2, SQRT_3 = math.sqrt(2), math.sqrt(3)


def make_rollout(outcomes, group, *, lengths=None, scored=None, time=None, **optional):
    """Each outcome stands on the last real decision of its row."""
    lengths = torch.tensor([1] * len(outcomes) if lengths is None else lengths)
    step = torch.arange(int(lengths.max()) if time is None else time)
    last = step == lengths[:, None] - 1
    return Rollout(
        log_prob_old=torch.zeros(last.shape, dtype=torch.float64),
        rewards=torch.where(last, torch.tensor(outcomes, dtype=torch.float64)[:, None], 0.0),
        mask=step < lengths[:, None],
        terminated=last,
        truncated=torch.zeros_like(last),
        group=torch.tensor(group),
        prompt_id=torch.zeros(len(outcomes), dtype=torch.int64),
        scored=torch.ones(len(outcomes), dtype=torch.bool) if scored is None else torch.tensor(scored),
        **optional,
    )


def parts(**columns):
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}


# Two groups: outcomes 4 1 1 over 1, 2, 3 decisions, and 2 0 over 2, 2. Means 2 and 1; centred 2 -1 -1 | 1 -1.
OUTCOMES, GROUP, LENGTHS = [4, 1, 1, 2, 0], [8, 8, 8, 3, 3], [1, 2, 3, 2, 2]
# Over the ten decisions: outcomes sum to 4 + 2 + 3 + 4 = 13, squares to 16 + 2 + 3 + 8 = 29: variance 12.1 / 9.
DECISION_STD = math.sqrt(12.1) / 3


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (GroupRelative(scale=False), [2, -1, -1, 1, -1]),
        (GroupRelative(eps=0.0), [2 / SQRT_3, -1 / SQRT_3, -1 / SQRT_3, 1 / SQRT_2, -1 / SQRT_2]),
        (GroupRelative(eps=0.0, unbiased=False), [SQRT_2, -1 / SQRT_2, -1 / SQRT_2, 1, -1]),
        (GroupRelative(eps=1.0, unbiased=False), [2 / (SQRT_2 + 1), *[-1 / (SQRT_2 + 1)] * 2, 0.5, -0.5]),
        (LeaveOneOut(), [4 - 1, 1 - 2.5, 1 - 2.5, 2 - 0, 0 - 2]),
        (MaxLikelihood(), [2 / 2, -1 / 2, -1 / 2, 1, -1]),
        # baselines (4 + 2 + 3) / 6 = 1.5 and (4 + 0) / 4 = 1
        (LengthWeighted(), [2.5, -0.5, -0.5, 1, -1]),
        # centred squares sum to 8 over 5 rollouts: sample variance 2
        (BatchScaled(), [SQRT_2, -1 / SQRT_2, -1 / SQRT_2, 1 / SQRT_2, -1 / SQRT_2]),
        (ReinforcePlusPlusBaseline(), [SQRT_2, -1 / SQRT_2, -1 / SQRT_2, 1 / SQRT_2, -1 / SQRT_2]),
        # weighted by decisions the centred mean is (2 - 2 - 3 + 2 - 2) / 10 = -0.3 and the squares sum to 12.1
        (
            ReinforcePlusPlusBaseline(whiten_over="decisions"),
            [(c + 0.3) / DECISION_STD for c in (2, -1, -1, 1, -1)],
        ),
        (ReinforcePlusPlus(), [(r - 1.3) / DECISION_STD for r in OUTCOMES]),
        (BetaNormalized(alpha=1.0, beta=1.0, reward_range=(0.0, 4.0)), [0.5, -0.25, -0.25, 0.25, -0.25]),
        (GreedyBaseline(), [3, 0, 0, 0, -2]),
    ],
    ids=lambda value: value.type if not isinstance(value, list) else "",
)
def test_hand_arithmetic_of_every_estimator_that_works_from_outcomes(cfg, expected):
    baseline = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    rollout = make_rollout(OUTCOMES, GROUP, lengths=LENGTHS, baseline_reward=baseline)
    estimator = build_estimator(cfg)
    assert isinstance(estimator, Estimator)
    batch = estimator(rollout)
    wanted = torch.tensor(expected, dtype=torch.float64)[:, None] * rollout.mask
    torch.testing.assert_close(batch.advantages, wanted, rtol=1e-7, atol=1e-7)
    assert batch.advantages[~rollout.mask].abs().sum() == 0
    assert batch.returns is None
    assert batch.weights.unique().tolist() == [1.0]


def test_options_of_the_beta_normaliser_reach_the_equation():
    # pass rates 15/16, 1/2, 1/16; with these options the weights before the weight cap are .9867 .9342 .9501
    outcomes = [1] * 15 + [0] + [1] * 8 + [0] * 8 + [1] + [0] * 15
    group = [0] * 16 + [1] * 16 + [2] * 16
    options = {"max_weight": 0.95, "max_concentration": 0.5, "normalize_weights": True, "reward_range": (-1.0, 1.0)}
    got = build_estimator(BetaNormalized(**options))(make_rollout(outcomes, group)).advantages[:, 0]
    rewards, groups = torch.tensor(outcomes, dtype=torch.float64), torch.tensor(group)
    torch.testing.assert_close(got, equations.beta_normalized(rewards, groups, **options))
    for name in options:
        others = {key: value for key, value in options.items() if key != name}
        assert not torch.allclose(got, equations.beta_normalized(rewards, groups, **others)), f"{name} had no effect"


def test_float32_rollouts_give_float32_batches():
    rollout = make_rollout([1, 0], [0, 0])
    facts = {
        name: value.float() if value.is_floating_point() else value for name, value in rollout.state_dict().items()
    }
    batch = build_estimator(BetaNormalized())(Rollout.from_state_dict(facts))
    assert batch.advantages.dtype == batch.weights.dtype == torch.float32


# ---------------------------------------------------------------- several rewards


def test_decomposition_averages_the_estimate_of_each_part():
    # part a: 1 0 -> +1/2 -1/2; part b: 0 8 -> -4 +4. As a sum, 1 8 would be -3.5 +3.5.
    rollout = make_rollout([1, 8], [0, 0], reward_parts=parts(a=[1, 0], b=[0, 8]))
    cfg = GroupRelative(scale=False, decompose=True)
    assert build_estimator(cfg)(rollout).advantages[:, 0].tolist() == [(0.5 - 4) / 2, (-0.5 + 4) / 2]


def test_part_weights_enter_by_sign_and_are_divided_by_their_size():
    # 3 x (+1/2 -1/2) and -1 x (-4 +4), over 3 + 1
    rollout = make_rollout([3, -8], [0, 0], reward_parts=parts(a=[1, 0], b=[0, 8]))
    cfg = GroupRelative(scale=False, decompose=True, part_weights={"a": 3.0, "b": -1.0})
    assert build_estimator(cfg)(rollout).advantages[:, 0].tolist() == [(1.5 + 4) / 4, (-1.5 - 4) / 4]


def test_weights_of_the_reward_functions_hold_unless_the_config_names_its_own():
    rollout = make_rollout([3, 8], [0, 0], reward_parts=parts(a=[1, 0], b=[0, 8]))
    plain, own = (GroupRelative(scale=False, decompose=True, part_weights=w) for w in ({}, {"a": 1.0, "b": 0.0}))
    assert build_estimator(plain, part_weights={"a": 3.0})(rollout).advantages[0, 0].item() == (1.5 - 4) / 4
    assert build_estimator(own, part_weights={"a": 3.0})(rollout).advantages[0, 0].item() == 0.5
    # Without `decompose` the outcome is weighted already: nothing to do.
    assert build_estimator(LeaveOneOut(), part_weights={"a": 3.0})(rollout).advantages[0, 0].item() == 3 - 8


def test_a_part_that_is_equal_everywhere_is_left_out():
    rollout = make_rollout([1.1, 0.1], [0, 0], reward_parts=parts(a=[1, 0], same=[0.1, 0.1]))
    cfg = GroupRelative(scale=False, decompose=True)
    assert build_estimator(cfg)(rollout).advantages[:, 0].tolist() == [0.5, -0.5]


def test_a_part_constant_in_one_group_only_still_counts():
    rollout = make_rollout([1, 0, 1, 2], [0, 0, 1, 1], reward_parts=parts(a=[1, 0, 1, 1], b=[0, 0, 0, 1]))
    cfg = GroupRelative(scale=False, decompose=True)
    assert build_estimator(cfg)(rollout).advantages[:, 0].tolist() == [0.25, -0.25, -0.25, 0.25]


def test_a_rollout_is_averaged_over_the_parts_that_apply_to_it():
    # `code` judges only group 1, `maths` only group 0; each rollout has one part, so nothing is halved.
    rollout = make_rollout(
        [1, 0, 0, 4], [0, 0, 1, 1], reward_parts=parts(maths=[1, 0, NAN, NAN], code=[NAN, NAN, 0, 4])
    )
    cfg = GroupRelative(scale=False, decompose=True)
    assert build_estimator(cfg)(rollout).advantages[:, 0].tolist() == [0.5, -0.5, -2.0, 2.0]


def test_a_part_that_abstained_on_one_rollout_is_out_of_that_baseline():
    # part a knows rollouts 0 and 1 only; part b all three: 2 -1 -1
    rollout = make_rollout([4, 0, 0], [0, 0, 0], reward_parts=parts(a=[1, 0, NAN], b=[3, 0, 0]))
    cfg = GroupRelative(scale=False, decompose=True)
    assert build_estimator(cfg)(rollout).advantages[:, 0].tolist() == [(0.5 + 2) / 2, (-0.5 - 1) / 2, -1.0]


def test_an_unscored_rollout_is_out_of_every_part():
    rollout = make_rollout([1, 0, 9], [0, 0, 0], scored=[True, True, False], reward_parts=parts(a=[1, 0, 9]))
    cfg = GroupRelative(scale=False, decompose=True)
    assert build_estimator(cfg)(rollout).advantages[:, 0].tolist() == [0.5, -0.5, 0.0]


def test_without_any_part_that_varies_there_is_no_signal_and_no_nan():
    rollout = make_rollout([2, 2], [0, 0], reward_parts=parts(a=[1, 1], b=[1, 1]))
    estimator = build_estimator(BetaNormalized(decompose=True))
    assert estimator(rollout).advantages.tolist() == [[0.0], [0.0]]
    assert estimator.metrics["advantage/groups_without_signal"] == 1


def test_decomposition_names_what_is_missing():
    with pytest.raises(ValueError, match=r"`advantage\.decompose: true` needs `reward_parts`"):
        build_estimator(LeaveOneOut(decompose=True))(make_rollout([1, 0], [0, 0]))
    rollout = make_rollout([1, 0], [0, 0], reward_parts=parts(accuracy=[1, 0]))
    with pytest.raises(ValueError, match=r"names 'acuracy', but the rewards are \['accuracy'\]"):
        build_estimator(LeaveOneOut(decompose=True, part_weights={"acuracy": 1.0}))(rollout)


# ---------------------------------------------------------------- per-decision estimators


def test_a_failed_reward_may_be_nan_on_every_column_of_its_row():
    rollout = make_rollout([1, 0, 0], [0, 0, 0], lengths=[1, 2, 1], scored=[True, True, False])
    rewards = rollout.rewards.clone()
    rewards[2] = NAN  # on its padding, too
    failed = Rollout.from_state_dict(rollout.state_dict() | {"rewards": rewards})
    assert build_estimator(LeaveOneOut())(failed).advantages.tolist() == [[1, 0], [-1, -1], [0, 0]]


def test_gae_gives_a_failed_rollout_no_advantage_and_its_values_as_returns():
    values = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    rollout = make_rollout([1, NAN], [0, 1], lengths=[2, 2], scored=[True, False], values=values, next_values=values)
    batch = build_estimator(GAE(gamma=1.0, gae_lambda=1.0))(rollout)
    assert batch.advantages.tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert batch.returns is not None
    assert batch.returns.tolist() == [[1.0, 1.0], [3.0, 4.0]]


def test_return_to_go_whitens_over_scored_decisions_only():
    # returns 2 2 and 0 0: mean 1, sample variance 4/3
    rollout = make_rollout([2, 0, 99], [0, 1, 2], lengths=[2, 2, 1], scored=[True, True, False])
    batch = build_estimator(ReinforcePlusPlus())(rollout)
    one = math.sqrt(3 / 4)
    expected = torch.tensor([[one, one], [-one, -one], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(batch.advantages, expected)


def test_return_to_go_discounts():
    # gamma 1/2: returns 1 2 and 0 0: mean 3/4, squares 5: variance (5 - 4 x 9/16) / 3 = 11/12
    batch = build_estimator(ReinforcePlusPlus(gamma=0.5))(make_rollout([2, 0], [0, 1], lengths=[2, 2]))
    assert batch.advantages[0].tolist() == pytest.approx([0.25 / math.sqrt(11 / 12), 1.25 / math.sqrt(11 / 12)])


@pytest.mark.parametrize("cfg", [GAE(), ReinforcePlusPlus()], ids=lambda cfg: cfg.type)
def test_a_reward_on_a_masked_decision_is_refused_where_it_would_be_lost(cfg):
    rollout = make_rollout([1, 0], [0, 0], lengths=[3, 3], values=torch.zeros(2, 3), next_values=torch.zeros(2, 3))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    lost = Rollout.from_state_dict(rollout.state_dict() | {"mask": mask})
    with pytest.raises(ValueError, match="row 0 has a reward on decision 2, which is masked"):
        build_estimator(cfg)(lost)
    # An outcome is never masked: the group estimators count it.
    assert build_estimator(LeaveOneOut())(lost).advantages.tolist() == [[1, 1, 0], [-1, -1, -1]]


# ---------------------------------------------------------------- what they report, and what they keep


def test_metrics_count_groups_with_signal_and_measure_real_decisions():
    # groups: 1 0 -> +-1/2; 5 5 -> no signal; a group whose other rollout failed -> no signal
    rollout = make_rollout(
        [1, 0, 5, 5, 1, NAN], [0, 0, 1, 1, 2, 2], lengths=[3, 1, 1, 1, 1, 1], scored=[True] * 5 + [False]
    )
    estimator = build_estimator(GroupRelative(scale=False))
    estimator(rollout)
    assert estimator.metrics == pytest.approx(
        {
            "advantage/rms": math.sqrt(4 * 0.25 / 8),  # four decisions of size 1/2 among eight
            "advantage/group_signal_frac": 1 / 3,
            "advantage/groups_without_signal": 2,
        }
    )


def test_a_group_whose_decisions_are_all_masked_still_has_signal():
    rollout = make_rollout([1, 0], [0, 0])
    masked = Rollout.from_state_dict(rollout.state_dict() | {"mask": torch.zeros(2, 1, dtype=torch.bool)})
    estimator = build_estimator(GroupRelative())
    estimator(masked)
    assert (estimator.metrics["advantage/group_signal_frac"], estimator.metrics["advantage/rms"]) == (1.0, 0.0)


def test_beta_metrics_describe_the_fit_and_the_largest_weight():
    # pass rates 1/4 and 3/4: m = 1/2, v = 1/8, k = 1, a = b = 1/2, alpha = beta = 7/6
    rollout = make_rollout([1, 0, 0, 0, 1, 1, 1, 0], [0] * 4 + [1] * 4)
    estimator = build_estimator(BetaNormalized())
    batch = estimator(rollout)
    log_beta = 2 * math.lgamma(7 / 6) - math.lgamma(7 / 3)
    weight = math.exp(log_beta - (math.log(1 / 4) + math.log(3 / 4)) / 6)
    assert batch.advantages[0, 0].item() == pytest.approx(0.75 * weight)
    found = {name: value for name, value in estimator.metrics.items() if name.startswith("bnpo/")}
    assert found == pytest.approx(
        {
            "bnpo/a": 0.5,
            "bnpo/b": 0.5,
            "bnpo/alpha": 7 / 6,
            "bnpo/beta": 7 / 6,
            "bnpo/fit_fallback": 0.0,
            "bnpo/weight_max": weight,
            "bnpo/weight_capped_frac": 0.0,
            "bnpo/adv_rms": weight * math.sqrt((0.75**2 + 3 * 0.25**2) / 4),
        }
    )


@pytest.mark.parametrize(
    ("rewards", "alpha", "fallback"),
    [
        ([1, 0, 1, 0], None, 1.0),  # all pass rates equal: nothing to fit
        ([1, 1, 1, 1], None, 1.0),
        ([1, 1, 0, 0], None, 1.0),  # rates 0 and 1: m (1 - m) / v - 1 = -1/2, wider than any Beta
        ([1, 0, 1, 1], None, 0.0),  # rates 1/2 and 1: 3/16 / (1/8) - 1 = 1/2, a fit
        ([1, 0, 1, 0], 1.5, 0.0),  # fixed: no fit is asked for
    ],
)
def test_a_fit_that_fell_back_is_counted(rewards, alpha, fallback):
    estimator = build_estimator(BetaNormalized(alpha=alpha, beta=alpha))
    estimator(make_rollout(rewards, [0, 0, 1, 1]))
    assert estimator.metrics["bnpo/fit_fallback"] == fallback


@pytest.mark.parametrize("normalize_weights", [False, True])
def test_the_share_of_capped_weights_is_of_groups_with_signal(normalize_weights):
    # Beta(2, 1) has density 2p: weights 1/(2p) = 2 at p = 1/4, 1 at 1/2, 2/3 at 3/4; the group of ones has no signal.
    rewards = [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1]
    group = [number // 4 for number in range(16)]
    for cap, share in ((10.0, 0.0), (1.5, 1 / 3), (0.9, 2 / 3), (0.5, 1.0)):
        cfg = BetaNormalized(alpha=2.0, beta=1.0, max_weight=cap, normalize_weights=normalize_weights)
        estimator = build_estimator(cfg)
        estimator(make_rollout(rewards, group))
        assert estimator.metrics["bnpo/weight_capped_frac"] == pytest.approx(share)


def test_groups_that_differ_are_told_from_rewards_alone():
    # equal; different; one of two scored; different parts with an equal sum
    outcome, group = [1, 1, 1, 0, 1, 0, 1, 1], [3, 3, 5, 5, 6, 6, 9, 9]
    rollout = make_rollout(
        outcome,
        group,
        scored=[True] * 5 + [False] + [True] * 2,
        reward_parts=parts(a=[1, 1, 1, 0, 1, 0, 1, 0], b=[0, 0, 0, 0, 0, 0, 0, 1]),
    )
    assert groups_that_differ(rollout).tolist() == [False, True, False, False]
    assert groups_that_differ(rollout, by_part=True).tolist() == [False, True, False, True]
    silent = make_rollout([0, 0], [0, 0], reward_parts=parts(a=[0, NAN], b=[NAN, 0]))
    assert groups_that_differ(silent, by_part=True).tolist() == [False]


def test_fixed_beta_parameters_are_reported_as_given():
    estimator = build_estimator(BetaNormalized(alpha=1.5, beta=1.5))
    estimator(make_rollout([1, 0], [0, 0]))
    assert (estimator.metrics["bnpo/alpha"], estimator.metrics["bnpo/beta"]) == (1.5, 1.5)


def test_beta_metrics_are_numbers_when_nothing_has_signal():
    estimator = build_estimator(BetaNormalized())
    estimator(make_rollout([1, 1, 0, 0], [0, 0, 1, 1]))
    assert (estimator.metrics["bnpo/weight_max"], estimator.metrics["bnpo/adv_rms"]) == (0.0, 0.0)
    assert all(math.isfinite(value) for value in estimator.metrics.values())


def test_decomposed_beta_metrics_are_told_apart_by_reward():
    rollout = make_rollout(
        [2, 0, 0, 1], [0, 0, 1, 1], reward_parts=parts(accuracy=[1, 0, 0, 1], format=[1, 0, 0, 0], same=[1, 1, 1, 1])
    )
    estimator = build_estimator(BetaNormalized(decompose=True))
    estimator(rollout)
    assert {name for name in estimator.metrics if name.endswith("_alpha")} == {
        "bnpo/accuracy_alpha",
        "bnpo/format_alpha",
    }
    assert "bnpo/alpha" not in estimator.metrics


def test_metrics_are_of_the_last_call_alone():
    estimator = build_estimator(BetaNormalized(decompose=True))
    estimator(make_rollout([1, 0], [0, 0], reward_parts=parts(a=[1, 0])))
    estimator(make_rollout([1, 0], [0, 0], reward_parts=parts(b=[1, 0])))
    assert not any(name.startswith("bnpo/a_") for name in estimator.metrics)


def test_an_estimator_without_memory_has_an_empty_state_and_takes_no_other():
    estimator = build_estimator(GroupRelative())
    assert estimator.state_dict() == {}
    estimator.load_state_dict({})
    with pytest.raises(ValueError, match=r"keeps no state, got entries \['history'\]"):
        estimator.load_state_dict({"history": 1})


@pytest.mark.parametrize("cfg", [GAE(), GreedyBaseline(), GroupRelative()], ids=lambda cfg: cfg.type)
def test_what_an_estimator_needs_is_declared(cfg):
    expected = {"gae": {"values", "next_values"}, "greedy_baseline": {"baseline_reward"}, "group_relative": set()}
    assert build_estimator(cfg).needs == expected[cfg.type]
