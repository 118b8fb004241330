"""Read a run directory as it is: finished, killed half-way, or partly unreadable. Never raises on content."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, nan
from pathlib import Path
from typing import Any

from rlalign.training.run_directory import flatten
from rlalign.training.untrusted_text import as_text, excerpt, one_line

PROMPT_CHARACTERS = 1_200
COMPLETION_CHARACTERS = 2_400
_MAX_LINE_BYTES = 32 * 2**20
_MAX_ERROR_FILES = 20
_ERROR_CHARACTERS = 6_000
_SAMPLE_FILE = re.compile(r"(?P<kind>step|eval|baseline)-(?P<step>\d+)\.jsonl")
_FLOAT_WORDS = {"nan": nan, "inf": inf, "infinity": inf, "-inf": -inf, "-infinity": -inf}


@dataclass(frozen=True)
class Series:
    """One metric over the run, ordered by step. Values may be NaN or infinite."""

    steps: list[float]
    values: list[float]

    def last(self) -> float:
        return self.values[-1] if self.values else nan


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion, its texts already cut to a showable length; or one episode of an agent, or one sample of a
    generator, which have no texts."""

    key: str
    """Equal for the same problem in the same words."""
    problem: str
    """Equal for the same problem in any words: its `prompt_id`, "" when there is none."""
    prompt: str
    completion: str
    reward: float
    """NaN when the sample was not scored."""
    parts: dict[str, float]
    details: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Record:
    """A file of `errors/`: fields of a JSON object, or plain text."""

    name: str
    fields: dict[str, str]
    text: str


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Everything the report draws from."""

    run_dir: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    status: dict[str, Any]
    train: dict[str, Series]
    eval: dict[str, Series]
    train_samples: list[Sample]
    """Of the newest step that saved any."""
    train_samples_step: int | None
    eval_samples: dict[int, list[Sample]]
    """Of the first and the last evaluation."""
    baselines: list[list[Sample]]
    """The untouched model on the same problems in other words, one list per phrasing."""
    errors: list[Record]
    error_count: int
    problems: list[str] = field(default_factory=list)
    """What could not be read, in words."""

    @property
    def agent(self) -> bool:
        """An agent's run: it plays episodes, and has no prompts and completions to show."""
        logged = any(name.startswith("episode/") for name in self.train) or "eval/return_mean" in self.eval
        return logged or isinstance(self.config.get("env"), dict)

    @property
    def generator(self) -> bool:
        """A diffusion run: its samples are pictures and shapes, which `media/` shows, and no texts."""
        return isinstance(self.config.get("pipeline"), dict)

    @property
    def unit(self) -> str:
        """What an evaluation counts."""
        return "start" if self.agent else "sample" if self.generator else "problem"

    @property
    def last_step(self) -> int:
        """The newest step any record speaks of, 0 for an empty run."""
        ends = [series.steps[-1] for series in self.train.values() if series.steps]
        return int(max(ends, default=0))


def read_run(run_dir: Path) -> RunData:
    """Read the directory; what is missing stays empty, what is damaged becomes a line in `problems`."""
    if not run_dir.is_dir():
        raise FileNotFoundError(f"no run directory at {run_dir}; pass the folder that holds metrics.jsonl.")
    problems: list[str] = []
    train, evaluation = _read_metrics(run_dir / "metrics.jsonl", problems)
    files = _sample_files(run_dir / "samples")
    baselines = [_read_samples(files["baseline"][number], problems) for number in sorted(files["baseline"])]
    eval_steps = sorted(files["eval"])
    ends = {step: _read_samples(files["eval"][step], problems) for step in {*eval_steps[:1], *eval_steps[-1:]}}
    newest = max(files["step"], default=None)
    errors, error_count = _read_errors(run_dir / "errors", problems)
    return RunData(
        run_dir=run_dir,
        config=_read_object(run_dir / "config.resolved.json", problems),
        versions=_read_object(run_dir / "versions.json", problems),
        status=_read_object(run_dir / "status.json", problems),
        train=train,
        eval=evaluation,
        train_samples=[] if newest is None else _read_samples(files["step"][newest], problems),
        train_samples_step=newest,
        baselines=[samples for samples in baselines if samples],
        eval_samples={step: ends[step] for step in sorted(ends) if ends[step]},
        errors=errors,
        error_count=error_count,
        problems=problems,
    )


