"""Results of a benchmark of many independent runs: kept one by one, so that it can be stopped and go on."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rlalign
from rlalign.training.intervals import bootstrap_interval, interquartile_mean

Key = dict[str, Any]


class Cells:
    """Finished runs of one benchmark in one JSON file.

    Args:
        path: The file. What it holds is kept as long as the settings are the same, and started anew otherwise.
        settings: Everything that decides a run but its own key.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            found = json.loads(path.read_text())
            self.runs = found["runs"] if found["settings"] == self.settings else []

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """The keys no run was kept of, in their order."""
        done = [run["key"] for run in self.runs]
        return [key for key in keys if key not in done]

    def keep(self, key: Key, outcome: Mapping[str, Any]) -> None:
        self.runs.append({"key": key, **outcome})
        self.write({})

    def where(self, **wanted: Any) -> list[dict[str, Any]]:
        """The runs whose key has these entries."""
        return [run for run in self.runs if wanted.items() <= run["key"].items()]

    def write(self, extra: Mapping[str, Any]) -> None:
        """Write the file whole, or not at all."""
        report = {
            "settings": self.settings,
            **extra,
            "versions": {name: version(name) for name in ("torch", "gymnasium")} | {"rlalign": rlalign.__version__},
            "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
            "runs": self.runs,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(report, indent=1) + "\n")
        draft.replace(self.path)


def over_seeds(values: Sequence[float]) -> dict[str, float | int | None]:
    """Interquartile mean and its 95 % bootstrap interval; the ends are None for a single run."""
    found = bootstrap_interval(values, statistic=interquartile_mean)
    low, high = (None if math.isnan(end) else end for end in (found.low, found.high))
    return {"iqm": found.estimate, "low": low, "high": high, "seeds": len(values)}


def told(found: Mapping[str, float | int | None], digits: int = 1) -> str:
    """`over_seeds` in a line of a table."""
    if found["low"] is None:
        return f"{found['iqm']:.{digits}f}"
    return f"{found['iqm']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
