"""Adapters folded into their weights: the same function and gradient, and nothing left behind."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from rlalign.diffusion.config import FlowGRPOConfig, LoRASettings, PipelineConfig, SDEConfig
from rlalign.diffusion.folding import bypassed, folded, pays
from rlalign.diffusion.policy import ADAPTER, TunedPipeline
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.tiny import tiny_call, tiny_pipeline


def tuned(kind="sd3", **changed):
    trained = TunedPipeline(tiny_pipeline(kind), FlowGRPOConfig(lora=LoRASettings(r=8, alpha=12.0), **changed))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter.normal_(std=0.1)
    return trained


def layers_of(trained):
    return [module for module in trained.denoiser.modules() if isinstance(module, LoraLayer)]


def test_a_folded_layer_multiplies_by_the_sum_of_the_weights():
    layer = layers_of(tuned())[0]
    x = torch.randn(5, layer.in_features)
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    whole = layer.base_layer.weight + 12 / 8 * up @ down
    expected = x @ whole.T + layer.base_layer.bias
    with folded([layer], ADAPTER):
        assert (layer(x) - expected).abs().max() <= 1e-6
    assert (layer(x) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["sd3", "sd15"])
def test_folding_changes_neither_the_sample_nor_the_gradient(kind):
    trained = tuned(kind)
    sde = SDEConfig(kind="ddim", noise_level=1.0) if kind == "sd15" else SDEConfig()
    sampler = StochasticSampler(trained.pipeline, sde)
    call = tiny_call(kind, 2) | {"output_type": "latent"}
    before = {name: value.clone() for name, value in trained.denoiser.state_dict().items()}
    with trained.folded():
        trajectory = sampler.sample(call, seeds=[0, 1])
    rows, steps = trajectory.decisions()
    assert sampler.parity(trajectory) <= 1e-6  # replayed as peft has it
    gradients = []
    for folding in (False, True):
        for parameter in trained.parameters.values():
            parameter.grad = None
        if folding:
            with trained.folded():
                score = sampler.replay(trajectory, rows, steps)
        else:
            score = sampler.replay(trajectory, rows, steps)
        score.prediction.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained.parameters.values() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() <= 1e-5 * gradients[0].norm()
    assert all(torch.equal(value, before[name]) for name, value in trained.denoiser.state_dict().items())


def test_every_small_linear_layer_is_folded():
    trained = tuned()
    with trained.folded():
        assert all("forward" in vars(layer) for layer in layers_of(trained))
    assert not any("forward" in vars(layer) for layer in layers_of(trained))


def test_layers_are_given_back_after_an_error_and_one_inside_another():
    layer = layers_of(tuned())[0]
    x = torch.randn(2, layer.in_features)
    plain = layer(x)
    with pytest.raises(RuntimeError, match="inside"), folded([layer], ADAPTER):
        raise RuntimeError("inside")
    assert "forward" not in vars(layer)
    with folded([layer], ADAPTER):
        with bypassed([layer]):
            assert torch.equal(layer(x), layer.base_layer(x))
        assert (layer(x) - plain).abs().max() <= 1e-6
    assert torch.equal(layer(x), plain)
    assert not any(name.startswith("forward") for name, _ in layer.named_modules())


def test_large_half_precision_and_checkpointed_layers_are_left_alone():
    """Rank 8 costs 3 x 8 x (64 + 64) = 3072 products a row, rank 11 costs 4224; a folded gradient 64 x 64 = 4096."""

    def layer(rank, dtype=torch.float32, **more):
        network = nn.ModuleDict({"to_q": nn.Linear(64, 64)}).to(dtype)
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=["to_q"], **more), network, adapter_name=ADAPTER)
        return network["to_q"]

    assert not pays(layer(8), ADAPTER)
    assert pays(layer(11), ADAPTER)
    assert not pays(layer(11, torch.bfloat16), ADAPTER)
    assert not pays(layer(11, lora_dropout=0.1), ADAPTER)
    assert not pays(layer(11, use_dora=True), ADAPTER)
    trained = tuned(pipeline=PipelineConfig(gradient_checkpointing=True))
    with trained.folded():
        assert not any("forward" in vars(layer) for layer in layers_of(trained))
