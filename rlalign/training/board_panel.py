"""What the live board knows, and how it is drawn: plain words for logs, a rich panel for terminals."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import TYPE_CHECKING

from rlalign.training.metric_names import describe, format_duration, format_number, format_share, plain_name
from rlalign.training.untrusted_text import one_line

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

REWARD = ("episode/return_mean", "reward/mean", "return/mean")
_SPREAD = ("episode/return_std", "reward/std", "return/std")
_CLOCKS = ("throughput/env_steps_per_s", "throughput/updates_per_s")
"""Where the clock counts more than one step per record, one of these says how fast it runs."""
_NOT_PHASES = frozenset({"time/step_s", "time/total_s", "time/elapsed_s"})
_SPARKS = " ▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 48
_PHASE_WIDTH = 24
_PHASE_STYLES = ("blue", "green", "magenta", "yellow", "cyan", "red")


@dataclass(kw_only=True)
class BoardState:
    """The numbers on the board."""

    title: str
    total_steps: int
    doing: str = ""
    """What goes on before there are numbers."""
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=4_000))
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    step_counts: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    """Steps of the clock in each of `step_seconds`: 1, or what an agent's iteration took."""
    sample: tuple[str, str, float | None] | None = None

    @property
    def eta_seconds(self) -> float:
        """Seconds to the last step at the pace of the last twenty records; NaN before the first."""
        if not self.step_seconds:
            return nan
        return max(self.total_steps - self.step, 0) * sum(self.step_seconds) / sum(self.step_counts)

    @property
    def episodic(self) -> bool:
        """An agent's run: its clock counts decisions or updates, and records are iterations."""
        return clock_speed(self.metrics) is not None


def first_of(metrics: Mapping[str, float], names: tuple[str, ...]) -> float:
    """The first of several names for the same thing that was logged, NaN when none was."""
    return next((metrics[name] for name in names if name in metrics), nan)


def clock_speed(metrics: Mapping[str, float]) -> float | None:
    """Steps of an agent's clock per second; None where the clock counts records."""
    speed = first_of(metrics, _CLOCKS)
    return speed if isfinite(speed) and speed > 0 else None


