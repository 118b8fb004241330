"""What several seeds of one config say together: interquartile means with intervals over seeds, on one page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from rlalign.training.charts import Line, line_chart
from rlalign.training.files import write_atomic
from rlalign.training.intervals import Interval, bootstrap_interval, interquartile_mean
from rlalign.training.metric_names import describe, format_duration, format_metric, is_spread
from rlalign.training.report import fill, subtitle
from rlalign.training.report_compare import primary_eval_metric
from rlalign.training.report_data import RunData, Series, read_run
from rlalign.training.report_figures import Figure, total_seconds
from rlalign.training.report_findings import primary_train_metric
from rlalign.training.seeds import read_plan, seed_directory, status_of
from rlalign.training.untrusted_text import one_line

AGGREGATE = "aggregate.json"
_TEMPLATE = "seeds_template.html.j2"
_GRID = 120
"""Points of a curve over seeds whose records do not stand at the same steps."""
_CURVE_RESAMPLES = 2_000
_FEW_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """One metric over seeds."""

    name: str
    interval: Interval
    values: dict[int, float]
    """Seed -> its value at the end."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the run: the interquartile mean of the seeds and its interval, step by step."""

    name: str
    steps: list[float]
    middle: list[float]
    low: list[float]
    high: list[float]


def write_aggregate(folder: Path) -> Path:
    """Write `aggregate.json` and `report.html` over the seeds that are done; returns the page's path.

    Raises:
        RunDirectoryError: The plan cannot be read.
        OSError: The files cannot be written.
    """
    plan = read_plan(folder)
    statuses = {seed: status_of(folder, seed) for seed in plan.seeds}
    runs = {seed: read_run(path) for seed in plan.seeds if (path := seed_directory(folder, seed)).is_dir()}
    done = {seed: run for seed, run in runs.items() if statuses[seed] == "done"}
    found, curves = aggregates(done), curves_of(done)
    write_atomic(folder / AGGREGATE, json.dumps(_as_data(statuses, found, curves), indent=1) + "\n")
    page = folder / "report.html"
    write_atomic(page, fill(_TEMPLATE, _view(folder, statuses, runs, found, curves)))
    return page


def aggregates(runs: Mapping[int, RunData]) -> list[Aggregate]:
    """The last evaluation of every seed, and its training curve's last tenth; the headline first."""
    if not runs:
        return []
    first = next(iter(runs.values()))
    head = primary_eval_metric(first.eval)
    names = sorted((n for n in first.eval if not is_spread(n) and n != "eval/n"), key=lambda name: name != head)
    found = {name: {seed: run.eval[name].last() for seed, run in runs.items() if name in run.eval} for name in names}
    train = primary_train_metric(first.train)
    if train is not None:
        found[train] = {seed: _last_tenth(run.train[train]) for seed, run in runs.items() if train in run.train}
    return [
        Aggregate(
            name=name, interval=bootstrap_interval(list(known.values()), statistic=interquartile_mean), values=known
        )
        for name, values in found.items()
        if (known := {seed: value for seed, value in values.items() if isfinite(value)})
    ]


def curves_of(runs: Mapping[int, RunData]) -> list[Curve]:
    """The held-out curve and the training curve over seeds."""
    if not runs:
        return []
    first = next(iter(runs.values()))
    evaluation, train = primary_eval_metric(first.eval), primary_train_metric(first.train)
    sides = [(evaluation, [run.eval for run in runs.values()]), (train, [run.train for run in runs.values()])]
    found = [_curve(name, [logged[name] for logged in side if name in logged]) for name, side in sides if name]
    return [curve for curve in found if curve is not None]


def _curve(name: str, series: Sequence[Series]) -> Curve | None:
    finite = [_finite(one) for one in series]
    finite = [one for one in finite if one.steps]
    if not finite:
        return None
    steps = _grid([one.steps for one in finite])
    columns = np.stack([np.interp(steps, one.steps, one.values) for one in finite], axis=1)
    marks = [bootstrap_interval(column, statistic=interquartile_mean, resamples=_CURVE_RESAMPLES) for column in columns]
    return Curve(
        name=name,
        steps=steps,
        middle=[mark.estimate for mark in marks],
        low=[mark.low for mark in marks],
        high=[mark.high for mark in marks],
    )


def _grid(steps: Sequence[Sequence[float]]) -> list[float]:
    """Steps at which to compare: record by record where all seeds have equally many (few), else evenly spread."""
    counts = {len(one) for one in steps}
    if len(counts) == 1 and max(counts) <= _GRID:
        return np.mean(np.asarray(steps, dtype=float), axis=0).tolist()
    low, high = max(one[0] for one in steps), min(one[-1] for one in steps)
    if low >= high:
        return [float(low)]
    return np.linspace(low, high, min(_GRID, max(counts))).tolist()


def _finite(series: Series) -> Series:
    kept = [(step, value) for step, value in zip(series.steps, series.values, strict=True) if isfinite(value)]
    return Series([step for step, _ in kept], [value for _, value in kept])


