"""What to do once the reward has nothing more to teach: turn to a graded one, or stop."""

from collections.abc import Mapping
from typing import Any

from rlalign.diffusion.rewards import Judge

THRESHOLD = 0.1
"""Share of groups with signal at and below which a step has taught next to nothing."""
WINDOW = 3
"""Steps in a row after which the graded reward takes over."""


class Saturation:
    """Counts steps in a row in which at most a tenth of the groups had any signal.

    Args:
        stop_after: Steps in a row after which the run ends; 0 only says so.
        graded: Outcome that takes over instead, once.
    """

    def __init__(self, judge: Judge, stop_after: int, *, graded: str | None):
        self.judge, self.stop_after, self.graded = judge, stop_after, graded
        self.streak, self.ended = 0, ""

    def update(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take note of a step; return what there is to say."""
        if metrics["signal/group_frac"] > THRESHOLD:
            self.streak = 0
            return []
        self.streak += 1
        share = (
            f"for {self.streak} steps in a row at most {THRESHOLD:.0%} of the groups had samples that differ in reward"
        )
        if self.graded is not None and self.judge.target != self.graded:
            if self.streak < (self.stop_after or WINDOW):
                return []
            self.judge.turn_to(self.graded)
            self.streak = 0
            return [f"step {step}: {share}; from now on the reward is `{self.graded}`."]
        if self.stop_after and self.streak >= self.stop_after:
            self.ended = (
                f"Stopped after step {step}: {share} (mean reward {metrics['reward/mean']:.3g}). Where it is solved, "
                "that is the end; else use `reward.graded`, a larger `rollout.group_size` or more noise."
            )
        elif self.streak == WINDOW:
            return [f"step {step}: {share}: there is little left to learn."]
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"streak": self.streak, "ended": self.ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.streak, self.ended = state["streak"], state["ended"]
