"""Sample groups of completions: shared beginnings computed once, one decode batch, rows leave at their end."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlalign.llm.prepacked import prepacked

SHORTEST_SHARED = 8
"""Fewer tokens in common are not worth a forward pass of their own."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Generations:
    """Completions of one decode batch, right-padded. Rows of a prompt are contiguous."""

    ids: Int[Tensor, "rows time"]
    log_prob: Float[Tensor, "rows time"]
    """Of each sampled token at the sampling temperature, in nats; 0 at padding, NaN where an engine reported none."""
    lengths: Int[Tensor, " rows"]
    """Tokens of each completion, its end-of-sequence token included."""
    truncated: Bool[Tensor, " rows"]
    """The completion reached the token limit without an end of sequence."""
    external: bool = False
    """Another program sampled, and its log-probabilities differ from the trainer's for the same weights."""

    @property
    def mask(self) -> Bool[Tensor, "rows time"]:
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.lengths[:, None]


class GrowingLayer(DynamicLayer):
    """A key-value cache layer that writes in place and grows by halves, where `DynamicLayer` copies every step."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.storage = (key_states[:, :, :0], value_states[:, :, :0])
            self.keys, self.values = self.storage
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        used, needed = keys.shape[2], keys.shape[2] + key_states.shape[2]
        # Selecting or repeating rows replaces `keys` by a fresh tensor: the old storage is then of no use.
        if keys.data_ptr() != self.storage[0].data_ptr() or needed > self.storage[0].shape[2]:
            self.storage = (_with_room(keys, needed + needed // 2), _with_room(values, needed + needed // 2))
        for storage, new in zip(self.storage, (key_states, value_states), strict=True):
            storage[:, :, used:needed] = new
        self.keys, self.values = (storage[:, :, :needed] for storage in self.storage)
        return self.keys, self.values


def _with_room(old: Tensor, length: int) -> Tensor:
    new = old.new_empty(*old.shape[:2], length, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache, with every plain layer (no sliding window, no recurrence) written in place."""
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@torch.no_grad()
def generate_groups(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    uniforms: Float[Tensor, "rows time"] | None = None,
    decode_rows: int | None = None,
    prepack: bool = True,
) -> Generations:
    """Sample `group_size` completions of every prompt.

    A row's sample is a function of the weights, its prompt and its own row of `uniforms`, by inverse transform
    sampling: it does not depend on which other rows share its batch (up to the rounding of the matrix product), on
    when they leave, or on how many processes share the work.

    Args:
        prompts: Token ids, any lengths >= 1.
        eos_ids: Every token that ends a completion. Empty: all completions run to the limit.
        temperature: Divides the logits; 0 takes the most probable token (`uniforms` is then not used).
        top_p: Sample from the smallest set of tokens with this mass. Log-probabilities are of the full distribution,
            so anything below 1 makes them wrong for training.
        uniforms: One number in [0, 1) per row and token; rows are ordered by prompt, then member.
        decode_rows: Most rows decoded at once; whole groups, at least one.
        prepack: Reorder float32 weights on a CPU for faster decoding, where there is anything to gain.

    Raises:
        ValueError: A prompt is empty, `uniforms` is missing or of another shape, or the model gives NaN.
    """
    rows = len(prompts) * group_size
    _require_complete(prompts, uniforms, (rows, max_new_tokens), temperature)
    written = _Written(rows, max_new_tokens, pad_id=pad_id, eos_ids=eos_ids, device=model.device)
    per_batch = max(1, (decode_rows or rows) // group_size)
    training = model.training
    model.eval()
    try:
        with prepacked(model, rows=min(rows, per_batch * group_size), steps=max_new_tokens * prepack):
            for first in range(0, len(prompts), per_batch):
                chunk = prompts[first : first + per_batch]
                span = slice(first * group_size, (first + len(chunk)) * group_size)
                noise = uniforms[span].to(model.device) if uniforms is not None and temperature > 0 else None
                state = _Decode(model, chunk, group_size=group_size, pad_id=pad_id)
                _decode(state, written, span.start, noise, temperature=temperature, top_p=top_p)
    finally:
        model.train(training)
    return written.generations()


def _require_complete(
    prompts: Sequence[Sequence[int]], uniforms: Tensor | None, shape: tuple[int, int], temperature: float
) -> None:
    if empty := [index for index, prompt in enumerate(prompts) if len(prompt) == 0]:
        raise ValueError(f"prompt {empty[0]} has no tokens; every prompt needs at least one.")
    if temperature > 0 and (uniforms is None or uniforms.shape != shape):
        got = None if uniforms is None else tuple(uniforms.shape)
        raise ValueError(f"sampling needs `uniforms` of shape {shape}, got {got}.")


def _decode(
    state: "_Decode", written: "_Written", first: int, noise: Tensor | None, *, temperature: float, top_p: float
) -> None:
    """Write the completions of one decode batch, whose rows begin at row `first` of all."""
    for step in range(written.time):
        picked = None if noise is None else noise[state.rows, step]
        token, log_prob = sample_tokens(state.logits, picked, temperature=temperature, top_p=top_p)
        ended = written.add(state.rows + first, step, token, log_prob)
        if step + 1 == written.time or bool(ended.all()):
            break
        state.advance(token, keep=~ended)


class _Written:
    """What has been sampled so far, in rows of all decode batches."""

    def __init__(self, rows: int, time: int, *, pad_id: int, eos_ids: Sequence[int], device: torch.device):
        self.time = time
        self.ids = torch.full((rows, time), pad_id, dtype=torch.long, device=device)
        self.log_prob = torch.zeros(rows, time, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)

    def add(self, rows: Tensor, step: int, token: Tensor, log_prob: Tensor) -> Bool[Tensor, " alive"]:
        """Append one token to each of `rows`; return which of them it ends."""
        ended = torch.isin(token, self.ends)
        self.ids[rows, step], self.log_prob[rows, step], self.lengths[rows] = token, log_prob, step + 1
        self.ended[rows] = ended
        return ended

    def generations(self) -> Generations:
        if bool(self.log_prob.isnan().any()):
            raise ValueError(
                "the model's logits are NaN or infinite: its weights are broken, or `model.dtype` is too narrow for "
                "them."
            )
        longest = int(self.lengths.max())
        return Generations(
            ids=self.ids[:, :longest],
            log_prob=self.log_prob[:, :longest],
            lengths=self.lengths,
            truncated=~self.ended,
        )


def sample_tokens(
    logits: Float[Tensor, "rows vocabulary"],
    uniform: Float[Tensor, " rows"] | None,
    *,
    temperature: float,
    top_p: float = 1.0,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Draw one token per row by inverting the cumulative distribution at `uniform`; argmax when temperature is 0.

    Returns the tokens and their log-probabilities under the full distribution at `temperature` (1 when it is 0).
    """
    scaled = logits.float() if temperature in (0.0, 1.0) else logits.float() / temperature
    log_total = scaled.logsumexp(-1)
    if temperature == 0:
        token = scaled.argmax(-1)
    elif uniform is None:
        raise ValueError(f"sampling at temperature {temperature} needs one uniform number per row, got None.")
    else:
        probs = (scaled - log_total[:, None]).exp_()
        if top_p < 1:
            probs = _nucleus(probs, top_p)
        cumulative = probs.cumsum(-1)
        # Strictly below the total, so rounding can never pick a token after the last one with any mass.
        total = cumulative[:, -1:]
        target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        # The clamp acts on NaN alone, which would be an index out of range.
        token = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=probs.shape[1] - 1)
    return token, scaled.gather(1, token[:, None]).squeeze(1) - log_total


def _nucleus(probs: Tensor, top_p: float) -> Tensor:
    ordered, index = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    return probs.scatter(-1, index, ordered.masked_fill(outside, 0.0))


class _Decode:
    """The rows still being written: their cache, attention mask, positions and next logits."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, group_size: int, pad_id: int):
        device = model.device
        self.model, self.cache = model, growing_cache(model)
        shared = self._prefill_shared(prompts, device)
        rests = [prompt[shared:] for prompt in prompts]
        longest = max(map(len, rests))
        padded = [[pad_id] * (longest - len(rest)) + list(rest) for rest in rests]
        real = [[1] * shared + [0] * (longest - len(rest)) + [1] * len(rest) for rest in rests]
        self.attention = torch.tensor(real, device=device)
        positions = (self.attention.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        logits = self._forward(torch.tensor(padded, device=device), positions)
        self.cache.batch_repeat_interleave(group_size)
        self.logits, self.attention, self.position = (
            tensor.repeat_interleave(group_size, dim=0) for tensor in (logits, self.attention, positions[:, -1:])
        )
        self.rows = torch.arange(len(prompts) * group_size, device=device)

    def _prefill_shared(self, prompts: Sequence[Sequence[int]], device: torch.device) -> int:
        """Compute what all prompts begin with (instructions, examples, a chat header) once; return its length.

        Padding then stands between this beginning and a prompt's rest, which only plain attention layers can ignore.
        """
        least, plain = min(map(len, prompts)) - 1, all(type(layer) is GrowingLayer for layer in self.cache.layers)
        if len(prompts) == 1 or least < SHORTEST_SHARED or not plain:
            return 0
        columns = torch.tensor([list(prompt[:least]) for prompt in prompts])
        shared = int((columns == columns[0]).all(0).long().cumprod(0).sum())
        if shared < SHORTEST_SHARED:
            return 0
        ids = columns[:1, :shared].to(device)
        self.attention = torch.ones_like(ids)
        self._forward(ids, torch.arange(shared, device=device)[None])
        self.cache.batch_repeat_interleave(len(prompts))
        return shared

    def advance(self, token: Int[Tensor, " alive"], *, keep: Bool[Tensor, " alive"]) -> None:
        """Append each kept row's token and compute its next logits; the other rows leave the batch."""
        if not bool(keep.all()):
            kept = keep.nonzero().squeeze(1)
            self.cache.batch_select_indices(kept)
            self.rows, self.attention, self.position = self.rows[kept], self.attention[kept], self.position[kept]
            token = token[kept]
        self.position = self.position + 1
        self.attention = torch.nn.functional.pad(self.attention, (0, 1), value=1)
        self.logits = self._forward(token[:, None], self.position)

    def _forward(self, ids: Tensor, positions: Tensor) -> Float[Tensor, "rows vocabulary"]:
        out = self.model(
            input_ids=ids,
            attention_mask=self.attention,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1]
