"""All parameters of a small network in one buffer, so that clipping and the optimizer touch one tensor, not many."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class FlatParameters:
    """Moves a module's trainable parameters into one contiguous buffer; they stay themselves, as views of it.

    Names, shapes, `state_dict`, in-place changes and everything that holds the parameters keep working. Gradients are
    views of one buffer too, which `clear` zeroes instead of freeing.

    Args:
        module: On its final device, in its final dtype, before anything copies its parameters' storage.

    Raises:
        ValueError: Nothing is trainable, or the parameters differ in dtype or device.
    """

    def __init__(self, module: nn.Module):
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        parameters = list(trainable.values())
        if not parameters:
            raise ValueError("no parameter is trainable: every `requires_grad` is False.")
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) > 1:
            raise ValueError(f"parameters must share dtype and device for one buffer, got {sorted(map(str, kinds))}.")
        self.parameter = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        """The buffer, for an optimizer."""
        self.parameter.grad = torch.zeros_like(self.parameter)
        self.shapes = {name: p.shape for name, p in trainable.items()}
        values, gradients = self.named(self.parameter.detach()), self.named(self.parameter.grad)
        for name, parameter in trainable.items():
            parameter.data, parameter.grad = values[name], gradients[name]

    def named(self, vector: Float[Tensor, " parameters"]) -> dict[str, Tensor]:
        """Views of a vector laid out like the buffer, by the name and in the shape of each parameter."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def clip(self, max_norm: float | None) -> Float[Tensor, ""]:
        """Scale the gradient to norm `max_norm` where it is larger; return its norm before."""
        clipped, norm = clipped_to_norm(self.gradient, max_norm)
        if max_norm is not None:
            self.gradient.copy_(clipped)
        return norm

    def clear(self) -> None:
        self.gradient.zero_()

    @property
    def gradient(self) -> Float[Tensor, " parameters"]:
        assert self.parameter.grad is not None
        return self.parameter.grad


def clipped_to_norm(
    gradient: Float[Tensor, " parameters"], max_norm: float | None
) -> tuple[Float[Tensor, " parameters"], Float[Tensor, ""]]:
    """Scale a gradient to norm `max_norm` where it is larger; None leaves it. Also its norm before."""
    norm = torch.linalg.vector_norm(gradient)
    if max_norm is None:
        return gradient, norm
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm
