"""Normalize-and-Project: a norm before every nonlinearity, and hidden weights that keep the norm they began with.

    W <- W ||W_0|| / ||W||       after an optimizer step

Where a norm follows, the function does not depend on ||W||, but the gradient shrinks as 1 / ||W||: weights that grow
slow their own learning. Projection takes that hidden schedule away, so give the learning rate one of its own.

Reference:
    Lyle et al. 2024 (arXiv:2407.01800), §4.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Tensors = Literal["strict", "all_hidden"]
Net = TypeVar("Net", bound=nn.Module)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
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


def to_normalized(module: Net, *, output: bool = True) -> Net:
    """Put a norm without scale and offset between every hidden layer and its nonlinearity, in place.

    Layers get a LayerNorm, convolutions a GroupNorm over all channels and pixels; the layer's bias goes, since scaling
    the weight would change its share. A norm that stands there already is kept. This changes the function: do it before
    training, and before an optimizer takes the parameters.

    Args:
        module: A network of `nn.Sequential`s and registered blocks; anything else in it stays as it is.
        output: The last layer is the network's output, and left alone. False for a trunk that ends in hidden features.

    Returns:
        The module that was passed.

    Raises:
        ValueError: A hidden layer has a single feature, which a norm would make constant; or the module is a layer.
    """
    if isinstance(module, LAYERS):
        raise ValueError("a single layer has no hidden part to normalise; pass the network that holds it.")
    kept = _output_layers(module) if output else set()
    done: dict[int, Normalized] = {}
    for block in list(module.modules()):
        for name, norm_name in _hidden_layers(block):
            layer = block.get_submodule(name)
            if not isinstance(layer, LAYERS) or id(layer) in kept:
                continue
            if id(layer) not in done:
                norm = _new_norm(layer) if norm_name is None else block.get_submodule(norm_name)
                layer.register_parameter("bias", None)
                done[id(layer)] = Normalized(layer, norm)
            block.register_module(name, done[id(layer)])
            if norm_name is not None:
                block.register_module(norm_name, nn.Identity())
        _no_fused_inference(block)
    return module


def projected_weights(
    module: nn.Module, *, tensors: Tensors = "strict", output: bool = True
) -> dict[str, tuple[nn.Parameter, ...]]:
    """Name the tensors whose size is to stay: never the output layer's, embeddings, or anything tied to them.

    Args:
        module: A network after `to_normalized`.
        tensors: `strict`: weights whose output provably meets a norm, so that projection does not change the function.
            `all_hidden`: every weight of a layer but the last one's; attention and residual branches included.
        output: As for `to_normalized`.

    Returns:
        Tensors that keep one norm together, by name: a weight alone, or the learned scale and offset of a norm behind a
        projected weight, which would otherwise grow in its place. Keeping those does not change the function if the
        nonlinearity is homogeneous (ReLU) and a projected layer follows, and does otherwise.
    """
    kept = _output_layers(module) if output else set()
    barred = kept if tensors == "all_hidden" else kept | _bare_layers(module)
    excluded = {
        id(p)
        for part in module.modules()
        if id(part) in barred or isinstance(part, nn.Embedding | nn.EmbeddingBag)
        for p in part.parameters(recurse=False)
    }
    groups: dict[str, tuple[nn.Parameter, ...]] = {}
    for name, group in _candidates(module, tensors):
        if not excluded & {id(p) for p in group}:
            groups[name] = group
            excluded |= {id(p) for p in group}
    return groups


class Projector:
    """Bring weights back to the norm they have now, after every optimizer step or every few.

    Weight decay on these tensors changes nothing but Adam's moments: leave it at 0. Make the projector before training:
    the norms of that moment are the ones kept, and they belong in the checkpoint.

    Args:
        groups: Tensors by name, from `projected_weights`; those of one entry share a norm.
        every: Optimizer steps between two projections.

    Raises:
        ValueError: There is nothing to project.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Parameter]], *, every: int = 1):
        if not groups:
            raise ValueError(
                "no weight meets a norm: call `to_normalized` first, describe your own blocks with `register_block`, "
                "or choose `normalize_and_project.tensors: all_hidden`."
            )
        if every < 1:
            raise ValueError(f"`normalize_and_project.every` must be at least 1, got {every}.")
        self.names, self.every, self.steps = list(groups), every, 0
        self._tensors: list[Tensor] = [p for group in groups.values() for p in group]
        sizes = torch.tensor([len(group) for group in groups.values()])
        # In half precision a norm has three digits, and its error would be put into the weights.
        self._dtype = torch.promote_types(self._tensors[0].dtype, torch.float32)
        self._index = torch.arange(len(sizes)).repeat_interleave(sizes).to(self._tensors[0].device)
        self.norms: Float[Tensor, " groups"] = self.current()
        """Norm of each group when the projector was made."""

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Project after each step of this optimizer, whatever its kind."""
        return optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def project(self) -> None:
        """Scale every group to its first norm. A group that began at zero stays free."""
        scale = self.norms / self.current().clamp(min=1e-12)
        scale = torch.where(self.norms > 0, scale, 1.0)
        torch._foreach_mul_(self._tensors, list(scale[self._index].unbind()))

    @torch.no_grad()
    def current(self) -> Float[Tensor, " groups"]:
        """Norm of each group now."""
        squares = torch.stack(torch._foreach_norm(self._tensors, dtype=self._dtype)).square()
        return squares.new_zeros(len(self.names)).index_add(0, self._index, squares).sqrt()

    def metrics(self, learning_rate: float | int) -> dict[str, float]:
        """Describe the weights for the log.

        `nap/norm_growth` is the mean of ||W|| / ||W_0||, and `nap/effective_learning_rate` the mean of the learning
        rate over ||W||: how far a normalised step (Adam's) turns a weight.
        """
        now = self.current()
        started = self.norms > 0
        growth = torch.where(started, now / self.norms, 1.0).mean()
        effective = (learning_rate / now.clamp(min=1e-12))[started].mean()
        return {"nap/norm_growth": float(growth), "nap/effective_learning_rate": float(effective)}

    def state_dict(self) -> dict[str, Any]:
        """Return the norms to keep, by name, and the steps seen."""
        return {"steps": self.steps, "norms": dict(zip(self.names, self.norms.clone().unbind(), strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            ValueError: It is of other tensors.
        """
        if set(state["norms"]) != set(self.names):
            raise ValueError(f"this projector holds {sorted(self.names)}, the state {sorted(state['norms'])}.")
        self.steps = int(state["steps"])
        self.norms = torch.stack([torch.as_tensor(state["norms"][name]) for name in self.names]).to(self.norms)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.project()


def dormant_share(activations: Float[Tensor, "*rows units"], *, tau: float | int = 0.0) -> Float[Tensor, ""]:
    """Return the share of units whose mean size is at most `tau` times the layer's: they have stopped to matter.

        s_i = mean |h_i| / mean_k mean |h_k|,   dormant if s_i <= τ

    Reference:
        Sokar et al. 2023 (arXiv:2302.12902), definition 3.1; a layer that is 0 throughout is dormant as a whole.
    """
    size = activations.abs().flatten(0, -2).mean(0)
    return (size <= tau * size.mean()).to(activations.dtype).mean()


@torch.no_grad()
def dormant_metrics(module: nn.Module, inputs: Tensor, *, tau: float | int = 0.0) -> dict[str, float]:
    """Run the network once and return `nap/dormant_frac`, the mean dormant share over its nonlinearities.

    Raises:
        ValueError: No nonlinearity is a module of the network.
    """
    shares: list[Tensor] = []

    def observe(part: nn.Module, args: Any, output: Tensor) -> None:
        channels_last = output.movedim(1, -1) if output.ndim >= 4 else output
        shares.append(dormant_share(channels_last, tau=tau))

    handles = [part.register_forward_hook(observe) for part in module.modules() if isinstance(part, NONLINEARITIES)]
    try:
        module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not shares:
        raise ValueError("dormant units are looked for behind nonlinearities that are modules, and there is none.")
    return {"nap/dormant_frac": float(torch.stack(shares).mean())}


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


def _candidates(module: nn.Module, tensors: Tensors) -> Iterator[tuple[str, tuple[nn.Parameter, ...]]]:
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, Normalized):
            yield f"{prefix}layer.weight", (part.layer.get_parameter("weight"),)
            affine = tuple(part.norm.parameters(recurse=False))
            if affine:
                yield f"{prefix}norm", affine
        elif tensors == "all_hidden" and isinstance(part, LAYERS):
            yield f"{prefix}weight", (part.get_parameter("weight"),)
        elif tensors == "all_hidden" and isinstance(part, nn.MultiheadAttention):
            packed = [(n, p) for n, p in part.named_parameters(recurse=False) if n.endswith("proj_weight")]
            yield from ((f"{prefix}{n}", (p,)) for n, p in packed)


def _output_layers(module: nn.Module) -> set[int]:
    layers = [part for part in module.modules() if isinstance(part, LAYERS)]
    return {id(layer) for layer in layers[-1:]}


def _bare_layers(module: nn.Module) -> set[int]:
    """Layers that are used without a norm behind them, there or somewhere else."""
    holders = (part for part in module.modules() if not isinstance(part, Normalized))
    return {id(child) for holder in holders for child in holder.children() if isinstance(child, LAYERS)}


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
