"""Normalize-and-Project: which layers are normalised, which weights keep their norm, and why that changes nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from rlalign.nn import MLP, Projector, to_normalized
from rlalign.nn.nap import Normalized, Wiring, dormant_metrics, dormant_share, projected_weights, register_block


class BasicBlock(nn.Module):
    """A residual block as in He et al. 2016: two convolutions, each with a norm, the second before the sum."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class PreNormBlock(nn.Module):
    """A transformer block with its norms before attention and before the hidden layer."""

    def __init__(self, dims):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dims), nn.LayerNorm(dims)
        self.attention = nn.MultiheadAttention(dims, 2, batch_first=True)
        self.up, self.down = nn.Linear(dims, 4 * dims), nn.Linear(4 * dims, dims)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


register_block(BasicBlock, Wiring(norm={"conv1": "bn1", "conv2": "bn2"}))
register_block(PreNormBlock, Wiring(nonlinearity=["up"]))


def mlp(**kwargs):
    return MLP([8, 16, 16, 3], "relu", **kwargs)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
    )


def language_model():
    return nn.Sequential(nn.Embedding(11, 16), PreNormBlock(16), PreNormBlock(16), nn.LayerNorm(16), nn.Linear(16, 11))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BasicBlock(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


NETS = {
    "mlp": (mlp, lambda: randn(7, 8)),
    "mlp with learned norms": (lambda: mlp(layer_norm=True), lambda: randn(7, 8)),
    "conv": (conv_net, lambda: randn(7, 3, 8, 8)),
    "resnet": (resnet, lambda: randn(7, 3, 8, 8)),
    "transformer": (language_model, lambda: torch.randint(11, (7, 5))),
}


def converted(name):
    make, inputs = NETS[name]
    return to_normalized(make()).double(), inputs()


# ---------------------------------------------------------------- conversion


def test_an_mlp_gets_a_norm_before_each_nonlinearity_and_its_last_layer_stays():
    net = mlp()
    last, weights = net.last, [net[0].weight, net[2].weight]
    assert to_normalized(net) is net
    assert [type(part) for part in net] == [Normalized, nn.ReLU, Normalized, nn.ReLU, nn.Linear]
    assert net.last is last
    assert net.last.bias is not None
    for part, weight in zip((net[0], net[2]), weights, strict=True):
        assert part.weight is weight
        assert part.layer.bias is None
        assert isinstance(part.norm, nn.LayerNorm)
        assert list(part.norm.parameters()) == []
    x = torch.randn(5, 8)
    hidden = net[0](x)
    torch.testing.assert_close(hidden.mean(-1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden, nn.functional.layer_norm(x @ weights[0].T, (16,)))
    assert list(projected_weights(net)) == ["0.layer.weight", "2.layer.weight"]


def test_converting_twice_changes_nothing_more():
    net = to_normalized(mlp())
    state = copy.deepcopy(net.state_dict())
    again = to_normalized(net).state_dict()
    assert list(again) == list(state)
    assert all(again[name].equal(state[name]) for name in state)


def test_a_conv_net_is_normalised_over_channels_and_pixels():
    net = to_normalized(conv_net())
    hidden = net[0](torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(hidden.mean((1, 2, 3)), torch.zeros(2), atol=1e-6, rtol=0)
    # Pooling before the nonlinearity passes scale on, so the second convolution counts as hidden.
    assert list(projected_weights(net)) == ["0.layer.weight", "2.layer.weight"]


def test_a_norm_that_stands_there_is_kept_and_the_bias_before_it_goes():
    net = resnet()
    norm = net[0 + 1]
    to_normalized(net)
    assert isinstance(net[0], Normalized)
    assert net[0].norm is norm
    assert isinstance(net[1], nn.Identity)
    assert net[3].conv2.layer.bias is None
    assert isinstance(net[3].bn2, nn.Identity)
    names = list(projected_weights(net))
    assert names == [f"{block}.{part}" for block in ("0", "3.conv1", "3.conv2") for part in ("layer.weight", "norm")]
    assert [len(group) for group in projected_weights(net).values()] == [1, 2] * 3


def test_a_transformer_projects_what_provably_meets_a_norm_or_all_hidden_layers():
    assert list(projected_weights(to_normalized(language_model()))) == ["1.up.layer.weight", "2.up.layer.weight"]
    expected = [
        f"{block}.{name}"
        for block in (1, 2)
        for name in ("attention.in_proj_weight", "attention.out_proj.weight", "up.layer.weight", "down.weight")
    ]
    net = to_normalized(language_model(), tensors="all_hidden")
    assert list(projected_weights(net)) == expected
    assert list(projected_weights(copy.deepcopy(net))) == expected
    assert net.state_dict().keys() == to_normalized(language_model()).state_dict().keys()


@pytest.mark.parametrize("training", [True, False])
def test_pytorch_transformer_layers_use_the_norm_in_training_and_in_inference(training):
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    net = to_normalized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), output=False).train(training)
    assert list(projected_weights(net)) == ["layers.0.linear1.layer.weight", "layers.1.linear1.layer.weight"]
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        before = net(x)
        net.layers[0].linear1.weight.mul_(3.0)
        torch.testing.assert_close(net(x), before, atol=1e-4, rtol=1e-4)
        net.layers[0].linear2.weight.mul_(3.0)
        assert not torch.allclose(net(x), before, atol=1e-2)


def test_the_last_layer_is_an_output_even_behind_a_squash_unless_it_is_said_to_be_hidden():
    def policy():
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2), nn.Tanh())

    assert list(projected_weights(to_normalized(policy()))) == ["0.layer.weight"]
    trunk = to_normalized(policy(), output=False)
    assert list(projected_weights(trunk)) == ["0.layer.weight", "2.layer.weight"]


