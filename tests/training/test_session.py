"""The session: what a run directory holds after every kind of ending, and that resuming goes on from there."""

import errno
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from rlalign.training import session as session_module
from rlalign.training.checkpoint import CheckpointError, Checkpoints
from rlalign.training.manifest import Manifest
from rlalign.training.metrics import MetricsLog, read
from rlalign.training.run_directory import RunDirectory, RunDirectoryError, RunLocked
from rlalign.training.session import Session
from rlalign.training.signals import Interrupted


class Counter:
    """A trainer that adds 1 to its only weight per step."""

    def __init__(self) -> None:
        self.step, self.weight, self.states = 0, torch.zeros(3), 0

    def advance(self) -> None:
        self.step += 1
        self.weight += 1

    def state_dict(self) -> dict[str, Any]:
        self.states += 1
        return {
            "model": {"w": self.weight},
            "optimizer": {"lr": 0.5},
            "trainer": {"step": self.step},
            "rng": {"seed": 1},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.weight = state["trainer"]["step"], state["model"]["w"]

    def save_model(self, path: str | Path) -> None:
        Path(path).mkdir(exist_ok=True)
        Path(path, "weights.txt").write_text(str(self.weight.tolist()))


def make(path: Path, **options: Any) -> Session:
    settings = {"name": "x", "config_text": "method: x\n", "resolved": {"method": "x"}, "total_steps": 4}
    return Session(path, **(settings | {"save_every": 2, "keep": 2} | options))


def train(
    session: Session, trainer: Counter, *, total: int = 4, resume: bool = False, at: Callable | None = None
) -> None:
    """The loop of every trainer, with `at` called in each step."""
    with session.open(trainer, resume=resume) as journal:
        while trainer.step < total:
            trainer.advance()
            journal.train(trainer.step, {"weight": float(trainer.weight[0])})
            if at is not None:
                at(trainer.step)
            session.after_step(trainer)
        session.finish(trainer)


def status(path: Path) -> dict[str, Any]:
    return json.loads((path / "status.json").read_text())


def on_step(step: int, action: Callable[[], Any]) -> Callable[[int], None]:
    return lambda now: action() if now == step else None


def fail(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def test_a_finished_run_ends_by_saying_what_changed_and_where_the_report_is(tmp_path, capsys):
    session, trainer = make(tmp_path / "run"), Counter()
    with session.open(trainer, resume=False) as journal:
        for trainer.step, right in ((0, 10), (4, 30)):
            rows = [
                {"prompt_id": n, "prompt": f"{n}?", "completion": "x", "reward": float(n < right)} for n in range(40)
            ]
            journal.samples(f"eval-{trainer.step:06d}", rows)
            journal.evaluation(trainer.step, {"eval/reward_mean": right / 40, "eval/n": 40.0})
        session.finish(trainer)
    change, model, report = capsys.readouterr().out.splitlines()[-3:]
    assert change.startswith("Held-out reward rose from 25.0 % to 75.0 %")
    assert "95 % interval +" in change
    assert "paired bootstrap over the same problems" in change
    assert model == f"Model: {tmp_path / 'run' / 'model'}"
    assert report == f"Report: {tmp_path / 'run' / 'report.html'}"


def test_a_run_that_ends_early_says_nothing_of_success(tmp_path, capsys):
    session, trainer = make(tmp_path / "run"), Counter()

    def evaluate_and_fail() -> None:
        with session.open(trainer, resume=False) as journal:
            for step in (0, 1):
                journal.evaluation(step, {"eval/reward_mean": 0.5 * step})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        evaluate_and_fail()
    assert "Held-out reward" not in "\n".join(capsys.readouterr().out.splitlines()[-2:])


def test_a_finished_run_has_status_checkpoints_model_and_report(tmp_path, capsys):
    run = tmp_path / "run"
    trainer = Counter()
    train(make(run), trainer)
    assert status(run)["status"] == "done"
    assert (status(run)["step"], status(run)["total_steps"]) == (4, 4)
    assert Checkpoints(run / "checkpoints").steps() == [2, 4]
    assert (run / "model/weights.txt").read_text() == "[4.0, 4.0, 4.0]"
    assert [record["weight"] for record in read(run / "metrics.jsonl")] == [1.0, 2.0, 3.0, 4.0]
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {run / 'report.html'}"
    assert (run / "report.html").is_file()
    assert trainer.states == 2  # the last step was saved once, not again at the end
    RunDirectory.open(run).close()  # the lock is free again


def test_every_kind_of_ending_leaves_its_status(tmp_path):
    endings: dict[str, BaseException] = {
        "failed": ValueError("boom"),
        "interrupted": KeyboardInterrupt(),
    }
    for ending, error in endings.items():
        run = tmp_path / ending
        with pytest.raises(type(error)):
            train(make(run), Counter(), at=on_step(3, fail(error)))
        assert (status(run)["status"], status(run)["step"]) == (ending, 3)
        assert (run / "report.html").is_file()
        assert Checkpoints(run / "checkpoints").steps() == [2]
        RunDirectory.open(run).close()


def test_a_failure_keeps_its_traceback_and_says_where(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="boom") as caught:
        train(make(run), Counter(), at=on_step(1, fail(ValueError("boom"))))
    assert caught.value.__notes__ == [f"Full traceback: {run / 'errors' / 'error-0001.txt'}"]
    assert "ValueError: boom" in (run / "errors/error-0001.txt").read_text()


def test_a_loop_abandoned_by_its_owner_is_interrupted_and_resumable(tmp_path):
    run, session, trainer = tmp_path / "run", make(tmp_path / "run"), Counter()

    def steps() -> Iterator[int]:
        with session.open(trainer, resume=False):
            while True:
                trainer.advance()
                yield trainer.step
                session.after_step(trainer)

    for step in steps():
        if step == 3:
            break
    assert status(run)["status"] == "interrupted"
    again = Counter()
    train(make(run), again, resume=True)
    assert again.weight.tolist() == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name)
def test_a_signal_finishes_the_step_saves_and_tells_how_to_go_on(tmp_path, number):
    run, trainer = tmp_path / "run", Counter()
    with pytest.raises(Interrupted, match=f"Saved step 3. Continue: rlalign resume {run}") as caught:
        train(make(run), trainer, at=on_step(3, lambda: signal.raise_signal(number)))
    assert caught.value.exit_code == 75
    assert status(run)["status"] == "interrupted"
    assert Checkpoints(run / "checkpoints").steps() == [2, 3]
    again = Counter()
    train(make(run), again, resume=True)
    assert again.weight.tolist() == [4.0, 4.0, 4.0]
    assert [record["step"] for record in read(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_second_ctrl_c_stops_within_the_step(tmp_path):
    run, trainer = tmp_path / "run", Counter()

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one did not interrupt")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(make(run), trainer, at=on_step(3, twice))
    assert status(run)["status"] == "interrupted"
    assert Checkpoints(run / "checkpoints").load().step == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_the_same_session_goes_on_after_a_signal(tmp_path):
    session, trainer = make(tmp_path / "run"), Counter()
    with pytest.raises(Interrupted):
        train(session, trainer, at=on_step(1, lambda: signal.raise_signal(signal.SIGTERM)))
    train(session, trainer, resume=True)
    assert trainer.weight.tolist() == [4.0, 4.0, 4.0]


def test_all_processes_stop_when_any_was_asked(tmp_path):
    session, trainer = make(tmp_path / "run", save_every=0), Counter()
    asked: list[bool] = []

    def anywhere(flag: bool) -> bool:
        asked.append(flag)
        return len(asked) == 2  # another process was asked during step 2

    session.join(main=True, anywhere=anywhere)
    with pytest.raises(Interrupted, match="Saved step 2"):
        train(session, trainer)
    assert asked == [False, False]
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == [2]


def test_other_processes_write_nothing_but_take_part_in_saving(tmp_path):
    (tmp_path / "run").mkdir()
    session, trainer = make(tmp_path / "run"), Counter()
    session.join(main=False, anywhere=bool)
    trainer.save_model = lambda path: None  # pyright: ignore[reportAttributeAccessIssue]
    train(session, trainer)
    assert trainer.states == 2
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize(("save_every", "steps"), [(0, [4]), (1, [3, 4]), (3, [3, 4])])
def test_checkpoints_come_every_so_many_steps_and_old_ones_go(tmp_path, save_every, steps):
    train(make(tmp_path / "run", save_every=save_every), Counter())
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == steps


def test_a_clock_that_jumps_saves_whenever_it_passes_a_multiple(tmp_path):
    run, trainer = tmp_path / "run", Counter()
    session = make(run, save_every=5, keep=9)
    with session.open(trainer, resume=False):
        for _ in range(4):  # 3, 6, 9, 12
            trainer.step += 3
            session.after_step(trainer)
    assert Checkpoints(run / "checkpoints").steps() == [6, 12]
    again = make(run, save_every=5, keep=9)
    with again.open(trainer, resume=True):
        trainer.step += 2  # 14 is no further multiple than 12
        again.after_step(trainer)
        trainer.step += 1
        again.after_step(trainer)
    assert Checkpoints(run / "checkpoints").steps() == [6, 12, 15]


def test_an_error_after_a_whole_step_is_raised_once_the_step_is_saved(tmp_path, capsys):
    run, session, trainer = tmp_path / "run", make(tmp_path / "run", save_every=0), Counter()
    with pytest.raises(ValueError, match="boom"):
        train(session, trainer, at=on_step(3, lambda: session.stop_with(ValueError("boom"))))
    assert Checkpoints(run / "checkpoints").steps() == [3]
    assert status(run)["status"] == "failed"
    assert "Saved step 3. Continue: rlalign resume" in capsys.readouterr().out
    train(session, trainer, resume=True)  # it is not raised twice
    assert trainer.weight.tolist() == [4.0, 4.0, 4.0]


def test_the_other_processes_stop_at_the_step_in_which_one_has_an_error(tmp_path):
    session, trainer, rounds = make(tmp_path / "run", save_every=0), Counter(), iter([False, True])
    session.join(main=True, anywhere=lambda flag: next(rounds))
    with pytest.raises(Interrupted, match="Saved step 2"):
        train(session, trainer)


def test_a_step_that_cannot_be_saved_does_not_hide_the_error(tmp_path):
    session, trainer = make(tmp_path / "run", save_every=0), Counter()

    def spoil() -> None:
        trainer.weight[1] = float("nan")
        session.stop_with(ValueError("boom"))

    with pytest.raises(ValueError, match="boom") as caught:
        train(session, trainer, at=on_step(2, spoil))
    assert "step 2 was not saved" in caught.value.__notes__[0]


def test_the_log_is_on_the_disk_before_a_checkpoint_counts_it(tmp_path, monkeypatch):
    done: list[str] = []
    sync, save = MetricsLog.sync, Checkpoints.save
    monkeypatch.setattr(MetricsLog, "sync", lambda self: done.append("log") or sync(self))
    monkeypatch.setattr(Checkpoints, "save", lambda *arguments: done.append("checkpoint") or save(*arguments))
    train(make(tmp_path / "run"), Counter())
    assert done == ["log", "checkpoint"] * 2


def test_resuming_takes_up_state_and_log_where_the_checkpoint_was(tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="boom"):
        train(make(run), Counter(), at=on_step(3, fail(ValueError("boom"))))
    assert [record["step"] for record in read(run / "metrics.jsonl")] == [1, 2, 3]
    again = Counter()
    train(make(run), again, resume=True)
    assert again.weight.tolist() == [4.0, 4.0, 4.0]
    assert [record["weight"] for record in read(run / "metrics.jsonl")] == [1.0, 2.0, 3.0, 4.0]
    assert "Resumed step 2 from ckpt-000002" in capsys.readouterr().out
    assert status(run)["status"] == "done"


def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="boom"):
        train(make(run), Counter(), at=on_step(1, fail(ValueError("boom"))))
    train(make(run), Counter(), resume=True)
    assert [record["step"] for record in read(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "No checkpoint yet: starting from the beginning" in capsys.readouterr().out


def test_a_checkpoint_without_optimizer_or_random_numbers_is_refused(tmp_path):
    run = tmp_path / "run"
    train(make(run), Counter(), total=2)
    for missing in ("optimizer", "rng"):
        state = {name: value for name, value in Counter().state_dict().items() if name != missing}
        Checkpoints(run / "checkpoints").save(9, state)
        with pytest.raises(CheckpointError, match=f"holds no {missing}, so the run cannot continue exactly"):
            train(make(run), Counter(), resume=True)
        assert status(run)["status"] == "failed"


def test_damaged_checkpoints_never_start_the_run_over(tmp_path):
    run = tmp_path / "run"
    train(make(run), Counter(), total=2)
    (run / "checkpoints/ckpt-000002/model.safetensors").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="no checkpoint in .* is intact"),
    ):
        train(make(run), Counter(), resume=True)


def flip(manifest: Path) -> None:
    text = manifest.read_text()
    manifest.write_text(text.replace('"step": 2', '"step": 3'))


def newer(manifest: Path) -> None:
    manifest.write_text(replace(Manifest.read(manifest.parent), schema=2, versions={"rlalign": "9.1"}).to_json())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(flip, "checksum does not match"), (Path.unlink, "has no manifest.json"), (newer, "written by rlalign 9.1")],
    ids=["flipped", "deleted", "newer"],
)
@pytest.mark.filterwarnings("ignore:passing over a damaged checkpoint")
def test_an_unreadable_manifest_never_starts_the_run_over(tmp_path, spoil, message):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="boom"):
        train(make(run, keep=1), Counter(), at=on_step(3, fail(ValueError("boom"))))
    spoil(run / "checkpoints/ckpt-000002/manifest.json")
    log = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=message):
        train(make(run, keep=1), Counter(), resume=True)
    assert (run / "metrics.jsonl").read_bytes() == log
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["ckpt-000002", "latest"]
    assert status(run)["status"] == "failed"


