"""Second-order products: conjugate gradient and Fisher-vector products, for one policy or for rows of them."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Float[Tensor, "*rows size"],
    *,
    iterations: int = 10,
    tolerance: float | int = 1e-10,
) -> Float[Tensor, "*rows size"]:
    """Solve A x = b for a positive definite A known only by its products; each row of b is a system of its own.

        α = r'r / p'Ap,   x += α p,   r -= α A p,   p = r + (r'r new / r'r) p,   from x = 0, r = p = b

    Args:
        matvec: p -> A p, row by row.
        b: Right-hand sides. A row that is not finite gives x = 0.
        iterations: At most this many products.
        tolerance: A row rests once its squared residual ||b - A x||² is no larger, after one iteration at least: a
            small b has a direction too. A row also rests, keeping the x it has, when p'Ap is not positive: A is not
            positive definite there, or rounding has eaten the residual.

    Reference:
        Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithm 5.2.
    """
    x, residual, squared = torch.zeros_like(b), b, _dot(b, b)
    active = (squared > 0) & squared.isfinite()
    direction = b.where(active, 0.0)
    for _ in range(iterations):
        if not bool(active.any()):
            break
        product = matvec(direction)
        curvature = _dot(direction, product)
        active = active & (curvature > 0) & curvature.isfinite()
        alpha = (squared / curvature).where(active, 0.0)
        x = (x + alpha * direction).where(active, x)
        residual = (residual - alpha * product).where(active, residual)
        squared_new = _dot(residual, residual)
        active = active & (squared_new > tolerance)
        direction = (residual + squared_new / squared * direction).where(active, 0.0)
        squared = squared_new
    return x


def fisher_vector_product(
    kl: Callable[[], Tensor], parameters: Sequence[Tensor], damping: float | int
) -> Callable[[Tensor], Tensor]:
    """Return v -> (F + damping I) v, with F the Hessian of the mean KL at the present parameters, never formed.

        F v = ∇ ((∇ KL)' v)          the forward graph and ∇ KL are built once and serve every product

    At parameters where old and new policies agree, that Hessian is the Fisher information matrix.

    Args:
        kl: Mean KL(old || new), one number or one per policy, with the old side constant.
        parameters: What F is taken over. One that `kl` does not depend on has zeros there.
        damping: 0 or more.

    Raises:
        ValueError: `kl` carries no gradient.

    Reference:
        Pearlmutter 1994 for the product; Schulman et al. 2015 (arXiv:1502.05477), appendix C.1.
    """
    divergence = kl()
    if not divergence.requires_grad:
        raise ValueError(
            "`kl` does not depend on the parameters: compute the new policy with gradients enabled, and detach the old "
            "one only."
        )
    gradient = flat_gradient(divergence, parameters, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        along = (gradient * vector).sum()
        columns = torch.autograd.grad(along, parameters, retain_graph=True, materialize_grads=True)
        return _flat(columns, divergence.shape) + damping * vector

    return product


def flat_gradient(
    value: Float[Tensor, "*rows"], parameters: Sequence[Tensor], *, create_graph: bool = False
) -> Float[Tensor, "*rows size"]:
    """Gradient of each row's value over that row's parameters, as one vector per row; 0 for unused parameters."""
    gradients = torch.autograd.grad(value.sum(), parameters, create_graph=create_graph, materialize_grads=True)
    return _flat(gradients, value.shape)


def _flat(tensors: Sequence[Tensor], rows: torch.Size) -> Tensor:
    return torch.cat([tensor.reshape(*rows, -1) for tensor in tensors], -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
