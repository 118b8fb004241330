"""The run directory: files, names, lock, status."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign.training.run_directory import RunDirectory, RunDirectoryError, RunLocked, check_run_name, free_run_path

HOLD = """
import sys
from rlalign.training.run_directory import RunDirectory
run = RunDirectory.open(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


def create(path, text: str = "method: bnpo\n") -> RunDirectory:
    return RunDirectory.create(path, text, {"method": "bnpo", "seed": 0})


def test_create_writes_what_the_run_needs(tmp_path) -> None:
    with create(tmp_path / "deep" / "run-1", "method: bnpo  # as typed\n") as run:
        assert run.config.read_text() == "method: bnpo  # as typed\n"
        assert json.loads(run.resolved_config.read_text()) == {"method": "bnpo", "seed": 0}
        assert {"python", "torch"} <= set(json.loads(run.versions.read_text()))
        for folder in (run.samples, run.checkpoints, run.errors, run.media):
            assert folder.is_dir()
        assert run.status()["status"] == "running"
        assert (run.metrics.name, run.report.name) == ("metrics.jsonl", "report.html")


def test_status_names_the_process_and_keeps_details(tmp_path) -> None:
    with create(tmp_path / "run") as run:
        run.set_status("failed", step=7, reason="TrainingDiverged")
        assert run.status() == {
            "status": "failed",
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "step": 7,
            "reason": "TrainingDiverged",
        }


def test_errors_are_kept_with_their_traceback(tmp_path) -> None:
    with create(tmp_path / "run") as run:
        for number in (1, 2):
            try:
                int("x")
            except ValueError as error:
                path = run.record_error(error)
            assert path.name == f"error-000{number}.txt"
        assert "Traceback" in path.read_text()
        assert "invalid literal" in path.read_text()


def test_a_second_run_in_the_same_place_is_told_to_resume(tmp_path) -> None:
    create(tmp_path / "run").close()
    with pytest.raises(RunDirectoryError, match="already holds a run. Continue it with `rlalign resume"):
        create(tmp_path / "run")
    # the refused attempt let go of the lock
    RunDirectory.open(tmp_path / "run").close()


def test_a_directory_with_foreign_files_is_left_alone(tmp_path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(RunDirectoryError, match=r"not empty \(it holds 'thesis.tex'\)"):
        create(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "mine"


def test_a_creation_that_was_killed_half_way_can_be_repeated(tmp_path) -> None:
    run = create(tmp_path / "run")
    run.resolved_config.unlink()
    run.close()
    create(tmp_path / "run").close()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "...", "a/b", "../x", "a b", "a\0b", "a\n", "é", "-rf", "x" * 81, "a\\b", "~"]
)
def test_names_that_could_leave_the_parent_are_refused(name) -> None:
    with pytest.raises(RunDirectoryError, match="is not allowed"):
        check_run_name(name)


@pytest.mark.parametrize("name", ["a", "2026-11-22_bnpo.seed0", "x" * 80, ".hidden"])
def test_ordinary_names_pass(name) -> None:
    check_run_name(name)


def test_the_first_free_name_is_one_that_a_run_may_have(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_run_path("bnpo") == Path("runs/bnpo")
    for taken in ("bnpo", "bnpo-2"):
        Path("runs", taken).mkdir(parents=True)
    assert free_run_path("bnpo") == Path("runs/bnpo-3")
    assert free_run_path("bnpo", taken=[tmp_path / "runs/bnpo-3"]) == Path("runs/bnpo-4")
    assert free_run_path("../my toy!", parent=tmp_path) == tmp_path / "my-toy"
    assert free_run_path("...") == Path("runs/run")


def test_several_processes_are_told_to_name_the_directory(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunDirectoryError, match="--run-dir") as caught:
        free_run_path("bnpo")
    assert caught.value.exit_code == 2


def test_links_and_files_are_not_run_directories(tmp_path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(RunDirectoryError, match="link or a file"):
            create(tmp_path / name)
    assert list((tmp_path / "target").iterdir()) == []


def test_opening_what_is_not_a_run(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RunDirectoryError, match="is not a run directory"):
            RunDirectory.open(path)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_place_is_reported(tmp_path) -> None:
    with pytest.raises(RunDirectoryError, match="cannot use /proc/rlalign-run as run directory"):
        create("/proc/rlalign-run")


def test_the_same_process_cannot_hold_a_run_twice_but_can_read_it(tmp_path) -> None:
    with create(tmp_path / "run"):
        with pytest.raises(RunLocked, match=f"locked by pid {os.getpid()} on host {socket.gethostname()}"):
            RunDirectory.open(tmp_path / "run")
        with RunDirectory.open(tmp_path / "run", lock=False) as reader:
            assert reader.status()["status"] == "running"
    RunDirectory.open(tmp_path / "run").close()


def test_a_lock_of_another_process_is_named_and_ends_with_kill_9(tmp_path) -> None:
    create(tmp_path / "run").close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunLocked, match=f"locked by pid {holder.pid} on host") as caught:
            RunDirectory.open(tmp_path / "run")
        assert caught.value.exit_code == 2
        # the refused attempt must not have erased the owner
        with pytest.raises(RunLocked, match=f"locked by pid {holder.pid} on host"):
            create(tmp_path / "run")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    RunDirectory.open(tmp_path / "run").close()
