"""Lay groups out for scoring: one row per group that shares its prompt, or one padded row per completion."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.buffers import Rollout

PROMPT, PADDING = -1, -2
"""Who owns a token of a packed row, beside the completions, which are numbered from 0."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """Token rows for the model and, for every decision to score, where it is predicted and where its number belongs."""

    ids: Int[Tensor, "rows length"]
    positions: Int[Tensor, "rows length"]
    attention: Bool[Tensor, "rows 1 length length"] | Int[Tensor, "rows length"]
    """4-D: which position sees which. 2-D: the usual padding mask, for models that refuse the former."""
    predictor: Int[Tensor, " decisions"]
    """Flat index into `ids` of the position whose output predicts the decision (one before it)."""
    chosen: Int[Tensor, " decisions"]
    target: Int[Tensor, " decisions"]
    """Flat index into the [B, T] tensors of the rollout."""

    def to(self, device: torch.device) -> "Layout":
        return Layout(**{name: value.to(device) for name, value in vars(self).items()})

    def scatter(self, values: Float[Tensor, " decisions"], shape: tuple[int, int]) -> Float[Tensor, "batch time"]:
        """Put per-decision values at their place in [B, T]; 0 elsewhere."""
        return values.new_zeros(shape[0] * shape[1]).index_put((self.target,), values).view(shape)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A prompt and some of its completions, as row numbers of the rollout."""

    prompt: tuple[int, ...]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(self.lengths)


def token_count(rollout: Rollout) -> int:
    """Tokens of a rollout, each prompt counted once."""
    return sum(int(rollout.inputs[name].value.sum()) for name in ("prompt_length", "completion_length"))


def segments(rollout: Rollout, *, most_tokens: int) -> list[Segment]:
    """Split the rollout into prompt-sharing segments of at most `most_tokens`, one completion at least.

    Rows without a decision in the mask (truncated ones under `mask_truncated`) are left out: they have no loss.
    A group wider than the budget is cut into several segments, each with the prompt again; its gradient is the same.
    """
    prompt_ids, prompt_lengths = rollout.inputs["prompt_ids"].value, rollout.inputs["prompt_length"].value.tolist()
    lengths = rollout.inputs["completion_length"].value.tolist()
    found = []
    group_index = rollout.group.unique(return_inverse=True)[1].tolist()
    members: dict[int, list[int]] = {}
    for row in rollout.mask.any(1).nonzero().squeeze(1).tolist():
        members.setdefault(group_index[row], []).append(row)
    for index, rows in members.items():
        prompt = tuple(prompt_ids[index, : prompt_lengths[index]].tolist())
        for part in _cut(rows, lengths, most_tokens - len(prompt)):
            found.append(Segment(prompt=prompt, rows=tuple(part), lengths=tuple(lengths[row] for row in part)))
    return found


def _cut(rows: Sequence[int], lengths: Sequence[int], room: int) -> Iterator[list[int]]:
    part: list[int] = []
    used = 0
    for row in rows:
        if part and used + lengths[row] > room:
            yield part
            part, used = [], 0
        part.append(row)
        used += lengths[row]
    if part:
        yield part


def micro_batches(parts: Sequence[Segment], *, most_tokens: int) -> list[list[Segment]]:
    """Deal segments into micro-batches whose padded size stays within the budget; longest first, so padding is small.

    Longest first also means that a batch too large for memory fails at once, not hours into the run.
    """
    batches: list[list[Segment]] = []
    for part in sorted(parts, key=lambda part: -part.tokens):
        if batches and (len(batches[-1]) + 1) * batches[-1][0].tokens <= most_tokens:
            batches[-1].append(part)
        else:
            batches.append([part])
    return batches


def pack_prefix_shared(parts: Sequence[Segment], rollout: Rollout) -> Layout:
    """One row per segment, [prompt | completion 1 | ... | completion n]: the prompt is computed once.

    A completion's positions go on from the prompt's end, and it sees the prompt and itself only. Its first token is
    predicted by the prompt's last position, which is why that position may serve several decisions.
    """
    completions, mask = rollout.inputs["completion_ids"].value, rollout.mask
    width, time = max(part.tokens for part in parts), completions.shape[1]
    ids = torch.zeros(len(parts), width, dtype=torch.long)
    positions = torch.zeros(len(parts), width, dtype=torch.long)
    owner = torch.full((len(parts), width), PADDING, dtype=torch.long)
    predictor, target = [], []
    for line, part in enumerate(parts):
        prompt = [torch.tensor(part.prompt)]
        written = [completions[row, :length] for row, length in zip(part.rows, part.lengths, strict=True)]
        ids[line, : part.tokens] = torch.cat(prompt + written)
        positions[line, : part.tokens], owner[line, : part.tokens], before = _places(part)
        real = torch.cat([mask[row, :length] for row, length in zip(part.rows, part.lengths, strict=True)])
        there = [torch.arange(length) + row * time for row, length in zip(part.rows, part.lengths, strict=True)]
        predictor.append(before[real] + line * width)
        target.append(torch.cat(there)[real])
    target = torch.cat(target)
    return Layout(
        ids=ids,
        positions=positions,
        attention=_shared_attention(owner),
        predictor=torch.cat(predictor),
        chosen=completions.reshape(-1)[target],
        target=target,
    )


def _places(part: Segment) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"], Int[Tensor, " written"]]:
    """Position and owner of every token of a segment, and for every completion token the place that predicts it."""
    prompt, lengths = len(part.prompt), torch.tensor(part.lengths)
    member = torch.arange(len(part.lengths)).repeat_interleave(lengths)
    place = torch.arange(prompt, part.tokens)
    within = place - prompt - (lengths.cumsum(0) - lengths)[member]
    positions = torch.cat([torch.arange(prompt), prompt + within])
    owner = torch.cat([torch.full((prompt,), PROMPT), member])
    return positions, owner, torch.where(within == 0, prompt - 1, place - 1)


def _shared_attention(owner: Int[Tensor, "rows length"]) -> Bool[Tensor, "rows 1 length length"]:
    key, query = owner[:, None, :], owner[:, :, None]
    length = owner.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    sees = ((key == query) | (key == PROMPT)) & causal
    # Padding sees itself: a row of the mask without a single True is NaN in some kernels.
    return (sees | torch.eye(length, dtype=torch.bool))[:, None]


def pack_padded(parts: Sequence[Segment], rollout: Rollout) -> Layout:
    """One right-padded row per completion, with the usual 2-D mask: the plain layout every causal model takes."""
    completions, mask = rollout.inputs["completion_ids"].value, rollout.mask
    lines = [(part.prompt, row, length) for part in parts for row, length in zip(part.rows, part.lengths, strict=True)]
    width, time = max(len(prompt) + length for prompt, _, length in lines), completions.shape[1]
    ids = torch.zeros(len(lines), width, dtype=torch.long)
    attention = torch.zeros(len(lines), width, dtype=torch.long)
    predictor, target = [], []
    for line, (prompt, row, length) in enumerate(lines):
        start, end = len(prompt), len(prompt) + length
        ids[line, :start], ids[line, start:end] = torch.tensor(prompt), completions[row, :length]
        attention[line, :end] = 1
        real = mask[row, :length]
        predictor.append(torch.arange(start - 1, end - 1)[real] + line * width)
        target.append(torch.arange(length)[real] + row * time)
    target = torch.cat(target)
    return Layout(
        ids=ids,
        positions=torch.arange(width).expand(len(lines), width).clone(),
        attention=attention,
        predictor=torch.cat(predictor),
        chosen=completions.reshape(-1)[target],
        target=target,
    )
