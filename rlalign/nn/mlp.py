"""Multi-layer perceptrons with orthogonal initialisation, and their normalised form for Normalize-and-Project."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

Activation = Literal["tanh", "relu", "elu", "gelu", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


class MLP(nn.Sequential):
    """Linear layers with a nonlinearity between them; the last one is linear.

    Args:
        sizes: Features of the input, each hidden layer and the output.
        activation: Nonlinearity between the layers.
        hidden_gain: Gain of the orthogonal initialisation of hidden layers.
        out_gain: That of the last layer; small values (0.01) make an untrained policy nearly uniform.
        layer_norm: Put a LayerNorm with learned scale and offset before each nonlinearity.

    Raises:
        ValueError: Fewer than two sizes.

    Reference:
        Andrychowicz et al. 2021 (arXiv:2006.05990), choices C56 and C57; the gains of Stable-Baselines3's policies.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: Activation = "tanh",
        *,
        hidden_gain: float | int = 2**0.5,
        out_gain: float | int = 1.0,
        layer_norm: bool = False,
    ):
        if len(sizes) < 2:
            raise ValueError(f"an MLP needs the sizes of its input and its output, got {list(sizes)}.")
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes[:-1]):
            layers.append(orthogonal(nn.Linear(fan_in, fan_out), gain=hidden_gain))
            layers += [nn.LayerNorm(fan_out)] if layer_norm else []
            layers.append(ACTIVATIONS[activation]())
        layers.append(orthogonal(nn.Linear(sizes[-2], sizes[-1]), gain=out_gain))
        super().__init__(*layers)

    @property
    def last(self) -> nn.Linear:
        """The output layer, which Normalize-and-Project leaves alone."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, input: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows outputs"]:
        return super().forward(input)


def orthogonal(layer: nn.Linear | nn.Conv2d, *, gain: float | int) -> nn.Linear | nn.Conv2d:
    """Initialise a layer's weight orthogonally and its bias to zero."""
    nn.init.orthogonal_(layer.weight, float(gain))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
