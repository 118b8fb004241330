"""The reference for HNPG against answers it does not compute itself: a known chain, and theory."""

import numpy as np
import pytest

from tests.reference import hybrid
from tests.reference.hybrid import Outcome, Transition

# Two states and actions. Action 0 stays and pays the state's number, action 1 pays 0 and leads on: 0 -> 1 -> end.
REWARD = np.array([[0.0, 0.0], [1.0, 0.0]])
NEXT = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 0.0]]])
POLICY = np.array([[0.5, 0.5], [0.75, 0.25]])
EVERYTHING = [
    Transition(0, 0, 0.0, 0),
    Transition(0, 1, 0.0, 1),
    Transition(1, 0, 1.0, 1),
    Transition(1, 1, 0.0, 0, True),
]
TABLE = hybrid.one_hot_features(2, 2)


def test_exact_q_by_hand():
    # gamma 1/2: V(1) = 3/4 (1 + V(1)/2), so V(1) = 6/5; V(0) = 1/2 V(0)/2 + 1/2 (3/5), so V(0) = 2/5
    assert hybrid.exact_q(NEXT, REWARD, POLICY, 0.5).tolist() == [
        pytest.approx([0.2, 0.6]),
        pytest.approx([1.6, 0.0]),
    ]


@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_evaluation_finds_the_true_q_where_data_or_returns_do(lam):
    q = hybrid.exact_q(NEXT, REWARD, POLICY, 0.5)
    online = [Outcome(s, a, q[s, a]) for s in (0, 1) for a in (0, 1)]
    for sources in ((EVERYTHING, []), ([], online), (EVERYTHING, online)):
        got = hybrid.fitted_policy_evaluation(*sources, POLICY, TABLE, gamma=0.5, lam=lam, iterations=60)
        assert got.tolist() == pytest.approx(q.reshape(-1).tolist())


def test_evaluation_weighs_the_sources_by_their_means():
    # one cell, offline target 0 seen twice, return 3 seen once: argmin f² + lam (f - 3)² = 3 lam / (1 + lam)
    offline = [Transition(0, 0, 0.0, 0, True)] * 2
    for lam, expected in ((1.0, 1.5), (2.0, 2.0)):
        got = hybrid.fitted_policy_evaluation(
            offline,
            [Outcome(0, 0, 3.0)],
            np.ones((1, 1)),
            hybrid.one_hot_features(1, 1),
            gamma=1,
            lam=lam,
            iterations=1,
        )
        assert got.tolist() == pytest.approx([expected])


def test_the_mean_of_the_last_critics():
    # r = 1, gamma 1/2, one state: f_k = 1, 3/2, 7/4
    forever = [Transition(0, 0, 1.0, 0)]
    got = hybrid.fitted_policy_evaluation(
        forever, [], np.ones((1, 1)), hybrid.one_hot_features(1, 1), gamma=0.5, lam=1, iterations=3, averaged=2
    )
    assert got.tolist() == [pytest.approx((1.5 + 1.75) / 2)]


def test_the_backward_sweep_sums_what_is_left():
    # reward 1 at each of three steps: f_h = 3 - h, also with exact returns beside the data
    one, features = [Transition(0, 0, 1.0, 0)], hybrid.one_hot_features(1, 1)
    for online in ([[]] * 3, [[Outcome(0, 0, 3.0 - h)] for h in range(3)]):
        weights = hybrid.finite_horizon_evaluation([one] * 3, online, [np.ones((1, 1))] * 3, features, lam=1.0)
        assert [w.tolist() for w in weights] == [[pytest.approx(3.0)], [pytest.approx(2.0)], [pytest.approx(1.0)]]


def test_returns_by_hand():
    assert hybrid.monte_carlo_returns([0.0, 0.0, 4.0], 0.5) == [1.0, 2.0, 4.0]
    assert hybrid.monte_carlo_returns([0.0, 4.0], 0.5, beyond=8.0) == [4.0, 8.0]


@pytest.mark.parametrize("lam", [0.3, 1.0])
def test_a_natural_gradient_step_on_logits_is_the_multiplicative_update(lam):
    # For a softmax table w . score = fbar has a solution whatever the weights, so theta + eta w is HAC's update.
    f = hybrid.critic(np.array([1.0, -2.0, 0.5, 3.0]), TABLE)
    offline, online = hybrid.every_action([0, 1], POLICY, 4), hybrid.every_action([0, 0, 1], POLICY, 4)
    direction = hybrid.union_natural_gradient(offline, online, POLICY, f, lam=lam)
    moved = hybrid.softmax_policy(np.log(POLICY) + 0.7 * direction.reshape(2, 2))
    np.testing.assert_allclose(moved, hybrid.actor_critic_update(POLICY, f, 0.7), rtol=1e-9)
