"""The structure of Normalize-and-Project: which layers get a norm, and which weights keep theirs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

Tensors = Literal["strict", "all_hidden"]
Net = TypeVar("Net", bound=nn.Module)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NONLINEARITIES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Softplus, nn.Softsign, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardtanh, nn.Hardsigmoid),
)
# Between a layer and its nonlinearity these keep a scaled input a scaled output.
PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d)


class Normalized(nn.Module):
    """A layer without bias and the norm behind it: its output does not depend on the size of the layer's weight."""

    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.layer, self.norm = layer, norm

    @property
    def weight(self) -> Tensor:
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> None:
        return None

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(self.layer(input))


class WithConstant(nn.Linear):
    """A linear layer on its input and a constant 1: the last column of the weight is the bias.

    Behind a norm, a layer without bias sees the direction of its input alone. With the bias in the weight, size tells
    too, and the output still does not depend on the size of the weight.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features + 1, layer.out_features, bias=False)
        offset = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        self.weight = nn.Parameter(torch.cat([layer.weight.detach(), offset[:, None]], 1))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.pad(input, (0, 1), value=1.0), self.weight)


class HiddenWeight(nn.Parameter):
    """A hidden weight that meets no norm, and keeps its size all the same. A copy of one is one too."""


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """What the `forward` of a block does with its layers, by their attribute names."""

    nonlinearity: Sequence[str] = ()
    """Layers whose output goes into a nonlinearity and nowhere else."""
    norm: Mapping[str, str] = field(default_factory=dict)
    """Layers whose output goes into a norm and nowhere else, and which."""


# The second linear layer and attention's feed the residual stream, where the size of a weight matters.
_WIRINGS: dict[type[nn.Module], Wiring] = {
    nn.TransformerEncoderLayer: Wiring(nonlinearity=("linear1",)),
    nn.TransformerDecoderLayer: Wiring(nonlinearity=("linear1",)),
}


def register_block(kind: type[nn.Module], wiring: Wiring) -> None:
    """Tell `to_normalized` how a block of yours is wired; `nn.Sequential` and PyTorch's transformer layers it knows.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(x).relu())
        >>> register_block(Residual, Wiring(nonlinearity=["up"]))
        >>> list(projected_weights(to_normalized(Residual(), output=False)))
        ['up.layer.weight']
    """
    _WIRINGS[kind] = wiring


def to_normalized(module: Net, *, tensors: Tensors = "strict", output: bool = True, constant: bool = False) -> Net:
    """Put a norm without scale and offset between every hidden layer and its nonlinearity, in place.

    Layers get a LayerNorm, convolutions a GroupNorm over all channels and pixels; the layer's bias goes, since scaling
    the weight would change its share. A norm that stands there already is kept. This changes the function: do it before
    training, and before an optimizer takes the parameters. Each network of an agent is converted by itself.

    Args:
        module: A network of `nn.Sequential`s and registered blocks; anything else in it stays as it is.
        tensors: What a `Projector` will hold. `strict`: weights whose output provably meets a norm, so that projection
            does not change the function. `all_hidden`: every weight of a layer but the output's and what is tied to it
            or to an embedding; attention and residual branches included.
        output: The layer registered last is the network's output, and left alone. False for a trunk that ends in
            hidden features.
        constant: A linear layer that is registered first keeps its bias, as a column of its weight (`WithConstant`):
            for inputs whose size means something, such as positions and speeds.

    Returns:
        The module that was passed.

    Raises:
        ValueError: A hidden layer has a single feature, which a norm would make constant; or the module is a layer.
    """
    if isinstance(module, LAYERS):
        raise ValueError("a single layer has no hidden part to normalise; pass the network that holds it.")
    kept = _output_layers(module) if output else set()
    first = next((part for part in module.modules() if isinstance(part, LAYERS)), None)
    done: dict[int, Normalized] = {}
    for block in list(module.modules()):
        for name, norm_name in _hidden_layers(block):
            layer = block.get_submodule(name)
            if not isinstance(layer, LAYERS) or id(layer) in kept:
                continue
            if id(layer) not in done:
                norm = _new_norm(layer) if norm_name is None else block.get_submodule(norm_name)
                done[id(layer)] = Normalized(_for_norm(layer, constant=constant and layer is first), norm)
            block.register_module(name, done[id(layer)])
            if norm_name is not None:
                block.register_module(norm_name, nn.Identity())
        _no_fused_inference(block)
    if tensors == "all_hidden":
        _mark_hidden(module, kept)
    return module


def projected_weights(module: nn.Module) -> dict[str, tuple[nn.Parameter, ...]]:
    """Name the tensors whose size is to stay, of one or several networks after `to_normalized`.

    Never an output layer's, an embedding's, or anything tied to them.

    Returns:
        Tensors that keep one norm together, by name: a weight alone, or the learned scale and offset of a norm behind a
        weight, which would otherwise grow in its place. Keeping those does not change the function if the nonlinearity
        is homogeneous (ReLU) and a projected layer follows, and does otherwise.
    """
    # A layer that is used without a norm, there or elsewhere, makes its weight count; an embedding always does.
    taken = {
        id(p)
        for holder in module.modules()
        if not isinstance(holder, Normalized)
        for part in holder.children()
        if isinstance(part, (*LAYERS, *EMBEDDINGS))
        for p in part.parameters(recurse=False)
        if not isinstance(p, HiddenWeight)
    }
    groups: dict[str, tuple[nn.Parameter, ...]] = {}
    for name, group in _candidates(module):
        if not taken & {id(p) for p in group}:
            groups[name] = group
            taken |= {id(p) for p in group}
    return groups


def _hidden_layers(block: nn.Module) -> Iterator[tuple[str, str | None]]:
    """Name a block's layers that meet a norm or a nonlinearity, and the norm where there is one."""
    if isinstance(block, nn.Sequential):
        names = list(block._modules)
        for position, name in enumerate(names):
            following = [
                other for other in names[position + 1 :] if not isinstance(block.get_submodule(other), PASSING)
            ]
            behind = block.get_submodule(following[0]) if following else None
            if isinstance(behind, NORMS) and following[0] == names[position + 1]:
                yield name, following[0]
            elif isinstance(behind, NONLINEARITIES):
                yield name, None
        return
    for kind, wiring in _WIRINGS.items():
        if isinstance(block, kind):
            yield from wiring.norm.items()
            yield from ((name, None) for name in wiring.nonlinearity)


