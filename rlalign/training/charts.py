"""Charts as inline SVG, drawn by hand: no script needed to see them, colours from the page's style sheet."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from math import ceil, floor, inf, isfinite, log10, nan

from rlalign.training.metric_names import format_number, format_share

WIDTH, WIDE, HEIGHT = 480.0, 760.0, 208.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 12.0, 12.0, 26.0
_MAX_POINTS = 240
_SMOOTH_FROM = 30
MAX_BARS = 60
_LARGEST = 1e100


@dataclass(frozen=True, kw_only=True)
class Line:
    """One series of a chart. `low` and `high` draw a band, or error bars where `marks` is set."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marks: bool = False
    band: bool = False
    """With `marks`: draw the band too."""
    color: int = 1


@dataclass(frozen=True)
class _Scale:
    """A linear map from data to pixels with the ticks to label it."""

    low: float
    high: float
    start: float
    end: float
    ticks: list[float]

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    unit: str = "",
    share: bool = False,
    from_zero: bool = False,
    wide: bool = False,
) -> str:
    """Draw lines over steps. Values that are not finite leave a gap and a tick on the axis."""
    width = WIDE if wide else WIDTH
    lines = [_thin(_drawable(line)) for line in lines]
    reach = [value for line in lines for column in (line.values, line.low or (), line.high or ()) for value in column]
    y_scale = _scale([v for v in reach if isfinite(v)], HEIGHT - _BOTTOM, _TOP, from_zero=from_zero, share=share)
    x_scale = _step_scale([step for line in lines for step in line.steps], width)
    number = format_share if share else format_number
    body = [_axes(x_scale, y_scale, width, percent=share)]
    for line in lines:
        if line.marks and line.band:
            body.extend(_band(line, x_scale, y_scale))
        body.append(_marks(line, x_scale, y_scale) if line.marks else _curve(line, x_scale, y_scale))
    body.extend(_gaps(line, x_scale) for line in lines)
    hover = _hover(lines, x_scale, unit="%" if share else unit, number=number)
    return _svg(title, _describe(lines, number, "%" if share else unit), body, width=width, hover=hover)


def stacked_bars(
    layers: Sequence[tuple[str, Sequence[float]]], steps: Sequence[float], *, title: str, unit: str
) -> str:
    """Stack layers per step; long runs are averaged into at most MAX_BARS bars."""
    size = max(1, ceil(len(steps) / MAX_BARS))
    slices = [slice(start, start + size) for start in range(0, len(steps), size)]
    bars = [[_mean(values[part]) for _, values in layers] for part in slices]
    totals = [sum((value for value in bar if isfinite(value)), 0.0) for bar in bars]
    y_scale = _scale(totals, HEIGHT - _BOTTOM, _TOP, from_zero=True)
    x_scale = _step_scale(steps, WIDTH, pad=(steps[-1] - steps[0]) / max(2 * len(bars), 2))
    pitch = (WIDTH - _LEFT - _RIGHT) / max(len(bars), 1)
    thickness = max(1.0, min(0.82 * pitch, 30))
    body, hover = [_axes(x_scale, y_scale, WIDTH)], []
    for part, bar in zip(slices, bars, strict=True):
        middle = x_scale(_mean(steps[part]))
        height = 0.0
        for index, value in enumerate(bar):
            if isfinite(value) and value > 0:
                top, base = y_scale(height + value), y_scale(height)
                body.append(
                    f'<rect class="f{index % 6 + 1}" x="{middle - thickness / 2:.1f}" y="{top:.1f}" '
                    f'width="{thickness:.1f}" height="{base - top:.1f}"/>'
                )
                height += value
        text = " · ".join(f"{name} {format_number(v)}" for (name, _), v in zip(layers, bar, strict=True))
        hover.append([round(middle, 1), f"{_step_text(steps[part])}: {text} {unit}"])
    words = [f"{name} {format_number(_mean(values))} {unit} on average" for name, values in layers]
    return _svg(title, "; ".join(words), body, width=WIDTH, hover=hover)


def interval_mark(low: float, estimate: float, high: float, *, reach: float, title: str) -> str:
    """A dot with whiskers against a zero line, for one row of a table. `reach` is the axis' half width."""
    width, height = 160.0, 20.0
    scale = _Scale(-reach, reach, 6.0, width - 6.0, [])
    tone = "good" if low > 0 else "bad" if high < 0 else "flat"
    body = f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="1" y2="{height - 1}"/>'
    if isfinite(low) and isfinite(high):
        body += f'<line class="whisker {tone}" x1="{scale(low):.1f}" x2="{scale(high):.1f}" y1="10" y2="10"/>'
    body += f'<circle class="dot {tone}" cx="{scale(estimate):.1f}" cy="10" r="4"/>'
    return (
        f'<svg class="mark" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{body}</svg>"
    )


