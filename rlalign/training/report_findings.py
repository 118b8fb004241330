"""What a run shows, in one honest sentence, and what about it deserves a look."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt

from rlalign.training.intervals import Interval
from rlalign.training.metric_names import describe, format_number, format_share
from rlalign.training.report_compare import Comparison, compare, primary_eval_metric, unpaired
from rlalign.training.report_data import RunData, Series

_FEW_PROBLEMS = 30
_ONLY_TRAINING = {
    False: "so this says what the policy was trained on, not what it learned in general",
    True: "so this is what the policy earned while it explored, averaged over recent episodes",
}
_MORE_SIGNAL = {
    False: "Prompts of middling difficulty, a higher temperature or more completions per prompt bring signal back.",
    True: "Starts of middling difficulty, more exploration or a larger `group_size` bring signal back.",
}
_IDENTICAL = {False: "identical rewards", True: "identical outcomes"}
_OF_GENERATORS = {
    "more_signal": "Prompts of middling difficulty, a graded reward, more noise or a larger `group_size` bring signal "
    "back.",
    "only_training": "so this is the reward of samples drawn with noise in their steps, as training draws them",
    "suspicion": "the generator may be exploiting the reward. Look at the pictures, and at fidelity and diversity.",
}
_SUSPICION = {
    False: "the policy may be exploiting the reward. Read the worst held-out samples below.",
    True: "exploration may do better here than the most probable actions (`eval.deterministic`), or statistics differ.",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The sentence at the top of the report."""

    sentence: str
    tone: str
    """good, bad, flat (no change beyond noise) or none (nothing to compare)."""
    detail: str = ""


@dataclass(frozen=True)
class Note:
    """Something the reader should know. `tone` is warn or info."""

    text: str
    tone: str = "warn"


@dataclass(frozen=True, kw_only=True)
class Findings:
    comparisons: list[Comparison]
    """The headline first."""
    verdict: Verdict
    notes: list[Note] = field(default_factory=list)


def find(run: RunData) -> Findings:
    """Compare the first evaluation with the last and word the result."""
    comparisons = compare(run)
    verdict = _verdict(run, comparisons)
    return Findings(comparisons=comparisons, verdict=verdict, notes=_notes(run, comparisons))


def primary_train_metric(train: Mapping[str, Series]) -> str | None:
    """The curve that says how training went."""
    preferred = ("episode/return_mean", "reward/mean", "return/mean", "episode/return")
    found = [name for name in preferred if name in train]
    found += sorted(name for name in train if name.split("/")[0] in ("reward", "episode", "return", "score"))
    return found[0] if found else None


def _verdict(run: RunData, comparisons: Sequence[Comparison]) -> Verdict:
    if comparisons and comparisons[0].change is not None:
        return _beside_baseline(_compared(comparisons[0]), comparisons)
    if comparisons:
        only = comparisons[0]
        return Verdict(
            sentence=f"{only.title} is {only.number(only.after.estimate)}, with no second evaluation to compare with.",
            tone="none",
            detail=_range(only, only.after) + _problems(only),
        )
    return _from_training(run)


def _compared(item: Comparison) -> Verdict:
    change, before = item.change, item.before
    if change is None or before is None:
        raise ValueError("a comparison needs both sides.")
    ends = f"from {item.number(before.estimate)} to {item.number(item.after.estimate)}"
    size = f"{item.difference(change.estimate)}{' points' if item.share else ''}"
    if not change.defined:
        return Verdict(
            sentence=f"{item.title} went {ends} ({size}), with too little data to say whether that is more than noise.",
            tone="none",
            detail=_problems(item).strip(),
        )
    how = f"paired bootstrap over the same {item.unit}s" if item.paired else "the two evaluations taken as independent"
    between = f"95 % interval {item.difference(change.low)} to {item.difference(change.high)}"
    detail = f"{between}, {how}.{_problems(item)}"
    if change.sign == 0:
        return Verdict(
            sentence=f"{item.title} did not change by more than the noise: {ends} ({size}).", tone="flat", detail=detail
        )
    verb, tone = ("rose", "good") if change.sign > 0 else ("fell", "bad")
    return Verdict(sentence=f"{item.title} {verb} {ends}: {size}.", tone=tone, detail=detail)


