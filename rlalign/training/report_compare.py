"""Held-out quantities before and after training, problem by problem where the samples were kept."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan

from rlalign.training.intervals import (
    Interval,
    bootstrap_interval,
    difference_interval,
    paired_bootstrap,
    standard_error,
    wilson_interval,
)
from rlalign.training.metric_names import describe, format_number, format_share, plain_name
from rlalign.training.report_data import RunData, Sample, Series

_CORRECTNESS = re.compile(r"(^|_)(accuracy|exact_match|correct(ness)?|success|solved|passed|stable)(_|$)")
_NOT_AN_OUTCOME = re.compile(r"(tokens|length|loss|entropy|kl|seconds)")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One held-out quantity before and after. `change` is None when there is only one evaluation."""

    name: str
    title: str
    before: Interval | None
    after: Interval
    change: Interval | None
    count: int
    """Problems behind `change`, or behind `after` when there is nothing to compare."""
    paired: bool
    share: bool
    """Outcomes are all 0 or 1: shown in percent."""
    phrasing: bool = False
    """Before is the untouched model under the best of several other phrasings, not the training prompt."""
    unit: str = "problem"
    """What was counted: an agent's are the starts of episodes."""
    better: int = 0
    same: int = 0
    worse: int = 0

    def number(self, value: float, *, signed: bool = False) -> str:
        """A level of this quantity with its unit."""
        return f"{format_share(value, signed=signed)} %" if self.share else format_number(value, signed=signed)

    def difference(self, value: float) -> str:
        """A signed change: points for shares."""
        return format_share(value, signed=True) if self.share else format_number(value, signed=True)


def compare(run: RunData) -> list[Comparison]:
    """Compare the first evaluation with the last: correctness first, then the reward, then its parts.

    A generator's samples name their gold outcome first, which is what training is judged by; what it may have cost (the
    numbers of `eval.watch`) stands at the end.
    """
    found = [*_compare_samples(run), *_against_baselines(run)]
    if all(item.change is None for item in found):  # samples of one evaluation only: the logged means may know more
        found = [replace(item, unit=run.unit) for item in _compare_records(run.eval)] or found
    found.sort(key=lambda item: (item.phrasing, not run.generator and not _CORRECTNESS.search(item.name)))
    return found + _watched(run) if run.generator and run.eval_samples else found


def primary_eval_metric(evaluation: Mapping[str, Series]) -> str | None:
    """The held-out curve to lay over it."""
    preferred = ("eval/reward_mean", "eval/return_mean", "eval/score_mean")
    found = [name for name in preferred if name in evaluation]
    found += sorted(name for name in evaluation if name.endswith("_mean") and not _NOT_AN_OUTCOME.search(name))
    return found[0] if found else None


def unpaired(first: Sequence[float], last: Sequence[float]) -> Interval:
    """Interval of the difference of two means of independent values."""
    means = [sum(values) / len(values) for values in (first, last)]
    return difference_interval(means[0], standard_error(first), means[1], standard_error(last))


def _compare_samples(run: RunData) -> list[Comparison]:
    if not run.eval_samples:
        return []
    steps = sorted(run.eval_samples)
    last = run.eval_samples[steps[-1]]
    first = run.eval_samples[steps[0]] if len(steps) > 1 else []
    names = [""] if run.agent else _names(last)
    if run.generator and len(names) > 1:  # its reward is the gold outcome, and stands under that name
        names = names[1:]
    found = [_compare(name, _by_problem(first, name), _by_problem(last, name)) for name in names]
    found = [_of_agent(item) for item in found] if run.agent else found
    found = [None if item is None else replace(item, unit=run.unit) for item in found]
    kept = [item for item in found if item is not None]
    # A single reward function with weight 1 is the reward: one row is enough.
    if not run.generator and len(kept) == 2 and _same_numbers(kept[0], kept[1]):
        return kept[1:] if _CORRECTNESS.search(kept[1].name) else kept[:1]
    return kept


def _watched(run: RunData) -> list[Comparison]:
    """Numbers about all samples together, which have no spread: likeness to the data, diversity."""
    names = [
        name for name in run.eval if name.endswith("_mean") and f"{name.removesuffix('_mean')}_stderr" not in run.eval
    ]
    found = [_compare_series(name, run.eval) for name in sorted(names) if name != "eval/reward_mean"]
    return [replace(item, unit=run.unit, count=0) for item in found if item is not None]


