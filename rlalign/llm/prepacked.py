"""Linear layers in oneDNN's own weight layout while a CPU samples: a decode step is then bound by memory alone.

A decode step multiplies a few rows by every weight of the model. In PyTorch's row-major layout such a product reads
its weights badly; reordered once per rollout, the same float32 product takes a half to a third of the time
(benchmarks/llm_vs_trl.py). The price is a second copy of the weights while sampling.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

FEWEST_STEPS = 8
"""Below this many decode steps, reordering costs as much as it saves."""


@contextmanager
def prepacked(model: nn.Module, *, rows: int, steps: int) -> Iterator[None]:
    """Let the plain float32 linear layers of a model on CPU multiply by reordered weights inside the block.

    Other layers, devices and dtypes, and PyTorch builds without oneDNN, are left as they are. The weights must not
    change inside the block, and no gradient flows through the layers.

    Args:
        rows: Rows decoded at once; the layout is chosen for them and right for any number.
        steps: Decode steps expected.
    """
    layers = [layer for layer in model.modules() if _packable(layer)] if steps >= FEWEST_STEPS and _available() else []
    try:
        for layer in layers:
            vars(layer)["forward"] = _product(layer, rows)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _packable(layer: nn.Module) -> TypeGuard[nn.Linear]:
    # Sharded and quantised weights are not plain parameters, and an instance's own `forward` is somebody's patch.
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and "forward" not in vars(layer)
    )


def _available() -> bool:
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return False
    try:
        operators = (torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise)
    except AttributeError:  # a build without the operators that PyTorch's own compiler uses
        return False
    return all(map(callable, operators))


def _product(layer: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows), layer.bias

    def forward(input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")

    return forward