def test_what_is_not_a_hidden_weight_is_never_projected():
    class Agent(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_std = nn.Parameter(torch.zeros(2))
            self.memory = nn.LSTM(4, 4)
            self.trunk = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU())
            self.head = nn.Linear(4, 2)

    net = to_normalized(Agent())
    assert list(projected_weights(net)) == ["trunk.0.layer.weight", "trunk.0.norm", "trunk.2.layer.weight"]
    assert list(projected_weights(to_normalized(Agent(), tensors="all_hidden"))) == list(projected_weights(net))


def test_several_networks_keep_an_output_layer_each():
    both = nn.ModuleDict({name: to_normalized(MLP([4, 8, 8, 2]), tensors="all_hidden") for name in ("actor", "critic")})
    names = [f"{name}.{index}.layer.weight" for name in ("actor", "critic") for index in (0, 2)]
    assert list(projected_weights(both)) == names
    assert Projector(both).names == names


def test_tied_weights_are_projected_once_and_not_at_all_when_tied_to_an_embedding_or_the_output():
    net = MLP([8, 8, 8, 8, 8], "relu")
    net[2].weight = net[4].weight
    assert list(projected_weights(to_normalized(net))) == ["0.layer.weight", "2.layer.weight"]
    net = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[1].weight = net[0].weight
    assert list(projected_weights(to_normalized(net))) == ["3.layer.weight"]
    net = MLP([8, 8, 8], "relu")
    net[0].weight = net.last.weight
    assert projected_weights(to_normalized(net)) == {}


def test_a_weight_also_used_without_a_norm_is_not_scale_invariant():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.skip = nn.Linear(4, 4)
            self.skip.weight = self.body[0].weight
            self.head = nn.Linear(4, 1)

    assert projected_weights(to_normalized(Twice())) == {}
    hidden = projected_weights(to_normalized(Twice(), tensors="all_hidden"))
    assert list(hidden) == ["body.0.layer.weight"]


def test_a_layer_used_twice_is_one_layer():
    shared = nn.Linear(8, 8)
    net = to_normalized(nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 2)))
    assert net[0] is net[2]
    assert list(projected_weights(net)) == ["0.layer.weight"]


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(ValueError, match="a norm would make the single feature of .* constant"):
        to_normalized(MLP([4, 1, 2]))
    with pytest.raises(ValueError, match="a single layer has no hidden part"):
        to_normalized(nn.Linear(4, 2))
    with pytest.raises(ValueError, match="no weight meets a norm: call `to_normalized` first"):
        Projector(mlp())
    with pytest.raises(ValueError, match="`normalize_and_project.every` must be at least 1, got 0"):
        Projector(to_normalized(mlp()), every=0)


