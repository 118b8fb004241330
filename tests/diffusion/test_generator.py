"""The small generator as a diffusers pipeline: steps and guidance by hand, seeds, adapters, saving."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from rlalign.diffusion.generator import ConditionalFlowPipeline, FlowTransformer, FlowTransformerOutput

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


class LabelIsVelocity(FlowTransformer):
    """Moves every sample at a speed that is its label, and remembers how it was asked."""

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, labels: Tensor, return_dict: bool = True
    ) -> FlowTransformerOutput | tuple[Tensor]:
        self.asked = [*vars(self).get("asked", []), (timestep.tolist(), labels.tolist())]
        return (labels.to(hidden_states)[:, None, None].expand_as(hidden_states),)


def pipeline_of(transformer: FlowTransformer, **data) -> ConditionalFlowPipeline:
    return ConditionalFlowPipeline(transformer, FlowMatchEulerDiscreteScheduler(), data=data or None)


def shaken(seed: int = 0, **config) -> FlowTransformer:
    """A transformer whose weights are all random: a new one predicts zero."""
    model = FlowTransformer(
        **{"tokens": 5, "channels": 6, "classes": 3, "width": 32, "layers": 2, "heads": 2, **config}
    )
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=random)
    return model.eval()


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_new_transformer_stands_still():
    pipeline = pipeline_of(FlowTransformer(2, 3, 2, width=8, heads=2), mean=[1.0, 2.0, 3.0], std=[1.0, 2.0, 4.0])
    noise = torch.randn(2, 2, 3)
    samples = pipeline([0, 1], latents=noise).samples
    np.testing.assert_allclose(samples, noise.numpy() * [1, 2, 4] + [1, 2, 3], rtol=1e-6)


def test_steps_by_hand():
    transformer = LabelIsVelocity(2, 3, 3)
    pipeline = pipeline_of(transformer)
    noise = torch.randn(2, 2, 3)
    out = pipeline([2, 1], latents=noise, num_inference_steps=4, output_type="latent").samples
    # sigma falls from 1 to 0, so a constant velocity v moves a sample by -v, in however many steps
    torch.testing.assert_close(out, noise - torch.tensor([2.0, 1.0])[:, None, None])
    assert [t for t, _ in transformer.asked] == [[1000, 1000], [750, 750], [500, 500], [250, 250]]


def test_guidance_by_hand():
    transformer = LabelIsVelocity(2, 3, 3)
    pipeline = pipeline_of(transformer)
    noise = torch.randn(2, 2, 3)
    out = pipeline([0, 1], latents=noise, num_inference_steps=2, guidance_scale=3.0, output_type="latent").samples
    # the null class is 3: 3 + 3 (0 - 3) = -6 and 3 + 3 (1 - 3) = -3
    torch.testing.assert_close(out, noise - torch.tensor([-6.0, -3.0])[:, None, None])
    assert [labels for _, labels in transformer.asked] == [[3, 3, 0, 1]] * 2  # one call, unconditional rows first


def test_no_guidance_asks_for_the_classes_alone():
    transformer = LabelIsVelocity(2, 3, 3)
    pipeline_of(transformer)([0, 1], num_inference_steps=1)
    assert transformer.asked == [([1000.0, 1000.0], [0, 1])]


def test_equal_seeds_and_labels_give_equal_samples_however_the_batch_is_cut():
    pipeline = pipeline_of(shaken())
    whole = pipeline([0, 1, 2, 1], generator=seeded(1, 2, 3, 4)).samples
    np.testing.assert_array_equal(whole, pipeline([0, 1, 2, 1], generator=seeded(1, 2, 3, 4)).samples)
    parts = [pipeline(labels, generator=seeded(*s)).samples for labels, s in (([0, 1, 2], (1, 2, 3)), ([1], (4,)))]
    np.testing.assert_allclose(whole, np.concatenate(parts), atol=1e-5)
    assert np.abs(whole[1] - pipeline([2], generator=seeded(2)).samples[0]).max() > 1e-3  # the label matters
    assert np.abs(whole[1] - whole[3]).max() > 1e-3  # and so does the seed


def test_names_of_classes_are_labels_too():
    pipeline = pipeline_of(shaken(), class_names=["table", "chair", "lamp"])
    by_name = pipeline(["lamp", "table"], generator=seeded(1, 2)).samples
    np.testing.assert_array_equal(by_name, pipeline(torch.tensor([2, 0]), generator=seeded(1, 2)).samples)
    with pytest.raises(ValueError, match=r"`labels` holds 'sofa'; there are table, chair, lamp, or .* 0 to 2"):
        pipeline(["table", "sofa"])
    with pytest.raises(ValueError, match="`labels` holds 3"):
        pipeline([3])


@pytest.mark.parametrize("positions", [True, False])
def test_order_of_the_tokens(positions):
    # without places a sample is a set: permuted tokens give the permuted velocity; with them, another one
    model = shaken(positions=positions)
    x, order = torch.randn(4, 5, 6), torch.tensor([3, 0, 4, 1, 2])
    t, labels = torch.full((4,), 500.0), torch.tensor([0, 1, 2, 3])
    velocity, permuted = (model(h, t, labels, return_dict=False)[0] for h in (x, x[:, order]))
    same = torch.allclose(permuted, velocity[:, order], atol=1e-5)
    assert same is not positions


def test_saved_pipeline_gives_the_same_bits(tmp_path):
    names = {"class_names": ["a", "b", "c"], "mean": [0.5] * 6, "std": [2.0] * 6}
    pipeline = pipeline_of(shaken(), **names)
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt*"))
    loaded = ConditionalFlowPipeline.from_pretrained(tmp_path)
    assert loaded.class_names == ["a", "b", "c"]
    want, got = (p([0, 1], generator=seeded(7, 8), guidance_scale=2.0).samples for p in (pipeline, loaded))
    np.testing.assert_array_equal(want, got)
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, loaded.transformer.state_dict()[name])


def test_two_classes_and_two_channels_are_not_taken_for_a_component(tmp_path):
    # diffusers reads a list of two in a pipeline's file as (library, class)
    pipeline = pipeline_of(shaken(channels=2, classes=2), class_names=["x", "y"], mean=[1.0, 2.0], std=[1.0, 1.0])
    pipeline.save_pretrained(tmp_path)
    assert ConditionalFlowPipeline.from_pretrained(tmp_path).class_names == ["x", "y"]


def test_adapters_sit_in_every_attention_and_travel(tmp_path):
    pipeline = pipeline_of(shaken())
    base = pipeline([0, 1], generator=seeded(1, 2)).samples
    model = pipeline.transformer
    model.add_adapter(LoraConfig(r=4, lora_alpha=16, init_lora_weights="gaussian", target_modules=TARGETS), "policy")
    found = {name.rsplit(".lora_A", 1)[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert found == {f"blocks.{k}.attention.{target}" for k in range(2) for target in TARGETS}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(3))
    tuned = pipeline([0, 1], generator=seeded(1, 2)).samples
    assert np.abs(tuned - base).max() > 1e-3
    model.disable_adapters()
    np.testing.assert_array_equal(pipeline([0, 1], generator=seeded(1, 2)).samples, base)
    pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model, adapter_name="policy"),
        transformer_lora_adapter_metadata=model.peft_config["policy"].to_dict(),
    )
    fresh = pipeline_of(shaken())
    fresh.load_lora_weights(tmp_path)
    np.testing.assert_allclose(fresh([0, 1], generator=seeded(1, 2)).samples, tuned, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = shaken()
        if checkpointing:
            model.enable_gradient_checkpointing()
        x = torch.ones(3, 5, 6)
        model(x, torch.full((3,), 300.0), torch.tensor([0, 1, 2]), return_dict=False)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_half_precision_tells_neighbouring_noise_levels_apart():
    # 998 and 1000 are one number in bfloat16; their features are taken in float32
    model = shaken().to(torch.bfloat16)
    x, labels = torch.randn(2, 5, 6, dtype=torch.bfloat16), torch.tensor([0, 0])
    x[1] = x[0]
    velocity = model(x, torch.tensor([998.0, 1000.0]), labels, return_dict=False)[0]
    assert velocity.dtype == torch.bfloat16 and not torch.equal(velocity[0], velocity[1])
    samples = pipeline_of(model)([0, 1], generator=seeded(1, 2)).samples
    full = pipeline_of(shaken())([0, 1], generator=seeded(1, 2)).samples
    assert samples.dtype == np.float32 and full.shape == samples.shape and np.isfinite(samples).all()


def test_encode_is_the_inverse_of_decode():
    pipeline = pipeline_of(shaken(), mean=[1.0] * 6, std=[0.25] * 6)
    samples = np.full((1, 5, 6), 1.5, dtype=np.float32)
    torch.testing.assert_close(pipeline.encode(samples), torch.full((1, 5, 6), 2.0))
    np.testing.assert_allclose(pipeline.decode(pipeline.encode(samples)), samples)


def test_the_call_can_be_replayed_with_gradients():
    # it runs without gradients, but keeps the function beneath, as every diffusers pipeline does
    pipeline = pipeline_of(shaken())
    noise = torch.randn(2, 5, 6)
    plain = pipeline([0, 1], latents=noise, output_type="latent", num_inference_steps=2).samples
    beneath = ConditionalFlowPipeline.__call__.__wrapped__
    out = beneath(pipeline, [0, 1], latents=noise, output_type="latent", num_inference_steps=2).samples
    assert torch.equal(out, plain) and out.requires_grad and not plain.requires_grad


def test_wrong_arguments_are_named():
    pipeline = pipeline_of(shaken())
    with pytest.raises(ValueError, match=r"`latents` must be \[2, 5, 6\] for 2 labels, got \[1, 5, 6\]"):
        pipeline([0, 1], latents=torch.zeros(1, 5, 6))
    with pytest.raises(ValueError, match="`output_type` must be 'np' or 'latent', got 'pil'"):
        pipeline([0], output_type="pil")
    with pytest.raises(ValueError, match="`width`=30 is not divisible by `heads`=4"):
        FlowTransformer(2, 2, 2, width=30, heads=4)
