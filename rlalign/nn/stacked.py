"""Several networks of one shape as one: parameters stacked, a forward pass of all at the price of one."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlalign.nn.mlp import MLP
from rlalign.nn.normalized import Normalized, WithConstant


class StackedMLP(nn.Module):
    """H independent networks, each with its own weights and its own inputs.

    The parameters are stacked, `[H, ...]`. The networks given stay usable by themselves: their parameters become views
    of the stack, so that whatever changes a row changes the stack, and the other way round. Only the stack is in the
    state dict.

    Args:
        rows: Networks of the same layers and sizes, on their final device and in their final dtype.

    Raises:
        ValueError: There is none, or two differ in their layers.
    """

    def __init__(self, rows: Sequence[MLP]):
        super().__init__()
        shapes = [[(name, p.shape) for name, p in row.named_parameters()] for row in rows]
        if not rows or any(shape != shapes[0] for shape in shapes):
            raise ValueError(f"stacked networks must have the same layers, got {len(rows)} with shapes {shapes[:2]}.")
        # A plain list keeps the rows out of `parameters()` and of the state dict, where the stack stands for them.
        self.rows = list(rows)
        for parts in zip(*(row.named_parameters() for row in rows), strict=True):
            stack = nn.Parameter(torch.stack([p.detach() for _, p in parts]))
            for index, (_, parameter) in enumerate(parts):
                parameter.data = stack.data[index]
            self.register_parameter(_flat_name(parts[0][0]), stack)

    def forward(self, input: Float[Tensor, "stack rows features"]) -> Float[Tensor, "stack rows outputs"]:
        """Row h of the stack sees `input[h]`."""
        hidden = input
        for name, layer in self.rows[0].named_children():
            hidden = self._layer(name, layer, hidden)
        return hidden

    def _layer(self, name: str, layer: nn.Module, hidden: Tensor) -> Tensor:
        match layer:
            case nn.Linear():
                return torch.baddbmm(self._of(name, "bias")[:, None], hidden, self._of(name, "weight").mT)
            case Normalized():
                if isinstance(layer.layer, WithConstant):
                    hidden = nn.functional.pad(hidden, (0, 1), value=1.0)
                return self._layer(f"{name}.norm", layer.norm, hidden @ self._of(name, "layer.weight").mT)
            case nn.LayerNorm():
                centred = nn.functional.layer_norm(hidden, layer.normalized_shape, eps=layer.eps)
                if not layer.elementwise_affine:
                    return centred
                return centred * self._of(name, "weight")[:, None] + self._of(name, "bias")[:, None]
        return layer(hidden)

    def _of(self, name: str, part: str) -> Tensor:
        return self.get_parameter(_flat_name(f"{name}.{part}"))


def _flat_name(name: str) -> str:
    return name.replace(".", "_")