# ---------------------------------------------------------------- the symmetry


@pytest.mark.parametrize("name", NETS)
def test_scaling_a_projected_weight_leaves_the_function_and_divides_the_gradient(name):
    net, x = converted(name)
    for part in net.modules():  # the norms' eps breaks the symmetry by eps / variance
        if isinstance(part, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
            part.eps = 1e-12

    def gradient(weight):
        net.zero_grad()
        net(x).square().sum().backward()
        return weight.grad.norm().item()

    for group_name, group in projected_weights(net).items():
        if group_name.endswith("norm"):
            continue
        (weight,) = group
        before, size = net(x).detach(), gradient(weight)
        with torch.no_grad():
            weight.mul_(5.0)
        torch.testing.assert_close(net(x), before, rtol=1e-7, atol=1e-7)
        assert gradient(weight) == pytest.approx(size / 5, rel=1e-6)
        # Along the weight itself nothing changes, so the gradient is orthogonal to it.
        cosine = (weight.grad * weight).sum() / (weight.grad.norm() * weight.norm())
        assert abs(cosine.item()) < 1e-6


def test_scaling_a_weight_of_the_residual_stream_does_change_the_function():
    net, x = converted("transformer")
    before = net(x)
    with torch.no_grad():
        net[1].down.weight.mul_(5.0)
    assert not torch.allclose(net(x), before, atol=1e-2)


def test_scale_and_offset_together_only_rescale_a_relu_that_meets_another_norm():
    net, x = converted("mlp with learned norms")
    before = net(x)
    with torch.no_grad():
        for p in projected_weights(net)["0.norm"]:
            p.mul_(4.0)
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- projection


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
}


def train(net, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        (net(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("layer_norm", [False, True])
def test_norms_stay_under_any_optimizer_and_would_not_without(make, layer_norm):
    torch.manual_seed(0)
    free = to_normalized(mlp(layer_norm=layer_norm))
    net = copy.deepcopy(free)
    optimizer = make(net.parameters())
    projector = Projector(net)
    unattached = Projector(free)
    first = projector.norms.clone()
    projector.attach(optimizer)
    train(net, optimizer, 20)
    train(free, make(free.parameters()), 20)
    torch.testing.assert_close(projector.current(), first)
    assert projector.metrics(0.1)["nap/norm_growth"] == pytest.approx(1.0, abs=1e-5)
    assert (unattached.current() / unattached.norms - 1).abs().max() > 0.02
    assert projector.steps == 20
    if layer_norm:  # scale and offset share one norm, and both moved inside it
        scale, offset = projected_weights(net)["0.norm"]
        assert (scale.square().sum() + offset.square().sum()).sqrt().item() == pytest.approx(math.sqrt(16), rel=1e-5)
        assert offset.abs().max() > 1e-3


def test_the_output_layer_moves_freely():
    torch.manual_seed(0)
    net = to_normalized(mlp())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    Projector(net).attach(optimizer)
    before = net.last.weight.norm().item()
    train(net, optimizer, 20)
    assert abs(net.last.weight.norm().item() / before - 1) > 0.05


def test_projection_changes_no_direction_and_no_function():
    net, x = converted("mlp")
    projector = Projector(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    weight = net[0].weight.detach().clone()
    before = net(x)
    projector.project()
    now = net[0].weight.detach()
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(now / now.norm(), weight / weight.norm())
    assert now.norm().item() == pytest.approx(projector.norms[0].item())


def test_projection_every_few_steps():
    net = to_normalized(mlp())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    projector = Projector(net, every=3)
    projector.attach(optimizer)
    growth = []
    for step in range(6):
        train(net, optimizer, 1, seed=step)
        growth.append((projector.current() / projector.norms - 1).abs().max().item())
    assert [g < 1e-6 for g in growth] == [False, False, True, False, False, True]


def test_a_removed_hook_projects_no_more():
    net = to_normalized(mlp())
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    projector = Projector(net)
    projector.attach(optimizer).remove()
    train(net, optimizer, 5)
    assert projector.steps == 0
    assert projector.metrics(0.05)["nap/norm_growth"] != pytest.approx(1.0, abs=1e-3)


def test_the_norms_travel_with_the_checkpoint():
    torch.manual_seed(0)
    net = to_normalized(mlp())
    projector = Projector(net, every=2)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2.0)
    projector.steps = 5
    resumed = Projector(net, every=2)  # made when the weights had grown already
    resumed.load_state_dict(projector.state_dict())
    assert resumed.norms.equal(projector.norms)
    assert resumed.steps == 5
    resumed.project()
    torch.testing.assert_close(resumed.current(), projector.norms)
    with pytest.raises(ValueError, match="this projector holds"):
        Projector(to_normalized(MLP([8, 16, 3]))).load_state_dict(projector.state_dict())


def test_a_group_that_begins_at_zero_stays_free():
    net = resnet()
    nn.init.zeros_(net[3].bn2.weight)  # the usual start of a residual branch; the offset is zero anyway
    projector = Projector(to_normalized(net))
    with torch.no_grad():
        net[3].conv2.norm.weight.fill_(0.5)
    projector.project()
    assert net[3].conv2.norm.weight.tolist() == [0.5] * 8


def test_metrics_by_hand():
    net = to_normalized(MLP([1, 2, 1]))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[3.0], [4.0]]))
    projector = Projector(net)
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    found = projector.metrics(0.5)
    assert found == pytest.approx({"nap/norm_growth": 2.0, "nap/effective_learning_rate": 0.05})


