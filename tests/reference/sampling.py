"""Sampling and scoring as on paper: one row at a time, the whole sequence through the model anew for every token."""

import bisect
from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def log_probs(model, sequence: Sequence[int], temperature: float) -> Tensor:
    """log p(. | sequence so far) after every position, float64 [length, vocabulary]: no padding, no cache."""
    logits = model(input_ids=torch.tensor([list(sequence)]), use_cache=False).logits[0]
    return (logits.double() / temperature).log_softmax(-1)


def inverse_transform(probs: Sequence[float], uniform: float) -> int:
    """The first token whose cumulative probability exceeds `uniform`."""
    cumulative, total = [], 0.0
    for prob in probs:
        total += prob
        cumulative.append(total)
    return bisect.bisect_right(cumulative, uniform * total)


def nucleus(probs: Sequence[float], top_p: float) -> list[float]:
    """Keep the most probable tokens until their mass reaches `top_p`; the others get 0 (arXiv:1904.09751, §3.1)."""
    kept, mass = [0.0] * len(probs), 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if mass >= top_p:
            break
        kept[token] = probs[token]
        mass += probs[token]
    return kept


@torch.no_grad()
def complete(
    model,
    prompt: Sequence[int],
    uniforms: Sequence[float],
    *,
    ends: Collection[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[list[int], list[float]]:
    """Tokens up to the first one in `ends` (inclusive) or `len(uniforms)`, and their log-probabilities.

    Temperature 0 takes the most probable token; log-probabilities are then those at temperature 1.
    """
    tokens: list[int] = []
    found: list[float] = []
    for uniform in uniforms:
        here = log_probs(model, [*prompt, *tokens], temperature or 1.0)[-1]
        probs = here.exp().tolist()
        token = int(here.argmax()) if temperature == 0 else inverse_transform(nucleus(probs, top_p), uniform)
        tokens.append(token)
        found.append(float(here[token]))
        if token in ends:
            break
    return tokens, found


def score(model, prompt: Sequence[int], completion: Sequence[int], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of every token of a completion, in nats, with their graph."""
    before = log_probs(model, [*prompt, *completion], temperature)[len(prompt) - 1 : -1]
    chosen = torch.stack([before[place, token] for place, token in enumerate(completion)])
    return chosen, -(before.exp() * before).sum(-1)
