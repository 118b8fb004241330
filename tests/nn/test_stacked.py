"""Networks stacked into one: each row is the network it was, and shares its memory."""

import pytest
import torch

from rlalign.nn.mlp import MLP
from rlalign.nn.nap import to_normalized
from rlalign.nn.stacked import StackedMLP

KINDS = {
    "plain": lambda: MLP([3, 5, 4, 2]),
    "relu": lambda: MLP([3, 5, 2], "relu"),
    "linear": lambda: MLP([3, 2]),
    "layer_norm": lambda: MLP([3, 5, 2], layer_norm=True),
    "normalized": lambda: to_normalized(MLP([3, 5, 4, 2])),
    "normalized_constant": lambda: to_normalized(MLP([3, 5, 4, 2]), constant=True),
    "normalized_layer_norm": lambda: to_normalized(MLP([3, 5, 2], layer_norm=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_row_h_of_the_stack_is_network_h(kind):
    torch.manual_seed(0)
    rows = [KINDS[kind]() for _ in range(3)]
    for row in rows:
        for p in row.parameters():
            torch.nn.init.normal_(p)
    inputs = torch.randn(3, 7, 3)
    expected = torch.stack([row(part) for row, part in zip(rows, inputs, strict=True)])
    torch.testing.assert_close(StackedMLP(rows)(inputs), expected)


def test_stack_and_rows_are_the_same_memory():
    rows = [MLP([2, 2]) for _ in range(2)]
    stack = StackedMLP(rows)
    with torch.no_grad():
        rows[1].last.weight.fill_(3.0)
        stack.get_parameter("0_bias")[0] = 5.0
    assert stack.get_parameter("0_weight")[1].tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert rows[0].last.bias.tolist() == [5.0, 5.0]
    stack.load_state_dict({name: torch.zeros_like(p) for name, p in stack.state_dict().items()})
    assert rows[1].last.weight.abs().sum() == 0


def test_gradients_of_a_row_reach_that_row_alone():
    stack = StackedMLP([MLP([2, 3, 1]) for _ in range(3)])
    stack(torch.ones(3, 4, 2))[1].sum().backward()
    for p in stack.parameters():
        assert p.grad is not None
        assert p.grad[1].abs().sum() > 0
        assert p.grad[[0, 2]].abs().sum() == 0


def test_only_the_stack_is_in_the_state_dict():
    assert {name: tuple(p.shape) for name, p in StackedMLP([MLP([2, 3])] * 1).state_dict().items()} == {
        "0_weight": (1, 3, 2),
        "0_bias": (1, 3),
    }


def test_different_networks_do_not_stack():
    with pytest.raises(ValueError, match="same layers"):
        StackedMLP([MLP([2, 3]), MLP([2, 4])])
    with pytest.raises(ValueError, match="got 0"):
        StackedMLP([])
