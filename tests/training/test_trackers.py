"""Trackers: what reaches them, what a missing package says, and that none of them can stop a run."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlalign.training import trackers
from rlalign.training.trackers import MissingTracker, open_trackers, require_trackers


class FakeWandb(ModuleType):
    """Remembers its calls; raises where told to."""

    def __init__(self, name: str, broken: str = "") -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.broken = broken

    def _call(self, name: str, /, *arguments: Any, **named: Any) -> None:
        self.calls.append((name, arguments, named))
        if name == self.broken:
            raise ConnectionError("no route to host")

    def init(self, **named: Any) -> None:
        self._call("init", **named)

    def log(self, metrics: dict[str, Any], **named: Any) -> None:
        self._call("log", metrics, **named)

    def finish(self) -> None:
        self._call("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_wandb_and_trackio_get_project_name_and_every_metric(name, monkeypatch, tmp_path: Path):
    fake = FakeWandb(name)
    monkeypatch.setitem(sys.modules, name, fake)
    (tracker,) = open_trackers([name], tmp_path / "run-7", project="sums")
    tracker.log(3, {"reward/mean": 0.5, "note": "text"})
    tracker.close()
    assert fake.calls == [
        ("init", (), {"project": "sums", "name": "run-7"}),
        ("log", ({"reward/mean": 0.5, "note": "text"},), {"step": 3}),
        ("finish", (), {}),
    ]


def test_tensorboard_gets_numbers_in_the_run_directory(monkeypatch, tmp_path: Path):
    written: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    monkeypatch.setattr(trackers, "import_module", lambda path: SimpleNamespace(SummaryWriter=Writer))
    (tracker,) = open_trackers(["tensorboard"], tmp_path, project="p")
    tracker.log(2, {"reward/mean": 0.25, "note": "text", "signal/groups_skipped": 1})
    tracker.close()
    numbers = [("reward/mean", 0.25, 2), ("signal/groups_skipped", 1, 2)]
    assert written == [str(tmp_path / "tensorboard"), *numbers, "closed"]


def test_an_outage_is_one_warning_and_the_others_go_on(monkeypatch, tmp_path: Path):
    broken, healthy = FakeWandb("wandb", broken="log"), FakeWandb("trackio")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setitem(sys.modules, "trackio", healthy)
    first, second = open_trackers(["wandb", "trackio"], tmp_path, project="p")
    with pytest.warns(UserWarning, match=r"wandb failed \(no route to host\); the run goes on, metrics.jsonl"):
        first.log(1, {"reward/mean": 1.0})
    second.log(1, {"reward/mean": 1.0})
    for step in (2, 3):  # every warning is an error in this test suite, so a second one would fail here
        first.log(step, {"reward/mean": 1.0})
        second.log(step, {"reward/mean": 1.0})
    first.close()
    second.close()
    assert [name for name, _, _ in healthy.calls] == ["init", "log", "log", "log", "finish"]


def test_a_tracker_that_cannot_even_start_stops_nothing(monkeypatch, tmp_path: Path):
    broken = FakeWandb("wandb", broken="init")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    with pytest.warns(UserWarning, match="wandb failed .no route to host."):
        (tracker,) = open_trackers(["wandb"], tmp_path, project="p")
    tracker.log(1, {"reward/mean": 1.0})
    tracker.close()
    assert [name for name, _, _ in broken.calls] == ["init"]


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named_with_its_pip_line_before_anything_starts(name, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(trackers, "find_spec", lambda wanted: None)
    with pytest.raises(
        MissingTracker, match=f"`log.trackers` names {name}, which is not installed: pip install {name}"
    ):
        require_trackers([name])
    for module in (name, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingTracker, match=f"pip install {name}") as caught:
        open_trackers([name], tmp_path, project="p")
    assert caught.value.name == name  # what the command line turns into exit code 2


def test_installed_trackers_are_not_imported_by_the_check(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda wanted: object())
    monkeypatch.setattr(trackers, "import_module", lambda path: pytest.fail(f"imported {path}"))
    require_trackers(["wandb", "tensorboard"])
    require_trackers([])