def _svg(title: str, description: str, body: Sequence[str], *, width: float, hover: list[list[float | str]]) -> str:
    data = escape(json.dumps(hover, ensure_ascii=True))
    return (
        f'<svg class="plot" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(f"{title}. {description}")}" '
        f'data-hover="{data}" data-top="{_TOP}" data-bottom="{HEIGHT - _BOTTOM}">'
        f"<desc>{escape(description)}</desc>{''.join(body)}</svg>"
    )


def _axes(x_scale: _Scale, y_scale: _Scale, width: float, *, percent: bool = False) -> str:
    parts = []
    for tick in y_scale.ticks:
        y = y_scale(tick)
        text = f"{100 * tick:.3g} %" if percent else format_tick(tick, y_scale.ticks)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{text}</text>')
    for tick in x_scale.ticks:
        x, text = x_scale(tick), format_tick(tick, x_scale.ticks)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{text}</text>')
    base = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)


def format_tick(value: float, ticks: Sequence[float]) -> str:
    """Label a tick with the digits its spacing needs."""
    if value == 0:
        return "0"
    gap = min((b - a for a, b in pairwise(ticks)), default=abs(value))
    if abs(value) >= 1e6 or gap < 1e-4:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", "\u2212")
    return f"{value:,.{max(0, -floor(log10(gap) + 1e-9))}f}".replace("-", "\u2212")


def _curve(line: Line, x_scale: _Scale, y_scale: _Scale) -> str:
    parts = []
    if line.low is not None and line.high is not None:
        parts.extend(_band(line, x_scale, y_scale))
    smooth = _smoothed(line.values) if len(line.values) >= _SMOOTH_FROM else None
    if smooth is not None:
        parts.append(_path(line.steps, line.values, x_scale, y_scale, f"s{line.color} raw"))
    parts.append(_path(line.steps, smooth or line.values, x_scale, y_scale, f"s{line.color}"))
    return "".join(parts)


def _band(line: Line, x_scale: _Scale, y_scale: _Scale) -> list[str]:
    shapes = []
    for run in _runs([low + high for low, high in zip(line.low or (), line.high or (), strict=True)]):
        upper = [(line.steps[i], (line.high or ())[i]) for i in run]
        lower = [(line.steps[i], (line.low or ())[i]) for i in reversed(run)]
        points = " ".join(f"{x_scale(x):.1f},{y_scale(y):.1f}" for x, y in upper + lower)
        if len(run) == 1:
            (step, top), (_, base) = upper[0], lower[0]
            ends = f'x1="{x_scale(step):.1f}" x2="{x_scale(step):.1f}" y1="{y_scale(top):.1f}" y2="{y_scale(base):.1f}"'
            shapes.append(f'<line class="s{line.color} lone" {ends}/>')
            continue
        shapes.append(f'<polygon class="f{line.color} band" points="{points}"/>')
    return shapes


def _path(steps: Sequence[float], values: Sequence[float], x_scale: _Scale, y_scale: _Scale, style: str) -> str:
    parts = []
    for run in _runs(values):
        points = [f"{x_scale(steps[i]):.1f},{y_scale(values[i]):.1f}" for i in run]
        if len(points) == 1:
            x, y = points[0].split(",")
            parts.append(f'<circle class="{style.replace("s", "f", 1)}" cx="{x}" cy="{y}" r="2.6"/>')
        else:
            parts.append(f'<polyline class="{style}" points="{" ".join(points)}"/>')
    return "".join(parts)


