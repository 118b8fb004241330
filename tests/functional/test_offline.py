"""Exponential weights and TD3+BC's objective."""

import math

import pytest
import torch

from rlalign.functional.offline import exponential_weights, td3_bc_objective


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_exponential_weights_match_hand_arithmetic():
    got = exponential_weights(f64([0.0, 1.0, -1.0, 9.0]), temperature=2.0, max_weight=50)
    assert got.tolist() == pytest.approx([1.0, math.exp(2), math.exp(-2), 50.0])
    assert exponential_weights(f64([-5.0, 5.0]), temperature=0).tolist() == [1.0, 1.0]


def test_exponential_weights_neither_overflow_nor_carry_a_gradient():
    advantages = f64([1e4, -1e4]).requires_grad_()
    weights = exponential_weights(advantages, temperature=3.0)
    assert weights.tolist() == [100.0, 0.0]
    assert not weights.requires_grad


def test_td3_bc_matches_hand_arithmetic():
    # mean |Q| = (2 + 6) / 2 = 4, scale 3 / 4; squared distances averaged over two dimensions: (1 + 0) / 2, (4 + 16) / 2
    q_values = f64([-2.0, 6.0]).requires_grad_()
    actions, recorded = f64([[1.0, 0.0], [0.0, 0.0]]).requires_grad_(), f64([[0.0, 0.0], [2.0, 4.0]])
    loss = td3_bc_objective(q_values, actions, recorded, alpha=3.0)
    assert loss.tolist() == [0.5 + 1.5, 10 - 4.5]
    loss.sum().backward()
    assert q_values.grad.tolist() == [-0.75, -0.75]  # the scale is held fixed
    assert actions.grad.tolist() == [[1.0, 0.0], [-2.0, -4.0]]


def test_td3_bc_does_not_depend_on_the_unit_of_rewards():
    q_values, actions = f64([-2.0, 6.0]), f64([[0.1], [0.2]])
    small = td3_bc_objective(q_values, actions, actions + 1, alpha=2.5)
    torch.testing.assert_close(td3_bc_objective(1000 * q_values, actions, actions + 1, alpha=2.5), small)
    assert td3_bc_objective(0 * q_values, actions, actions + 1, alpha=2.5).tolist() == [1.0, 1.0]