def _candidates(module: nn.Module) -> Iterator[tuple[str, tuple[nn.Parameter, ...]]]:
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, Normalized):
            yield f"{prefix}layer.weight", (part.layer.get_parameter("weight"),)
            affine = tuple(part.norm.parameters(recurse=False))
            if affine:
                yield f"{prefix}norm", affine
        else:
            own = part.named_parameters(recurse=False)
            yield from ((f"{prefix}{n}", (p,)) for n, p in own if isinstance(p, HiddenWeight))


def _mark_hidden(module: nn.Module, kept: set[int]) -> None:
    spared = {
        id(p)
        for part in module.modules()
        if id(part) in kept or isinstance(part, EMBEDDINGS)
        for p in part.parameters(recurse=False)
    }
    for part in module.modules():
        if isinstance(part, (*LAYERS, nn.MultiheadAttention)):
            for name, p in part.named_parameters(recurse=False):
                if name.endswith("weight") and id(p) not in spared:
                    p.__class__ = HiddenWeight


def _output_layers(module: nn.Module) -> set[int]:
    layers = [part for part in module.modules() if isinstance(part, LAYERS)]
    return {id(layer) for layer in layers[-1:]}


def _for_norm(layer: nn.Module, *, constant: bool) -> nn.Module:
    """The layer without a bias beside its weight."""
    if constant and type(layer) is nn.Linear:
        return WithConstant(layer)
    layer.register_parameter("bias", None)
    return layer


def _new_norm(layer: nn.Module) -> nn.Module:
    weight = layer.get_parameter("weight")
    if weight.shape[0] < 2 and isinstance(layer, nn.Linear):
        raise ValueError(f"a norm would make the single feature of {layer} constant; widen the layer.")
    if isinstance(layer, nn.Linear):
        return nn.LayerNorm(layer.out_features, elementwise_affine=False).to(weight)
    return nn.GroupNorm(1, weight.shape[0], affine=False).to(weight)


def _no_fused_inference(block: nn.Module) -> None:
    """Keep PyTorch's transformer from its fused inference, which would compute `linear1` without the norm."""
    if isinstance(block, nn.TransformerEncoderLayer):
        block.activation_relu_or_gelu = 0
    elif isinstance(block, nn.TransformerEncoder):
        block.use_nested_tensor = False
