"""O-DICE's value gradient (arXiv:2402.00348) the long way: three `backward` calls into `.grad` and one flat vector."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def conjugate(y: float, divergence: str) -> float:
    """sup_x >= 0 of x y - f(x), by its stationary point x = (f')⁻¹(y), or x = 0 where that is negative."""
    if divergence == "reverse_kl":
        x = torch.tensor(y, dtype=torch.float64).sub(1).exp().item()
        return x * y - x * torch.tensor(x, dtype=torch.float64).log().item()
    x = max(y / 2 + 1, 0.0)
    return x * y - (x - 1) ** 2


def three_backwards(
    parameters: Sequence[Tensor],
    linear: Callable[[], Tensor],
    forward: Callable[[], Tensor],
    backward: Callable[[], Tensor],
) -> list[Tensor]:
    """Gradients of the three mean losses, combined as linear + (1 - k) forward + backward."""

    def flat(loss: Callable[[], Tensor]) -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        loss().backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return torch.cat([grad.reshape(-1) for grad in grads])

    g_linear, g_forward, g_backward = flat(linear), flat(forward), flat(backward)
    k = (g_forward @ g_backward / max((g_forward @ g_forward).item(), 1e-10)).item()
    total = g_linear + (1 - k) * g_forward + g_backward
    pieces = total.split([p.numel() for p in parameters])
    return [piece.reshape(p.shape) for piece, p in zip(pieces, parameters, strict=True)]
