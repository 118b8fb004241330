"""The tiny pipelines: offline, of the real classes, guided, repeatable, and saved like any other."""

import inspect

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from rlalign.diffusion.tiny import TINY_KINDS, byte_level_tokenizer, tiny_call, tiny_pipeline, tiny_prompts

CLASSES = {
    "sd15": ("StableDiffusionPipeline", "PNDMScheduler"),
    "sdxl": ("StableDiffusionXLPipeline", "EulerDiscreteScheduler"),
    "sd3": ("StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
    "flux_true_cfg": ("FluxPipeline", "FlowMatchEulerDiscreteScheduler"),
}


def latents(pipeline, kind, **changed):
    call = tiny_call(kind, 2) | {"output_type": "latent"} | changed
    return pipeline(**call, generator=[torch.Generator().manual_seed(k) for k in range(2)]).images


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_each_family_runs_its_own_classes_and_makes_images(kind):
    pipeline = tiny_pipeline(kind)
    assert (type(pipeline).__name__, type(pipeline.scheduler).__name__) == CLASSES[kind]
    images = pipeline(**tiny_call(kind, 2)).images
    assert [image.size for image in images] == [(8, 8), (8, 8)]
    assert latents(pipeline, kind).isfinite().all()


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_the_seed_decides_the_weights_and_nothing_else(kind):
    state = torch.get_rng_state()
    same, again, other = tiny_pipeline(kind), tiny_pipeline(kind), tiny_pipeline(kind, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(latents(same, kind), latents(again, kind))
    assert not torch.allclose(latents(same, kind), latents(other, kind))


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, "true_cfg_scale" if kind == "flux_true_cfg" else "guidance_scale") for kind in TINY_KINDS],
)
def test_guidance_has_an_effect(kind, name):
    pipeline = tiny_pipeline(kind)
    assert not torch.allclose(latents(pipeline, kind), latents(pipeline, kind, **{name: 2.0}), atol=1e-3)


def test_the_tokenizer_has_a_token_per_byte():
    tokenizer = byte_level_tokenizer()
    assert len(tokenizer) == 514
    ids = tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids[0]
    # start, "a" at a word's end, "c", "a", "t" at a word's end, end
    assert len(ids) == 77
    assert ids[0] == 512
    assert (ids == 513).sum() == 77 - 5
    assert tokenizer.convert_ids_to_tokens(ids[1:5]) == ["a</w>", "c", "a", "t</w>"]
    assert tokenizer.decode(ids[1:5]) == "a cat"


def test_prompts_are_read():
    pipeline = tiny_pipeline("sd15")
    one, other = latents(pipeline, "sd15"), latents(pipeline, "sd15", prompt=["a red cube", "a blue ship"])
    assert torch.equal(one[0], other[0])
    assert not torch.allclose(one[1], other[1], atol=1e-4)
    assert len(set(tiny_prompts(35))) == 35


def test_a_whole_pipeline_is_saved_and_reloaded(tmp_path):
    pipeline = tiny_pipeline("sd15")
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded, "sd15"), latents(pipeline, "sd15"))
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 600_000


def test_one_without_text_encoders_is_reloaded_by_naming_them(tmp_path):
    pipeline = tiny_pipeline("sd3")
    pipeline.save_pretrained(tmp_path)
    absent = {name: None for name, part in pipeline.components.items() if part is None}
    loaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents(loaded, "sd3"), latents(pipeline, "sd3"))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="no tiny pipeline 'sd4'; choose one of sd15, sdxl, sd3, flux, flux_true_cfg"):
        inspect.unwrap(tiny_call)("sd4", 1)  # beneath the type check of tests
    with pytest.raises(ValueError, match="`count` is the number of samples and must be >= 1, got 0"):
        tiny_call("sd3", 0)