def _last_tenth(series: Series) -> float:
    values = _finite(series).values
    return float(np.mean(values[-max(1, len(values) // 10) :])) if values else float("nan")


def _as_data(statuses: Mapping[int, str], found: Sequence[Aggregate], curves: Sequence[Curve]) -> dict[str, Any]:
    return {
        "statistic": "interquartile mean over seeds; 95 % percentile bootstrap interval over seeds",
        "seeds": {str(seed): status for seed, status in statuses.items()},
        "metrics": {
            item.name: {
                "estimate": item.interval.estimate,
                "low": _or_null(item.interval.low),
                "high": _or_null(item.interval.high),
                "values": {str(seed): value for seed, value in item.values.items()},
            }
            for item in found
        },
        "curves": {
            curve.name: {
                "steps": curve.steps,
                "estimate": curve.middle,
                "low": [_or_null(value) for value in curve.low],
                "high": [_or_null(value) for value in curve.high],
            }
            for curve in curves
        },
    }


def _or_null(value: float) -> float | None:
    return value if isfinite(value) else None


def _view(
    folder: Path,
    statuses: Mapping[int, str],
    runs: Mapping[int, RunData],
    found: Sequence[Aggregate],
    curves: Sequence[Curve],
) -> dict[str, Any]:
    agent = any(run.agent for run in runs.values())
    done = [seed for seed, status in statuses.items() if status == "done"]
    some = next(iter(runs.values()), None)
    head = found[0] if found else None
    config = {} if some is None else {key: value for key, value in some.config.items() if key != "seed"}
    return {
        "name": one_line(folder.resolve().name, limit=80),
        "subtitle": subtitle(config),
        "status": (f"{len(done)} of {len(statuses)} seeds done", "good" if len(done) == len(statuses) else "flat"),
        "verdict": _verdict(head, curves, agent=agent),
        "detail": "" if head is None else _detail(head),
        "metrics": [_row(item, agent=agent) for item in found],
        "figures": [_figure(curve, agent=agent) for curve in curves] + _every_seed(runs, agent=agent),
        "seeds": [_seed_row(seed, status, runs.get(seed), head) for seed, status in statuses.items()],
        "resume": "" if len(done) == len(statuses) else f"rlalign resume {folder}",
        "agent": agent,
    }


def _verdict(head: Aggregate | None, curves: Sequence[Curve], *, agent: bool) -> str:
    if head is None:
        return "No seed is done yet."
    title, now = describe(head.name, agent=agent).title, format_metric(head.name, head.interval.estimate)
    curve = next((curve for curve in curves if curve.name == head.name and len(curve.steps) > 1), None)
    seeds = f"interquartile mean of {len(head.values)} seeds" if len(head.values) > 1 else "one seed"
    if curve is None or curve.steps[0] > 0:
        return f"{title}: {now} ({seeds})."
    return f"{title} from {format_metric(head.name, curve.middle[0])} to {now} ({seeds})."


def _detail(head: Aggregate) -> str:
    low, high = (format_metric(head.name, pick(head.values.values())) for pick in (min, max))
    ends = f"Seeds lie between {low} and {high}."
    few = " Few seeds: treat the interval as rough." if len(head.values) < _FEW_SEEDS else ""
    if not head.interval.defined:
        return ends
    return f"95 % bootstrap interval over seeds {_interval(head)}. {ends}{few}"


def _interval(item: Aggregate) -> str:
    if not item.interval.defined:
        return ""
    return f"{format_metric(item.name, item.interval.low)} to {format_metric(item.name, item.interval.high)}"


def _row(item: Aggregate, *, agent: bool) -> tuple[str, str, str, str, str]:
    low, high = (format_metric(item.name, pick(item.values.values())) for pick in (min, max))
    title = describe(item.name, agent=agent).title
    title = title if item.name.startswith("eval/") else f"Training {title.lower()}, last tenth"
    return title, format_metric(item.name, item.interval.estimate), _interval(item), low, high


def _figure(curve: Curve, *, agent: bool) -> Figure:
    metric = describe(curve.name, agent=agent)
    color = 2 if curve.name.startswith("eval/") else 1
    title = metric.title if color == 2 else f"Training {metric.title.lower()}"
    line = Line(
        label="interquartile mean", steps=curve.steps, values=curve.middle, low=curve.low, high=curve.high, color=color
    )
    return Figure(
        title=title,
        svg=line_chart([line], title=title, unit=metric.unit, share=metric.share, wide=True),
        now=format_metric(curve.name, curve.middle[-1]),
        legend=[(color, "interquartile mean of the seeds, 95 % interval over seeds")],
        wide=True,
    )


def _every_seed(runs: Mapping[int, RunData], *, agent: bool) -> list[Figure]:
    """All seeds in one figure, by the curve that most of them have."""
    for held_out in (True, False):
        sides = {seed: run.eval if held_out else run.train for seed, run in runs.items()}
        name = next((primary_eval_metric(s) if held_out else primary_train_metric(s) for s in sides.values()), None)
        if name is None or all(len(side[name].steps) < 2 for side in sides.values() if name in side):
            continue
        metric = describe(name, agent=agent)
        shown = [(seed, side[name]) for seed, side in sides.items() if name in side]
        lines = [
            Line(label=f"seed {seed}", steps=one.steps, values=one.values, color=index % 6 + 1)
            for index, (seed, one) in enumerate(shown)
        ]
        svg = line_chart(lines, title="Every seed", unit=metric.unit, share=metric.share, wide=True)
        legend = [(index % 6 + 1, f"seed {seed}") for index, (seed, _) in enumerate(shown)]
        return [Figure(title=f"{metric.title}, every seed", svg=svg, legend=legend, wide=True)]
    return []


def _seed_row(seed: int, status: str, run: RunData | None, head: Aggregate | None) -> dict[str, str]:
    value = head.values.get(seed) if head is not None else None
    page = "" if run is None or not (run.run_dir / "report.html").is_file() else f"./seed-{seed}/report.html"
    return {
        "seed": str(seed),
        "status": one_line(status, limit=40),
        "value": "" if head is None or value is None else format_metric(head.name, value),
        "steps": "" if run is None else f"{run.last_step:,}",
        "time": "" if run is None or not total_seconds(run) else format_duration(total_seconds(run)),
        "page": page,
    }
