"""Policy objectives: the policy gradient and everything that bounds how far it may go."""

import inspect
import math

import pytest
import torch

from rlalign.functional.masked import aggregate, spread
from rlalign.functional.policy import (
    cispo,
    clip_fractions,
    clipped_surrogate,
    reinforce,
    sapo,
    sequence_ratio,
    weighted_bc,
)
from tests.reference import objectives as reference

NAN = math.nan


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_batch(seed, rows=4, time=6):
    """Log-probabilities, old ones, advantages of both signs and zero, and a ragged mask."""
    generator = torch.Generator().manual_seed(seed)
    log_prob, old, advantages = torch.randn(3, rows, time, generator=generator, dtype=torch.float64)
    advantages[0, 0] = 0
    mask = torch.rand(rows, time, generator=generator) < 0.7
    return log_prob, old, advantages, mask


OBJECTIVES = {
    "reinforce": lambda lp, old, a: reinforce(lp, a),
    "clipped": lambda lp, old, a: clipped_surrogate(lp - old, a, clip_low=0.2, clip_high=0.28),
    "dual": lambda lp, old, a: clipped_surrogate(lp - old, a, clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "cispo": lambda lp, old, a: cispo(lp, lp - old, a, cap=5.0),
    "sapo": lambda lp, old, a: sapo(lp - old, a),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())


# ---------------------------------------------------------------- hand arithmetic


def test_reinforce_matches_hand_arithmetic():
    assert reinforce(f64([[-0.5, -2.0]]), f64([[2.0, -1.0]])).tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "gradient"),
    [  # clip 0.2 below, 0.28 above; the gradient is with respect to the log-probability
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.56, 0.0),  # good and already likelier: clipped at 1.28
        (0.5, 2.0, -1.0, -1.0),  # good but less likely: pulled back up
        (0.5, -2.0, 1.6, 0.0),  # bad and already rarer: clipped at 0.8
        (1.5, -2.0, 3.0, 3.0),  # bad and likelier: no bound without dual clip
        (9.0, -2.0, 18.0, 18.0),
    ],
)
def test_clipped_surrogate_matches_hand_arithmetic(ratio, advantage, expected, gradient):
    log_ratio = f64([[math.log(ratio)]]).requires_grad_()
    loss = clipped_surrogate(log_ratio, f64([[advantage]]), clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    assert log_ratio.grad.item() == pytest.approx(gradient)


def test_dual_clip_bounds_the_punishment_of_bad_decisions_only():
    log_ratio = f64([[9.0, 9.0, 2.0]]).log().requires_grad_()
    loss = clipped_surrogate(log_ratio, f64([[-2.0, 2.0, -2.0]]), clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert loss.tolist()[0] == pytest.approx([6.0, -2.4, 4.0])
    loss.sum().backward()
    assert log_ratio.grad.tolist()[0] == pytest.approx([0.0, 0.0, 4.0])


def test_cispo_matches_hand_arithmetic():
    """Trap: the cap is the ratio itself, and the ratio carries no gradient."""
    log_prob = f64([[-1.0, -3.0, -0.5]]).requires_grad_()
    ratios, advantages = f64([[2.0, 40.0, 0.1]]), f64([[1.0, -1.0, 2.0]])
    loss = cispo(log_prob, ratios.log(), advantages, cap=5.0)
    assert loss.tolist()[0] == pytest.approx([2.0, -15.0, 0.1])
    loss.sum().backward()
    assert log_prob.grad.tolist()[0] == pytest.approx([-2.0, 5.0, -0.2])  # -min(ratio, cap) A: above the cap too


def test_cispo_detaches_the_ratio_even_when_it_is_computed_from_the_same_log_prob():
    log_prob = f64([[-1.0]]).requires_grad_()
    cispo(log_prob, log_prob - f64([[-1.5]]), f64([[1.0]]), cap=5.0).sum().backward()
    assert log_prob.grad.item() == pytest.approx(-math.exp(0.5))


@pytest.mark.parametrize("cap", [0.2, 0.999, -1.0])
def test_a_cap_below_one_is_a_distance_by_mistake(cap):
    """Trap: a cap of 0.2 makes every gradient five times too small, without an error."""
    with pytest.raises(ValueError, match=r"largest ratio itself and must be >= 1, got .*1 \+ epsilon"):
        cispo(f64([[0.0]]), f64([[0.0]]), f64([[1.0]]), cap=cap)


def test_sapo_matches_hand_arithmetic():
    # sigmoid(1 x (2 - 1)) x 4 x A; for A < 0 the temperature 1.05
    log_ratio, advantages = f64([[2.0, 2.0]]).log(), f64([[1.0, -1.0]])
    expected = [-4 / (1 + math.exp(-1)), 4 / 1.05 / (1 + math.exp(-1.05))]
    assert sapo(log_ratio, advantages).tolist()[0] == pytest.approx(expected, rel=1e-12)


def test_sapo_fades_out_on_both_sides():
    log_ratio = f64([[0.05, 1.0, 5.0]]).log().requires_grad_()
    sapo(log_ratio, f64([[1.0, 1.0, 1.0]]), tau_positive=3.0).sum().backward()
    slope = (log_ratio.grad / log_ratio.detach().exp()).abs()[0]  # per unit of ratio
    assert slope[1].item() == pytest.approx(1.0)
    assert slope[0].item() < 0.25
    assert slope[2].item() < 1e-4


def test_weighted_imitation_matches_hand_arithmetic():
    log_prob = f64([-0.5, -2.0, -1.0]).requires_grad_()
    loss = weighted_bc(log_prob, f64([3.0, 0.0, 1.0]))
    assert loss.tolist() == [1.5, 0.0, 1.0]
    loss.sum().backward()
    assert log_prob.grad.tolist() == [-3.0, 0.0, -1.0]


def test_weights_of_imitation_carry_no_gradient():
    """Trap: weights that depend on a value function would train it through the policy's loss."""
    weights = f64([2.0]).requires_grad_()
    weighted_bc(f64([-1.0]).requires_grad_(), weights).sum().backward()
    assert weights.grad is None


def test_clip_fractions_match_hand_arithmetic():
    # ratios 2 (good: high), 2 (bad: not clipped), 0.5 (bad: low), 0.5 (good: not clipped), 1.1 (inside), masked
    log_ratio = f64([[2.0, 2.0, 0.5, 0.5, 1.1, 9.0]]).log()
    advantages = f64([[1.0, -1.0, -1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[True] * 5 + [False]])
    low, high = clip_fractions(log_ratio, advantages, mask, clip_low=0.2, clip_high=0.2)
    assert (low.item(), high.item()) == pytest.approx((1 / 5, 1 / 5))


@pytest.mark.parametrize("seed", range(4))
def test_clip_fractions_count_the_decisions_without_gradient(seed):
    log_prob, old, advantages, mask = random_batch(seed)
    log_ratio = (log_prob - old).requires_grad_()
    low, high = clip_fractions(log_ratio, advantages, mask, clip_low=0.2, clip_high=0.28)
    assert not low.requires_grad
    clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.28).sum().backward()
    stuck = (log_ratio.grad == 0) & (advantages != 0) & mask
    assert (low + high).item() == pytest.approx(float(stuck.sum() / mask.sum()))


# ---------------------------------------------------------------- agreement with definitions


@pytest.mark.parametrize("seed", range(4))
def test_objectives_agree_with_their_definitions(seed):
    log_prob, old, advantages, _ = random_batch(seed)
    got = {name: objective(log_prob, old, advantages) for name, objective in OBJECTIVES.items()}
    for i in range(log_prob.shape[0]):
        for t in range(log_prob.shape[1]):
            lp, advantage = log_prob[i, t].item(), advantages[i, t].item()
            ratio = math.exp(lp - old[i, t].item())
            expected = {
                "reinforce": -advantage * lp,
                "clipped": reference.clipped(ratio, advantage, 0.2, 0.28),
                "dual": reference.clipped(ratio, advantage, 0.2, 0.28, 3.0),
                "cispo": reference.cispo(lp, ratio, advantage, 5.0),
                "sapo": reference.sapo(ratio, advantage, 1.0, 1.05),
            }
            for name, value in expected.items():
                assert got[name][i, t].item() == pytest.approx(value, rel=1e-12), name


# ---------------------------------------------------------------- laws


@every_objective
def test_gradient_at_ratio_one_is_the_policy_gradient(objective):
    log_prob, _, advantages, _ = random_batch(5)
    log_prob.requires_grad_()
    objective(log_prob, log_prob.detach(), advantages).sum().backward()
    torch.testing.assert_close(log_prob.grad, -advantages)


def test_on_policy_gradient_is_exact_in_expectation():
    # Three actions with rewards: the gradient of E[r] by enumeration, against the objectives' gradients in expectation.
    logits, rewards = f64([0.2, -0.4, 1.0]), f64([1.0, 0.0, 0.5])

    def gradient(objective):
        leaf = logits.clone().requires_grad_()
        log_prob = leaf.log_softmax(0)[None]
        weights = log_prob.detach().exp()
        (weights * objective(log_prob, log_prob.detach(), rewards[None])).sum().backward()
        return leaf.grad

    leaf = logits.clone().requires_grad_()
    (-(leaf.softmax(0) * rewards).sum()).backward()
    for objective in OBJECTIVES.values():
        torch.testing.assert_close(gradient(objective), leaf.grad)


@every_objective
def test_objectives_scale_with_the_advantages_and_vanish_without(objective):
    log_prob, old, advantages, _ = random_batch(6)
    torch.testing.assert_close(objective(log_prob, old, 3 * advantages), 3 * objective(log_prob, old, advantages))
    assert objective(log_prob, old, 0 * advantages).abs().max().item() == 0.0


@every_objective
def test_objectives_differentiate(objective):
    log_prob, old, advantages, _ = random_batch(7, rows=2, time=4)
    if objective is OBJECTIVES["cispo"]:  # its ratio is held fixed by definition
        ratio = (log_prob - old).detach()
        assert torch.autograd.gradcheck(lambda lp: cispo(lp, ratio, advantages, cap=5.0), log_prob.requires_grad_())
        return
    assert torch.autograd.gradcheck(lambda lp: objective(lp, old, advantages), log_prob.requires_grad_())


@every_objective
@pytest.mark.parametrize("mode", ["token", "sequence_mean", "sequence_sum"])
def test_masked_decisions_get_exactly_zero_gradient(objective, mode):
    log_prob, old, advantages, mask = random_batch(8)
    advantages = advantages + 3 * advantages.sign() + 0.5
    log_prob.requires_grad_()
    aggregate(objective(log_prob, old, advantages), mask, mode=mode).backward()
    assert log_prob.grad[~mask].tolist() == [0.0] * int((~mask).sum())
    assert bool((log_prob.grad[mask] != 0).any())
    assert bool(log_prob.grad.isfinite().all())


@every_objective
def test_one_token_and_nothing_but_masked_tokens(objective):
    log_prob, old, advantages = f64([[-1.0]]).requires_grad_(), f64([[-1.0]]), f64([[2.0]])
    assert objective(log_prob, old, advantages).shape == (1, 1)
    loss = aggregate(objective(log_prob, old, advantages), torch.tensor([[False]]), mode="token")
    loss.backward()
    assert (loss.item(), log_prob.grad.item()) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0, math.inf, -math.inf])
