"""A small class-conditional generator of token sets (boxes, voxel or image patches), as an ordinary diffusers pipeline.

It has what a large text-to-image pipeline has, in small: a transformer that takes adapters, a scheduler, guidance by a
null class, `save_pretrained`. Everything that aligns pipelines runs on it unchanged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin, SanaLoraLoaderMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional as F

_TIME_FEATURES = 64
_LONGEST_PERIOD = 10_000.0


@dataclass
class FlowTransformerOutput(BaseOutput):
    """`sample`: the velocity noise - data, [B, L, C]."""

    sample: Tensor


@dataclass
class SampleOutput(BaseOutput):
    """`samples`: [B, L, C], a NumPy array in the data's units, or a tensor of latents."""

    samples: np.ndarray | Tensor


class Attention(nn.Module):
    """Full self-attention between the tokens of a sample. Projections are named as in diffusers, for LoRA targets."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a two-layer network, both scaled, shifted and gated by the condition (DiT's adaLN-Zero).

    Reference:
        Peebles and Xie 2023 (arXiv:2212.09748), section 3.2.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.condition = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(condition)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attention(_modulated(x, shift1, scale1)))
        hidden = F.silu(self.up(_modulated(x, shift2, scale2)))
        return torch.addcmul(x, gate2, self.down(hidden))


class FlowTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predict the velocity of noisy token sets, given the noise level and a class.

    Args:
        tokens: Number of tokens L of a sample.
        channels: Numbers C per token.
        classes: Number of classes; label `classes` is the null class of guidance.
        width: Of a token inside.
        layers: Blocks.
        heads: Of the attention.
        positions: Add a learned vector per place. Without, the output is equivariant to the order of the tokens.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]

    @register_to_config
    def __init__(
        self,
        tokens: int,
        channels: int,
        classes: int,
        width: int = 64,
        layers: int = 3,
        heads: int = 4,
        positions: bool = True,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"`width`={width} is not divisible by `heads`={heads}.")
        self.gradient_checkpointing = False
        self.embed = nn.Linear(channels, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width)) if positions else None
        self.time = nn.Sequential(nn.Linear(_TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.condition = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, channels)
        # Every block begins as the identity and the velocity as zero, so that large learning rates are safe.
        for name, parameter in self.named_parameters():
            if "condition" in name or name.startswith("out."):
                nn.init.zeros_(parameter)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, labels: Tensor, return_dict: bool = True
    ) -> FlowTransformerOutput | tuple[Tensor]:
        """Return the velocity.

        Args:
            hidden_states: Noisy samples, [B, L, C].
            timestep: 1000 x the noise level, [B].
            labels: Class of each, int64 [B].
            return_dict: False returns a tuple.
        """
        features = _time_features(timestep).to(hidden_states.dtype)
        condition = F.silu(self.time(features) + self.label(labels))
        x = self.embed(hidden_states)
        if self.place is not None:
            x = x + self.place
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                assert self._gradient_checkpointing_func is not None  # set with the flag
                x = self._gradient_checkpointing_func(block, x, condition)
            else:
                x = block(x, condition)
        shift, scale = self.condition(condition)[:, None].chunk(2, dim=-1)
        velocity = self.out(_modulated(x, shift, scale))
        return FlowTransformerOutput(sample=velocity) if return_dict else (velocity,)


class ConditionalFlowPipeline(DiffusionPipeline, SanaLoraLoaderMixin):
    """Draw samples of given classes: noise at the start, one Euler step of the flow per noise level.

    The LoRA loader is that of any pipeline whose adapters sit in its transformer alone.

    Args:
        transformer: The velocity model.
        scheduler: Of noise levels.
        data: What turns latents into samples: `class_names`, and `mean` and `std` per channel.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(
        self,
        transformer: FlowTransformer,
        scheduler: FlowMatchEulerDiscreteScheduler,
        data: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        channels, classes = transformer.config["channels"], transformer.config["classes"]
        plain = {"class_names": [str(k) for k in range(classes)], "mean": [0.0] * channels, "std": [1.0] * channels}
        self.register_to_config(data=plain | (data or {}))

    @property
    def class_names(self) -> list[str]:
        """In the order of the labels."""
        return list(self.config["data"]["class_names"])

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int | str] | np.ndarray | Tensor,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float | int = 1.0,
        latents: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
    ) -> SampleOutput | tuple[np.ndarray | Tensor]:
        """Draw one sample per label.

        Args:
            labels: Indices or names of classes.
            num_inference_steps: Noise levels, evenly spaced from 1.
            guidance_scale: Above 1: v_null + scale (v_class - v_null), both from one call of 2 B rows.
            latents: Initial noise, [B, L, C]; drawn where absent.
            generator: Of the noise; a list has one per sample.
            output_type: `np`: an array in the data's units; `latent`: a tensor, standardised.
            return_dict: False returns a tuple.
        """
        if output_type not in ("np", "latent"):
            raise ValueError(f"`output_type` must be 'np' or 'latent', got {output_type!r}.")
        device = self._execution_device
        index = self._indices(labels).to(device)
        x = self._noise(len(index), latents, generator, device)
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self._velocity(x, t, index, guidance_scale), t, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        samples = x if output_type == "latent" else self.decode(x)
        return SampleOutput(samples=samples) if return_dict else (samples,)

    def encode(self, samples: np.ndarray) -> Tensor:
        """Standardise samples: what the transformer sees at noise level 0, float32 on the CPU."""
        mean, std = self._statistics()
        return torch.from_numpy(((np.asarray(samples, dtype=np.float64) - mean) / std).astype(np.float32))

    def decode(self, latents: Tensor) -> np.ndarray:
        """Turn latents into samples in the data's units, float32."""
        mean, std = self._statistics()
        return (latents.detach().double().cpu().numpy() * std + mean).astype(np.float32)

    def _velocity(self, x: Tensor, t: Tensor, labels: Tensor, guidance_scale: float | int) -> Tensor:
        if guidance_scale <= 1:
            return self.transformer(hidden_states=x, timestep=t.expand(len(x)), labels=labels, return_dict=False)[0]
        null = torch.full_like(labels, self.transformer.config["classes"])
        both = self.transformer(
            hidden_states=torch.cat([x, x]),
            timestep=t.expand(2 * len(x)),
            labels=torch.cat([null, labels]),
            return_dict=False,
        )[0]
        unconditional, conditional = both.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        data = self.config["data"]
        return np.asarray(data["mean"]), np.asarray(data["std"])

    def _indices(self, labels: Sequence[int | str] | np.ndarray | Tensor) -> Tensor:
        names = self.class_names
        given = labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else list(labels)
        unknown = [label for label in given if label not in names and label not in range(len(names))]
        if unknown:
            raise ValueError(
                f"`labels` holds {unknown[0]!r}; there are {', '.join(names)}, or their indices 0 to {len(names) - 1}."
            )
        return torch.tensor([names.index(label) if isinstance(label, str) else int(label) for label in given])

    def _noise(
        self,
        count: int,
        latents: Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Tensor:
        config = self.transformer.config
        shape = (count, config["tokens"], config["channels"])
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=self.transformer.dtype)
        if latents.shape != shape:
            raise ValueError(f"`latents` must be {list(shape)} for {count} labels, got {list(latents.shape)}.")
        return latents.to(device, self.transformer.dtype)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def _time_features(timestep: Tensor) -> Tensor:
    """Sines and cosines of 1000 sigma, [B] -> [B, 64], float32: half precision cannot tell near levels apart."""
    half = _TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(_LONGEST_PERIOD) / half * torch.arange(half, device=timestep.device))
    angle = timestep.float()[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