def figures(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """The numbers people look at, without those that were not measured."""
    speed = next((name for name in metrics if name.startswith("throughput/")), "")
    reward_name = next((name for name in REWARD if name in metrics), "")
    spread = first_of(metrics, _SPREAD)
    reward = _shown(metrics, reward_name) + (f" ±{format_number(spread)}" if isfinite(spread) else "")
    found = [
        ("reward" if reward_name == "reward/mean" else "return", reward if reward_name else ""),
        ("signal", f"{format_share(metrics['signal/group_frac'])}%" if "signal/group_frac" in metrics else ""),
        ("entropy", _shown(metrics, "policy/entropy_nats")),
        ("kl", _shown(metrics, "policy/kl")),
        ("grad", _shown(metrics, "optim/grad_norm")),
        ("speed", f"{_shown(metrics, speed)} {describe(speed).unit}" if speed else ""),
    ]
    return [(label, value) for label, value in found if value]


def step_line(state: BoardState) -> str:
    """One step in one line."""
    words = [f"step  {state.step:>{max(6, len(str(state.total_steps)))}}/{state.total_steps}"]
    words += [f"{label} {value}" for label, value in figures(state.metrics)]
    if not state.episodic:  # an agent's speed stands among its figures
        words.append(f"{format_duration(state.step_seconds[-1] if state.step_seconds else nan)}/step")
    words.append(f"ETA {format_duration(state.eta_seconds)}")
    return "  ".join(words)


def evaluation_words(numbers: Mapping[str, float]) -> str:
    """The means of an evaluation with their standard errors."""
    words = []
    for name, value in numbers.items():
        stem = name.removeprefix("eval/")
        if stem.endswith(("_mean", "_frac")):
            error = numbers.get(name.removesuffix("_mean") + "_stderr", nan)
            spread = f" ±{format_number(error)}" if isfinite(error) else ""
            shown = f"{format_share(value)}%" if describe(name).share else format_number(value)
            words.append(f"{_evaluated(name)} {shown}{spread}")
    count = numbers.get("eval/n", nan)
    kept = words[:4]
    return "  ".join([*kept, f"(n={count:.0f})"] if isfinite(count) else kept) or "done"


def _evaluated(name: str) -> str:
    """What an evaluation's number is called on one line, where "held-out" goes without saying."""
    if name == "eval/best_baseline_mean":
        return "best other phrasing"
    return plain_name(name.removeprefix("eval/").removesuffix("_mean").removesuffix("_frac")).lower()


def sparkline(values: list[float], *, width: int = _SPARK_WIDTH) -> str:
    """Draw values as blocks, averaged into at most `width` of them; a gap where nothing was finite."""
    size = max(1, -(-len(values) // width))
    means = []
    for start in range(0, len(values), size):
        finite = [value for value in values[start : start + size] if isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else nan)
    shown = [value for value in means if isfinite(value)]
    low, reach = min(shown, default=0.0), max(shown, default=0.0) - min(shown, default=0.0)
    return "".join(_spark(value, low, reach) for value in means)


def panel(state: BoardState) -> "RenderableType":
    """Draw the board. Text goes in as rich.text.Text throughout, so nothing in it is read as markup."""
    from rich.console import Group
    from rich.panel import Panel

    optional = [_sparkline_row(state), _evaluation_row(state), _phases_row(state), *_sample_rows(state)]
    rows = [_progress_row(state), _figures_row(state), *[row for row in optional if row is not None]]
    title = _line((state.title, "bold"))
    return Panel(Group(*rows), title=title, title_align="left", border_style="dim", padding=(0, 1))


def _progress_row(state: BoardState) -> "RenderableType":
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    total = max(state.total_steps, 1)
    row = Table.grid(padding=(0, 2), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    bar = ProgressBar(total=total, completed=min(state.step, total), complete_style="blue", finished_style="green")
    ends = (
        _line((f"step {state.step:,}/{state.total_steps:,}", "bold")),
        _line((f"ETA {format_duration(state.eta_seconds)}", "")),
    )
    row.add_row(ends[0], bar, ends[1])
    return row


def _figures_row(state: BoardState) -> "RenderableType":
    from rich.table import Table

    found = figures(state.metrics)
    if not found:
        return _line(("no numbers in this step" if state.step else state.doing or "waiting for the first step", "dim"))
    table = Table.grid(padding=(0, 3))
    table.add_row(*[_line((label, "dim")) for label, _ in found])
    table.add_row(*[_line((value, "bold red" if value.startswith("n/a") else "bold")) for _, value in found])
    return table


def _sparkline_row(state: BoardState) -> "Text | None":
    finite = [value for value in state.rewards if isfinite(value)]
    if len(finite) < 2:
        return None
    ends = f"  {format_number(min(finite))} to {format_number(max(finite))}"
    label = "return  " if state.episodic else "reward  "
    return _line((label, "dim"), (sparkline(list(state.rewards)), "green"), (ends, "dim"))


def _evaluation_row(state: BoardState) -> "Text | None":
    if not state.evaluations:
        return None
    step, numbers = state.evaluations[-1]
    line = _line(("eval    ", "dim"), (evaluation_words(numbers), "bold"), (f"  at step {step}", "dim"))
    if len(state.evaluations) > 1:
        first_step, first = state.evaluations[0]
        line.append(f"; before, at step {first_step}: {evaluation_words(first)}", style="dim")
    return line


def _phases_row(state: BoardState) -> "Text | None":
    seconds = {
        name: value
        for name, value in state.metrics.items()
        if name.startswith("time/") and name not in _NOT_PHASES and isfinite(value) and value > 0
    }
    if not seconds:
        return None
    whole = sum(seconds.values())
    line = _line(("time    ", "dim"))
    for index, (name, value) in enumerate(seconds.items()):
        line.append("━" * max(1, round(_PHASE_WIDTH * value / whole)), style=_PHASE_STYLES[index % len(_PHASE_STYLES)])
        line.append(f" {describe(name).title} {100 * value / whole:.0f}%  ")
    return line


def _sample_rows(state: BoardState) -> "list[Text]":
    if state.sample is None:
        return []
    prompt, completion, reward = state.sample
    score = "" if reward is None else f"  reward {format_number(reward)}"
    return [
        _line(("prompt  ", "dim"), (one_line(prompt, limit=160), "")),
        _line(("answer  ", "dim"), (one_line(completion, limit=240), "italic"), (score, "bold")),
    ]


def _line(*parts: tuple[str, str]) -> "Text":
    from rich.text import Text

    return Text.assemble(*parts)


def _spark(value: float, low: float, reach: float) -> str:
    if not isfinite(value):
        return _SPARKS[0]
    return _SPARKS[1 + round(7 * (value - low) / reach) if reach > 0 else 4]


def _shown(metrics: Mapping[str, float], name: str) -> str:
    return format_number(metrics[name]) if name in metrics else ""
