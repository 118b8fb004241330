"""One optimizer step: global-norm clipping, a finite check, the step, cleared gradients."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Device types for which PyTorch ships a fused AdamW kernel.
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")

Clip = Callable[[list[Tensor], float], Tensor]


class TrainingDiverged(RuntimeError):
    """Gradients stayed non-finite for longer than the budget allows; the parameters are those of the last good step."""


@dataclass(kw_only=True)
class SkipBudget:
    """How many non-finite steps in a row a run survives, and how many it has met."""

    limit: int = 3
    """Consecutive steps that may be skipped; the next one raises `TrainingDiverged`."""

    consecutive: int = 0
    total: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"consecutive": self.consecutive, "total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.consecutive, self.total = state["consecutive"], state["total"]


def finite_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[tuple[str, Tensor]],
    *,
    max_grad_norm: float | None,
    budget: SkipBudget | None = None,
    clip: Clip | None = None,
) -> float:
    """Clip the gradients by their global norm, step when that norm is finite, and clear them.

        g <- g * min(1, max_grad_norm / (||g|| + 1e-6)),    ||g|| over all parameters together

    A non-finite norm leaves parameters and optimizer state untouched.

    Args:
        optimizer: Any PyTorch optimizer.
        parameters: Named parameters, as from `model.named_parameters()`; those without a gradient are passed over.
        max_grad_norm: None measures the norm and clips nothing.
        budget: Counts skipped steps across calls. None allows no skip: the first non-finite gradient raises.
        clip: Replaces clipping where gradients are sharded, for instance `accelerator.clip_grad_norm_`. It takes the
            parameters and the largest norm, and returns the norm before clipping.

    Returns:
        The norm before clipping; not finite exactly when the step was skipped.

    Raises:
        TrainingDiverged: The budget is spent. The message names the first parameter with a bad gradient.
        ValueError: No parameter has a gradient, or `max_grad_norm` is not positive.
    """
    if max_grad_norm is not None and not max_grad_norm > 0.0:
        raise ValueError(f"`optim.max_grad_norm` must be positive, or null for no clipping, got {max_grad_norm}.")
    named = [(name, p) for name, p in parameters if p.grad is not None]
    if not named:
        raise ValueError(
            "no parameter has a gradient: call `loss.backward()` first, and check that the loss depends on the model "
            "(a batch whose decisions are all masked has none)."
        )
    norm, problem = _clipped_norm(named, max_grad_norm, clip)
    try:
        if math.isfinite(norm):
            optimizer.step()
        _account(norm, problem, budget if budget is not None else SkipBudget(limit=0))
    finally:
        optimizer.zero_grad(set_to_none=True)
    return norm


def adamw(
    parameters: Iterable[tuple[str, Tensor]],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool | None = None,
) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, with weight decay on matrices only.

    Biases, norm scales and other vectors are not decayed: shrinking them regularises nothing.

    Args:
        parameters: Named parameters, as from `model.named_parameters()`; frozen ones are left out.
        eps: Added to the root of the second moment. Raise it (1e-6, 1e-5) where gradients are tiny.
        fused: None picks the fused kernel when every parameter's device has one.

    Raises:
        ValueError: Nothing is trainable.

    Reference:
        Loshchilov & Hutter 2019 (arXiv:1711.05101), algorithm 2.
    """
    unique = {id(p): p for _, p in parameters if p.requires_grad}
    trainable = list(unique.values())
    if not trainable:
        raise ValueError("no parameter is trainable: every `requires_grad` is False.")
    if fused is None:
        fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in trainable)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take moments from a checkpoint, and leave settings (betas, eps, weight decay ...) as they are here.

    torch's own method would bring the old settings back, and what a resumed run was given would have no effect.

    Args:
        optimizer: Of the same parameters in the same order.
        state: What its `state_dict` returned.
    """
    here = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, here, strict=True):
        group |= settings


def bring_moments(optimizer: torch.optim.Optimizer) -> None:
    """Move moments to where their parameters are now, which offloading may have moved since they were loaded."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter, {})
            for name, value in moments.items():
                # Kernels that are not fused count their steps on the CPU.
                if isinstance(value, Tensor) and (name != "step" or group["fused"]):
                    moments[name] = value.to(parameter.device)


def _clipped_norm(
    named: list[tuple[str, Tensor]], max_grad_norm: float | None, clip: Clip | None
) -> tuple[float, str | None]:
    """Clip; return the norm before it and, when a gradient is bad, which one."""
    largest = math.inf if max_grad_norm is None else max_grad_norm
    parameters = [p for _, p in named]
    if clip is not None:
        # Clipping by a NaN norm spreads it to every gradient, so the culprit is looked for first.
        problem = _first_bad(named)
        return float(clip(parameters, largest)), problem
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if not math.isfinite(float(norm)):
        return float(norm), _first_bad(named)
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return float(norm), None


def _first_bad(named: list[tuple[str, Tensor]]) -> str | None:
    gradients = [(name, _local(p.grad)) for name, p in named if p.grad is not None]
    finite = torch.stack([torch.isfinite(g).all() for _, g in gradients]).tolist()
    for (name, gradient), good in zip(gradients, finite, strict=True):
        if not good:
            bad = int((~torch.isfinite(gradient)).sum())
            return f"the gradient of `{name}` has {bad} of {gradient.numel()} entries NaN or infinite"
    return None


def _local(gradient: Tensor) -> Tensor:
    # Builds of PyTorch without torch.distributed have no DTensor to import.
    if not torch.distributed.is_available():
        return gradient
    from torch.distributed.tensor import DTensor

    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _account(norm: float, problem: str | None, budget: SkipBudget) -> None:
    if math.isfinite(norm):
        budget.consecutive = 0
        return
    budget.consecutive += 1
    budget.total += 1
    if budget.consecutive > budget.limit:
        raise TrainingDiverged(
            f"{problem or 'every gradient here is finite but the global norm is not'} "
            f"({budget.consecutive} non-finite steps in a row, {budget.limit} allowed). "
            "The parameters are unchanged since the last finite step. Lower `optim.learning_rate` or "
            "`optim.max_grad_norm`, and look for extreme rewards or log-ratios in the metrics before this step."
        )
