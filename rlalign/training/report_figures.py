"""Turn the logged metrics, whatever they are, into the figures of the report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan

from rlalign.training.charts import Line, line_chart, stacked_bars
from rlalign.training.metric_names import (
    Metric,
    describe,
    format_duration,
    format_metric,
    format_share,
    group_order,
    is_spread,
)
from rlalign.training.report_compare import primary_eval_metric
from rlalign.training.report_data import RunData, Series
from rlalign.training.report_findings import primary_train_metric

_HEADLINES = (  # one figure each, its metrics in one unit; absent ones are left out; "": the metric's own title
    ("Groups with signal", ("signal/group_frac",)),
    ("Gradient norm", ("optim/grad_norm",)),
    ("Entropy", ("policy/entropy_nats",)),
    ("", ("policy/kl",)),
    ("Clipped decisions", ("policy/clip_low_frac", "policy/clip_high_frac")),
    ("Completion length", ("rollout/completion_tokens_mean",)),
    ("Completions cut at the limit", ("rollout/truncated_frac",)),
    ("Episode length", ("episode/length_mean",)),
    ("", ("value/explained_variance",)),
)
_WHOLE = "time/step_s"
_NOT_PHASES = frozenset({_WHOLE, "time/total_s", "time/elapsed_s"})
_MAX_GROUP_FIGURES = 24
_CENTURY = 3.2e9  # seconds; a longer or negative time is a logging mistake and would drown the rest


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart with its words. `svg` is trusted markup, everything else is text."""

    title: str
    svg: str
    now: str = ""
    note: str = ""
    legend: Sequence[tuple[int, str]] = ()
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One row of the timing table."""

    name: str
    total: str
    per_step: str
    share: float
    color: int


def headline_figures(run: RunData) -> list[Figure]:
    """The figures worth a look in every run that has them."""
    figures = [_progress(run), _parts(run)]
    figures += [_together(title, names, run) for title, names in _HEADLINES]
    figures.append(_time(run))
    return [figure for figure in figures if figure is not None]


def other_figures(run: RunData) -> list[tuple[str, list[Figure]]]:
    """Every metric that no headline figure shows, by the group before the slash."""
    shown = {primary_train_metric(run.train), "reward/std", *_phases(run), *_part_names(run)}
    shown |= {name for _, names in _HEADLINES for name in names}
    main_eval = primary_eval_metric(run.eval)
    shown |= {main_eval, "eval/n"} if main_eval else set()
    series = {name: one for name, one in run.train.items() if name not in shown}
    series |= {name: one for name, one in run.eval.items() if name not in shown and not is_spread(name)}
    groups: dict[str, list[Figure]] = {}
    for name in sorted(series, key=group_order):
        group = groups.setdefault(name.partition("/")[0], [])
        if len(group) < _MAX_GROUP_FIGURES:
            group.append(_single(name, series[name], run))
    return list(groups.items())


def phases(run: RunData) -> list[Phase]:
    """Where the time went, largest first."""
    names = _phases(run)
    totals = {name: _sum(run.train[name].values) for name in names}
    whole = max(_sum(totals.values()), total_seconds(run))
    rest = whole - _sum(totals.values())
    rows = [
        Phase(
            name=describe(name).title,
            total=format_duration(totals[name]),
            per_step=format_metric(name, totals[name] / max(len(run.train[name].values), 1)),
            share=totals[name] / whole if whole > 0 else 0.0,
            color=names.index(name) % 6 + 1,
        )
        for name in sorted(names, key=lambda name: -totals[name])
    ]
    if rows and rest > 0.01 * whole:
        steps = max(len(run.train[_WHOLE].values), 1)
        per_step = format_metric(_WHOLE, rest / steps)
        rows.append(Phase(name="the rest", total=format_duration(rest), per_step=per_step, share=rest / whole, color=0))
    return rows


def total_seconds(run: RunData) -> float:
    """Time spent in training steps, 0 when it was not logged."""
    return _sum(run.train[_WHOLE].values) if _WHOLE in run.train else 0.0


def _sum(seconds: Iterable[float]) -> float:
    return sum((value for value in seconds if 0 <= value < _CENTURY), 0.0)


def _progress(run: RunData) -> Figure | None:
    name, eval_name = primary_train_metric(run.train), primary_eval_metric(run.eval)
    lines, legend = [], []
    if name is not None:
        spread = run.train.get(name.removesuffix("_mean").removesuffix("mean").rstrip("_/") + "/std")
        line = _line(run.train[name], label="training", spread=spread)
        lines.append(line)
        legend.append((1, "training" + (", ± 1 standard deviation" if line.low else "")))
    if eval_name is not None:
        line, how = _held_out(eval_name, run)
        lines.append(line)
        legend.append((2, "held out" + how))
    if not lines:
        return None
    key = name or eval_name or ""
    metric = _described(key, run)
    now = run.train[name].last() if name else run.eval[key].last()
    svg = line_chart(lines, title=metric.title, unit=metric.unit, share=metric.share, wide=True)
    return Figure(title=metric.title, svg=svg, now=format_metric(key, now), note=metric.note, legend=legend, wide=True)


def _held_out(name: str, run: RunData) -> tuple[Line, str]:
    """The held-out curve with its interval where that was logged, else its standard error; and what is drawn."""
    series, stem = run.eval[name], name.removesuffix("_mean")
    ends = [run.eval.get(f"{stem}_{end}") for end in ("low", "high")]
    if None not in ends:
        low, high = (
            [dict(zip(end.steps, end.values, strict=True)).get(s, nan) for s in series.steps] for end in ends if end
        )
        return _with_band(series, low, high), ", 95 % interval over episodes" if run.agent else ", 95 % interval"
    line = _line(series, label="held out", spread=run.eval.get(f"{stem}_stderr"), marks=True, color=2)
    return line, ", ± 1 standard error" if line.low else ""


def _with_band(series: Series, low: list[float], high: list[float]) -> Line:
    return Line(
        label="held out", steps=series.steps, values=series.values, low=low, high=high, marks=True, band=True, color=2
    )


def _described(name: str, run: RunData) -> Metric:
    return describe(name, agent=run.agent, generator=run.generator)


def _line(series: Series, *, label: str, spread: Series | None = None, marks: bool = False, color: int = 1) -> Line:
    if spread is None:
        return Line(label=label, steps=series.steps, values=series.values, marks=marks, color=color)
    around = dict(zip(spread.steps, spread.values, strict=True))
    half = [around.get(step, nan) for step in series.steps]
    low = [value - h for value, h in zip(series.values, half, strict=True)]
    high = [value + h for value, h in zip(series.values, half, strict=True)]
    return Line(label=label, steps=series.steps, values=series.values, low=low, high=high, marks=marks, color=color)


def _part_names(run: RunData) -> list[str]:
    found = [name for name in run.train if name.startswith("reward/") and name.endswith("_mean")]
    if run.generator:  # a simulator's other outcomes are degrees and counts, which no axis fits together
        judged = {name for samples in run.eval_samples.values() for sample in samples for name in sample.parts}
        found = [name for name in found if name.removeprefix("reward/").removesuffix("_mean") in judged]
    return sorted(found)[:6]


def _parts(run: RunData) -> Figure | None:
    names = _part_names(run)
    if not names or names == [primary_train_metric(run.train)]:
        return None
    titles = [name.removeprefix("reward/").removesuffix("_mean") for name in names]  # as their authors wrote them
    return _overlay("Outcomes in training" if run.generator else "Reward by function", names, titles, run)


def _together(title: str, names: Sequence[str], run: RunData) -> Figure | None:
    present = [name for name in names if name in run.train]
    if not present:
        return None
    return _overlay(
        title or _described(present[0], run).title, present, [_described(name, run).title for name in present], run
    )


def _overlay(title: str, names: Sequence[str], labels: Sequence[str], run: RunData) -> Figure:
    metric = _described(names[0], run)
    single = len(names) == 1
    lines = [
        _line(run.train[name], label=label, color=index + 1)
        for index, (name, label) in enumerate(zip(names, labels, strict=True))
    ]
    return Figure(
        title=title,
        svg=line_chart(lines, title=title, unit=metric.unit, share=metric.share, from_zero=metric.from_zero),
        now=format_metric(names[0], run.train[names[0]].last()) if single else "",
        note=metric.note if single else "",
        legend=() if single else [(index + 1, label) for index, label in enumerate(labels)],
    )


def _single(name: str, series: Series, run: RunData) -> Figure:
    metric = _described(name, run)
    spread = run.eval.get(name.removesuffix("_mean") + "_stderr") if name in run.eval else None
    line = _line(series, label=metric.title, spread=spread, marks=name in run.eval, color=2 if name in run.eval else 1)
    return Figure(
        title=metric.title,
        svg=line_chart([line], title=metric.title, unit=metric.unit, share=metric.share, from_zero=metric.from_zero),
        now=format_metric(name, series.last()),
        note=metric.note or name,
    )


def _phases(run: RunData) -> list[str]:
    order = ("time/generate_s", "time/collect_s", "time/reward_s", "time/train_s", "time/eval_s")
    found = [name for name in run.train if name.startswith("time/") and name.endswith("_s") and name not in _NOT_PHASES]
    return sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))


def _time(run: RunData) -> Figure | None:
    names = _phases(run)
    if not names:
        return None
    steps = sorted({step for name in names for step in run.train[name].steps})
    layers = []
    for name in names:
        at = dict(zip(run.train[name].steps, run.train[name].values, strict=True))
        layers.append((describe(name).title, [_sum([at.get(step, 0.0)]) for step in steps]))
    main = phases(run)[0]
    title = "Time per iteration" if run.agent else "Time per step"
    return Figure(
        title=title,
        svg=stacked_bars(layers, steps, title=title, unit="s"),
        now=f"{main.name} {format_share(main.share)} %",
        legend=[(index % 6 + 1, title) for index, (title, _) in enumerate(layers)],
    )
