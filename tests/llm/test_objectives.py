"""Each config means its equation: values by the definitions of the papers, every knob where it belongs."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlalign.llm.config import CISPO, GSPO, SAPO, ClippedSurrogate, CorrectionConfig, KLConfig, Reinforce
from rlalign.llm.objectives import clipped_shares, engine_weights, kl_penalty, penalised, policy_objective
from tests.llm.hand_made import hand_made
from tests.reference import objectives as reference

# Ratios on both sides of every clip, for good and bad decisions; the last decision of row 1 is masked.
RATIO = torch.tensor([[0.5, 0.9, 1.2], [1.6, 14.0, 1.0]], dtype=torch.float64)
ADVANTAGE = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -0.5, 3.0]], dtype=torch.float64)
LOG_PROB = torch.tensor([[-0.3, -1.0, -2.0], [-0.7, -0.1, -9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def objective(cfg) -> Tensor:
    return policy_objective(cfg, LOG_PROB, LOG_PROB - RATIO.log(), ADVANTAGE, MASK)


def each(function) -> Tensor:
    """`function(log_prob, ratio, advantage)` of every decision."""
    flat = zip(LOG_PROB.flatten().tolist(), RATIO.flatten().tolist(), ADVANTAGE.flatten().tolist(), strict=True)
    return torch.tensor([function(*decision) for decision in flat], dtype=torch.float64).view(2, 3)


def sequence_ratios() -> list[float]:
    """exp of the mean log-ratio over the real decisions of each row."""
    return [
        math.exp(sum(math.log(ratio) for ratio in row) / len(row)) for row in ([0.5, 0.9, 1.2], [1.6, 14.0])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        (Reinforce(), lambda log_prob, ratio, advantage: -advantage * log_prob),
        (
            ClippedSurrogate(clip_low=0.1, clip_high=0.3),
            lambda log_prob, ratio, advantage: reference.clipped(ratio, advantage, 0.1, 0.3),
        ),
        (
            ClippedSurrogate(clip_low=0.1, clip_high=0.3, dual_clip=10.0),
            lambda log_prob, ratio, advantage: reference.clipped(ratio, advantage, 0.1, 0.3, 10.0),
        ),
        (CISPO(cap=1.1), lambda log_prob, ratio, advantage: reference.cispo(log_prob, ratio, advantage, 1.1)),
        (
            SAPO(tau_positive=0.7, tau_negative=1.9),
            lambda log_prob, ratio, advantage: reference.sapo(ratio, advantage, 0.7, 1.9),
        ),
    ],
    ids=["reinforce", "clipped", "dual_clip", "cispo", "sapo"],
)
def test_token_level_objectives_follow_their_definitions(cfg, expected):
    torch.testing.assert_close(objective(cfg), each(expected))


def test_the_dual_clip_acts_where_the_plain_one_does_not():
    plain, dual = (objective(ClippedSurrogate(dual_clip=clip)) for clip in (None, 10.0))
    assert plain[1, 1].item() == pytest.approx(7.0)  # 14 x 0.5
    assert dual[1, 1].item() == pytest.approx(5.0)  # 10 x 0.5
    torch.testing.assert_close(plain[0], dual[0])


@pytest.mark.parametrize("per_token", [False, True])
def test_gspo_clips_one_ratio_per_sequence(per_token):
    got = objective(GSPO(clip_low=0.05, clip_high=0.1, per_token=per_token))
    for row, ratio in enumerate(sequence_ratios()):
        for token in range(3):
            if MASK[row, token]:
                expected = reference.clipped(ratio, float(ADVANTAGE[row, token]), 0.05, 0.1)
                assert got[row, token].item() == pytest.approx(expected)


def gradient(cfg) -> Tensor:
    log_prob = LOG_PROB.clone().requires_grad_()
    kept = policy_objective(cfg, log_prob, LOG_PROB - RATIO.log(), ADVANTAGE, MASK).masked_fill(~MASK, 0)
    return torch.autograd.grad(kept.sum(), log_prob)[0]


def test_gspo_shares_a_sequences_gradient_among_its_tokens_and_gspo_token_does_not():
    whole = gradient(GSPO(clip_low=1.0, clip_high=100.0))
    own = gradient(GSPO(clip_low=1.0, clip_high=100.0, per_token=True))
    first, second = sequence_ratios()
    # d/dlogp_t of -s sum_t A_t = -s (sum_t A_t) / n;   GSPO-token: -s A_t
    torch.testing.assert_close(whole[0], torch.full((3,), -first * 2 / 3, dtype=torch.float64))
    torch.testing.assert_close(whole[1, :2], torch.full((2,), second * 1.5 / 2, dtype=torch.float64))
    torch.testing.assert_close(own[0], -first * ADVANTAGE[0])
    assert whole[1, 2] == own[1, 2] == 0


ALL = (Reinforce(), ClippedSurrogate(), ClippedSurrogate(dual_clip=10.0), CISPO(), GSPO(per_token=True), SAPO())


@pytest.mark.parametrize("cfg", ALL, ids=lambda cfg: type(cfg).__name__)
def test_at_ratio_one_every_objective_has_the_gradient_of_the_policy_gradient(cfg):
    log_prob = LOG_PROB.clone().requires_grad_()
    loss = policy_objective(cfg, log_prob, LOG_PROB, ADVANTAGE, MASK).masked_fill(~MASK, 0).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, log_prob)[0], -ADVANTAGE.masked_fill(~MASK, 0))


def test_cispo_and_reinforce_differ_by_a_detached_ratio_only():
    torch.testing.assert_close(gradient(CISPO(cap=5.0)), -(RATIO.clamp(max=5.0) * ADVANTAGE).masked_fill(~MASK, 0))


def test_decisions_of_other_micro_batches_cannot_overflow():
    # They hold 0 where their log-probability will be; a ratio against the real one must stay finite.
    for cfg in (*ALL, GSPO()):
        log_prob = torch.zeros(1, 2, requires_grad=True)
        old, mask = torch.tensor([[-1.0, -5000.0]]), torch.tensor([[True, False]])
        got = policy_objective(cfg, log_prob, old, torch.ones(1, 2), mask)
        assert got.isfinite().all()
        assert torch.autograd.grad(got.masked_fill(~mask, 0).sum(), log_prob)[0].isfinite().all()


@pytest.mark.parametrize(
    ("cfg", "shares"),
    [
        # of 5 real decisions: 0.9 with A < 0 is below 1 - 0.05; 1.2 with A > 0 is above 1 + 0.1; 0.5 with A > 0 is kept
        (ClippedSurrogate(clip_low=0.05, clip_high=0.1), (0.2, 0.2)),
        (ClippedSurrogate(clip_low=0.2, clip_high=0.28), (0.0, 0.0)),
        (CISPO(cap=1.5), (0.0, 0.4)),  # 1.6 and 14
        (GSPO(clip_low=0.05, clip_high=0.1), (0.2, 0.0)),  # row 0 is at 0.81: its one bad decision
        (Reinforce(), (0.0, 0.0)),
        (SAPO(), (0.0, 0.0)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_shares_of_clipped_decisions_by_hand(cfg, shares):
    assert clipped_shares(cfg, RATIO.log(), ADVANTAGE, MASK) == pytest.approx(shares)


def test_nothing_real_clips_nothing():
    assert clipped_shares(CISPO(), RATIO.log(), ADVANTAGE, torch.zeros_like(MASK)) == (0.0, 0.0)
    assert clipped_shares(ClippedSurrogate(), RATIO.log(), ADVANTAGE, torch.zeros_like(MASK)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("cfg", "value"),
    [
        (KLConfig(estimator="k1"), 0.5),
        (KLConfig(estimator="k2"), 0.125),
        (KLConfig(estimator="k3"), math.exp(-0.5) - 1 + 0.5),
        (KLConfig(where="loss"), math.exp(-0.5) - 1 + 0.5),
        (KLConfig(where="reward"), 0.5),
    ],
)
def test_the_divergence_by_hand_and_by_default(cfg, value):
    got = kl_penalty(cfg, torch.tensor([[-1.0]]), torch.tensor([[-1.5]]))
    assert got.item() == pytest.approx(value)


def test_kl_in_the_reward_comes_off_every_real_token_of_the_outcome():
    rollout = hand_made([[1]], [[[2, 3, 4], [5, 6]]], masked=[(0, 1)])
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    log_prob = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]])
    log_prob_ref = torch.tensor([[-2.0, -9.0, -3.5], [-0.5, -1.0, 0.0]])
    rollout = replace(rollout, rewards=rewards, log_prob_old=log_prob, log_prob_ref=log_prob_ref)
    got = penalised(rollout, KLConfig(coef=0.1, where="reward"))
    # k1: 1.0, (a tool's token), 0.5 and -0.5, 0
    torch.testing.assert_close(got.rewards, torch.tensor([[-0.1, 0.0, 0.95], [0.05, 2.0, 0.0]]))
    torch.testing.assert_close(got.outcome, torch.tensor([0.85, 2.05]))
    assert penalised(rollout, KLConfig(coef=0.1, where="loss")) is rollout
    assert penalised(rollout, KLConfig(coef=0.0, where="reward")) is rollout


def test_engine_weights_by_hand():
    old = torch.tensor([[-1.0, -1.0, -1.0, -1.0]])
    engine = torch.tensor([[-1.0 + math.log(0.25), -1.0 + math.log(4.0), math.nan, -1.0]])
    mask = torch.tensor([[True, True, True, False]])
    # ratios old / engine: 4, 1/4, unknown = 1, masked
    cases = {
        CorrectionConfig(kind="truncated", cap=2.0): [2.0, 0.25, 1.0, 0.0],
        CorrectionConfig(kind="masked", cap=5.0, floor=0.5): [4.0, 0.0, 1.0, 0.0],
        CorrectionConfig(kind="masked", cap=3.0, floor=0.2): [0.0, 0.25, 1.0, 0.0],
        CorrectionConfig(kind="none"): [1.0, 1.0, 1.0, 0.0],
    }
    for cfg, expected in cases.items():
        torch.testing.assert_close(engine_weights(cfg, old, engine, mask), torch.tensor([expected]))
