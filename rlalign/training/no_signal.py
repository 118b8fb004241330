"""Notice a run that has stopped learning: steps whose groups all got equal rewards, and there is nothing to learn."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any


class NoSignalWarning(UserWarning):
    """Many steps in a row had almost no group with differing rewards."""


class NoSignalError(RuntimeError):
    """The run was asked to stop when its rewards carry no signal, and they do not."""


class SignalWatch:
    """Count consecutive steps in which more than `threshold` of the groups had no signal.

    Args:
        patience: Steps in a row before the first warning; the next ones come after twice, four times ... as many.
        threshold: Share of groups without signal above which a step counts.
        stop_after: Raise `NoSignalError` after this many steps in a row; 0 only warns.

    Example:
        >>> watch = SignalWatch(patience=2)
        >>> watch.update(1, groups=8, groups_without_signal=8) is None
        True
        >>> watch.update(2, groups=8, groups_without_signal=3) is None, watch.streak
        (True, 0)
    """

    def __init__(self, *, patience: int = 20, threshold: float = 0.9, stop_after: int = 0) -> None:
        if patience < 1 or stop_after < 0 or not 0 <= threshold < 1:
            raise ValueError(
                f"`patience` >= 1, `stop_after` >= 0 and 0 <= `threshold` < 1 are needed, got {patience}, {stop_after} "
                f"and {threshold}."
            )
        self.patience, self.threshold, self.stop_after = patience, threshold, stop_after
        self.streak = 0
        self._next_warning = patience

    def update(
        self, step: int, *, groups: int, groups_without_signal: int, rewards: Sequence[float] = ()
    ) -> str | None:
        """Take note of one step; warn when it is time.

        Args:
            rewards: The step's scored outcomes: their spread and mean tell the causes apart.

        Returns:
            The text of the warning just given, else None.

        Raises:
            NoSignalError: `stop_after` steps in a row had no signal.
        """
        if groups < 1 or groups_without_signal <= self.threshold * groups:
            self.streak, self._next_warning = 0, self.patience
            return None
        self.streak += 1
        share = f"{groups_without_signal} of {groups} groups"
        text = (
            f"step {step}: for {self.streak} steps in a row over {self.threshold:.0%} of the groups had no signal "
            f"({share} now): all completions of a group got the same reward, or none is in the loss, so there is "
            f"nothing to learn. {cause(rewards)}"
        )
        if self.stop_after and self.streak >= self.stop_after:
            raise NoSignalError(f"{text} Stopped by `stop_without_signal`={self.stop_after}.")
        if self.streak < self._next_warning:
            return None
        self._next_warning *= 2
        warnings.warn(text, NoSignalWarning, stacklevel=2)
        return text

    def state_dict(self) -> dict[str, Any]:
        return {"streak": self.streak, "next_warning": self._next_warning}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.streak, self._next_warning = int(state["streak"]), int(state["next_warning"])


def cause(rewards: Sequence[float]) -> str:
    """The likely cause and what to change, from the rewards of one step."""
    finite = [reward for reward in rewards if math.isfinite(reward)]
    if not rewards:
        return "Look at the samples: too hard, too easy, or a reward that does not look at the completion."
    if not finite:
        return "No row was scored: the reward returns None or fails. Run `rlalign check` on it."
    low, high = min(finite), max(finite)
    if low < high:
        return (
            "Groups agree but prompts differ: the completions of one prompt are too alike, or prompts are all solved "
            "or all hopeless. Raise `rollout.temperature` or `rollout.group_size`, or mix prompts."
        )
    if low == 0:
        return (
            "Every reward is 0: the task is too hard, the answer format is never met (look at `samples/`), or "
            "completions are cut at `rollout.max_completion_tokens`. Use easier prompts, show the format in "
            "`data.template`, or add a reward for the format."
        )
    return (
        f"Every reward is {low:g}: the task is solved or the function does not look at the completion. Use harder "
        "prompts, or run `rlalign check` on the function."
    )
