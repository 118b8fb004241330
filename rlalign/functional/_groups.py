"""Statistics of the rollouts of each group: sums over segments, in any order, without a loop over groups."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.functional.masked import CONSTANT_SPREAD


@dataclass(frozen=True, eq=False, kw_only=True)
class Groups:
    """Rewards sorted into the groups they are compared in. Statistics count scored rollouts only."""

    rewards: Float[Tensor, " batch"]
    """In double precision, so that equal rewards stay equal to their mean; 0 where unscored."""
    scored: Bool[Tensor, " batch"]
    index: Int[Tensor, " batch"]
    """Number of each rollout's group, 0 to G - 1, by ascending id."""
    count: Int[Tensor, " groups"]
    """Scored rollouts of each group."""

    @classmethod
    def of(
        cls, rewards: Float[Tensor, " batch"], group: Int[Tensor, " batch"], scored: Bool[Tensor, " batch"] | None
    ) -> "Groups":
        """Check the rewards and number the groups.

        Raises:
            ValueError: A scored reward is not finite, or a group holds a single rollout.
        """
        everything_scored = torch.ones_like(group, dtype=torch.bool) if scored is None else scored
        _check_finite(rewards, everything_scored)
        ids, index, size = group.unique(return_inverse=True, return_counts=True)
        if size.numel() and int(size.min()) < 2:
            raise ValueError(
                f"comparing rollouts of a group needs >= 2 of them, but group {int(ids[size.argmin()])} holds 1. "
                "Raise `rollout.group_size`, or use the `gae` or `reinforce_plus_plus` estimator for lone rollouts."
            )
        return cls(
            rewards=torch.where(everything_scored, rewards, 0).to(_wide_dtype(rewards)),
            scored=everything_scored,
            index=index,
            count=torch.zeros_like(size).index_add(0, index, everything_scored.to(size.dtype)),
        )

    def total(self, x: Float[Tensor, " batch"]) -> Float[Tensor, " groups"]:
        """Sum over the scored rollouts of each group."""
        x = torch.where(self.scored, x, 0)
        return torch.zeros_like(self.count, dtype=x.dtype).index_add(0, self.index, x)

    @cached_property
    def mean(self) -> Float[Tensor, " groups"]:
        """Mean reward of each group; 0 where nothing is scored."""
        return self.total(self.rewards) / self.count.clamp(min=1)

    @cached_property
    def centred(self) -> Float[Tensor, " batch"]:
        """Reward minus the group's mean."""
        return self.rewards - self.mean[self.index]

    @cached_property
    def comparable(self) -> Bool[Tensor, " groups"]:
        """Groups with at least two scored rollouts."""
        return self.count >= 2

    @cached_property
    def live(self) -> Bool[Tensor, " groups"]:
        """Groups with signal: comparable, and rewards that differ by more than rounding."""
        lowest, highest = self._extreme("amin"), self._extreme("amax")
        largest = torch.maximum(lowest.abs(), highest.abs()).clamp(min=1)
        return self.comparable & (highest - lowest > CONSTANT_SPREAD * largest)

    def finish(self, advantages: Float[Tensor, " batch"], dtype: torch.dtype) -> Float[Tensor, " batch"]:
        """Set advantages to exactly 0 where there is nothing to learn from: unscored, alone, or all equal."""
        return torch.where(self.scored & self.live[self.index], advantages, 0).to(dtype)

    def _extreme(self, reduce: str) -> Float[Tensor, " groups"]:
        fill = torch.inf if reduce == "amin" else -torch.inf
        start = torch.full_like(self.count, fill, dtype=self.rewards.dtype)
        found = start.scatter_reduce(0, self.index, torch.where(self.scored, self.rewards, fill), reduce)
        return torch.where(self.count > 0, found, 0)


def _check_finite(rewards: Float[Tensor, " batch"], scored: Bool[Tensor, " batch"]) -> None:
    """Raise `ValueError` when a scored reward is NaN or infinite."""
    bad = scored & ~rewards.isfinite()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"the reward of rollout {row} is {float(rewards[row])}; rewards must be finite. Mark a rollout "
            "whose reward failed or does not apply with `scored` = False instead."
        )


def _wide_dtype(x: Tensor) -> torch.dtype:
    """Return double precision, or the widest there is: Apple's MPS has no float64."""
    return torch.float32 if x.device.type == "mps" else torch.float64
