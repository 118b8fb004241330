"""Policy and critic networks over any observation space, with the action distribution and the value head on top."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlalign.agents.config import NetworkConfig, NormalizeAndProject
from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.nn.mlp import MLP, orthogonal
from rlalign.nn.nap import to_normalized
from rlalign.nn.policies import ActionDistribution
from rlalign.nn.value_heads import ValueHead

AnyModule = TypeVar("AnyModule", bound=nn.Module)
VECTOR = "vector"
"""Name of everything in an observation that is not an image, side by side."""


class Features(nn.Module):
    """Numbers as they are, and each image through the convolutions of Mnih et al. 2015 (Nature 518)."""

    def __init__(self, parts: ObservationParts):
        super().__init__()
        self.names = sorted(parts.images)
        self.images = nn.ModuleDict({name: _convolutions(parts.spaces[name].shape or ()) for name in self.names})
        self.has_vector = parts.vector_size > 0
        self.size = parts.vector_size + 512 * len(self.names)

    def forward(self, prepared: Mapping[str, Tensor]) -> Tensor:
        if not self.names:
            return prepared[VECTOR]
        columns = [prepared[VECTOR]] if self.has_vector else []
        for name in self.names:
            pixels = prepared[name]
            flat = self.images[name](pixels.flatten(0, -4).float() / 255)
            columns.append(flat.unflatten(0, pixels.shape[:-3]))
        return torch.cat(columns, -1)


class Actor(nn.Module):
    """Observation -> parameters of the action distribution."""

    def __init__(self, parts: ObservationParts, actions: ActionInterface, cfg: NetworkConfig):
        super().__init__()
        self.features = Features(parts)
        self.distribution: ActionDistribution = actions.distribution
        sizes = [self.features.size, *cfg.hidden, self.distribution.size]
        # A nearly uniform start: the last layer's outputs are small.
        self.network = MLP(sizes, cfg.activation, out_gain=0.01, layer_norm=cfg.layer_norm)

    def forward(self, prepared: Mapping[str, Tensor], allowed: Tensor | None = None) -> Tensor:
        params = self.distribution(self.network(self.features(prepared)))
        return params if allowed is None else self.distribution.masked(params, allowed)


class Critic(nn.Module):
    """Observation -> outputs of a value head."""

    def __init__(self, parts: ObservationParts, head: ValueHead, cfg: NetworkConfig):
        super().__init__()
        self.features, self.head = Features(parts), head
        sizes = [self.features.size, *cfg.hidden, head.out_features]
        self.network = MLP(sizes, cfg.activation, out_gain=1.0, layer_norm=cfg.layer_norm)
        if head.out_features > 1:
            nn.init.zeros_(self.network.last.weight)
            with torch.no_grad():
                self.network.last.bias.copy_(head.init_bias())

    def forward(self, prepared: Mapping[str, Tensor]) -> Tensor:
        return self.network(self.features(prepared))

    def values(self, prepared: Mapping[str, Tensor]) -> Tensor:
        return self.head.values(self(prepared))


def prepare(parts: ObservationParts, observation: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What networks take: images as they are, the rest as one vector."""
    vector = {VECTOR: parts.vector(observation)} if parts.vector_size else {}
    return vector | {name: observation[name] for name in parts.images}


def normalized(module: AnyModule, cfg: NormalizeAndProject | None) -> AnyModule:
    """Put Normalize-and-Project's norms into a network, where the config asks for it."""
    return module if cfg is None else to_normalized(module, tensors=cfg.tensors, constant=True)


def _convolutions(shape: tuple[int, ...]) -> nn.Sequential:
    """Channels are the smallest of the first and last dimension."""
    channels_last = shape[-1] < shape[0]
    channels = shape[-1] if channels_last else shape[0]
    height, width = (shape[0], shape[1]) if channels_last else (shape[1], shape[2])
    layers: list[nn.Module] = [_ChannelsFirst()] if channels_last else []
    if min(height, width) >= 36:
        plan = [(32, 8, 4), (64, 4, 2), (64, 3, 1)]
    else:  # small grids, such as MinAtar's
        plan = [(16, 3, 1), (32, 3, 1)]
    fan_in = channels
    for fan_out, kernel, stride in plan:
        layers += [orthogonal(nn.Conv2d(fan_in, fan_out, kernel, stride), gain=2**0.5), nn.ReLU()]
        height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        fan_in = fan_out
    layers += [nn.Flatten(), orthogonal(nn.Linear(fan_in * height * width, 512), gain=2**0.5), nn.ReLU()]
    return nn.Sequential(*layers)


class _ChannelsFirst(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.movedim(-1, -3)
