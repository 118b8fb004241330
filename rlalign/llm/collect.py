"""From dataset rows to a `Rollout`: choose prompts, sample groups, score them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.buffers import Input, Rollout
from rlalign.llm.data import Prompt, Prompts, as_completion
from rlalign.llm.generate import Generations
from rlalign.training.guard import RewardGuard, RewardTable
from rlalign.training.seeding import generator


@dataclass(frozen=True, eq=False, kw_only=True)
class Scored:
    """What the reward functions saw and said, row by row; only for the samples file and the reward call."""

    texts: list[str]
    prompts: list[Prompt]
    table: RewardTable
    outcome: Float[Tensor, " rows"]
    scored: Tensor
    logged: dict[str, float] = field(default_factory=dict)
    """Mean of what the functions passed to `log_metric`, by name."""
    extras: dict[str, list[Any]] = field(default_factory=dict)
    """Columns they passed to `log_extra`, for the samples file."""


def prompt_rows(step: int, *, count: int, dataset_size: int, seed: int) -> list[int]:
    """Dataset rows of one step: the next `count` of an endless sequence of seeded permutations.

    A pure function of the step, so there is no sampler state to save or to lose. A row met twice in one step (where
    two passes over a small dataset touch) gives two groups.

    Example:
        >>> sorted(prompt_rows(0, count=5, dataset_size=5, seed=0))
        [0, 1, 2, 3, 4]
    """
    rows = []
    orders: dict[int, list[int]] = {}
    for position in range(step * count, (step + 1) * count):
        epoch, place = divmod(position, dataset_size)
        if epoch not in orders:
            orders[epoch] = torch.randperm(dataset_size, generator=generator(seed, "prompts", epoch)).tolist()
        rows.append(orders[epoch][place])
    return rows


def row_uniforms(
    step: int, places: Sequence[int], *, group_size: int, time: int, seed: int
) -> Float[Tensor, "rows time"]:
    """The random numbers of each completion, from a generator of its own (step, place in the step, member).

    A completion therefore does not change when prompts are dealt to more processes.
    """
    rows = [
        torch.rand(time, generator=generator(seed, "completion", step, place, member))
        for place in places
        for member in range(group_size)
    ]
    return torch.stack(rows)


def score_completions(
    guard: RewardGuard,
    source: Prompts,
    rows: Sequence[int],
    generations: Generations,
    tokenizer: Any,
    *,
    step: int,
) -> Scored:
    """Decode completions and call the reward functions with TRL's arguments.

    Args:
        rows: Dataset row of each completion.
    """
    ids = [line[:length] for line, length in zip(generations.ids.tolist(), generations.lengths.tolist(), strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    prompts = [source[row]["prompt"] for row in rows]
    logged: dict[str, list[float]] = {}
    extras: dict[str, list[Any]] = {}
    table = guard.score(
        prompts=prompts,
        completions=[as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        completion_ids=ids,
        columns=source.columns(rows),
        trainer_state={"global_step": step},
        log_metric=lambda name, value: logged.setdefault(name, []).append(float(value)),
        log_extra=lambda name, values: extras.update({name: list(values)}),
    )
    outcome, scored = guard.total(table)
    means = {name: sum(values) / len(values) for name, values in logged.items()}
    return Scored(
        texts=texts, prompts=prompts, table=table, outcome=outcome, scored=scored, logged=means, extras=extras
    )


def assemble_rollout(
    generations: Generations,
    scored: Scored,
    *,
    prompt_tokens: Sequence[Sequence[int]],
    prompt_ids: Sequence[int],
    first_group: int,
    group_size: int,
    mask_truncated: bool,
) -> Rollout:
    """Lay generations and rewards out as a `Rollout` on the CPU: time is tokens, the reward stands on the last one.

    Args:
        prompt_tokens: Tokens of each prompt, one per group.
        prompt_ids: Dataset row of each prompt: the id that persists from epoch to epoch.
        first_group: Group id of the first prompt; ids are unique over the whole run.
        mask_truncated: Take completions that hit the limit out of the loss. They stay in every baseline.
    """
    ids, lengths, log_prob = generations.ids.cpu(), generations.lengths.cpu(), generations.log_prob.float().cpu()
    mask, truncated = generations.mask.cpu(), generations.truncated.cpu()
    last = torch.arange(ids.shape[1]) == (lengths - 1)[:, None]
    return Rollout(
        log_prob_old=log_prob,
        log_prob_engine=log_prob if generations.external else None,
        rewards=last * scored.outcome.float()[:, None],
        mask=mask & ~truncated[:, None] if mask_truncated else mask,
        terminated=last & ~truncated[:, None],
        truncated=last & truncated[:, None],
        group=(first_group + torch.arange(len(prompt_tokens))).repeat_interleave(group_size),
        prompt_id=torch.tensor(list(prompt_ids)).repeat_interleave(group_size),
        scored=scored.scored,
        reward_parts={name: values.float() for name, values in scored.table.parts().items()},
        inputs=_inputs(prompt_tokens, ids, lengths),
    )


def _inputs(prompts: Sequence[Sequence[int]], ids: Tensor, lengths: Tensor) -> dict[str, Input]:
    widest = max(map(len, prompts))
    padded = torch.tensor([list(tokens) + [0] * (widest - len(tokens)) for tokens in prompts])
    return {
        "prompt_ids": Input(value=padded, axis="per_group", pad_value=0),
        "prompt_length": Input(value=torch.tensor([len(tokens) for tokens in prompts]), axis="per_group"),
        "completion_ids": Input(value=ids, axis="per_decision"),
        "completion_length": Input(value=lengths, axis="per_rollout"),
    }