def as_number(value: Any) -> float | None:
    """Read a logged value as a float; words for NaN and infinity count, other text does not."""
    match value:
        case bool() | int() | float():
            try:
                return float(value)
            except OverflowError:
                return inf if value > 0 else -inf
        case str():
            return _FLOAT_WORDS.get(value.strip().lower())
        case _:
            return None


def _read_object(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} could not be read ({type(error).__name__}).")
        return {}
    return loaded if isinstance(loaded, dict) else {path.stem: loaded}


def _json_rows(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON-lines file; a torn or foreign line is counted, not fatal."""
    unreadable = 0
    try:
        with path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                row = _parse(line)
                if row is not None:
                    yield row
                elif line.strip():
                    unreadable += 1
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} could not be read ({error.strerror}).")
    if unreadable:
        lines = "1 line" if unreadable == 1 else f"{unreadable} lines"
        problems.append(f"{path.name}: {lines} torn or not JSON, left out.")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _read_metrics(path: Path, problems: list[str]) -> tuple[dict[str, Series], dict[str, Series]]:
    columns: dict[str, dict[str, dict[float, float]]] = {"train": {}, "eval": {}}
    for index, row in enumerate(_json_rows(path, problems)):
        kind = "eval" if row.get("kind") == "eval" else "train"
        step = as_number(row.get("step"))
        position = step if step is not None and abs(step) < inf else float(index)
        for name, value in row.items():
            number = None if name in ("kind", "step") else as_number(value)
            if number is not None:
                columns[kind].setdefault(one_line(name, limit=80), {})[position] = (
                    number  # a rewritten step replaces the old one
                )
    train, evaluation = (
        {name: _series(column) for name, column in columns[kind].items()} for kind in ("train", "eval")
    )
    return train, evaluation


def _series(column: Mapping[float, float]) -> Series:
    steps = sorted(column)
    return Series(steps, [column[step] for step in steps])


def _sample_files(folder: Path) -> dict[str, dict[int, Path]]:
    files: dict[str, dict[int, Path]] = {"step": {}, "eval": {}, "baseline": {}}
    for path in sorted(folder.glob("*.jsonl")):
        match = _SAMPLE_FILE.fullmatch(path.name)
        if match and path.is_file():
            files[match["kind"]][int(match["step"])] = path
    return files


def _read_samples(path: Path, problems: list[str]) -> list[Sample]:
    return [_sample(row) for row in _json_rows(path, problems)]


def _sample(row: Mapping[str, Any]) -> Sample:
    prompt = as_text(row.get("prompt"))
    parts, problem = row.get("parts"), row.get("prompt_id", row.get("episode"))
    identity = prompt if prompt.strip() else f"id {problem}"
    reward = as_number(row.get("reward"))
    shown = ("advantage", "tokens", "truncated", "group", "prompt_id", "length")
    return Sample(
        key=hashlib.sha256(identity.encode("utf-8", errors="replace")).hexdigest(),
        problem="" if problem is None else one_line(str(problem), limit=80),
        prompt=excerpt(prompt if prompt.strip() else f"(prompt {row.get('prompt_id')})", limit=PROMPT_CHARACTERS),
        completion=excerpt(as_text(row.get("completion")), limit=COMPLETION_CHARACTERS),
        reward=nan if reward is None else reward,
        parts={
            excerpt(str(name), limit=60): nan if (number := as_number(value)) is None else number
            for name, value in (parts.items() if isinstance(parts, dict) else ())
        },
        details={name: excerpt(str(row[name]), limit=40) for name in shown if row.get(name) not in (None, False)},
    )


def _read_errors(folder: Path, problems: list[str]) -> tuple[list[Record], int]:
    # Tracebacks of the run itself first, the newest on top; then what reward functions did.
    found = (path for path in folder.glob("*") if path.is_file() and path.stat().st_size)
    paths = sorted(found, key=lambda path: path.name)
    crashes = [path for path in paths if path.name.startswith("error-")]
    paths = crashes[::-1] + [path for path in paths if path not in crashes]
    return [_record(path, problems) for path in paths[:_MAX_ERROR_FILES]], len(paths)


def _record(path: Path, problems: list[str]) -> Record:
    if path.suffix == ".json":
        fields = {
            excerpt(name, limit=60): excerpt(as_text(value), limit=COMPLETION_CHARACTERS)
            for name, value in flatten(_read_object(path, problems))
        }
        return Record(name=excerpt(path.name, limit=100), fields=fields, text="")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        text = f"could not be read ({error.strerror})"
    return Record(name=excerpt(path.name, limit=100), fields={}, text=excerpt(text, limit=_ERROR_CHARACTERS))