def test_hidden_weights_without_a_norm_are_held_too_if_asked_for():
    net = to_normalized(language_model(), tensors="all_hidden")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    projector = Projector(net)
    projector.attach(optimizer)
    tokens = torch.randint(11, (4, 5))
    embedding = net[0].weight.norm().item()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    torch.testing.assert_close(projector.current(), projector.norms)
    assert net[1].down.weight.norm().item() == pytest.approx(projector.norms[3].item(), rel=1e-5)
    assert net[0].weight.norm().item() != pytest.approx(embedding, rel=1e-4)


# ---------------------------------------------------------------- dormant units


def test_dormant_share_by_hand():
    # mean sizes 0, 1, 3, 4: the layer's mean is 2, scores 0, .5, 1.5, 2
    activations = torch.tensor([[0.0, 1.0, -3.0, 4.0], [0.0, -1.0, 3.0, -4.0]])
    assert dormant_share(activations).item() == 0.25
    assert dormant_share(activations, tau=0.5).item() == 0.5
    assert dormant_share(5 * activations[None], tau=0.5).item() == 0.5
    assert dormant_share(torch.zeros(3, 4)).item() == 1.0


def test_dormant_metrics_look_behind_every_nonlinearity_by_channel():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5), nn.ReLU(), nn.Linear(5, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, 1.0, 1.0, -1.0]).view(4, 1, 1, 1))
        net[0].bias.zero_()
        net[3].weight.fill_(1.0)
        net[3].bias.zero_()
    found = dormant_metrics(net, torch.ones(2, 1, 3, 3))
    assert found == {"nap/dormant_frac": pytest.approx((1 / 4 + 0) / 2)}
    with pytest.raises(ValueError, match="there is none"):
        dormant_metrics(nn.Linear(2, 2), torch.ones(1, 2))


# ---------------------------------------------------------------- inputs whose size means something


def test_a_first_layer_with_a_constant_is_the_layer_and_its_norm():
    layer, head = nn.Linear(3, 8).double(), nn.Linear(8, 2).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    wanted = head(nn.functional.layer_norm(layer(x), (8,)).tanh())
    net = to_normalized(nn.Sequential(layer, nn.Tanh(), head), constant=True)
    torch.testing.assert_close(net(x), wanted, rtol=1e-12, atol=1e-12)
    ((name, (weight,)),) = projected_weights(net).items()
    assert (name, weight.shape) == ("0.layer.weight", (8, 4))
    with torch.no_grad():
        weight.mul_(7.0)  # the norm's own epsilon, 1e-5, is what is left of the size
    torch.testing.assert_close(net(x), wanted, rtol=1e-3, atol=1e-3)


def test_only_a_constant_lets_the_size_of_an_input_through():
    x = torch.randn(6, 4)
    for constant, differs in ((False, False), (True, True)):
        net = to_normalized(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)), constant=constant)
        assert bool((net(3 * x) - net(x)).abs().max() > 0.05) == differs
