"""One idea carries the library: tokens, environment steps and denoising steps walk the same path to a loss.

Hand-made rollouts go through a buffer, an estimator, an objective and `aggregate`; each result is checked against
arithmetic written out here. Everything is float64, so what is equal on paper is equal to nine digits.
"""

import dataclasses
import math

import pytest
import torch

from rlalign.advantages import (
    GAE,
    BetaNormalized,
    GreedyBaseline,
    GroupRelative,
    LeaveOneOut,
    PerPromptRunning,
    build_estimator,
)
from rlalign.buffers import Input, Rollout, RolloutBuffer, TrainBatch
from rlalign.functional.masked import aggregate, aggregate_denominator
from rlalign.functional.policy import clipped_surrogate, guarded_log_ratio

NAN = math.nan
HALF = math.sqrt(0.5)  # sample deviation of {0, 1}; (1 - 1/2) / sqrt(1/2) = sqrt(1/2)


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def make_rollout(mask, rewards, group, *, prompt_id=None, scored=None, terminated=None, truncated=None, **optional):
    """One row per rollout; unless told otherwise no boundary is recorded and everything is scored."""
    mask = torch.tensor(mask, dtype=torch.bool)
    none = torch.zeros_like(mask)
    return Rollout(
        log_prob_old=torch.zeros(mask.shape, dtype=torch.float64),
        rewards=f64(rewards),
        mask=mask,
        terminated=none if terminated is None else torch.tensor(terminated, dtype=torch.bool),
        truncated=none if truncated is None else torch.tensor(truncated, dtype=torch.bool),
        group=torch.tensor(group),
        prompt_id=torch.tensor(group if prompt_id is None else prompt_id),
        scored=torch.ones(len(group), dtype=torch.bool) if scored is None else torch.tensor(scored),
        **optional,
    )


def through_buffer(rollout):
    """Add in two parts, save, restore and drain: what every trainer does between collection and update."""
    buffer, restored = RolloutBuffer(), RolloutBuffer()
    first = rollout.group == rollout.group[0]
    buffer.add(rollout.select(first))
    if not bool(first.all()):
        buffer.add(rollout.select(~first))
    restored.load_state_dict(buffer.state_dict())
    return restored.drain()


def surrogate_at_ratio_one(batch):
    return clipped_surrogate(batch.log_prob_old * 0, batch.advantages, clip_low=0.2, clip_high=0.28)


# ---------------------------------------------------------------- language models: tokens with tool masks, GRPO


def tool_tokens():
    """Two groups of two for the *same* prompt 7. Row 0 calls a tool: its third token is the tool's and masked."""
    return make_rollout(
        mask=[[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]],
        rewards=[[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 3, 0], [0, 1, 0, 0]],
        terminated=[[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]],
        truncated=[[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]],
        group=[11, 11, 12, 12],
        prompt_id=[7, 7, 7, 7],
    )


# pi / pi_old of each token; what stands at masked ones must not matter, whatever it is
TOKEN_RATIOS = f64([[1.5, 0.5, NAN, 1.0], [0.5, 9.0, math.inf, NAN], [1.1, 1.0, 2.0, NAN], [2.0, 1.0, 9.0, 0.0]])

# GRPO gives each pair +HALF and -HALF. With clip 0.2 / 0.28 (ratios kept in [0.8, 1.28]), in units of HALF:
#   row 0, A > 0:  -1.28 (clipped), -0.5, tool, -1.0    sum -2.78 over 3 tokens
#   row 1, A < 0:  +0.8 (clipped from 0.5)              sum +0.80 over 1 token
#   row 2, A > 0:  -1.1, -1.0, -1.28                    sum -3.38 over 3 tokens
#   row 3, A < 0:  +2.0 (no clip in this direction), +1 sum +3.00 over 2 tokens
TOKEN_SUMS = [-2.78, 0.80, -3.38, 3.00]


