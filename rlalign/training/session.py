"""The life of a run around any trainer's loop: directory, journal, checkpoints, signals, report."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlalign.training.checkpoint import CheckpointError, Checkpoints
from rlalign.training.journal import Journal
from rlalign.training.report import write_report
from rlalign.training.report_data import read_run
from rlalign.training.report_findings import find
from rlalign.training.run_directory import RunDirectory, Status, free_run_path
from rlalign.training.signals import GracefulStop, Interrupted
from rlalign.training.trackers import require_trackers

REQUIRED = ("model", "optimizer", "trainer", "rng")
_sessions: "WeakSet[Session]" = WeakSet()
"""Those of this process: a name that one of them was given is taken before its directory is made."""


@runtime_checkable
class Resumable(Protocol):
    """What a session saves and restores."""

    step: int

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save_model(self, path: str | Path) -> None: ...


class Session:
    """Owns a run directory while a trainer trains.

    Args:
        run_dir: A new directory, or with `resume` one that exists. None picks `runs/<name>` with a free number.
        config_text: The configuration as the user wrote it.
        resolved: The same with every default, as `rlalign resume` reads it.
        total_steps: Where the board's progress bar ends.
        save_every: Steps between checkpoints; 0 saves only at the end and when interrupted.
        keep: How many checkpoints stay.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        *,
        name: str,
        config_text: str,
        resolved: Mapping[str, Any],
        total_steps: int,
        save_every: int,
        keep: int,
        trackers: tuple[str, ...] = (),
        project: str = "rlalign",
    ):
        require_trackers(trackers)
        promised = [session.path for session in _sessions]
        self.path = Path(run_dir) if run_dir is not None else free_run_path(name, taken=promised)
        _sessions.add(self)
        self.config_text, self.resolved = config_text, dict(resolved)
        self.total_steps, self.save_every = total_steps, save_every
        self.main: bool = True
        self.anywhere: Callable[[bool], bool] = bool
        self.trackers, self.project = trackers, project
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep=keep)
        self.stop = GracefulStop()
        self.saved_at: int | None = None
        self.error: Exception | None = None
        self.resume_with = f"rlalign resume {self.path}"
        """What the user types or calls to go on; a run started from Python is continued by its own script."""

    def join(self, *, main: bool, anywhere: Callable[[bool], bool]) -> None:
        """Tell the session about the other processes.

        Args:
            main: False on all but the first process, which alone writes.
            anywhere: Tells whether a flag is up on any process; all of them must stop at the same step.
        """
        self.main, self.anywhere = main, anywhere

    @contextmanager
    def open(self, trainer: Resumable, *, resume: bool) -> Iterator[Journal]:
        """Lock the directory, restore the trainer when resuming, and leave a status and a report however it ends."""
        with ExitStack() as stack:
            run = self._directory(resume) if self.main else None
            if run is not None:
                stack.enter_context(run)
            self.journal = stack.enter_context(
                Journal(run, total_steps=self.total_steps, trackers=self.trackers, project=self.project)
            )
            # The signal or error that ended the last one is answered.
            self.stop, self.error = stack.enter_context(GracefulStop()), None
            try:
                if resume:
                    self._restore(trainer)
                    if run is not None:
                        self.journal.notes(_settings_taken(run, self.resolved))
                yield self.journal
            except (Interrupted, KeyboardInterrupt):
                self._close(run, "interrupted", trainer)
                raise
            except GeneratorExit:
                # The user's own loop over `steps` ended early: not a failure, and resumable like an interruption.
                self._close(run, "interrupted", trainer)
                raise
            except BaseException as error:
                if run is not None:
                    error.add_note(_kept_traceback(run, error))
                self._close(run, "failed", trainer)
                raise
            else:
                self._close(run, "done", trainer)

    def after_step(self, trainer: Resumable) -> None:
        """Save when a multiple of `save_every` was reached or passed, and stop when asked to; see `stop_if_asked`."""
        if self.save_every and trainer.step // self.save_every > (self.saved_at or 0) // self.save_every:
            self.save(trainer)
        self.stop_if_asked(trainer)

    def stop_with(self, error: Exception) -> None:
        """Let the next `after_step` save before it raises `error`: the step is whole, and none of it need be lost."""
        if self.error is None:
            self.error = error

    def stop_if_asked(self, trainer: Resumable) -> None:
        """Save, then raise what `stop_with` was given, or `Interrupted` when any process has a signal or an error."""
        if not self.anywhere(self.stop.requested or self.error is not None):
            return
        saved = f"Saved step {trainer.step}. Continue: {self.resume_with}"
        if self.error is None:
            self.save(trainer)
            raise Interrupted(saved)
        try:
            self.save(trainer)
            self.journal.note(saved)
        except CheckpointError as trouble:  # it must not hide why the run stops
            self.error.add_note(str(trouble))
        raise self.error

    def finish(self, trainer: Resumable) -> None:
        """Save the end of the run: a last checkpoint, and the model in the form other libraries load.

        Raises:
            CheckpointError: The disk refuses; what was saved before is intact.
        """
        self.save(trainer)
        try:
            trainer.save_model(self.path / "model")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"the model could not be written to {self.path / 'model'}: {error}. Nothing that was learned is lost: "
                f"step {trainer.step}, the last one, is saved as a checkpoint. Free disk space (or mend what is named "
                f"above), then write the model: {self.resume_with}"
            ) from error

    def save(self, trainer: Resumable) -> None:
        """Write a checkpoint of this step, unless there is one."""
        if self.saved_at == trainer.step:
            return
        state = dict(trainer.state_dict())  # every process takes part: sharded state is gathered here
        _require_finite(state["model"], trainer.step)
        if self.main:
            self.journal.sync()  # the log must reach as far as the checkpoint says
            self.checkpoints.save(trainer.step, {**state, "journal": {"records": self.journal.records}})
        self.saved_at = trainer.step

    def _directory(self, resume: bool) -> RunDirectory:
        if resume:
            run = RunDirectory.open(self.path)
        else:
            run = RunDirectory.create(self.path, self.config_text, self.resolved)
        run.set_status("running")
        return run

    def _restore(self, trainer: Resumable) -> None:
        if self.checkpoints.empty:
            self.journal.rewind(-1)
            self.journal.note("No checkpoint yet: starting from the beginning, with the same random numbers.")
            return
        found = self.checkpoints.load(require=REQUIRED)
        trainer.load_state_dict(found.state)
        self.saved_at = found.step
        self.journal.rewind(found.step, records=found.state["journal"]["records"])
        self.journal.note(
            f"Resumed step {found.step} from {found.path.name}: weights, optimizer, schedule, data position, random "
            "numbers and statistics are as they were."
        )

    def _close(self, run: RunDirectory | None, status: Status, trainer: Resumable) -> None:
        if run is None:
            return
        self.journal.board.close()  # the last words are plain lines below it
        try:
            run.set_status(status, step=trainer.step, total_steps=self.total_steps)
            if status == "done":
                verdict = find(read_run(run.path)).verdict
                self.journal.note(f"{verdict.sentence} {verdict.detail}".rstrip())
                if (run.path / "model").exists():
                    self.journal.note(f"Model: {run.path / 'model'}")
            self.journal.note(f"Report: {write_report(run.path)}")
        except OSError as error:  # a full disk must not hide why the run ended
            self.journal.note(f"The report could not be written ({error}). Later: rlalign report {run.path}")


def _settings_taken(run: RunDirectory, resolved: dict[str, Any]) -> list[str]:
    """Write the settings of a resumed run, which its state fits, and say what differs from before."""
    changed = run.change_config(resolved)
    if not changed:
        return []
    return [
        f"With other settings than before: {', '.join(changed)}. The earlier ones are kept in config.resolved.1.json "
        "and so on."
    ]


def _require_finite(tree: Any, step: int, name: str = "model") -> None:
    """A model that is no longer finite must not push the last good one out of the checkpoints."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            _require_finite(value, step, str(key))
    elif isinstance(tree, Tensor) and not bool(torch.isfinite(tree).all()):
        raise CheckpointError(
            f"`{name}` has NaN or infinite entries, so step {step} was not saved; older checkpoints are intact. Lower "
            "`optim.learning_rate`, and look at the metrics before this step."
        )


def _kept_traceback(run: RunDirectory, error: BaseException) -> str:
    try:
        return f"Full traceback: {run.record_error(error)}"
    except OSError as trouble:  # a full disk must not hide why the run ended
        return f"The traceback could not be saved to {run.errors} ({trouble.strerror})."