def test_ratios_do_not_overflow(dtype, log_ratio):
    """Trap: exp of an unclamped log-ratio."""
    log_prob = torch.tensor([[log_ratio, log_ratio]], dtype=dtype).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0]], dtype=dtype)
    for loss in (
        clipped_surrogate(log_prob, advantages, clip_low=0.2, clip_high=0.2),
        sapo(log_prob, advantages),
        cispo(torch.ones_like(log_prob), log_prob, advantages, cap=5.0),
    ):
        assert loss.dtype == dtype
        assert bool(loss.isfinite().all())
    clipped_surrogate(log_prob, advantages, clip_low=0.2, clip_high=0.2).sum().backward()
    assert log_prob.grad.tolist() == [[0.0, 0.0]]


def test_two_ratios_that_are_both_clipped_differ_by_the_clip_alone():
    high = clipped_surrogate(f64([[3.0]]), f64([[1.0]]), clip_low=0.2, clip_high=0.28)
    assert high.item() == pytest.approx(-1.28)
    assert clipped_surrogate(f64([[0.5]]), f64([[1.0]]), clip_low=0.2, clip_high=0.28).item() == high.item()


# ---------------------------------------------------------------- one ratio per rollout (GSPO)


def test_one_ratio_per_rollout_reaches_every_decision():
    """Trap: with `sequence_mean` every rollout weighs the same; a token mean would weigh it by its length."""
    log_prob = f64([[0.3, 0.1, -0.1], [0.2, NAN, NAN]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages = spread(f64([1.0, -1.0]), mask)
    log_ratio = sequence_ratio(log_prob, mask)
    objective = clipped_surrogate(log_ratio, advantages, clip_low=0.5, clip_high=0.5)
    assert objective.shape == (2, 3)
    first, second = -math.exp(0.1), math.exp(0.2)
    assert aggregate(objective, mask, mode="sequence_mean").item() == pytest.approx((first + second) / 2)
    assert aggregate(objective, mask, mode="token").item() == pytest.approx((3 * first + second) / 4)


def test_the_gradient_of_a_sequence_ratio_is_shared_by_its_tokens():
    log_prob = f64([[0.3, 0.1, 5.0]]).requires_grad_()
    mask = torch.tensor([[True, True, False]])
    objective = clipped_surrogate(sequence_ratio(log_prob, mask), spread(f64([2.0]), mask), clip_low=0.5, clip_high=0.5)
    aggregate(objective, mask, mode="sequence_mean").backward()
    # d/dlp of -2 exp((lp0 + lp1) / 2): half of -2 s for each
    assert log_prob.grad.tolist()[0] == pytest.approx([-math.exp(0.2), -math.exp(0.2), 0.0])


# ---------------------------------------------------------------- errors


def test_advantages_per_rollout_do_not_broadcast_by_accident():
    square = f64([[0.0, 0.0], [0.0, 0.0]])
    per_rollout = f64([1.0, -1.0])
    for objective in (
        lambda: inspect.unwrap(reinforce)(square, per_rollout),
        lambda: inspect.unwrap(clipped_surrogate)(square, per_rollout, clip_low=0.2, clip_high=0.2),
        lambda: inspect.unwrap(cispo)(square, square, per_rollout, cap=5.0),
        lambda: inspect.unwrap(sapo)(square, per_rollout),
    ):
        with pytest.raises(ValueError, match=r"advantages \[2\] do not line up .*\[2, 2\].*masked\.spread"):
            objective()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip_low": -0.1, "clip_high": 0.2}, "clips are distances from ratio 1 and >= 0, got clip_low=-0.1"),
        ({"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 1.0}, "`dual_clip` bounds ratios above 1, got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        clipped_surrogate(f64([[0.0]]), f64([[1.0]]), **options)


def test_gates_need_positive_temperatures():
    with pytest.raises(ValueError, match="gate temperatures must be > 0"):
        sapo(f64([[0.0]]), f64([[1.0]]), tau_negative=0.0)


def test_weights_of_two_critics_do_not_broadcast_over_the_batch():
    with pytest.raises(ValueError, match=r"weights \[2, 2\] do not line up with log-probabilities \[2\]"):
        inspect.unwrap(weighted_bc)(f64([-1.0, -1.0]), f64([[1.0, 0.0], [1.0, 0.0]]))
