"""Adaptive projected guidance where steps are recorded and replayed: its momentum is a part of a step's state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlalign.diffusion.branches import two_branches, weighed
from rlalign.diffusion.combiner import Combiner, NotCombined
from rlalign.diffusion.guidance import AdaptiveProjection
from rlalign.diffusion.recorder import EQUAL_BRANCHES, Recorder
from rlalign.diffusion.sde import Step, Transition
from rlalign.diffusion.trajectory import Trajectory


class GuidedSteps:
    """Guides the steps of one run as they are asked for, and keeps the running difference that each of them met."""

    def __init__(self, projection: AdaptiveProjection, recorder: Recorder):
        self.projection, self.recorder = projection, recorder
        self._now: Tensor | None = None
        self._met: list[Tensor] = []
        self._begun = False

    def __call__(self, step: Step) -> Tensor:
        """Return what the scheduler is to step with in place of the pipeline's own prediction.

        Raises:
            ValueError: The pipeline does not guide, or in a way that cannot be projected.
        """
        branches, combiner, problem = self.recorder.close_step(step)
        if self.projection.momentum:
            now = torch.zeros_like(step.x, dtype=torch.float32) if self._now is None else self._now
            self._met.append(now)
        if len(branches) == 1 and self._begun:
            return step.prediction  # Guidance ended before the last step, as guidance intervals do.
        two_branches(branches)
        if combiner is None and problem != EQUAL_BRANCHES:
            raise NotCombined(problem)
        if combiner is None:
            return step.prediction  # Condition and no condition give the same: so does any guidance of it.
        self._begun = True
        level = step.level.expand(len(step.x))
        guided, after = _guided(self.projection, combiner, branches, step.x, step.transition, level, self._now)
        # Rounded before it is used, to what a replay will see.
        self._now = after.detach().float() if self.projection.momentum else None
        return guided

    def met(self) -> Tensor | None:
        """The running difference before each step, [B, T, *]; None without momentum, where steps have no memory."""
        return torch.stack(self._met, 1) if self._met else None


class Replayed:
    """The guidance of recorded steps, of any samples and steps at once, with gradient."""

    def __init__(self, trajectory: Trajectory, projection: AdaptiveProjection):
        self.trajectory, self.projection = trajectory, projection

    def __call__(
        self, combiner: Combiner, branches: Sequence[Tensor], x: Tensor, rows: Tensor, steps: Tensor
    ) -> Tensor:
        if not combiner.others:
            return combiner(branches)
        taken = self.trajectory
        level = taken.level[steps.to(taken.level.device)].to(x.device)
        running = None
        if taken.running is not None:
            place = taken.running.device
            running = taken.running[rows.to(place), steps.to(place) - taken.first].to(x.device)
        return _guided(self.projection, combiner, branches, x, taken.transition, level, running)[0]


def _guided(
    projection: AdaptiveProjection,
    combiner: Combiner,
    branches: Sequence[Tensor],
    x: Tensor,
    transition: Transition,
    level: Tensor,
    running: Tensor | None,
) -> tuple[Tensor, Tensor]:
    cond, uncond, scale = weighed(combiner, branches)
    guided, after = projection.guided(cond, uncond, x, transition.space(level), scale=scale, running=running)
    return guided.to(cond.dtype), after
