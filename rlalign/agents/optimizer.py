"""Adam over an agent's networks: schedule, clipping, finite check, and Normalize-and-Project behind each step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rlalign.agents.config import AgentOptimConfig, NormalizeAndProject
from rlalign.nn.nap import Projector
from rlalign.optim.flat import FlatParameters
from rlalign.optim.step import SkipBudget, TrainingDiverged, load_optimizer, set_learning_rate
from rlalign.training.schedules import lr_scale

PROGRESS_TICKS = 10_000
"""Resolution of the schedule, which counts progress rather than steps."""


class AgentOptimizer:
    """One Adam over all trainable parameters of `module`, which share one flat buffer: a step costs one kernel."""

    def __init__(self, module: nn.Module, cfg: AgentOptimConfig, *, nap: NormalizeAndProject | None):
        self.cfg, self.module = cfg, module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        """In the order of the flat buffer; walking the modules for them costs as much as a small layer."""
        self.flat = FlatParameters(module)
        options = {"lr": cfg.learning_rate, "betas": cfg.betas, "eps": cfg.eps}
        fused = self.flat.parameter.device.type in ("cpu", "cuda")
        if cfg.weight_decay:
            options["weight_decay"] = cfg.weight_decay
        self.adam = (
            torch.optim.AdamW([self.flat.parameter], fused=fused, **options)
            if cfg.weight_decay
            else (torch.optim.Adam([self.flat.parameter], fused=fused, **options))
        )
        self.projector = None if nap is None else Projector(module, every=nap.every)
        if self.projector is not None:
            self.projector.attach(self.adam)
        self.budget = SkipBudget(limit=cfg.nonfinite_budget)
        self.updates = 0
        self.learning_rate = cfg.learning_rate

    def take_step(self, *, progress: float, clipped_from: torch.Tensor | None = None) -> torch.Tensor:
        """Clip, check and apply the gradient; `progress` in [0, 1] places the learning rate on its schedule.

        Args:
            clipped_from: The norm that the gradient had, where it is clipped already.

        Returns:
            The gradient's norm before clipping.

        Raises:
            TrainingDiverged: Gradients were not finite more often in a row than `optim.nonfinite_budget` allows.
        """
        self._schedule(progress)
        norm = self.flat.clip(self.cfg.max_grad_norm) if clipped_from is None else clipped_from
        if math.isfinite(norm):
            self.adam.step()
            self.budget.consecutive = 0
        else:
            self._skip()
        self.flat.clear()
        self.updates += 1
        return norm

    def _schedule(self, progress: float) -> None:
        cfg = self.cfg
        scale = lr_scale(
            min(int(progress * PROGRESS_TICKS), PROGRESS_TICKS),
            warmup_steps=0,
            total_steps=PROGRESS_TICKS,
            schedule=cfg.schedule,
        )
        if cfg.warmup_updates:
            scale *= min(1.0, (self.updates + 1) / cfg.warmup_updates)
        if cfg.learning_rate * scale != self.learning_rate:
            self.learning_rate = cfg.learning_rate * scale
            set_learning_rate(self.adam, self.learning_rate)

    def _skip(self) -> None:
        self.budget.consecutive += 1
        self.budget.total += 1
        if self.budget.consecutive > self.budget.limit:
            bad = [
                name for name, p in self.module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
            ]
            raise TrainingDiverged(
                f"the gradient of `{bad[0] if bad else 'the norm'}` is NaN or infinite, "
                f"{self.budget.consecutive} steps in a row ({self.budget.limit} allowed). The parameters are those of "
                "the last finite step. Lower "
                "`optim.learning_rate`, and set `normalize.observations` or `normalize.rewards` where they are large."
            )

    def metrics(self) -> dict[str, float]:
        found = {"optim/learning_rate": self.learning_rate, "optim/updates": float(self.updates)}
        return found if self.projector is None else found | self.projector.metrics(self.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        state = {"adam": self.adam.state_dict(), "budget": self.budget.state_dict(), "updates": self.updates}
        return state | self._projector_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_optimizer(self.adam, state["adam"])
        self.budget.load_state_dict(state["budget"])
        self.updates = state["updates"]
        if self.projector is not None:
            self.projector.load_state_dict(state["projector"])

    def _projector_state(self) -> dict[str, Any]:
        return {} if self.projector is None else {"projector": self.projector.state_dict()}
