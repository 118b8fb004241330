"""Decisions without their order in time: what a minibatch needs, nothing checked twice."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rlalign.buffers.rollout import TrainBatch


class Decisions:
    """The real decisions of a checked `TrainBatch`, one per row, for many quick minibatches.

    Args:
        fields: Name -> tensor [decisions, ...].
    """

    def __init__(self, fields: Mapping[str, Tensor]):
        self.fields = dict(fields)

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def get(self, name: str) -> Tensor | None:
        """A field that may be absent."""
        return self.fields.get(name)

    def replaced(self, **fields: Tensor) -> "Decisions":
        """The same decisions with other values in some fields."""
        return Decisions({**self.fields, **fields})

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    @classmethod
    def of(cls, batch: TrainBatch, extra: Mapping[str, Tensor] | None = None) -> "Decisions":
        """Take the real decisions of a batch: its tensors per decision, its `inputs`, and `extra` ones [B, T, ...]."""
        names = ("log_prob_old", "advantages", "returns", "values", "weights")
        fields = {name: vars(batch)[name] for name in names if vars(batch)[name] is not None}
        fields |= {name: entry.value for name, entry in batch.inputs.items() if entry.axis == "per_decision"}
        fields |= extra or {}
        return cls({name: value[batch.mask] for name, value in fields.items()})

    def minibatches(self, size: int, generator: torch.Generator) -> Iterator["Decisions"]:
        """Deal the decisions in a random order into minibatches of `size`; a last one of a single decision is left out.

        A deviation, and so a normalised advantage, needs at least two. Where all decisions make one minibatch their
        order means nothing, and they come as they are.
        """
        if 1 < len(self) <= size:
            yield self
            return
        order = torch.randperm(len(self), generator=generator)
        dealt = {name: value[order].split(size) for name, value in self.fields.items()}
        for parts in zip(*dealt.values(), strict=True):
            if len(parts[0]) > 1:
                yield Decisions(dict(zip(dealt, parts, strict=True)))