@pytest.mark.parametrize(
    ("mode", "denominator", "expected"),
    [
        ("token", None, sum(TOKEN_SUMS) / 9),
        ("sequence_mean", None, (-2.78 / 3 + 0.80 / 1 - 3.38 / 3 + 3.00 / 2) / 4),
        ("sequence_sum", None, sum(TOKEN_SUMS) / 4),
        ("group", None, ((-2.78 + 0.80) / 4 + (-3.38 + 3.00) / 5) / 2),
        ("constant", 4 * 4, sum(TOKEN_SUMS) / 16),
    ],
)
def test_tokens_with_tool_masks_through_grpo(mode, denominator, expected):
    batch = build_estimator(GroupRelative(eps=0.0))(through_buffer(tool_tokens()))
    assert isinstance(batch, TrainBatch)
    signs = f64([[1, 1, 0, 1], [-1, 0, 0, 0], [1, 1, 1, 0], [-1, -1, 0, 0]])  # 0 at the tool's token and at padding
    torch.testing.assert_close(batch.advantages, signs * HALF)

    log_prob = TOKEN_RATIOS.log().requires_grad_()
    objective = clipped_surrogate(log_prob - batch.log_prob_old, batch.advantages, clip_low=0.2, clip_high=0.28)
    loss = aggregate(
        objective, batch.mask, weights=batch.weights, mode=mode, group=batch.group, denominator=denominator
    )
    assert loss.item() == pytest.approx(expected * HALF, rel=1e-12)

    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad[~batch.mask].tolist() == [0.0] * 7
    # Clipped tokens have no gradient: rows 0 and 2 at ratios above 1.28, row 1 at 0.5.
    clipped = [log_prob.grad[0, 0], log_prob.grad[2, 2], log_prob.grad[1, 0]]
    assert [value.item() for value in clipped] == [0.0, 0.0, 0.0]


def test_token_gradient_is_minus_ratio_times_advantage_over_the_count():
    batch = build_estimator(GroupRelative(eps=0.0))(tool_tokens())
    log_prob = TOKEN_RATIOS.log().requires_grad_()
    objective = clipped_surrogate(log_prob - batch.log_prob_old, batch.advantages, clip_low=0.2, clip_high=0.28)
    aggregate(objective, batch.mask, mode="token").backward()
    assert log_prob.grad is not None
    # d/dlog pi of -rho A = -rho A: row 0 token 1 has rho 0.5 and A = HALF; row 3 token 0 has rho 2 and A = -HALF
    assert log_prob.grad[0, 1].item() == pytest.approx(-0.5 * HALF / 9)
    assert log_prob.grad[3, 0].item() == pytest.approx(2.0 * HALF / 9)


def test_duplicate_prompts_are_compared_within_their_own_group_only():
    rollout = tool_tokens()
    batch = build_estimator(LeaveOneOut())(rollout)
    # group 11: 1 against 0, group 12: 3 against 1; each other's reward is the whole baseline
    assert [row[row != 0].unique().tolist() for row in batch.advantages] == [[1.0], [-1.0], [2.0], [-2.0]]
    # Grouped by prompt instead, row 0 would be 1 - (0 + 3 + 1) / 3 = -1/3: a right answer punished.
    by_prompt = dataclasses.replace(rollout, group=rollout.prompt_id)
    wrong = build_estimator(LeaveOneOut())(by_prompt)
    assert wrong.advantages[0, 0].item() == pytest.approx(1 - 4 / 3)


def test_tokens_with_tool_masks_through_gae_carry_credit_across_the_tool():
    # One rollout: two tokens, one tool token, one token with reward 1; gamma = lambda = 1/2, and V = 0 everywhere:
    #   A3 = 1;  tool: 0 and the trace passes;  A1 = 0 + 1/4 A3 = 1/4;  A0 = 1/4 A1 = 1/16
    rollout = make_rollout(
        mask=[[1, 1, 0, 1]],
        rewards=[[0, 0, 0, 1]],
        terminated=[[0, 0, 0, 1]],
        group=[0],
        values=f64([[0, 0, 50, 0]]),  # a value at the tool's token is nobody's
        next_values=f64([[0, 0, 50, 0]]),
    )
    batch = build_estimator(GAE(gamma=0.5, gae_lambda=0.5))(rollout)
    torch.testing.assert_close(batch.advantages, f64([[1 / 16, 1 / 4, 0, 1]]))
    # ratio 1, so the objective is -A; three real tokens
    loss = aggregate(surrogate_at_ratio_one(batch), batch.mask, mode="token")
    assert loss.item() == pytest.approx(-(1 / 16 + 1 / 4 + 1) / 3)


# ---------------------------------------------------------------- agents: several episodes per row, a truncation, GAE


