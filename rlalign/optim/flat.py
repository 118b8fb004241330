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
        parameters = [p for p in module.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("no parameter is trainable: every `requires_grad` is False.")
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) > 1:
            raise ValueError(f"parameters must share dtype and device to share a buffer, got {sorted(map(str, kinds))}.")
        self.parameter = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        """The buffer, for an optimizer."""
        self.parameter.grad = torch.zeros_like(self.parameter)
        sizes = [p.numel() for p in parameters]
        values = self.parameter.detach().split(sizes)
        gradients = self.parameter.grad.split(sizes)
        for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
            parameter.data = value.view_as(parameter)
            parameter.grad = gradient.view_as(parameter)

    def clip(self, max_norm: float | None) -> Float[Tensor, ""]:
        """Scale the gradient to norm `max_norm` where it is larger; return its norm before."""
        gradient = self.gradient
        norm = torch.linalg.vector_norm(gradient)
        if max_norm is not None:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def clear(self) -> None:
        self.gradient.zero_()

    @property
    def gradient(self) -> Float[Tensor, " parameters"]:
        assert self.parameter.grad is not None
        return self.parameter.grad
