"""The perceptron: its layers, its initialisation, its output layer."""

import pytest
import torch
from torch import nn

from rlalign.nn import MLP
from rlalign.nn.mlp import ACTIVATIONS, orthogonal


def test_layers_alternate_and_the_last_is_linear():
    net = MLP([3, 5, 7, 2], "tanh")
    assert [type(part) for part in net] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert [(part.in_features, part.out_features) for part in net if isinstance(part, nn.Linear)] == [
        (3, 5),
        (5, 7),
        (7, 2),
    ]
    assert net.last is net[4]


def test_the_forward_pass_is_the_composition():
    net = MLP([3, 5, 2], "relu")
    x = torch.randn(4, 6, 3)
    expected = (x @ net[0].weight.T + net[0].bias).clamp(min=0) @ net[2].weight.T + net[2].bias
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_the_one_named(name):
    net, x = MLP([2, 4, 1], name), torch.randn(5, 2)
    functions = {
        "tanh": torch.tanh,
        "relu": torch.relu,
        "elu": nn.functional.elu,
        "gelu": nn.functional.gelu,
        "silu": nn.functional.silu,
    }
    torch.testing.assert_close(net(x), net.last(functions[name](net[0](x))))


def test_rows_are_orthogonal_with_the_gains_asked_for_and_biases_are_zero():
    net = MLP([16, 8, 8, 4], hidden_gain=2, out_gain=0.01)
    for layer, gain in ((net[0], 2.0), (net[2], 2.0), (net.last, 0.01)):
        rows = layer.weight.shape[0]
        torch.testing.assert_close(layer.weight @ layer.weight.T, gain**2 * torch.eye(rows), atol=1e-5, rtol=1e-5)
        assert layer.bias.abs().max().item() == 0.0


def test_the_default_gain_of_hidden_layers_is_the_root_of_two():
    weight = MLP([16, 8, 4])[0].weight
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(8), atol=1e-5, rtol=1e-5)


def test_a_small_output_gain_makes_outputs_small():
    x = torch.randn(100, 16)
    large, small = MLP([16, 32, 4], out_gain=1.0), MLP([16, 32, 4], out_gain=0.01)
    assert small(x).std() < 0.03 * large(x).std()


def test_layer_norm_stands_before_each_nonlinearity():
    net = MLP([3, 5, 5, 2], "relu", layer_norm=True)
    kinds = [nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Linear]
    assert [type(part) for part in net] == kinds
    hidden = net[1](net[0](torch.randn(9, 3)))
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(9), atol=1e-6, rtol=0)
    assert [name for name, _ in net[1].named_parameters()] == ["weight", "bias"]


def test_a_network_without_hidden_layers_is_linear():
    net = MLP([3, 2], out_gain=0.5)
    assert len(net) == 1
    assert net.last is net[0]
    torch.testing.assert_close(net.last.weight @ net.last.weight.T, 0.25 * torch.eye(2))


def test_one_size_is_refused():
    with pytest.raises(ValueError, match=r"sizes of its input and its output, got \[3\]"):
        MLP([3])


def test_orthogonal_also_initialises_convolutions():
    layer = orthogonal(nn.Conv2d(3, 4, 3), gain=1)
    flat = layer.weight.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(4), atol=1e-5, rtol=1e-5)
    assert orthogonal(nn.Linear(3, 2, bias=False), gain=1).bias is None
