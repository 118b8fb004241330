"""Heads: what outputs mean, how they are scored, and a support that moves only when told."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from rlalign.functional import value
from rlalign.nn import C51, MSE, HLGauss, TwoHot, ValueHead, ValueHeadConfig

FIXED = [HLGauss(low=-10.0, high=10.0, num_bins=51), TwoHot(low=-10.0, high=10.0, num_bins=51)]
AUTOMATIC = [HLGauss(), TwoHot(), C51(), HLGauss(edges="centers"), HLGauss(num_bins=4)]


def test_configs_are_picked_by_type_and_checked():
    adapter = TypeAdapter(ValueHeadConfig)
    assert adapter.validate_python({"type": "hl_gauss", "low": -1, "high": 1}) == HLGauss(low=-1.0, high=1.0)
    with pytest.raises(ValidationError, match="set both `low` and `high` or neither"):
        adapter.validate_python({"type": "two_hot", "low": -1})
    with pytest.raises(ValidationError, match="`low` must be below `high`"):
        adapter.validate_python({"type": "c51", "low": 1, "high": -1})


# ---------------------------------------------------------------- decoding and objectives


def test_mse_is_the_number_and_its_squared_error():
    head = ValueHead(MSE())
    outputs = torch.tensor([[1.0], [4.0]], requires_grad=True)
    assert head.out_features == 1
    assert head.values(outputs).tolist() == [1.0, 4.0]
    targets = torch.tensor([3.0, 4.0], requires_grad=True)
    objective = head.objective(outputs, targets)
    assert objective.tolist() == [4.0, 0.0]
    objective.sum().backward()
    assert outputs.grad.tolist() == [[-4.0], [0.0]]
    assert targets.grad is None
    assert head.state_dict() == {}
    assert head.metrics(targets) == {}
    assert head.outside_share(targets).item() == 0


def test_mse_clips_like_the_equation():
    head, outputs, old, targets = ValueHead(MSE()), torch.randn(9, 1), torch.randn(9), torch.randn(9)
    got = head.objective(outputs, targets, values_old=old, clip=0.2)
    torch.testing.assert_close(got, value.clipped_value(outputs[:, 0], old, targets, clip=0.2))
    with pytest.raises(ValueError, match="needs `values_old`"):
        head.objective(outputs, targets, clip=0.2)


@pytest.mark.parametrize("cfg", FIXED)
def test_a_head_that_puts_out_its_target_decodes_it(cfg):
    head, targets = ValueHead(cfg), torch.linspace(-8, 8, 33)
    outputs = (head.encode(targets) + 1e-12).log()
    torch.testing.assert_close(head.values(outputs), targets, atol=1e-4, rtol=0)
    torch.testing.assert_close(head.probs(outputs), head.encode(targets), atol=1e-6, rtol=0)


def test_hl_gauss_objective_is_the_cross_entropy_to_the_histogram():
    head = ValueHead(HLGauss(low=-1.0, high=1.0, num_bins=5))
    outputs = torch.zeros(2, 5, requires_grad=True)
    objective = head.objective(outputs, torch.tensor([0.3, 0.0]), values_old=torch.zeros(2))
    assert objective.tolist() == pytest.approx([math.log(5)] * 2)
    objective.sum().backward()
    expected = [0.2 - p for p in (0.001356, 0.046901, 0.324842, 0.476585, 0.150316)]
    assert outputs.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_edges_are_passed_on():
    head = ValueHead(HLGauss(low=-10.0, high=10.0, edges="centers"))
    probs = head.encode(torch.tensor(3.3))
    assert probs[66].item() == pytest.approx(0.408789, abs=1e-5)
    assert head.values((probs + 1e-12).log()).item() == pytest.approx(3.3, abs=1e-5)
    assert ValueHead(TwoHot(low=-1.0, high=1.0, num_bins=3)).values(torch.tensor([0.0, 0.0, 99.0])).item() == 1.0


@pytest.mark.parametrize("cfg", [*FIXED, C51(low=-1.0, high=1.0)])
def test_value_clipping_of_a_distribution_is_refused(cfg):
    head = ValueHead(cfg)
    with pytest.raises(ValueError, match="learns a distribution. Set `value_clip` to null"):
        head.objective(torch.zeros(2, head.out_features), torch.zeros(2), values_old=torch.zeros(2), clip=0.2)


def test_c51_refuses_scalar_targets_and_names_the_heads_that_take_them():
    head = ValueHead(C51(low=-1.0, high=1.0, num_bins=5))
    with pytest.raises(ValueError, match="needs that of the next state.*`hl_gauss` or `two_hot`"):
        head.objective(torch.zeros(2, 5), torch.zeros(2))
    with pytest.raises(ValueError, match="has scalar targets"):
        ValueHead(FIXED[0]).projected(torch.zeros(2, 51), torch.zeros(2), torch.zeros(2))
    with pytest.raises(ValueError, match="mse head has no distribution"):
        ValueHead(MSE()).probs(torch.zeros(2, 1))


def test_c51_learns_from_the_projected_next_distribution():
    head = ValueHead(C51(low=-1.0, high=1.0, num_bins=5))
    next_outputs = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]]).log().requires_grad_()
    target = head.projected(next_outputs, torch.tensor([0.3]), torch.tensor([0.9]))
    torch.testing.assert_close(target, torch.tensor([[0.02, 0.14, 0.30, 0.34, 0.20]]))
    assert not target.requires_grad
    outputs = torch.zeros(1, 5, requires_grad=True)
    head.distribution_objective(outputs, target).sum().backward()
    torch.testing.assert_close(outputs.grad, 0.2 - target)


@pytest.mark.parametrize("cfg", [MSE(), *FIXED])
def test_leading_dimensions_are_free(cfg):
    head = ValueHead(cfg)
    outputs, targets = torch.randn(2, 3, head.out_features), torch.randn(2, 3)
    assert head.values(outputs).shape == (2, 3)
    flat = head.objective(outputs.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(head.objective(outputs, targets).flatten(), flat)


# ---------------------------------------------------------------- the untrained head


@pytest.mark.parametrize(
    "cfg", [MSE(), *FIXED, HLGauss(low=-1.0, high=50.0), C51(low=-1.0, high=9.0), HLGauss(low=-3.0, high=0.0)]
)
def test_an_untrained_head_decodes_zero_where_the_support_is_not_centred(cfg):
    head = ValueHead(cfg)
    bias = head.init_bias()
    assert bias.shape == (head.out_features,)
    assert bias.isfinite().all()
    assert bias.abs().max().item() < 14  # within reach of an optimizer
    width = 1.0 if isinstance(cfg, MSE) else cfg.high - cfg.low
    # At an end (-3..0) HL-Gauss decodes half a bin inside.
    assert head.values(bias).item() == pytest.approx(0.0, abs=width / 100)


def test_an_automatic_head_decodes_zero_before_it_has_seen_anything():
    head = ValueHead(HLGauss())
    assert head.values(torch.randn(4, 101)).tolist() == [0.0] * 4
    assert head.init_bias().tolist() == [0.0] * 101
    with pytest.raises(ValueError, match=r"has seen no targets: call `fit_support\(targets\)`"):
        head.objective(torch.zeros(2, 101), torch.zeros(2))
    with pytest.raises(ValueError, match="has seen no targets"):
        ValueHead(C51()).projected(torch.zeros(1, 101), torch.zeros(1), torch.zeros(1))


# ---------------------------------------------------------------- the automatic support


@pytest.mark.parametrize("cfg", AUTOMATIC)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_a_fitted_support_holds_its_targets_and_zero_with_a_margin(cfg, scale):
    head = ValueHead(cfg)
    targets = scale * torch.tensor([3.0, 7.0, 5.0])
    assert head.fit_support(targets)
    bins_of_margin = 3 * cfg.sigma_ratio if isinstance(cfg, HLGauss) else 1
    margin = min(bins_of_margin / cfg.num_bins, 0.25) * (head.high - head.low)
    assert head.low + margin <= 0
    assert head.high - margin >= 7 * scale
    assert head.high - head.low < 5 * 7 * scale
    assert head.outside_share(targets).item() == 0
    if not isinstance(cfg, C51) and cfg.num_bins > 50:
        outputs = (head.encode(targets) + 1e-12).log()
        torch.testing.assert_close(head.values(outputs), targets, rtol=1e-4, atol=0)


def test_a_support_moves_rarely_and_never_shrinks():
    head = ValueHead(HLGauss())
    moves = [head.fit_support(torch.tensor([0.0, top])) for top in range(1, 101)]
    assert moves[0]
    assert sum(moves) < 45  # each move goes a tenth further than asked
    ends = head.low.item(), head.high.item()
    assert not head.fit_support(torch.tensor([1.0, 2.0, 100.0]))
    assert not head.fit_support(torch.zeros(0))
    assert (head.low.item(), head.high.item()) == ends


def test_only_the_side_that_is_too_short_moves():
    head = ValueHead(TwoHot())
    head.fit_support(torch.tensor([-1.0, 1.0]))
    before = head.low.item(), head.high.item()
    assert head.fit_support(torch.tensor([5.0]))
    grown = head.high.item() - before[1]
    assert grown > 3.5
    # The margin is a share of the whole, so the other end gives way a little.
    assert 0 < before[0] - head.low.item() < 0.1


def test_targets_that_are_all_zero_make_a_support_too():
    head = ValueHead(HLGauss())
    assert head.fit_support(torch.zeros(5))
    assert head.objective(torch.zeros(5, 101), torch.zeros(5)).isfinite().all()
    assert head.fit_support(torch.ones(1))
    assert head.high.item() > 1


def test_nothing_but_fit_support_moves_it():
    head = ValueHead(HLGauss())
    head.fit_support(torch.tensor([-1.0, 1.0]))
    ends = head.low.item(), head.high.item()
    head.objective(torch.zeros(3, 101), torch.tensor([50.0, -50.0, 0.0]))
    head.metrics(torch.tensor([50.0]))
    assert (head.low.item(), head.high.item()) == ends
    fixed = ValueHead(HLGauss(low=-1.0, high=1.0))
    assert not fixed.fit_support(torch.tensor([99.0]))
    assert (fixed.low.item(), fixed.high.item()) == (-1.0, 1.0)


def test_targets_that_are_not_finite_are_refused():
    head = ValueHead(HLGauss())
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="a support cannot hold targets"):
            head.fit_support(torch.tensor([0.0, bad]))
    assert head.low.item() == head.high.item() == 0


def test_the_support_travels_with_the_state_dict():
    head, other = ValueHead(HLGauss()), ValueHead(HLGauss())
    head.fit_support(torch.tensor([-3.0, 8.0]))
    other.load_state_dict(head.state_dict())
    outputs, targets = torch.randn(6, 101), torch.randn(6)
    assert other.values(outputs).equal(head.values(outputs))
    assert other.objective(outputs, targets).equal(head.objective(outputs, targets))
    assert set(head.state_dict()) == {"low", "high"}


def test_the_log_tells_the_support_and_what_it_misses():
    head = ValueHead(TwoHot(low=-2.0, high=2.0))
    found = head.metrics(torch.tensor([0.0, 1.0, 3.0, -2.5]))
    assert found == {"value/outside_frac": 0.5, "value/support_low": -2.0, "value/support_high": 2.0}


@pytest.mark.parametrize("cfg", [HLGauss(), TwoHot()])
def test_moving_the_rows_with_the_support_keeps_the_values(cfg):
    torch.manual_seed(1)
    head, states = ValueHead(cfg), torch.randn(128, 8)
    layer = nn.Linear(8, 101)
    targets = states @ torch.randn(8)
    head.fit_support(targets, layer=layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        head.objective(layer(states), targets).mean().backward()
        optimizer.step()
    before = head.values(layer(states)).detach()
    assert (before - targets).abs().mean() < 0.3
    silent = ValueHead(cfg)
    silent.load_state_dict(head.state_dict())
    assert silent.fit_support(4 * targets)
    shifted = (silent.values(layer(states)) - before).abs().mean()
    assert head.fit_support(4 * targets, layer=layer)
    kept = (head.values(layer(states)) - before).abs().mean()
    width = (head.high - head.low) / 101
    assert kept < width
    assert shifted > 5 * kept  # without the layer all values would have been stretched


def test_new_bins_begin_unlikely():
    head, layer = ValueHead(TwoHot()), nn.Linear(2, 101)
    head.fit_support(torch.tensor([-1.0, 1.0]))
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # equal logits decode to 0; over all bins of the wider support they would to about 2
    head.fit_support(torch.tensor([5.0]), layer=layer)
    assert head.values(layer(torch.zeros(1, 2))).abs().item() < 0.1


def test_the_first_support_sets_the_layer_to_decode_zero():
    head, layer = ValueHead(HLGauss()), nn.Linear(4, 101)
    nn.init.zeros_(layer.weight)
    head.fit_support(torch.tensor([0.0, 90.0]), layer=layer)
    assert head.values(layer(torch.randn(3, 4))).abs().max().item() < 0.1
    with pytest.raises(ValueError, match="`layer` must put out 101 numbers, got 3"):
        head.fit_support(torch.tensor([900.0]), layer=nn.Linear(4, 3))


def test_a_head_in_double_precision_keeps_double_precision():
    head = ValueHead(HLGauss(low=-1.0, high=1.0)).double()
    outputs, targets = torch.randn(3, 101, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert head.values(outputs).dtype == head.objective(outputs, targets).dtype == torch.float64
