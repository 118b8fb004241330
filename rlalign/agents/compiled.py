"""The clipped gradient of a loss over one flat parameter vector, compiled into a single function."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.exc import InvalidCxxCompiler
from torch.func import functional_call, grad

from rlalign.config import ConfigError
from rlalign.optim.flat import FlatParameters, clipped_to_norm

Loss = Callable[[Any, Mapping[str, Tensor]], tuple[Tensor, tuple[Tensor, ...]]]
"""(outputs of the networks, a minibatch) -> (scalar, what else is wanted of the way there)."""


class CompiledGradient:
    """Writes the clipped gradient of `loss(networks(minibatch), minibatch)` into the flat buffer's gradient.

    For small networks PyTorch spends most of a step on the way to its kernels; a compiled step goes there once. Loss
    and gradient are the same up to rounding. The first call compiles; later ones must bring the same shapes.

    Raises:
        ConfigError: There is no C++ compiler, at the first call.
    """

    def __init__(self, networks: nn.Module, loss: Loss, flat: FlatParameters, *, max_grad_norm: float | None):
        self.flat = flat

        def of_parameters(vector: Tensor, minibatch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
            return loss(functional_call(networks, flat.named(vector), (minibatch,)), minibatch)

        # Guards ask at every call whether shapes and settings are still the same. They are: both are fixed for a run.
        unguarded: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        gradient: Any = grad(of_parameters, has_aux=True)

        def clipped(vector: Tensor, minibatch: dict[str, Tensor]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
            found, scored = gradient(vector, minibatch)
            return *clipped_to_norm(found, max_grad_norm), scored

        self.gradient = torch.compile(clipped, fullgraph=True, dynamic=False, options=unguarded)

    def __call__(self, minibatch: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradient's norm before clipping, and what else `loss` returned."""
        try:
            gradient, norm, scored = self.gradient(self.flat.parameter.detach(), minibatch)
        except InvalidCxxCompiler as error:
            raise ConfigError(
                "`compile: true` needs a C++ compiler (g++ or clang++); install one, or set it to false."
            ) from error
        self.flat.gradient.copy_(gradient)
        return norm, scored
