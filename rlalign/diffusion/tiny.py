"""Stable Diffusion 1.5, SDXL, SD3 and Flux with a few thousand random weights: for tests, without a download."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from jaxtyping import Float
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TinyKind = Literal["sd15", "sdxl", "sd3", "flux", "flux_true_cfg"]

TINY_KINDS: tuple[TinyKind, ...] = ("sd15", "sdxl", "sd3", "flux", "flux_true_cfg")

WIDTH, POOLED = 32, 64
_TOKENS = 7
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_COLOURS = ("red", "green", "blue", "black", "white")
_THINGS = ("cube", "cat", "table", "house", "ship", "tree", "chair")


def tiny_pipeline(kind: TinyKind, *, seed: int = 0) -> DiffusionPipeline:
    """Build a pipeline of the named family with random weights; four steps of it take about 0.1 s on one core.

    The components are those of the real thing, scheduler included. `sd15` has a byte-level tokenizer and a text model,
    so it takes prompts and saves and reloads whole. The others come without text encoders and take embeddings; load a
    saved one with those parts given as None. `flux` has distilled guidance, `flux_true_cfg` calls its transformer
    twice per step.

    Args:
        kind: Which family.
        seed: Decides the weights. The global random state is left as it was.

    Raises:
        ValueError: The family is not one of these.

    Example:
        >>> pipeline = tiny_pipeline("sd3")
        >>> pipeline(**tiny_call("sd3", 2), output_type="latent").images.shape
        torch.Size([2, 4, 8, 8])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _builder(kind)()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_call(kind: TinyKind, count: int, *, seed: int = 0) -> dict[str, Any]:
    """Return call arguments for `count` samples of a tiny pipeline: four guided steps, prompts or random embeddings.

    Args:
        kind: Which family.
        count: Number of samples; each has a prompt of its own.
        seed: Decides the embeddings.

    Raises:
        ValueError: The family is not one of these, or `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"`count` is the number of samples and must be >= 1, got {count}.")
    size = {"num_inference_steps": 4, "height": 8, "width": 8}
    embeddings = _embeddings(count, seed)
    positive = {name: value for name, value in embeddings.items() if not name.startswith("negative")}
    match kind:
        case "sd15":
            return size | {"prompt": tiny_prompts(count), "guidance_scale": 4.0}
        case "sdxl" | "sd3":
            return size | embeddings | {"guidance_scale": 4.0}
        case "flux":
            return size | positive | {"guidance_scale": 3.5}
        case "flux_true_cfg":
            return size | embeddings | {"true_cfg_scale": 4.0}
    raise ValueError(_unknown(kind))


def tiny_prompts(count: int) -> list[str]:
    """Name `count` things: "a red cube", "a green cat", ..., different up to 35."""
    return [f"a {_COLOURS[k % len(_COLOURS)]} {_THINGS[k % len(_THINGS)]}" for k in range(count)]


def _builder(kind: str) -> Callable[[], DiffusionPipeline]:
    match kind:
        case "sd15":
            return _sd15
        case "sdxl":
            return _sdxl
        case "sd3":
            return _sd3
        case "flux":
            return lambda: _flux(distilled=True)
        case "flux_true_cfg":
            return lambda: _flux(distilled=False)
    raise ValueError(_unknown(kind))


def _unknown(kind: str) -> str:
    return f"there is no tiny pipeline {kind!r}; choose one of {', '.join(TINY_KINDS)}."


def _sd15() -> DiffusionPipeline:
    tokenizer = byte_level_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )
    return StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=WIDTH),
        vae=_vae(channels=4, scaling_factor=0.18215),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(**_BETAS, skip_prk_steps=True),  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )


def byte_level_tokenizer() -> CLIPTokenizer:
    """Build CLIP's tokenizer without merges: 256 bytes, the same 256 at the end of a word, and two special tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # transformers 5 takes `vocab` and ignores the older `vocab_file` without a word.
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def _sdxl() -> DiffusionPipeline:
    unet = _unet(
        cross_attention_dim=WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED,
        use_linear_projection=True,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(channels=4, scaling_factor=0.13025),
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading"),  # type: ignore[arg-type]
        add_watermarker=False,
        **_without("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    )


def _sd3() -> DiffusionPipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=WIDTH // 8,
        caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        vae=_vae(channels=4, scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **_without("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    )


def _flux(*, distilled: bool) -> DiffusionPipeline:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=distilled,
    )
    return FluxPipeline(
        transformer=transformer.eval(),
        vae=_vae(channels=1, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        **_without("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    )


def _unet(**config: Any) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )
    return unet.eval()


def _vae(*, channels: int, **config: float) -> AutoencoderKL:
    """One block: an image has the size of its latent."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=channels,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=1,
        sample_size=8,
        **config,  # type: ignore[arg-type]
    ).eval()


def _without(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names)


def _embeddings(count: int, seed: int) -> dict[str, Float[Tensor, "count ..."]]:
    source = torch.Generator().manual_seed(seed)
    shapes = {"prompt_embeds": (count, _TOKENS, WIDTH), "pooled_prompt_embeds": (count, POOLED)}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    return {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
