"""Sampling through reordered weights gives what the plain layers give, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from rlalign.llm.generate import generate_groups
from rlalign.llm.prepacked import FEWEST_STEPS, prepacked

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a PyTorch build without oneDNN")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 8, bias=False))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (7, 24), (3, 5, 24)])
def test_the_product_is_the_same_for_any_number_of_rows(shape):
    model, x = layers(), torch.randn(shape)
    with torch.no_grad():
        expected = model(x)
        with prepacked(model, rows=4, steps=FEWEST_STEPS):
            assert all("forward" in vars(model[index]) for index in (0, 2))
            got = model(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_layers_are_their_own_again_afterwards_even_after_an_error():
    model = layers()
    with pytest.raises(RuntimeError, match="stop"), prepacked(model, rows=4, steps=100):
        raise RuntimeError("stop")
    assert not any("forward" in vars(layer) for layer in model)
    assert model(torch.randn(2, 24)).requires_grad


def test_new_weights_are_seen_the_next_time():
    model, x = layers(), torch.randn(3, 24)
    with torch.no_grad():
        for factor in (1.0, 2.0):
            model[2].weight.mul_(factor)
            with prepacked(model, rows=3, steps=100):
                hidden = torch.tanh(x @ model[0].weight.T + model[0].bias)
                torch.testing.assert_close(model(x), hidden @ model[2].weight.T)


@pytest.mark.parametrize("change", ["few steps", "double", "patched", "subclass"])
def test_what_cannot_gain_or_is_not_plain_is_left_alone(change):
    model, steps = layers(), 100
    own = None
    match change:
        case "few steps":
            steps = FEWEST_STEPS - 1
        case "double":
            model.double()
        case "patched":
            own = model[0].forward = lambda x: x[..., :1].expand(*x.shape[:-1], 48)
        case "subclass":
            model[0].__class__ = type("Quantised", (nn.Linear,), {})
    with prepacked(model, rows=4, steps=steps):
        assert vars(model[0]).get("forward") is own


def test_greedy_completions_are_those_of_the_plain_layers(tiny_model, monkeypatch):
    prompts = [[3, 4, 5], [6, 7]]
    options = {"group_size": 2, "max_new_tokens": 12, "eos_ids": [], "pad_id": 0, "temperature": 0.0}
    packed = generate_groups(tiny_model, prompts, **options)
    monkeypatch.setattr("rlalign.llm.prepacked.FEWEST_STEPS", 1000)
    plain = generate_groups(tiny_model, prompts, **options)
    assert packed.ids.tolist() == plain.ids.tolist()
    torch.testing.assert_close(packed.log_prob, plain.log_prob, rtol=1e-4, atol=1e-5)
