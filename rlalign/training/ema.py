"""Exponential moving average of parameters, with a swap that restores the trained weights bit for bit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class EMA:
    """Keep averages of `parameters`: average_n = decay * average_{n-1} + (1 - decay) * parameter_n.

    Args:
        parameters: The tensors to follow, in a fixed order; pass the trainable ones.
        decay: In [0, 1). 0 copies the parameters.
        warmup: True lowers the decay of the n-th update to at most (1 + n) / (10 + n), n counted from 0, so that the
            average forgets the initial weights quickly.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float, *, warmup: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"`ema.decay` must lie in [0, 1), got {decay}.")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self._parameters = list(parameters)
        # Half precision cannot hold an average: 1 - 0.999 is below bfloat16's spacing at 1.
        self._averages = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self._parameters
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards its parameter; call once after each optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.lerp_(parameter.to(average), 1.0 - decay)
        self.updates += 1

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Run a block with the averages in the parameters; afterwards the trained weights are back, bit for bit."""
        # A true copy: `.detach().cpu()` would alias a CPU parameter, and restoring from it would restore nothing.
        trained = [p.detach().to("cpu", copy=True) for p in self._parameters]
        self._write(self._averages)
        try:
            yield
        finally:
            self._write(trained)

    def state_dict(self) -> dict[str, Any]:
        """Everything `load_state_dict` needs; the tensors are the live ones, not copies."""
        return {"decay": self.decay, "warmup": self.warmup, "updates": self.updates, "averages": list(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: The state belongs to other parameters (their number or a shape differs).
        """
        saved, current = [a.shape for a in state["averages"]], [a.shape for a in self._averages]
        if saved != current:
            raise ValueError(
                f"the saved EMA follows {len(saved)} tensors and this model has {len(current)}, or a shape differs; "
                "resume with the configuration that wrote the checkpoint."
            )
        self.decay, self.warmup, self.updates = state["decay"], state["warmup"], state["updates"]
        for average, value in zip(self._averages, state["averages"], strict=True):
            average.copy_(value)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)
