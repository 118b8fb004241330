"""Winners and losers of the same prompt: who may be paired, and which pairs a step gets."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlalign.training.seeding import generator


def labels_of(
    outcome: Float[Tensor, " samples"], *, threshold: float | int, band: float | int = 0.0
) -> Int[Tensor, " samples"]:
    """Judge samples by an outcome: 1 at or above the threshold, -1 below.

    Args:
        outcome: NaN where unknown.
        threshold: Samples of equal outcome are on the same side of it, so no pair is ever a tie.
        band: Samples nearer to the threshold than this are left out: their label is noise.

    Returns:
        1, -1, or 0 where the outcome is unknown or too near to the threshold.
    """
    label = torch.where(outcome >= threshold, 1, -1)
    out = outcome.isnan() | ((outcome - threshold).abs() < band)
    return label.masked_fill(out, 0)


@dataclass(frozen=True, eq=False)
class _Group:
    """The samples of one prompt that can be paired."""

    number: int
    winners: Int[Tensor, " w"]
    losers: Int[Tensor, " l"]


class Pairs:
    """Deals a winner and a loser of the same prompt.

    Every prompt with both classes gives a pair per lap, whatever its share of winners, and within a prompt every winner
    (and every loser) is used once before one is used again. All of it is a function of the seed and the pair's number.

    Args:
        labels: 1, -1 or 0 per sample; see `labels_of`.
        prompts: Row of each sample's prompt.
        seed: Decides the order.
    """

    def __init__(self, labels: Int[Tensor, " samples"], prompts: Int[Tensor, " samples"], *, seed: int):
        self.seed, self.groups = seed, []
        rows = torch.arange(len(labels))
        for number in prompts.unique().tolist():
            here = prompts == number
            winners, losers = rows[here & (labels > 0)], rows[here & (labels < 0)]
            if len(winners) and len(losers):
                self.groups.append(_Group(number, winners, losers))
        self.without = len(prompts.unique()) - len(self.groups)
        """Prompts that give no pair: all of their samples win, or all lose."""
        self._orders: dict[tuple[str, int], tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        """How many prompts give pairs."""
        return len(self.groups)

    def draw(self, step: int, count: int) -> Int[Tensor, "count two=2"]:
        """The pairs of a step: rows of winners and losers.

        Args:
            step: Counts from 0; the same step gets the same pairs.
            count: Pairs per step.

        Raises:
            ValueError: No prompt has both classes.
        """
        if not self.groups:
            raise ValueError("no prompt has both a winner and a loser, so there are no pairs.")
        pairs = []
        for place in range(step * count, (step + 1) * count):
            lap, within = divmod(place, len(self.groups))
            which = int(self._order("prompts", 0, lap, len(self.groups))[within])
            group = self.groups[which]
            pairs.append([self._pick("win", which, lap, group.winners), self._pick("lose", which, lap, group.losers)])
        return torch.tensor(pairs)

    def _pick(self, side: str, which: int, visit: int, samples: Tensor) -> int:
        lap, within = divmod(visit, len(samples))
        return int(samples[self._order(side, which, lap, len(samples))[within]])

    def _order(self, what: str, which: int, lap: int, size: int) -> Tensor:
        """A permutation for this lap; the last one is kept, since consecutive pairs ask for it again."""
        known = self._orders.get((what, which))
        if known is None or known[0] != lap:
            known = (lap, torch.randperm(size, generator=generator(self.seed, "pairs", what, which, lap)))
            self._orders[what, which] = known
        return known[1]


def told(labels: Int[Tensor, " samples"], pairs: Pairs) -> str:
    """What there is to say of a labelled set."""
    wins, losses, out = (int((labels == value).sum()) for value in (1, -1, 0))
    counts = f"{wins:,} samples win, {losses:,} lose, {out:,} are left out"
    if not len(pairs):
        return f"{counts}, and no prompt has both, so there are no pairs"
    return f"{counts}; {pairs.without:,} prompts have only one kind and are not used" if pairs.without else counts
