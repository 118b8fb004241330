"""Low-rank adapters as sums of weights: one product per call of the denoiser in place of two for every row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F


def pays(layer: nn.Module, adapter: str) -> bool:
    """Whether folding this layer saves work and keeps its precision.

    Per row an adapter of rank r costs 3 r (in + out) products more, forward and backward; the gradient of the folded
    weight costs in x out. In half precision a sum of weights would lose what the adapter has learned.
    """
    if type(layer) is not LoraLinear or type(layer.base_layer) is not nn.Linear:
        return False
    if layer.lora_variant or not isinstance(layer.lora_dropout[adapter], nn.Identity):
        return False
    if {p.dtype for p in layer.parameters()} != {torch.float32}:
        return False
    into, out = layer.base_layer.in_features, layer.base_layer.out_features
    return into * out < 3 * layer.r[adapter] * (into + out)


@contextmanager
def folded(layers: Sequence[LoraLinear], adapter: str) -> Iterator[None]:
    """Let layers multiply by W + s B A inside the context, with gradient to A and B; no stored weight is touched.

    The sums are made at their first use and kept until the context ends, so weights must not change inside, and each
    backward pass needs a context of its own.
    """
    with _forwarding({layer: _product(layer, adapter) for layer in layers}):
        yield


@contextmanager
def bypassed(layers: Sequence[LoraLayer]) -> Iterator[None]:
    """Let layers do what they did before they had an adapter."""
    with _forwarding({layer: layer.get_base_layer() for layer in layers}):
        yield


def _product(layer: LoraLinear, adapter: str) -> Callable[[Tensor], Tensor]:
    base: Any = layer.get_base_layer()
    down: Any = layer.lora_A[adapter]
    up: Any = layer.lora_B[adapter]
    sums: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        if not sums:
            sums.append(torch.addmm(base.weight, up.weight, down.weight, alpha=layer.scaling[adapter]))
        return F.linear(x, sums[0], base.bias)

    return forward


@contextmanager
def _forwarding(instead: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another `forward`, as members of these objects alone: a module would be registered as a part."""
    before = {module: vars(module).get("forward") for module in instead}
    for module, forward in instead.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward
