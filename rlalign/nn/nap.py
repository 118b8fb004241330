"""Normalize-and-Project: a norm before every nonlinearity, and hidden weights that keep the norm they began with.

    W <- W ||W_0|| / ||W||       after an optimizer step

Where a norm follows, the function does not depend on ||W||, but the gradient shrinks as 1 / ||W||: weights that grow
slow their own learning. Projection takes that hidden schedule away, so give the learning rate one of its own.

Reference:
    Lyle et al. 2024 (arXiv:2407.01800), §4.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rlalign.nn.normalized import (
    NONLINEARITIES,
    Normalized,
    Wiring,
    projected_weights,
    register_block,
    to_normalized,
)

__all__ = [
    "Normalized",
    "Projector",
    "Wiring",
    "dormant_metrics",
    "dormant_share",
    "projected_weights",
    "register_block",
    "to_normalized",
]


class Projector:
    """Bring weights back to the norm they have now, after every optimizer step or every few.

    Weight decay on these tensors changes nothing but Adam's moments: leave it at 0. Make the projector before training:
    the norms of that moment are the ones kept, and they belong in the checkpoint.

    Args:
        module: One or several networks after `to_normalized`; `projected_weights` says what is held.
        every: Optimizer steps between two projections.

    Raises:
        ValueError: There is nothing to project.
    """

    def __init__(self, module: nn.Module, *, every: int = 1):
        groups = projected_weights(module)
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