def test_two_sessions_cannot_have_one_directory(tmp_path):
    run = tmp_path / "run"
    train(make(run), Counter())
    with pytest.raises(RunDirectoryError, match="already holds a run"):
        train(make(run), Counter())
    with RunDirectory.open(run), pytest.raises(RunLocked, match="locked by pid"):
        train(make(run), Counter(), resume=True)
    assert status(run)["status"] == "done"
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        train(make(tmp_path / "nothing"), Counter(), resume=True)


def test_other_settings_of_a_resumed_run_are_told_and_written_and_the_earlier_ones_kept(tmp_path, capsys):
    run = tmp_path / "run"
    settings = {"method": "x", "optim": {"rate": 0.1, "betas": [0.9, 0.99]}, "net": None}
    train(make(run, resolved=settings), Counter(), total=2)
    train(make(run, resolved=settings), Counter(), resume=True, total=3)
    assert "other settings" not in capsys.readouterr().out
    assert not (run / "config.resolved.1.json").exists()
    other = {"method": "x", "optim": {"rate": 0.3, "betas": (0.9, 0.99)}, "net": {"width": 3}}
    train(make(run, resolved=other), Counter(), resume=True)
    told = " ".join(capsys.readouterr().out.split())
    assert "With other settings than before: net.width: not set -> 3, optim.rate: 0.1 -> 0.3." in told
    assert json.loads((run / "config.resolved.1.json").read_text()) == settings
    assert json.loads((run / "config.resolved.json").read_text())["optim"]["rate"] == 0.3
    train(make(run, resolved=settings), Counter(), resume=True)
    assert json.loads((run / "config.resolved.2.json").read_text())["optim"]["rate"] == 0.3


