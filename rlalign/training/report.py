"""Draw report.html from a run directory alone: one file, no network, readable on a crash as on success."""

import base64
import hashlib
import json
import re
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from rlalign.training import report_samples
from rlalign.training.charts import interval_mark
from rlalign.training.files import process_is_alive, write_atomic
from rlalign.training.intervals import Interval
from rlalign.training.metric_names import describe, format_duration, format_metric, format_number
from rlalign.training.report_compare import Comparison
from rlalign.training.report_data import RunData, read_run
from rlalign.training.report_figures import headline_figures, other_figures, phases, total_seconds
from rlalign.training.report_findings import Findings, find
from rlalign.training.report_media import read_media
from rlalign.training.run_directory import flatten
from rlalign.training.untrusted_text import as_text, excerpt, one_line

_TEMPLATE = "report_template.html.j2"
_STATUS = {
    "done": ("Finished", "good"),
    "running": ("Running, or stopped without a word", "flat"),
    "failed": ("Failed", "bad"),
    "interrupted": ("Interrupted, resumable", "flat"),
}
_SECRET = re.compile(r"(api_?key|secret|password|passwd|credential|(^|_)token$)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number of the summary row."""

    label: str
    value: str
    below: str = ""


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """A comparison in words, with its interval drawn. `mark` is trusted markup."""

    title: str
    before: str
    after: str
    count: str
    moves: tuple[int, int, int] | None
    """Problems better, same, worse."""
    change: str = ""
    interval: str = ""
    tone: str = "flat"
    mark: str = ""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run directory and return its path.

    Reads config.resolved.json, versions.json, status.json, metrics.jsonl, samples/, errors/ and media/; any of
    them may be missing or damaged. The page is replaced atomically, so a reader never sees half of it.

    Raises:
        FileNotFoundError: There is no such directory.
        OSError: The page cannot be written (disk full, no permission).
    """
    target = run_dir / "report.html"
    write_atomic(target, render(read_run(run_dir)))
    return target


def render(run: RunData) -> str:
    """The page of one run."""
    return fill(_TEMPLATE, _view(run))


def fill(template: str, view: Mapping[str, Any]) -> str:
    """Fill a template of this folder. Everything that is not our own SVG is escaped by it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawing"] = Markup  # only for markup made by charts.py, which escapes its own text
    environment.filters["digest"] = _digest
    environment.filters["number"] = format_number
    return environment.get_template(template).render(**view)


def _view(run: RunData) -> dict[str, Any]:
    findings = find(run)
    return {
        "name": one_line(run.run_dir.resolve().name, limit=80),
        "subtitle": subtitle(run.config),
        "status": _status(run),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "verdict": findings.verdict,
        "tiles": _tiles(run, findings),
        "notes": findings.notes,
        "comparisons": [_comparison_row(item) for item in findings.comparisons],
        "agent": run.agent,
        "unit": run.unit,
        "eval_steps": sorted(run.eval_samples),
        "media": read_media(run.run_dir),
        "figures": headline_figures(run),
        "other": other_figures(run),
        "episodes": report_samples.episodes(run),
        "pairs": [] if run.agent or run.generator else report_samples.pairs(run),
        "held_out_tables": [] if run.agent or run.generator else report_samples.held_out_tables(run),
        "training_tables": [] if run.agent or run.generator else report_samples.training_tables(run),
        "train_samples_step": run.train_samples_step,
        "phases": phases(run),
        "errors": run.errors,
        "error_count": run.error_count,
        "commands": _commands(run),
        "versions": _table(run.versions),
        "config": _table(run.config),
    }


def _digest(script: str) -> str:
    """The hash that lets the page's policy allow this one script and no other."""
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def subtitle(config: Mapping[str, Any]) -> str:
    """Method, model or environment, and seed, as far as a config names them."""
    keys = ("method", "model", "env", "dataset", "pipeline")
    words = [as_text(config[key]) for key in keys if isinstance(config.get(key), str)]
    for key in keys[1:]:
        inner = config.get(key)
        if isinstance(inner, dict):
            words += [
                as_text(inner[name]) for name in ("name", "path", "id", "source") if isinstance(inner.get(name), str)
            ][:1]
    if isinstance(config.get("seed"), int):
        words.append(f"seed {config['seed']}")
    return " · ".join(one_line(word, limit=80) for word in words if word)


def _status(run: RunData) -> dict[str, str]:
    word = run.status.get("status")
    text, tone = _STATUS[word] if isinstance(word, str) and word in _STATUS else ("No status recorded", "flat")
    if word == "running" and _owner_is_gone(run.status):
        text, tone = "Stopped without a word, resumable", "bad"
    return {"text": text, "tone": tone, "reason": "" if word == "done" else _reason(run)}


def _reason(run: RunData) -> str:
    """What stopped the run: its own words, or the last line of its traceback."""
    said = [run.status[key] for key in ("error", "message", "reason") if isinstance(run.status.get(key), str)]
    if run.status.get("status") == "failed":
        said += [record.text.strip().splitlines()[-1] for record in run.errors if record.text.strip()]
    return excerpt(said[0], limit=600) if said else ""


def _owner_is_gone(status: Mapping[str, Any]) -> bool:
    pid = status.get("pid")
    return status.get("host") == socket.gethostname() and isinstance(pid, int) and pid > 0 and not process_is_alive(pid)


def _tiles(run: RunData, findings: Findings) -> list[Tile]:
    tiles = [*_held_out_tiles(findings), Tile(label=_clock(run), value=f"{run.last_step:,}", below=_planned(run))]
    seconds = total_seconds(run)
    if seconds:
        each = f"{format_duration(seconds / len(run.train['time/step_s'].values))} each"
        label = "Time in iterations" if run.agent else "Time in steps"
        tiles.append(Tile(label=label, value=format_duration(seconds), below=each))
    speed = next((name for name in run.train if name.startswith("throughput/")), "")
    values = [value for value in run.train[speed].values if isfinite(value)] if speed else []
    if values:
        mean = format_metric(speed, sum(values) / len(values))
        tiles.append(
            Tile(
                label=describe(speed).title,
                value=mean,
                below="mean over iterations" if run.agent else "mean over steps",
            )
        )
    return tiles


def _clock(run: RunData) -> str:
    """What the steps of a run count."""
    if not run.agent:
        return "Steps"
    return "Updates" if "total_updates" in run.config and "total_env_steps" not in run.config else "Environment steps"


def _held_out_tiles(findings: Findings) -> list[Tile]:
    if not findings.comparisons:
        return []
    head = findings.comparisons[0]
    after = Tile(label=f"{head.title}, after", value=head.number(head.after.estimate), below=_ends(head, head.after))
    if head.before is None:
        return [Tile(label=head.title, value=after.value, below=after.below)]
    before = Tile(
        label=f"{head.title}, before", value=head.number(head.before.estimate), below=_ends(head, head.before)
    )
    return [before, after]


def _ends(item: Comparison, interval: Interval) -> str:
    return f"{item.number(interval.low)} to {item.number(interval.high)}" if interval.defined else ""


def _planned(run: RunData) -> str:
    names = ("total_steps", "total_updates", "total_env_steps")
    found = [run.status.get("total_steps"), *(value for key, value in flatten(run.config) if key in names)]
    return next((f"of {value:,} planned" for value in found if isinstance(value, int)), "")


def _comparison_row(item: Comparison) -> ComparisonRow:
    change = item.change
    shown = ComparisonRow(
        title=item.title,
        before=item.number(item.before.estimate) if item.before else "",
        after=item.number(item.after.estimate),
        count=f"{item.count:,}" if item.count else "",
        moves=(item.better, item.same, item.worse) if item.paired else None,
    )
    if change is None:
        return shown
    interval = f"{item.difference(change.low)} to {item.difference(change.high)}" if change.defined else ""
    reach = max((abs(end) for end in (change.low, change.high, change.estimate) if isfinite(end)), default=0.0)
    title = f"{item.title}: {item.difference(change.estimate)}, 95 % interval {interval or 'unknown'}"
    return replace(
        shown,
        change=item.difference(change.estimate) + (" points" if item.share else ""),
        interval=interval,
        tone={1: "good", -1: "bad", 0: "flat"}[change.sign],
        mark=interval_mark(change.low, change.estimate, change.high, reach=1.1 * reach or 1.0, title=title),
    )


def _commands(run: RunData) -> list[tuple[str, str]]:
    path = run.run_dir if run.run_dir.name else run.run_dir.resolve()
    where = shlex.quote(one_line(str(path), limit=1_000))
    again = shlex.quote(one_line(f"{path}-again", limit=1_000))
    config = shlex.quote(one_line(str(path / "config.yaml"), limit=1_000))
    draw = ("Draw this page again", f"rlalign report {where}")
    if _needs_its_script(run):
        return [("Continue it, from the script that began it", "trainer.fit(resume=True)"), draw]
    commands = [
        ("Run it again from the start", f"rlalign train {config} --run-dir {again}"),
        ("Evaluate the newest checkpoint", f"rlalign eval {where}"),
        _try_it(run, where),
        draw,
    ]
    if run.status.get("status") != "done":
        commands.insert(0, ("Continue where it stopped", f"rlalign resume {where}"))
    return commands


def _needs_its_script(run: RunData) -> bool:
    """Whether the settings leave open what only Python objects said: the generator, the model, the rewards."""
    settings = run.config
    if run.generator:
        pipeline = settings.get("pipeline") or {}
        return not settings.get("reward") or not (pipeline.get("source") or pipeline.get("pretrain"))
    return not run.agent and "rewards" in settings and not (settings["rewards"] and settings.get("model"))


def _try_it(run: RunData, where: str) -> tuple[str, str]:
    if run.agent:
        return "Play episodes with it", f"rlalign sample {where} --count 3"
    if run.generator:
        return "Draw samples with it", f"rlalign sample {where} --count 4"
    return "Talk to it", f"rlalign sample {where}"


def _table(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (one_line(key, limit=120), "(hidden)" if _is_secret(key, value) else excerpt(_plain(value), limit=400))
        for key, value in flatten(content)
    ]


def _is_secret(key: str, value: Any) -> bool:
    return isinstance(value, str) and bool(value) and bool(_SECRET.search(key.rpartition(".")[2]))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
