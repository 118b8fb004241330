"""What a run leaves behind: metrics, samples, notes on the board, trackers. Silent on all but the first process."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rlalign.training.board import Board
from rlalign.training.metrics import MetricsLog
from rlalign.training.run_directory import RunDirectory
from rlalign.training.trackers import Tracker, open_trackers

Metrics = Mapping[str, float | int | str]


class Journal:
    """Writes into one run directory and shows the same on the terminal.

    Args:
        run: None on every process but the first: nothing is written or shown.
    """

    def __init__(
        self, run: RunDirectory | None, *, total_steps: int, trackers: Sequence[str] = (), project: str = "rlalign"
    ):
        self.run = run
        self.log = MetricsLog(run.metrics) if run is not None else None
        self.board = Board(total_steps, run.path.name if run else "", quiet=run is None)
        self.trackers: list[Tracker] = open_trackers(trackers, run.path, project=project) if run else []

    def __enter__(self) -> "Journal":
        self.board.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.board.__exit__(kind, error, trace)
        for tracker in self.trackers:
            tracker.close()
        if self.log is not None:
            self.log.close()

    def train(self, step: int, metrics: Metrics) -> None:
        self._write(step, metrics, "train")
        self.board.step(step, metrics)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._write(step, metrics, "eval")
        self.board.evaluation(step, metrics)

    def doing(self, text: str) -> None:
        self.board.doing(text)

    def note(self, text: str) -> None:
        self.board.note(text)

    def notes(self, texts: Sequence[str]) -> None:
        for text in texts:
            self.note(text)

    def samples(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `samples/<name>.jsonl`, replacing what an interrupted run may have left there."""
        if self.run is None:
            return
        path: Path = self.run.samples / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        if rows and "prompt" in rows[-1]:
            self.board.sample(rows[-1]["prompt"], rows[-1]["completion"], rows[-1].get("reward"))

    def rewind(self, step: int, *, records: int | None = None) -> None:
        """Forget what came after a checkpoint, so that a resumed run's log equals an uninterrupted one's."""
        if self.log is not None:
            self.log.truncate_after(step, records=records)

    def sync(self) -> None:
        """Have the metrics on the disk: a checkpoint that counts them is about to be."""
        if self.log is not None:
            self.log.sync()

    @property
    def records(self) -> int:
        return 0 if self.log is None else len(self.log)

    def _write(self, step: int, metrics: Metrics, kind: Any) -> None:
        if self.log is not None:
            self.log.write(step, metrics, kind=kind)
        for tracker in self.trackers:
            tracker.log(step, metrics)
