"""The journal: metrics, samples, notes and trackers of one run, and nothing at all on other processes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlalign.training import journal as journal_module
from rlalign.training.journal import Journal
from rlalign.training.metrics import read
from rlalign.training.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> Any:
    with RunDirectory.create(tmp_path / "run", "method: x\n", {"method": "x"}) as run:
        yield run


def test_the_first_record_of_a_new_run_is_written(run):
    """An empty log has length 0 and is still a log."""
    with Journal(run, total_steps=2) as journal:
        assert journal.records == 0
        journal.train(1, {"reward/mean": 0.5})
        journal.evaluation(1, {"eval/reward_mean": 0.25})
        assert journal.records == 2
    assert read(run.metrics) == [
        {"kind": "train", "step": 1, "reward/mean": 0.5},
        {"kind": "eval", "step": 1, "eval/reward_mean": 0.25},
    ]


def test_samples_are_json_lines_in_any_script_and_replace_what_was_there(run):
    rows = [
        {"prompt": "2 + 2 =", "completion": "четыре\u2028\n<b>", "reward": 1.0},
        {"prompt": [{"role": "user", "content": "x"}], "completion": "", "reward": None},
    ]
    with Journal(run, total_steps=2) as journal:
        journal.samples("step-000010", [{"prompt": "old", "completion": "old"}] * 5)
        journal.samples("step-000010", rows)
    text = (run.samples / "step-000010.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.rstrip("\n").split("\n")] == rows
    assert "четыре" in text


def test_no_rows_are_an_empty_file(run):
    with Journal(run, total_steps=1) as journal:
        journal.samples("eval-000000", [])
    assert (run.samples / "eval-000000.jsonl").read_text() == ""


def test_notes_and_steps_show_on_the_terminal(run, capsys):
    with Journal(run, total_steps=2) as journal:
        journal.notes(["one thing", "another"])
        journal.train(1, {"reward/mean": 0.5})
        journal.evaluation(1, {"eval/reward_mean": 0.25, "eval/n": 4.0})
    shown = capsys.readouterr().out.splitlines()
    assert shown[:2] == ["one thing", "another"]
    assert "reward 0.5" in shown[2]
    assert "reward 0.25" in shown[3]


def test_rewind_forgets_what_came_after_a_checkpoint(run):
    with Journal(run, total_steps=4) as journal:
        journal.train(1, {"a": 1})
        journal.train(2, {"a": 2})
        kept = journal.records
        journal.evaluation(2, {"a": 3})
        journal.train(3, {"a": 4})
        journal.rewind(2, records=kept)
        assert [record["a"] for record in read(run.metrics)] == [1, 2]
        journal.train(3, {"a": 5})
        journal.rewind(1)
        assert [record["a"] for record in read(run.metrics)] == [1]
        journal.rewind(-1)
        assert journal.records == 0


def test_other_processes_write_and_show_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with Journal(None, total_steps=2, trackers=("wandb",)) as journal:
        journal.train(1, {"reward/mean": 0.5})
        journal.evaluation(1, {"eval/reward_mean": 0.5})
        journal.note("hello")
        journal.samples("step-000001", [{"prompt": "p", "completion": "c"}])
        journal.rewind(0)
        assert journal.records == 0
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.seen.append((step, dict(metrics)))

    def close(self) -> None:
        self.seen.append("closed")


def test_trackers_get_what_the_log_gets_and_are_closed_on_an_error(run, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(journal_module, "open_trackers", lambda names, path, project: [recorder])

    def fail() -> None:
        with Journal(run, total_steps=2, trackers=("wandb",)) as journal:
            journal.train(1, {"a": 1.5})
            journal.evaluation(2, {"b": 2.5})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert recorder.seen == [(1, {"a": 1.5}), (2, {"b": 2.5}), "closed"]


def test_the_log_is_closed_at_the_end(run):
    with Journal(run, total_steps=1) as journal:
        pass
    with pytest.raises(OSError, match="Bad file descriptor" if sys.platform != "win32" else ""):
        journal.train(1, {"a": 1.0})
