"""Choose the samples worth reading: best, median, worst, and the same prompt before and after."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan

from rlalign.training.metric_names import format_column, format_number
from rlalign.training.report_data import RunData, Sample
from rlalign.training.untrusted_text import one_line

_PER_GROUP = 20
_MAX_EPISODES = 100
_MAX_PARTS = 8
_SNIPPET = 90
_PROMPT_SNIPPET = 70


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sample of a table; `before` is the completion to the same prompt before training."""

    sample: Sample
    reward: str
    parts: list[str]
    prompt: str
    snippet: str
    before: Sample | None
    before_reward: str = ""


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    title: str
    part_names: list[str]
    rows: list[Row]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt answered before and after."""

    label: str
    tone: str
    before: Sample
    after: Sample
    before_reward: str
    after_reward: str


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One start of an agent's evaluation, before training and now. Lengths are in steps, "" where unknown."""

    start: str
    before: str
    after: str
    length_before: str
    length_after: str


def episodes(run: RunData) -> list[Episode]:
    """The evaluation of an agent start by start; nothing for other runs."""
    if not run.agent:
        return []
    last, first = _last(run)[:_MAX_EPISODES], _first_by_key(run)
    pairs_of = [(sample, first.get(sample.key)) for sample in last]
    after = format_column([sample.reward for sample, _ in pairs_of])
    before = format_column([one.reward if one else nan for _, one in pairs_of])
    return [
        Episode(
            start=sample.problem,
            before=before[index] if one else "",
            after=after[index],
            length_before=one.details.get("length", "") if one else "",
            length_after=sample.details.get("length", ""),
        )
        for index, (sample, one) in enumerate(pairs_of)
    ]


def held_out_tables(run: RunData) -> list[SampleTable]:
    """Best, median and worst of the last evaluation."""
    return _tables(_last(run), _first_by_key(run)) if run.eval_samples else []


def training_tables(run: RunData) -> list[SampleTable]:
    """Best, median and worst of the newest training step that kept its samples."""
    return _tables(run.train_samples, {})


def pairs(run: RunData) -> list[Pair]:
    """The largest rises and falls, and a prompt that still fails."""
    first = _first_by_key(run)
    both = [
        (first[sample.key], sample)
        for sample in _distinct(_last(run))
        if sample.key in first and isfinite(sample.reward) and isfinite(first[sample.key].reward)
    ]
    if not both:
        return []
    by_change = sorted(both, key=lambda item: item[0].reward - item[1].reward)  # stable: rises first
    rises = [item for item in by_change if item[1].reward > item[0].reward][:3]
    falls = [item for item in reversed(by_change) if item[1].reward < item[0].reward][:2]
    lowest = min(sample.reward for _, sample in both)
    highest = max(sample.reward for _, sample in both)
    steady = [item for item in both if item[1].reward == item[0].reward]
    failing = [item for item in steady if item[1].reward == lowest < highest][:1]
    chosen = [_pair("Rose", "good", item) for item in rises] + [_pair("Fell", "bad", item) for item in falls]
    chosen += [_pair("Still low", "flat", item) for item in failing]
    return chosen or [_pair("Unchanged", "flat", item) for item in steady[:2]]


def _pair(label: str, tone: str, item: tuple[Sample, Sample]) -> Pair:
    before, after = item
    return Pair(
        label=label,
        tone=tone,
        before=before,
        after=after,
        before_reward=format_number(before.reward),
        after_reward=format_number(after.reward),
    )


def _last(run: RunData) -> list[Sample]:
    return run.eval_samples[max(run.eval_samples)] if run.eval_samples else []


def _first_by_key(run: RunData) -> dict[str, Sample]:
    if len(run.eval_samples) < 2:
        return {}
    return {sample.key: sample for sample in reversed(run.eval_samples[min(run.eval_samples)])}


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    return list({sample.key: sample for sample in reversed(samples)}.values())[::-1]


def _tables(samples: Sequence[Sample], before: dict[str, Sample]) -> list[SampleTable]:
    names = list(dict.fromkeys(name for sample in samples for name in sample.parts))[:_MAX_PARTS]
    scored = _ranked([sample for sample in samples if isfinite(sample.reward)])
    groups = [*_thirds(scored), ("Without a score", [s for s in samples if not isfinite(s.reward)][:_PER_GROUP])]
    return [
        SampleTable(title=title, part_names=names, rows=_rows(chosen, names, before))
        for title, chosen in groups
        if chosen
    ]


def _ranked(samples: Sequence[Sample]) -> list[Sample]:
    """Best first. Ties take one of each prompt in turn, in hash order: file order would show one group only."""
    seen: Counter[tuple[str, float]] = Counter()
    order = []
    for sample in samples:
        turn = seen[sample.key, sample.reward]
        seen[sample.key, sample.reward] += 1
        order.append((-sample.reward, turn, sample.key))
    return [samples[index] for index in sorted(range(len(samples)), key=order.__getitem__)]


def _thirds(ranked: Sequence[Sample]) -> list[tuple[str, Sequence[Sample]]]:
    if len(ranked) <= _PER_GROUP:
        return [("All, best first", ranked)]
    size = min(_PER_GROUP, len(ranked) // 3)
    middle = (len(ranked) - size) // 2
    return [("Best", ranked[:size]), ("Median", ranked[middle : middle + size]), ("Worst", ranked[: -size - 1 : -1])]


def _rows(samples: Sequence[Sample], names: Sequence[str], before: dict[str, Sample]) -> list[Row]:
    rewards = format_column([sample.reward for sample in samples])
    columns = [format_column([sample.parts.get(name, nan) for sample in samples]) for name in names]
    rows = []
    for index, sample in enumerate(samples):
        first = before.get(sample.key)
        rows.append(
            Row(
                sample=sample,
                reward=rewards[index],
                parts=[column[index] for column in columns],
                prompt=one_line(sample.prompt, limit=_PROMPT_SNIPPET),
                snippet=one_line(sample.completion, limit=_SNIPPET) or "(empty)",
                before=first,
                before_reward=format_number(first.reward) if first else "",
            )
        )
    return rows
