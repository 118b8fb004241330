"""The optimizer of a generator: schedule, gradients summed over processes, clipping, finite check, moving average."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from rlalign.diffusion.config import AdamWConfig
from rlalign.diffusion.policy import TunedPipeline
from rlalign.optim.step import SkipBudget, adamw, bring_moments, finite_step, load_optimizer, set_learning_rate
from rlalign.training.schedules import lr_scale


class Tuning:
    """Takes the steps of what `tuned` trains.

    Args:
        total: Optimizer steps of the whole run, for the schedule.
    """

    def __init__(self, tuned: TunedPipeline, cfg: AdamWConfig, *, total: int, accelerator: Accelerator):
        self.tuned, self.cfg, self.total, self.accelerator = tuned, cfg, total, accelerator
        self.optimizer = adamw(
            tuned.parameters.items(),
            learning_rate=cfg.learning_rate,
            betas=cfg.betas,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
        )
        self.budget = SkipBudget(limit=cfg.nonfinite_budget)
        self.updates = 0

    def take_step(self) -> tuple[float, float]:
        """Clip, check and apply the gradient; return its norm before clipping, and the learning rate.

        Raises:
            TrainingDiverged: Gradients were not finite more often in a row than `optim.nonfinite_budget` allows.
        """
        cfg = self.cfg
        self._sum_gradients()
        scale = lr_scale(
            self.updates,
            warmup_steps=min(cfg.warmup_steps, self.total),
            total_steps=self.total,
            schedule=cfg.schedule,
        )
        set_learning_rate(self.optimizer, cfg.learning_rate * scale)
        bring_moments(self.optimizer)
        norm = finite_step(
            self.optimizer, self.tuned.parameters.items(), max_grad_norm=cfg.max_grad_norm, budget=self.budget
        )
        self.updates += 1
        self.tuned.stepped(self.updates)
        return norm, cfg.learning_rate * scale

    def state_dict(self) -> dict[str, Any]:
        return {"adamw": self.optimizer.state_dict(), "budget": self.budget.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_optimizer(self.optimizer, state["adamw"])
        self.budget.load_state_dict(state["budget"])
        self.updates = state["updates"]

    def _sum_gradients(self) -> None:
        """Each process holds its share of a loss that is divided by the count over all: the sum is the gradient."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in self.tuned.parameters.values():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            summed: Any = self.accelerator.reduce(gradient, reduction="sum")
            parameter.grad = summed
