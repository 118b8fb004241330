"""Sampling through reordered weights gives what the plain layers give, and leaves the model as it was."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlalign.llm import prepacked as prepacked_module
from rlalign.llm.generate import generate_groups
from rlalign.llm.prepacked import FEWEST_STEPS, prepacked
from rlalign.llm.scoring import base_model
from tests.reference import sampling as reference

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


def biased_model() -> Qwen2ForCausalLM:
    """Qwen2 has biases in its attention; drawn here, since it begins with zeros. float32, as the reordering needs."""
    config = Qwen2Config(
        vocab_size=120,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                assert part.bias is not None
                part.bias.normal_()
    return model


@pytest.mark.parametrize("adapted", [False, True], ids=["biases", "biases_and_lora"])
def test_whole_completions_have_the_plain_models_log_probabilities(adapted, monkeypatch):
    model = biased_model()
    if adapted:
        settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        model = base_model(get_peft_model(model, settings).eval())
    products: list[nn.Module] = []
    make = prepacked_module._product
    monkeypatch.setattr(prepacked_module, "_product", lambda layer, rows: products.append(layer) or make(layer, rows))
    prompts = [[3, 4, 5], [6], [*range(70, 80), 1], [*range(70, 80), 2, 3]]
    got = generate_groups(
        model,
        prompts,
        group_size=3,
        max_new_tokens=12,
        eos_ids=[*range(10)],
        pad_id=0,
        temperature=0.8,
        uniforms=torch.rand(12, 12),
    )
    linear = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert len(products) == len(linear) == 2 * 7 + 1 + (2 * 3 * 2 if adapted else 0)
    assert not any("forward" in vars(part) for part in linear)
    assert int(got.lengths.max()) == 12 > FEWEST_STEPS
    for row, length in enumerate(got.lengths.tolist()):
        expected, _ = reference.score(model, prompts[row // 3], got.ids[row, :length].tolist(), temperature=0.8)
        torch.testing.assert_close(got.log_prob[row, :length].double(), expected.detach(), rtol=0, atol=2e-5)