def _marks(line: Line, x_scale: _Scale, y_scale: _Scale) -> str:
    parts = [_path(line.steps, line.values, x_scale, y_scale, f"s{line.color} link")]
    for index, (step, value) in enumerate(zip(line.steps, line.values, strict=True)):
        if not isfinite(value):
            continue
        x = x_scale(step)
        low = line.low[index] if line.low else nan
        high = line.high[index] if line.high else nan
        if isfinite(low) and isfinite(high):
            ends = f'y1="{y_scale(low):.1f}" y2="{y_scale(high):.1f}"'
            parts.append(f'<line class="s{line.color}" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        parts.append(f'<circle class="f{line.color} point" cx="{x:.1f}" cy="{y_scale(value):.1f}" r="4"/>')
    return "".join(parts)


def _gaps(line: Line, x_scale: _Scale) -> str:
    base = HEIGHT - _BOTTOM
    bad = [step for step, value in zip(line.steps, line.values, strict=True) if not isfinite(value)]
    return "".join(
        f'<line class="missing" x1="{x_scale(s):.1f}" x2="{x_scale(s):.1f}" y1="{base - 6}" y2="{base}"/>' for s in bad
    )


def _hover(
    lines: Sequence[Line], x_scale: _Scale, *, unit: str, number: Callable[[float], str]
) -> list[list[float | str]]:
    texts: dict[float, list[str]] = {}
    for line in lines:
        for index, (step, value) in enumerate(zip(line.steps, line.values, strict=True)):
            spread = _spread_text(line, index, number)
            name = f"{line.label} " if line.label else ""
            texts.setdefault(step, []).append(f"{name}{number(value)}{spread} {unit}".strip())
    return [[round(x_scale(step), 1), f"{_step_text([step])}: {' · '.join(texts[step])}"] for step in sorted(texts)]


def _spread_text(line: Line, index: int, number: Callable[[float], str]) -> str:
    if line.low is None or line.high is None or not isfinite(line.low[index]):
        return ""
    value, low, high = line.values[index], line.low[index], line.high[index]
    if abs((high - value) - (value - low)) <= 1e-6 * (high - low):
        return f" ± {number(value - low)}"
    return f" ({number(low)} to {number(high)})"


def _step_text(steps: Sequence[float]) -> str:
    return f"step {steps[0]:g}" if len(steps) == 1 else f"steps {steps[0]:g} to {steps[-1]:g}"


def _describe(lines: Sequence[Line], number: Callable[[float], str], unit: str) -> str:
    words = []
    for line in lines:
        finite = [(s, v) for s, v in zip(line.steps, line.values, strict=True) if isfinite(v)]
        if not finite:
            words.append(f"{line.label} has no finite value.")
            continue
        (first_step, first), (last_step, last) = finite[0], finite[-1]
        low, high = min(v for _, v in finite), max(v for _, v in finite)
        words.append(
            f"{line.label or 'Value'}: {number(first)} at step {first_step:g}, {number(last)} at step {last_step:g}, "
            f"between {number(low)} and {number(high)} {unit}".strip()
            + "."
        )
    return " ".join(words)


def _scale(values: Sequence[float], start: float, end: float, *, from_zero: bool, share: bool = False) -> _Scale:
    low, high = min(values, default=0.0), max(values, default=1.0)
    if from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if share:
        high = 1.0 if high > 0.5 else max(high, 0.02)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        pad = 0.5 * abs(high) or 1.0
        low, high = (min(0.0, high), max(0.0, high) + pad) if from_zero else (low - pad, high + pad)
    ticks = _ticks(low, high, 4)
    if not from_zero or low < 0:
        low, high = min(low, ticks[0]), max(high, ticks[-1])
    return _Scale(low, max(high, ticks[-1]), start, end, ticks)


def _step_scale(steps: Sequence[float], width: float, *, pad: float = 0.0) -> _Scale:
    low, high = min(steps, default=0.0), max(steps, default=1.0)
    if low == high:
        return _Scale(low - 1, high + 1, _LEFT, width - _RIGHT, [low])
    ticks = [tick for tick in _ticks(low, high, 6) if low <= tick <= high and tick == round(tick)]
    margin = pad or 0.02 * (high - low)
    return _Scale(low - margin, high + margin, _LEFT, width - _RIGHT, ticks or [low, high])


def _ticks(low: float, high: float, count: int) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** floor(log10(raw)) if raw > 0 and isfinite(raw) else 1.0
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * raw)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(index * step, 12) if step > 1e-9 else index * step for index in range(first, last + 1)]


def _runs(values: Sequence[float]) -> list[list[int]]:
    """Split positions into unbroken stretches of finite values."""
    runs: list[list[int]] = [[]]
    for index, value in enumerate(values):
        if isfinite(value):
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _drawable(line: Line) -> Line:
    """Treat astronomically large values as infinite: their differences would overflow the axis."""
    cut = {
        name: None if column is None else [value if abs(value) < _LARGEST else inf for value in column]
        for name, column in (("values", line.values), ("low", line.low), ("high", line.high))
    }
    return replace(line, **cut)


def _thin(line: Line) -> Line:
    """Average neighbouring steps so that a page holds at most _MAX_POINTS of them."""
    if len(line.steps) <= _MAX_POINTS:
        return line
    size = ceil(len(line.steps) / _MAX_POINTS)

    def bins(column: Sequence[float] | None) -> list[float] | None:
        return None if column is None else [_mean(column[i : i + size]) for i in range(0, len(column), size)]

    return replace(
        line, steps=bins(line.steps) or [], values=bins(line.values) or [], low=bins(line.low), high=bins(line.high)
    )


def _smoothed(values: Sequence[float]) -> list[float]:
    reach = max(1, len(values) // 24)
    return [
        _mean(values[max(0, i - reach) : i + reach + 1]) if isfinite(values[i]) else nan for i in range(len(values))
    ]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if isfinite(value) and abs(value) < inf]
    return sum(finite) / len(finite) if finite else nan
