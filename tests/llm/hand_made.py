"""Rollouts of given prompts and completions, for tests of what happens to them after sampling."""

from collections.abc import Sequence

import torch

from rlalign.buffers import Input, Rollout

Tokens = Sequence[int]


def hand_made(
    prompts: Sequence[Tokens],
    groups: Sequence[Sequence[Tokens]],
    *,
    masked: Sequence[tuple[int, int]] = (),
    left_out: Sequence[int] = (),
    group_ids: Sequence[int] | None = None,
) -> Rollout:
    """One group of completions per prompt.

    Args:
        masked: (row, token) of tokens that a tool wrote: context, but no decision.
        left_out: Rows without any decision, such as truncated ones.
        group_ids: Ascending; 0, 1, 2 ... when None.
    """
    rows = [list(completion) for group in groups for completion in group]
    time, widest = max(map(len, rows)), max(map(len, prompts))
    lengths = torch.tensor([len(row) for row in rows])
    written = torch.arange(time) < lengths[:, None]
    mask = written.clone()
    for row, token in masked:
        mask[row, token] = False
    mask[list(left_out)] = False
    last = torch.arange(time) == (lengths - 1)[:, None]
    group = torch.tensor(list(group_ids) if group_ids is not None else list(range(len(prompts))))
    group = group.repeat_interleave(torch.tensor([len(members) for members in groups]))
    return Rollout(
        log_prob_old=torch.zeros(len(rows), time),
        rewards=torch.zeros(len(rows), time),
        mask=mask,
        terminated=last,
        truncated=torch.zeros_like(last),
        group=group,
        prompt_id=group,
        scored=torch.ones(len(rows), dtype=torch.bool),
        inputs={
            "prompt_ids": Input(
                value=torch.tensor([[*prompt, *[0] * (widest - len(prompt))] for prompt in prompts]),
                axis="per_group",
                pad_value=0,
            ),
            "prompt_length": Input(value=torch.tensor([len(prompt) for prompt in prompts]), axis="per_group"),
            "completion_ids": Input(
                value=torch.tensor([row + [0] * (time - len(row)) for row in rows]), axis="per_decision"
            ),
            "completion_length": Input(value=lengths, axis="per_rollout"),
        },
    )


def ragged(vocabulary: int = 259, seed: int = 0) -> Rollout:
    """Four groups with prompts of 1 to 9 tokens and completions of 1 to 7; tool tokens; rows left out, one group whole.

    Rows 0-3, 4-6, 7-8 and 9-11 are groups 3, 5, 8 and 9. Tokens 1, 2 of row 1 and the first of row 5 are a tool's.
    """
    random = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=random).tolist()

    lengths = [[7, 4, 1, 5], [2, 3, 6], [3, 2], [1, 5, 4]]
    return hand_made(
        [tokens(count) for count in (3, 9, 2, 1)],
        [[tokens(count) for count in group] for group in lengths],
        masked=[(1, 1), (1, 2), (5, 0)],
        left_out=[3, 7, 8],
        group_ids=[3, 5, 8, 9],
    )


def prompt_of(rollout: Rollout, row: int) -> list[int]:
    """The prompt of one row."""
    place = int(rollout.group.unique(return_inverse=True)[1][row])
    length = int(rollout.inputs["prompt_length"].value[place])
    return rollout.inputs["prompt_ids"].value[place, :length].tolist()


def completion_of(rollout: Rollout, row: int) -> list[int]:
    """Everything that was written in one row, tool tokens included."""
    length = int(rollout.inputs["completion_length"].value[row])
    return rollout.inputs["completion_ids"].value[row, :length].tolist()
