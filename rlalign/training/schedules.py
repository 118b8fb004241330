"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def lr_scale(
    step: int, *, warmup_steps: int, total_steps: int, schedule: Schedule = "constant", floor: float = 0.0
) -> float:
    """Return the factor on the base learning rate for the update that follows `step` completed ones.

        step < w :  (step + 1) / w                                          w = warmup_steps
        else     :  floor + (1 - floor) * shape(p),  p = (step - w) / (total_steps - w)
        shape(p) :  1 (constant),  1 - p (linear),  (1 + cos(pi p)) / 2 (cosine);  p is capped at 1

    The first update is never wasted on a zero rate, and neither is the last.

    Args:
        step: Completed optimizer steps, so 0 for the first update.
        floor: Fraction of the base rate that linear and cosine end on.

    Raises:
        ValueError: An argument is out of range, or the warm-up is longer than the run.

    Example:
        >>> [lr_scale(s, warmup_steps=2, total_steps=6, schedule="linear") for s in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < 0 or total_steps < 1 or not 0.0 <= floor <= 1.0:
        raise ValueError(
            f"need step >= 0, total_steps >= 1 and 0 <= floor <= 1, got {step=}, {total_steps=}, {floor=}."
        )
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"`warmup_steps`={warmup_steps} must lie between 0 and the run's {total_steps} updates.")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1.0 - floor) * (1.0 - progress)
        case "cosine":
            return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case _:
            raise ValueError(f"`schedule`={schedule!r} is unknown; choose constant, linear or cosine.")
