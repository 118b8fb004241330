"""Holds rollouts between collection and update, and survives a checkpoint in between."""

from collections.abc import Mapping

from torch import Tensor

from rlalign.buffers.rollout import Rollout


class RolloutBuffer:
    """Collects rollouts of one update. It is part of the checkpoint: a run killed mid-collection loses nothing."""

    def __init__(self) -> None:
        self._held: Rollout | None = None

    def __len__(self) -> int:
        """Rows held, not rollouts added."""
        return 0 if self._held is None else self._held.batch_size

    def add(self, rollout: Rollout) -> None:
        """Keep a rollout until `drain`.

        Raises:
            ValueError: It cannot be joined with those held, for example because it repeats a group id.
        """
        # Joined now and not in `drain`, so that the caller who repeated a group is still on the stack.
        self._held = rollout if self._held is None else Rollout.concatenate([self._held, rollout])

    def drain(self) -> Rollout:
        """Return everything held as one rollout, in the order added, and forget it.

        Raises:
            ValueError: Nothing was added since the last call.
        """
        if self._held is None:
            raise ValueError("the rollout buffer is empty; `add` a rollout before `drain`.")
        rollout, self._held = self._held, None
        return rollout

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self._held is None else self._held.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._held = Rollout.from_state_dict(state) if state else None