def test_settings_that_the_saved_state_does_not_fit_leave_those_of_the_run_alone(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(make(run), Counter(), total=2)
    before = (run / "config.resolved.json").read_bytes()
    monkeypatch.setattr(Counter, "load_state_dict", lambda *_: fail(ValueError("another shape"))())
    with pytest.raises(ValueError, match="another shape"):
        train(make(run, resolved={"method": "x", "width": 3}), Counter(), resume=True)
    assert (run / "config.resolved.json").read_bytes() == before
    assert not (run / "config.resolved.1.json").exists()


def test_a_full_disk_does_not_hide_why_a_run_ended(tmp_path, monkeypatch, capsys):
    def full(*arguments: Any, **named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = tmp_path / "run"

    def fill_up() -> None:
        monkeypatch.setattr(RunDirectory, "record_error", full)
        monkeypatch.setattr(session_module, "write_report", full)
        raise CheckpointError("could not save step 3")

    with pytest.raises(CheckpointError, match="could not save step 3") as caught:
        train(make(run), Counter(), at=on_step(3, fill_up))
    assert "could not be saved" in caught.value.__notes__[0]
    assert "No space left on device" in caught.value.__notes__[0]
    assert f"Later: rlalign report {run}" in capsys.readouterr().out
    assert Checkpoints(run / "checkpoints").steps() == [2]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_model_that_finds_no_room_costs_nothing_and_is_written_on_resume(tmp_path, monkeypatch, error):
    run, trainer = tmp_path / "run", Counter()
    with monkeypatch.context() as full:
        full.setattr(Counter, "save_model", lambda *_: fail(error)())
        with pytest.raises(CheckpointError) as caught:
            train(make(run), trainer)
    told = str(caught.value)
    assert "No space left on device" in told and "step 4, the last one, is saved" in told
    assert told.endswith(f"rlalign resume {run}")
    assert status(run)["status"] == "failed"
    assert Checkpoints(run / "checkpoints").steps()[-1] == 4
    train(make(run), again := Counter(), resume=True)
    assert (run / "model" / "weights.txt").read_text() == "[4.0, 4.0, 4.0]"
    assert (again.step, status(run)["status"]) == (4, "done")


def test_missing_tracker_packages_are_found_before_there_is_a_directory(tmp_path, monkeypatch):
    from rlalign.training import trackers

    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(trackers.MissingTracker, match="pip install wandb"):
        make(tmp_path / "run", trackers=("wandb",))
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_name_gets_the_first_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = make(None), make(None)  # pyright: ignore[reportArgumentType]
    for session in (second, first):
        train(session, Counter(), total=1)
    third = make(None)  # pyright: ignore[reportArgumentType]
    assert [str(session.path) for session in (first, second, third)] == ["runs/x", "runs/x-2", "runs/x-3"]


def test_a_session_that_was_given_up_leaves_its_name_to_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given_up = make(None)  # pyright: ignore[reportArgumentType]
    assert str(given_up.path) == "runs/x"
    del given_up
    assert str(make(None).path) == "runs/x"  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


def test_several_processes_cannot_each_choose_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunDirectoryError, match="`run_dir=`"):
        make(None)  # pyright: ignore[reportArgumentType]
    assert make(tmp_path / "mine").path == tmp_path / "mine"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_never_replaces_the_last_good_one(tmp_path, bad):
    run, trainer = tmp_path / "run", Counter()

    def spoil() -> None:
        trainer.weight[1] = bad

    with pytest.raises(CheckpointError, match="`w` has NaN or infinite entries, so step 4 was not saved"):
        train(make(run), trainer, at=on_step(3, spoil))
    assert status(run)["status"] == "failed"
    assert Checkpoints(run / "checkpoints").load().state["model"]["w"].tolist() == [2.0, 2.0, 2.0]
