"""One buffer under all parameters."""

import copy

import pytest
import torch
from torch import nn

from rlalign.optim.flat import FlatParameters


def network():
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))


def loss_of(module, seed):
    generator = torch.Generator().manual_seed(seed)
    return module(torch.randn(16, 3, generator=generator)).square().sum()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("max_norm", [None, 0.5, 1e9])
def test_steps_equal_those_of_adam_on_separate_parameters(fused, max_norm):
    module, reference = network(), network()
    flat = FlatParameters(module)
    ours = torch.optim.Adam([flat.parameter], lr=0.01, eps=1e-5, fused=fused)
    theirs = torch.optim.Adam(reference.parameters(), lr=0.01, eps=1e-5)
    for step in range(30):
        loss_of(module, step).backward()
        norm = flat.clip(max_norm)
        ours.step()
        flat.clear()
        loss_of(reference, step).backward()
        expected = nn.utils.clip_grad_norm_(reference.parameters(), float("inf") if max_norm is None else max_norm)
        theirs.step()
        theirs.zero_grad()
        torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    for (name, p), q in zip(module.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=name)


def test_without_clipping_the_bits_are_the_same():
    module, reference = network(), network()
    flat = FlatParameters(module)
    ours = torch.optim.Adam([flat.parameter], lr=0.01, foreach=False)
    theirs = torch.optim.Adam(reference.parameters(), lr=0.01, foreach=False)
    for step in range(10):
        for net, optimizer, clear in ((module, ours, flat.clear), (reference, theirs, theirs.zero_grad)):
            loss_of(net, step).backward()
            optimizer.step()
            clear()
    assert all(p.equal(q) for p, q in zip(module.parameters(), reference.parameters(), strict=True))


def test_parameters_stay_themselves():
    module = network()
    before = copy.deepcopy(module.state_dict())
    held = module[0].weight
    flat = FlatParameters(module)
    assert module[0].weight is held
    assert [name for name, _ in module.named_parameters()] == list(before)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    flat.parameter.data.zero_()
    assert not held.any()


def is_flat(module, flat):
    storage = flat.parameter.untyped_storage().data_ptr()
    gradients = flat.gradient.untyped_storage().data_ptr()
    return all(
        p.untyped_storage().data_ptr() == storage and p.grad.untyped_storage().data_ptr() == gradients
        for p in module.parameters()
    )


def test_loading_a_state_keeps_the_views():
    module, other = network(), network()
    nn.init.constant_(other[0].weight, 3.0)
    flat = FlatParameters(module)
    module.load_state_dict(other.state_dict())
    assert is_flat(module, flat)
    assert flat.parameter[:15].tolist() == [3.0] * 15


def test_training_goes_on_in_the_buffer():
    module = network()
    flat = FlatParameters(module)
    loss_of(module, 0).backward()
    flat.clear()
    loss_of(module, 1).backward()
    assert is_flat(module, flat)
    expected = torch.autograd.grad(loss_of(module, 1), list(module.parameters()))
    torch.testing.assert_close(flat.gradient, torch.cat([g.flatten() for g in expected]))


def test_a_copy_has_numbers_of_its_own():
    module = network()
    flat = FlatParameters(module)
    twin = copy.deepcopy(module)
    flat.parameter.data.zero_()
    assert not any(p.any() for p in module.parameters())
    assert twin[0].weight.any()


def test_what_is_frozen_is_left_alone():
    module = network()
    module[0].requires_grad_(False)
    frozen = module[0].weight.data_ptr()
    flat = FlatParameters(module)
    assert flat.parameter.numel() == 5 + 5 + 12
    assert module[0].weight.data_ptr() == frozen


def test_nothing_to_train_and_mixed_kinds_are_refused():
    with pytest.raises(ValueError, match="no parameter is trainable"):
        FlatParameters(nn.Tanh())
    mixed = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1).double()])
    with pytest.raises(ValueError, match=r"must share dtype and device .*float32.*float64"):
        FlatParameters(mixed)