def _beside_baseline(verdict: Verdict, comparisons: Sequence[Comparison]) -> Verdict:
    """Say it too when the untouched model was also asked in other words; the fair gain is the smaller one."""
    item = next((item for item in comparisons if item.phrasing), None)
    if item is None or item.change is None or item.before is None:
        return verdict
    points = " points" if item.share else ""
    detail = (
        f"{verdict.detail} Against the untouched model's best other phrasing ({item.number(item.before.estimate)}): "
        f"{item.difference(item.change.estimate)}{points}, 95 % interval {item.difference(item.change.low)} to "
        f"{item.difference(item.change.high)}."
    )
    # A gain over a clumsy prompt alone is not an improvement of the model.
    tone = "flat" if verdict.tone == "good" and item.change.sign <= 0 else verdict.tone
    return replace(verdict, detail=detail, tone=tone)


def _range(item: Comparison, interval: Interval) -> str:
    if not interval.defined:
        return ""
    return f"95 % interval {item.number(interval.low)} to {item.number(interval.high)}."


def _problems(item: Comparison) -> str:
    if item.count == 0:
        return ""
    unit = item.unit if item.count == 1 else f"{item.unit}s"
    few = " Few: treat the interval as rough." if item.count < _FEW_PROBLEMS else ""
    return f" {item.count:,} {unit}.{few}"


def _from_training(run: RunData) -> Verdict:
    name = primary_train_metric(run.train)
    values = [v for v in run.train[name].values if isfinite(v)] if name else []
    if name is None or not values:
        return Verdict(sentence="Nothing was measured: the run recorded no reward and no evaluation.", tone="none")
    title, unit = f"Training {describe(name).title.lower()}", "iteration" if run.agent else "step"
    window = len(values) // 5
    if window < 2:
        steps = f"1 {unit}" if len(values) == 1 else f"{len(values)} {unit}s"
        now = f"{title.lower()} {format_number(values[-1])}"
        return Verdict(
            sentence=f"Too short to judge: {steps} recorded, {now}, nothing held out.",
            tone="none",
        )
    change = unpaired(values[:window], values[-window:])
    ends = f"from {format_number(sum(values[:window]) / window)} to {format_number(sum(values[-window:]) / window)}"
    detail = (
        f"Mean of the first and last {window} {unit}s, difference {format_number(change.estimate, signed=True)}, "
        f"95 % interval {format_number(change.low, signed=True)} to {format_number(change.high, signed=True)} "
        f"with {unit}s taken as independent."
        f" Nothing was held out, {_OF_GENERATORS['only_training'] if run.generator else _ONLY_TRAINING[run.agent]}."
    )
    if change.sign == 0:
        return Verdict(sentence=f"{title} did not change by more than the noise: {ends}.", tone="flat", detail=detail)
    return Verdict(sentence=f"{title} {'rose' if change.sign > 0 else 'fell'} {ends}.", tone="none", detail=detail)


def _notes(run: RunData, comparisons: Sequence[Comparison]) -> list[Note]:
    notes = [
        _reward_note(run),
        _signal_note(run),
        _phrasing_note(comparisons),
        _hacking_note(run, comparisons),
        _best_note(run),
        _length_note(run),
        _entropy_note(run),
    ]
    found = [note for note in notes if note is not None]
    found += _non_finite_notes(run)
    unscored = sum(not isfinite(s.reward) for s in next(reversed(run.eval_samples.values()), []))
    if unscored:
        found.append(
            Note(f"{unscored} samples of the last evaluation have no score and are left out of the comparison.")
        )
    found += [Note(problem, "info") for problem in run.problems]
    return found