def _against_baselines(run: RunData) -> list[Comparison]:
    """The last evaluation against the untouched model's best phrasing, problem by problem."""
    if not run.baselines or len(run.eval_samples) < 2:  # one evaluation is that of the untouched model itself
        return []
    last = run.eval_samples[max(run.eval_samples)]
    found = []
    for part in _names(last):
        after = _by_problem(last, part, any_words=True)
        sides = [_by_problem(samples, part, any_words=True) for samples in run.baselines]
        best = max((side for side in sides if side), key=lambda side: sum(side.values()) / len(side), default={})
        item = _compare(part, best, after) if best else None
        if item is not None and item.paired:
            title = f"{item.title}, against the best of {len(run.baselines)} other phrasings"
            found.append(replace(item, title=title, phrasing=True))
    found.sort(key=lambda item: not _CORRECTNESS.search(item.name))
    return found[:1]


def _names(samples: Sequence[Sample]) -> list[str]:
    return ["", *dict.fromkeys(name for sample in samples for name in sample.parts)]


def _same_numbers(one: Comparison, other: Comparison) -> bool:
    return (one.after, one.before, one.change) == (other.after, other.before, other.change)


def _by_problem(samples: Sequence[Sample], part: str, *, any_words: bool = False) -> dict[str, float]:
    """Mean outcome per problem, unscored samples left out."""
    outcomes: dict[str, list[float]] = {}
    for sample in samples:
        value = sample.parts.get(part, nan) if part else sample.reward
        if isfinite(value):
            outcomes.setdefault(sample.problem or sample.key if any_words else sample.key, []).append(value)
    return {key: sum(values) / len(values) for key, values in outcomes.items()}


def _compare(part: str, first: Mapping[str, float], last: Mapping[str, float]) -> Comparison | None:
    if not last:
        return None
    share = {*first.values(), *last.values()} <= {0.0, 1.0}
    common = [key for key in last if key in first]
    title = f"Held-out {plain_name(part).lower()}" if part else "Held-out reward"
    if not common:
        after = _level(list(last.values()), share)
        before = _level(list(first.values()), share) if first else None
        change = None if before is None else unpaired(list(first.values()), list(last.values()))
        return Comparison(
            name=part,
            title=title,
            before=before,
            after=after,
            change=change,
            count=len(last),
            paired=False,
            share=share,
        )
    before_values, after_values = [first[key] for key in common], [last[key] for key in common]
    signs = [(b > a) - (b < a) for a, b in zip(before_values, after_values, strict=True)]
    return Comparison(
        name=part,
        title=title,
        before=_level(before_values, share),
        after=_level(after_values, share),
        change=paired_bootstrap(before_values, after_values),
        count=len(common),
        paired=True,
        share=share,
        better=signs.count(1),
        same=signs.count(0),
        worse=signs.count(-1),
    )


def _of_agent(item: Comparison | None) -> Comparison | None:
    """The same numbers as returns of episodes; one of 0 and 1 is a return like any other, not a share."""
    return None if item is None else replace(item, title="Held-out return", share=False, unit="start")


def _level(values: Sequence[float], share: bool) -> Interval:
    return wilson_interval(round(sum(values)), len(values)) if share else bootstrap_interval(values)


def _compare_records(evaluation: Mapping[str, Series]) -> list[Comparison]:
    """Fall back on logged means when the samples were not kept."""
    names = [name for name in evaluation if name.endswith("_mean") and not _NOT_AN_OUTCOME.search(name)]
    head = primary_eval_metric(evaluation)
    names.sort(key=lambda name: name != head)
    found = [item for name in names if (item := _compare_series(name, evaluation)) is not None]
    # What only one evaluation measured (a baseline, say) has no place beside what changed.
    return [item for item in found if item.change is not None] or found


def _compare_series(name: str, evaluation: Mapping[str, Series]) -> Comparison | None:
    pairs = [(s, v) for s, v in zip(evaluation[name].steps, evaluation[name].values, strict=True) if isfinite(v)]
    if not pairs:
        return None
    stem = name.removesuffix("_mean")
    errors = evaluation.get(f"{stem}_stderr", Series([], []))
    stderr = dict(zip(errors.steps, errors.values, strict=True))
    count = int(evaluation["eval/n"].last()) if "eval/n" in evaluation and isfinite(evaluation["eval/n"].last()) else 0
    (first_step, first), (last_step, last) = pairs[0], pairs[-1]
    before_error, after_error = stderr.get(first_step, nan), stderr.get(last_step, nan)
    metric = describe(name)
    plain = plain_name(stem.removeprefix("eval/")).lower()
    return Comparison(
        name=stem.removeprefix("eval/"),
        title=metric.title if metric.title.startswith("Held-out") else f"Held-out {plain}",
        before=None if len(pairs) == 1 else difference_interval(0.0, 0.0, first, before_error),
        after=difference_interval(0.0, 0.0, last, after_error),
        change=None if len(pairs) == 1 else difference_interval(first, before_error, last, after_error),
        count=count,
        paired=False,
        share=metric.share,
    )