def episodes():
    """gamma = lambda = 1/2, so gamma * lambda = 1/4.

    Row 0: an episode that terminates at step 1, a reset row (masked), an episode truncated at step 4:
        d4 = 4 + 8/2 - 6 = 2            A4 = 2                      the bootstrap 8 is V of the true last observation
        d3 = 3 + 6/2 - 2 = 4            A3 = 4 + 2/4 = 4.5
        step 2 is no decision           A2 = 0
        d1 = 2 + 0 - 4 = -2             A1 = -2                     terminated: the 100 behind it is not looked at
        d0 = 1 + 4/2 - 2 = 1            A0 = 1 - 2/4 = 0.5
    Row 1: truncated at once, then an episode that goes on when the rollout ends:
        d4 = 0 + 4/2 - 0 = 2            A4 = 2
        d3 = d2 = d1 = 0                A3 = 1/2, A2 = 1/8, A1 = 1/32
        d0 = 1 + 10/2 - 2 = 4           A0 = 4                      truncated: bootstraps, but the trace is cut
    """
    return make_rollout(
        mask=[[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]],
        rewards=[[1, 2, 0, 3, 4], [1, 0, 0, 0, 0]],
        terminated=[[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
        truncated=[[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]],
        group=[0, 1],
        values=f64([[2, 4, 77, 2, 6], [2, 0, 0, 0, 0]]),
        next_values=f64([[4, 100, 77, 6, 8], [10, 0, 0, 0, 4]]),
    )


EPISODE_ADVANTAGES = [[0.5, -2.0, 0.0, 4.5, 2.0], [4.0, 1 / 32, 1 / 8, 1 / 2, 2.0]]


def test_several_episodes_with_a_truncation_through_gae():
    batch = build_estimator(GAE(gamma=0.5, gae_lambda=0.5))(through_buffer(episodes()))
    torch.testing.assert_close(batch.advantages, f64(EPISODE_ADVANTAGES))
    assert batch.returns is not None
    torch.testing.assert_close(batch.returns[batch.mask], (f64(EPISODE_ADVANTAGES) + batch.values)[batch.mask])
    assert batch.returns[0].tolist()[:2] == [2.5, 2.0]

    loss = aggregate(surrogate_at_ratio_one(batch), batch.mask, weights=batch.weights, mode="token")
    assert loss.item() == pytest.approx(-(0.5 - 2 + 4.5 + 2 + 4 + 1 / 32 + 1 / 8 + 1 / 2 + 2) / 9)


def test_minibatches_of_episodes_add_up_to_the_whole():
    batch = build_estimator(GAE(gamma=0.5, gae_lambda=0.5))(episodes())
    count = aggregate_denominator(batch.mask, mode="token")
    assert count == 9
    parts = [
        aggregate(surrogate_at_ratio_one(part), part.mask, weights=part.weights, mode="token", denominator=count)
        for part in batch.minibatches(1, torch.Generator().manual_seed(3))
    ]
    whole = aggregate(surrogate_at_ratio_one(batch), batch.mask, mode="token")
    assert sum(part.item() for part in parts) == pytest.approx(whole.item(), rel=1e-12)


# ---------------------------------------------------------------- BNPO: a failed reward, and two reward parts


def one_token_each(outcomes, group, **optional):
    return make_rollout([[1]] * len(group), [[value] for value in outcomes], group, **optional)


def test_bnpo_with_a_failed_reward():
    # Three prompts with pass rates 1/4, 1/2, 3/4: mean 1/2, sample variance 1/16, so k = (1/4)/(1/16) - 1 = 3 and
    # a = b = 3/2, alpha = beta = 1 + a/3 = 3/2. The normaliser is f(p) = sqrt(p (1-p)) / B(3/2, 3/2) with
    # B(3/2, 3/2) = pi/8, so the weight is (pi/8) / sqrt(p (1-p)): pi/4 at p = 1/2, (pi/8) / sqrt(3/16) at 1/4 and 3/4.
    middle, outer = math.pi / 4, math.pi / 8 / math.sqrt(3 / 16)
    quarter = [outer * 0.75, -outer * 0.25, -outer * 0.25, -outer * 0.25]
    expected = [*quarter, 0.0, middle / 2, middle / 2, -middle / 2, -middle / 2, *[-value for value in quarter]]
    # The fifth rollout of the first prompt has no outcome. It moves no pass rate; as a failure it would make 1/5.
    rollout = one_token_each(
        [1, 0, 0, 0, NAN, 1, 1, 0, 0, 0, 1, 1, 1],
        [4] * 5 + [2] * 4 + [9] * 4,
        scored=[True] * 4 + [False] + [True] * 8,
    )
    estimator = build_estimator(BetaNormalized(max_weight=1e6, max_concentration=None))
    batch = estimator(rollout)
    torch.testing.assert_close(batch.advantages[:, 0], f64(expected))
    assert expected[0] == pytest.approx(0.68017476)  # the authors' own number for this batch
    assert {name: estimator.metrics[f"bnpo/{name}"] for name in ("a", "b", "alpha", "beta", "weight_max")} == (
        pytest.approx({"a": 1.5, "b": 1.5, "alpha": 1.5, "beta": 1.5, "weight_max": outer})
    )
    assert batch.advantages[4].tolist() == [0.0]

    # BNPO's loss: mean over rollouts of token sums. The failed one is a rollout: 13 of them.
    loss = aggregate(surrogate_at_ratio_one(batch), batch.mask, mode="sequence_sum")
    assert loss.item() == pytest.approx(-sum(expected) / 13, abs=1e-12)


def test_grpo_with_a_failed_reward_is_grpo_without_the_rollout():
    estimator = build_estimator(GroupRelative(eps=0.0))
    failed = estimator(one_token_each([1, 0, 5], [3, 3, 3], scored=[True, True, False]))
    assert failed.advantages[:, 0].tolist() == pytest.approx([HALF, -HALF, 0.0])
    # As a reward of 0 it would have changed the others: mean 1/3.
    as_zero = estimator(one_token_each([1, 0, 0], [3, 3, 3]))
    assert as_zero.advantages[1, 0].item() != pytest.approx(-HALF)


def test_bnpo_with_two_reward_parts():
    # accuracy as above; format per prompt [1 1 0 1][1 1 1 1][0 1 1 0], so p = 3/4, 1, 1/2: mean 3/4, variance 1/16,
    # k = (3/16)/(1/16) - 1 = 2, a = 3/2, b = 1/2, alpha = 3/2, beta = 7/6, weight = B(3/2, 7/6) p^(-1/2) (1-p)^(-1/6).
    accuracy = f64([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0])
    form = f64([1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0])
    log_beta = math.lgamma(3 / 2) + math.lgamma(7 / 6) - math.lgamma(3 / 2 + 7 / 6)
    weight = {p: math.exp(log_beta) * p**-0.5 * (1 - p) ** (-1 / 6) for p in (0.75, 0.5)}
    hit, miss = weight[0.75] * 0.25, -weight[0.75] * 0.75
    assert hit == pytest.approx(0.19874686, abs=1e-8)
    half = weight[0.5] / 2
    form_advantages = f64([hit, hit, miss, hit, 0, 0, 0, 0, -half, half, half, -half])
    outer, middle = math.pi / 8 / math.sqrt(3 / 16), math.pi / 8
    accuracy_advantages = f64(
        [outer * 0.75] + [-outer * 0.25] * 3 + [middle, middle, -middle, -middle] + [outer * 0.25] * 3 + [-outer * 0.75]
    )
    rollout = one_token_each(
        (accuracy + form).tolist(),  # 0 to 2: as one reward this is outside the normaliser's range
        [0] * 4 + [1] * 4 + [2] * 4,
        reward_parts={"accuracy": accuracy, "format": form, "always": torch.ones(12, dtype=torch.float64)},
    )
    settings = {"max_weight": 1e6, "max_concentration": None, "decompose": True}
    mean = build_estimator(BetaNormalized(**settings))(rollout)
    # `always` is constant: it says nothing and does not thin the others out, or the divisor would be 3
    torch.testing.assert_close(mean.advantages[:, 0], (accuracy_advantages + form_advantages) / 2)
    assert mean.advantages[0, 0].item() == pytest.approx(0.43946081, abs=1e-8)  # the authors' decomposition

    weighted = build_estimator(BetaNormalized(**settings, part_weights={"accuracy": 3.0}))(rollout)
    torch.testing.assert_close(weighted.advantages[:, 0], (3 * accuracy_advantages + form_advantages) / 4)


# ---------------------------------------------------------------- diffusion: an SDE window, last step unscored, Guard


def test_an_sde_window_with_an_unscored_last_step_through_guard():
    # Two rollouts of one group, three denoising steps. The last step adds no noise: it has no probability and is
    # masked, and the reward of the finished sample stands on it all the same.
    rollout = make_rollout(
        mask=[[1, 1, 0], [1, 1, 0]],
        rewards=[[0, 0, 1], [0, 0, 0]],
        terminated=[[0, 0, 1], [0, 0, 1]],
        group=[6, 6],
        inputs={"latents": Input(value=torch.zeros(2, 4, 4, dtype=torch.float64), axis="per_rollout")},
    )
    batch = build_estimator(GroupRelative(scale=False))(through_buffer(rollout))
    torch.testing.assert_close(batch.advantages, f64([[0.5, 0.5, 0], [-0.5, -0.5, 0]]))

    # Guard's log-ratio is mean_d (mu - mu_old) eps with x = mu_old + s eps.
    #   step 0, s = 0.1: mu - mu_old = [.02 -.01 -.03 .04], eps = [.5 -1 .5 -.5]:  (.01 + .01 - .015 - .02)/4 = -.00375
    #   step 1, s = 0.2: row 0: [.1 0 0 0] . [1 -.5 0 .5] / 4 = .025
    #                    row 1: [.3 -.3 .3 -.3] . [-.5 1 -1 .5] / 4 = -.225
    std = f64([0.1, 0.2])
    moved = [f64([[0.02, -0.01, -0.03, 0.04]] * 2), f64([[0.1, 0, 0, 0], [0.3, -0.3, 0.3, -0.3]])]
    noise = [f64([[0.5, -1, 0.5, -0.5]] * 2), f64([[1, -0.5, 0, 0.5], [-0.5, 1, -1, 0.5]])]
    log_ratio = torch.zeros(2, 3, dtype=torch.float64)
    for step in range(2):
        s = std[step].expand(2)
        old, new = torch.zeros(2, 4, dtype=torch.float64), moved[step]
        # log-probabilities per dimension, up to the constant that cancels: -(x - mu)^2 / (2 s^2)
        x = s[:, None] * noise[step]
        log_prob_old, log_prob = (-((x - mean) ** 2).mean(1) / (2 * s**2) for mean in (old, new))
        log_ratio[:, step] = guarded_log_ratio(log_prob, log_prob_old, new, old, s)
    torch.testing.assert_close(log_ratio, f64([[-0.00375, 0.025, 0], [-0.00375, -0.225, 0]]))

    # Guard weighs a step by 1 / dt: dt = 0.04 and 0.16 give 25 and 6.25. With a clip of 0.001 on both sides:
    #   row 0, A = 1/2:  step 0 keeps exp(-.00375);  step 1 is clipped to 1.001
    #   row 1, A = -1/2: both are clipped to 0.999 from below
    weights = f64([[25, 6.25, 1], [25, 6.25, 1]])
    batch = TrainBatch.from_rollout(batch, batch.advantages, weights=weights)
    objective = clipped_surrogate(log_ratio, batch.advantages, clip_low=1e-3, clip_high=1e-3)
    loss = aggregate(objective, batch.mask, weights=batch.weights, mode="token")
    first = 25 * (-math.exp(-0.00375) + 0.999) / 2
    second = 6.25 * (-1.001 + 0.999) / 2
    assert loss.item() == pytest.approx((first + second) / 4)  # four scored steps: weights are not in the divisor


@pytest.mark.parametrize("mode", ["token", "sequence_mean", "sequence_sum", "group", "constant"])
def test_weights_are_never_normalised_away(mode):
    batch = build_estimator(GroupRelative(eps=0.0))(tool_tokens())

    def loss(weights):
        objective = clipped_surrogate(TOKEN_RATIOS.log(), batch.advantages, clip_low=0.2, clip_high=0.28)
        divisor = 16.0 if mode == "constant" else None
        return aggregate(
            objective, batch.mask, weights=weights, mode=mode, group=batch.group, denominator=divisor
        ).item()

    assert loss(3 * batch.weights) == pytest.approx(3 * loss(batch.weights), rel=1e-12)
    without_row_3 = batch.weights * f64([1, 1, 1, 0])[:, None]
    divisors = {"token": 9, "sequence_mean": 2 * 4, "sequence_sum": 4, "group": 5 * 2, "constant": 16}
    # Row 3 alone sums to 3.00 HALF; taking it out must leave every divisor as it was.
    assert loss(batch.weights) - loss(without_row_3) == pytest.approx(3.00 * HALF / divisors[mode], rel=1e-12)


# ---------------------------------------------------------------- laws of every group estimator


@pytest.mark.parametrize(
    "cfg", [GroupRelative(), LeaveOneOut(), BetaNormalized(), PerPromptRunning()], ids=lambda cfg: cfg.type
)
def test_shuffling_before_the_advantages_changes_nothing(cfg):
    outcomes, group = [1, 0, 0, 1, 1, 0, 1, 1, 1, 0], [5, 5, 5, 2, 2, 2, 9, 9, 9, 9]
    rollout = one_token_each(outcomes, group)
    ordered = build_estimator(cfg)(rollout).advantages
    assert bool((ordered != 0).any())
    order = torch.randperm(10, generator=torch.Generator().manual_seed(4))
    shuffled = build_estimator(cfg)(rollout.select(order))
    assert shuffled.group.tolist() != group
    torch.testing.assert_close(shuffled.advantages, ordered[order])


def test_statistics_over_all_ranks_are_those_of_the_gathered_rollout():
    whole = one_token_each([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0], [0] * 4 + [1] * 4 + [2] * 4)
    rank_0, rank_1 = whole.select(whole.group < 2), whole.select(whole.group == 2)
    estimator = build_estimator(BetaNormalized())
    gathered = estimator(Rollout.concatenate([rank_1, rank_0])).select(torch.tensor([4, 5, 6, 7, 8, 9, 10, 11, 0]))
    torch.testing.assert_close(gathered.advantages, estimator(whole).advantages[:9])
    # Alone, rank 1 knows one pass rate, fits nothing and falls back to r - p: another number.
    alone = estimator(rank_1).advantages[:, 0]
    assert alone.tolist() == [0.25, 0.25, 0.25, -0.75]
    assert estimator(whole).advantages[8, 0].item() != pytest.approx(0.25)


def test_minibatches_never_split_a_group_when_the_aggregation_needs_it_whole():
    batch = build_estimator(GroupRelative(eps=0.0))(tool_tokens())
    whole = aggregate(surrogate_at_ratio_one(batch), batch.mask, mode="group", group=batch.group)
    parts = list(batch.minibatches(3, torch.Generator().manual_seed(0), keep_groups=True))
    assert sorted(part.group.tolist() for part in parts) == [[11, 11], [12, 12]]
    summed = sum(
        aggregate(surrogate_at_ratio_one(part), part.mask, mode="group", group=part.group, denominator=2).item()
        for part in parts
    )
    assert summed == pytest.approx(whole.item(), rel=1e-12)


def test_a_masked_truncation_counts_in_the_baseline_but_not_in_the_loss():
    # Row 1 ran out of room: its tokens are masked, its outcome 0 still stands in the mean of its group.
    rollout = make_rollout([[1, 1], [0, 0]], [[0, 1], [0, 0]], [3, 3], truncated=[[0, 0], [0, 1]])
    batch = build_estimator(GroupRelative(scale=False))(rollout)
    assert batch.advantages.tolist() == [[0.5, 0.5], [0.0, 0.0]]
    loss = aggregate(surrogate_at_ratio_one(batch), batch.mask, mode="token")
    assert loss.item() == pytest.approx(-0.5)


def test_a_batch_with_every_decision_masked_has_loss_zero_and_a_gradient_of_zero():
    rollout = make_rollout([[0, 0], [0, 0]], [[0, 1], [0, 0]], [3, 3])
    batch = build_estimator(GroupRelative())(rollout)
    log_prob = torch.full((2, 2), NAN, dtype=torch.float64, requires_grad=True)
    objective = clipped_surrogate(log_prob - batch.log_prob_old, batch.advantages, clip_low=0.2, clip_high=0.2)
    loss = aggregate(objective, batch.mask, mode="token")
    assert loss.item() == 0.0
    loss.backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "cfg", [GroupRelative(), LeaveOneOut(), BetaNormalized(), PerPromptRunning()], ids=lambda cfg: cfg.type
)
def test_a_boundary_inside_a_row_is_refused_by_whoever_compares_outcomes(cfg):
    with pytest.raises(ValueError, match=r"row 0 goes on after its episode ended at decision 1.*advantage\.type: gae"):
        build_estimator(cfg)(episodes())


@pytest.mark.parametrize(
    ("cfg", "sentence"),
    [
        (GAE(), r"`advantage\.type: gae` needs `next_values`.*only a policy with a critic"),
        (
            GreedyBaseline(),
            r"`advantage\.type: greedy_baseline` needs `baseline_reward`.*trainer collects it by itself",
        ),
    ],
    ids=lambda value: value.type if not isinstance(value, str) else "",
)
def test_a_missing_optional_field_names_the_config_key(cfg, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_estimator(cfg)(tool_tokens())