def _reward_note(run: RunData) -> Note | None:
    series = run.train.get("reward/error_frac")
    values = [v for v in series.values if isfinite(v)] if series else []
    if not values or max(values) <= 0:
        return None
    return Note(
        f"{format_share(sum(values) / len(values))} % of the reward calls failed or timed out, at worst "
        f"{format_share(max(values))} % in a step; those samples count as unscored. See Errors."
    )


def _phrasing_note(comparisons: Sequence[Comparison]) -> Note | None:
    item = next((item for item in comparisons if item.phrasing and item.change is not None), None)
    if item is None or item.change is None or item.change.sign > 0:
        return None
    return Note(
        "The untouched model does as well when asked in other words: what training changed may be the answer's form, "
        "not the skill."
    )


def _signal_note(run: RunData) -> Note | None:
    recent = _recent(run, "signal/group_frac")
    if recent is None or recent >= 0.25:
        return None
    return Note(
        f"Lately {format_share(1 - recent)} % of the groups had {_IDENTICAL[run.agent]} and gave no gradient. "
        f"{_OF_GENERATORS['more_signal'] if run.generator else _MORE_SIGNAL[run.agent]}"
    )


def _hacking_note(run: RunData, comparisons: Sequence[Comparison]) -> Note | None:
    name = primary_train_metric(run.train)
    head = next((item for item in comparisons if item.change is not None), None)
    if name is None or head is None or head.change is None:
        return None
    values = [v for v in run.train[name].values if isfinite(v)]
    window = len(values) // 5
    rose = window >= 2 and unpaired(values[:window], values[-window:]).sign > 0
    if rose and head.change.sign < 0:
        return Note(
            f"Training {describe(name).title.lower()} rose while {head.title[:1].lower() + head.title[1:]} fell: "
            f"{_OF_GENERATORS['suspicion'] if run.generator else _SUSPICION[run.agent]}"
        )
    return None


def _best_note(run: RunData) -> Note | None:
    name = primary_eval_metric(run.eval)
    if name is None:
        return None
    points = [(v, s) for s, v in zip(run.eval[name].steps, run.eval[name].values, strict=True) if isfinite(v)]
    if len(points) < 3:
        return None
    best, step = max(points)
    errors = run.eval.get(name.removesuffix("_mean") + "_stderr", Series([], []))
    noise = sqrt(2) * errors.last() if isfinite(errors.last()) else 0.0
    if best - points[-1][0] <= noise:
        return None
    return Note(
        f"The best evaluation was at step {step:g} ({format_number(best)}), "
        f"not at the end ({format_number(points[-1][0])}): prefer that checkpoint if it was kept."
    )


def _length_note(run: RunData) -> Note | None:
    recent = _recent(run, "rollout/truncated_frac")
    if recent is None or recent < 0.2:
        return None
    return Note(f"Lately {format_share(recent)} % of the completions were cut at the length limit before they ended.")


def _entropy_note(run: RunData) -> Note | None:
    series = run.train.get("policy/entropy_nats")
    recent = _recent(run, "policy/entropy_nats")
    if series is None or recent is None or len(series.values) < 10:
        return None
    start = next((v for v in series.values if isfinite(v)), 0.0)
    if start <= 0 or recent > 0.1 * start:
        return None
    return Note(
        f"Entropy fell from {format_number(start)} to {format_number(recent)} nats: the policy hardly explores now."
    )


def _recent(run: RunData, name: str, count: int = 10) -> float | None:
    values = [v for v in run.train[name].values[-count:] if isfinite(v)] if name in run.train else []
    return sum(values) / len(values) if values else None


def _non_finite_notes(run: RunData) -> list[Note]:
    notes = []
    for name, series in run.train.items():
        bad = [step for step, value in zip(series.steps, series.values, strict=True) if not isfinite(value)]
        if bad:
            times = "once" if len(bad) == 1 else f"{len(bad)} times"
            notes.append(Note(f"`{name}` was not a finite number {times}, first at step {bad[0]:g}."))
    return notes[:6]
