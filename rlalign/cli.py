"""The `rlalign` command: parse, load the config, hand over to the domain, and turn every failure into one message.

Exit codes: 0 done, 1 failed run, 2 usage or config, 75 interrupted and resumable. Nothing heavy is imported before a
command needs it, so `--help`, `list` and `check CONFIG` answer at once.
"""

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

import rlalign
from rlalign import config
from rlalign.cli_errors import clean_exit, stray_setting
from rlalign.cli_text import GUIDE, number, print_methods, print_presets, print_table


class GuideWhenBare(TyperGroup):
    """`rlalign` alone is a question, not a mistake: answer it on one screen."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            typer.echo(GUIDE.format(version=rlalign.__version__))
            raise typer.Exit
        return super().parse_args(ctx, args)


class WithSettings(TyperCommand):
    """A command that takes KEY=VALUE, which who comes from elsewhere writes as `--key=value`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        mistake = stray_setting(args, known)
        if mistake is not None:
            typer.echo(mistake, err=True)
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=GuideWhenBare,
    help="Reinforcement learning and alignment. Exit codes: 0 done, 1 failed run, 2 usage or config, 75 interrupted.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, such as runs/bnpo_arithmetic.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as rollout.group_size=8.")
]


def main() -> None:
    """Entry point of the `rlalign` script."""
    # As with `python -m rlalign`: modules beside the user are found, such as `env.id: my_envs:Grid-v0`.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    app(prog_name="rlalign")


@app.callback(invoke_without_command=True)
def before_any_command(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(rlalign.__version__)
        raise typer.Exit


@app.command(cls=WithSettings)
def train(
    source: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, or a preset of `rlalign list`.")],
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Where the run goes; a new directory. Default: runs/NAME, then runs/NAME-2 ...")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Short for seed=N.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Train this many seeds, from `seed` on, one process each; then aggregate.")
    ] = None,
) -> None:
    """Train from a config file or preset."""
    settings = [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]
    with clean_exit():
        from rlalign.training.run_directory import free_run_path

        path = config.locate(source)
        loaded = config.load(path, settings)
        run = run_dir or free_run_path(path.stem if seeds is None else f"{path.stem}-seeds")
    with clean_exit(run):
        text = path.read_text(encoding="utf-8") + _settings_comment(settings)
        if seeds is not None:
            _train_seeds(run, range(loaded.seed, loaded.seed + seeds), text, overrides or [])
            return
        _domain(loaded.method).train(loaded, run_dir=run, config_text=text)


@app.command()
def resume(run: Run) -> None:
    """Continue an interrupted or crashed run from its last complete checkpoint; of several seeds, those not done."""
    if _holds_seeds(run):
        with clean_exit(run):
            from rlalign.training.seeds import run_seeds

            run_seeds(run, tell=typer.echo)
            return
    with clean_exit():
        loaded = _load_run(run)
    with clean_exit(run):
        text = (run / "config.yaml").read_text(encoding="utf-8")
        _domain(loaded.method).train(loaded, run_dir=run, config_text=text, resume=True)


@app.command(name="eval")
def evaluate(
    run: Run,
    checkpoint: Annotated[Path | None, typer.Option(help="A checkpoint of the run. Default: the newest.")] = None,
) -> None:
    """Score a run's model on the held-out data."""
    with clean_exit(run):
        result = _domain(_load_run(run).method).evaluate(run, checkpoint=checkpoint)
        print_table([(name, number(value)) for name, value in result.items()])


@app.command()
def sample(
    run: Run,
    prompt: Annotated[str | None, typer.Argument(help="Text to complete. Default: held-out prompts.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many completions.")] = 1,
) -> None:
    """Let a run's model write."""
    with clean_exit(run):
        for text in _domain(_load_run(run).method).sample(run, prompt, count=count):
            typer.echo(text)


@app.command(cls=WithSettings)
def check(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A config, a preset, a reward file.py:function, or an environment.")
    ],
    overrides: Overrides = None,
) -> None:
    """Find mistakes before training: validate a config, try a reward function, or look an environment over."""
    with clean_exit():
        if _is_environment(target):
            _check_environment(target, overrides or [])
        elif _is_reward(target):
            _check_reward(target, overrides or [])
        else:
            _check_config(target, overrides or [])


@app.command()
def collect(
    source: Annotated[str, typer.Argument(metavar="RUN|ENV", help="A run, a saved agent, or an environment (random).")],
    episodes: Annotated[int, typer.Option(min=1, help="Whole episodes to record.")] = 100,
    kind: Annotated[Literal["random", "medium", "mixed", "expert"], typer.Option(help="Who acts.")] = "expert",
    out: Annotated[Path | None, typer.Option(help="A .npz file, or an empty folder for one file an episode.")] = None,
    minari: Annotated[str | None, typer.Option(help="Also a local Minari dataset, such as pole/mixed-v0.")] = None,
    seed: Annotated[int, typer.Option(help="Decides starts and random actions.")] = 0,
    noise: Annotated[float, typer.Option(min=0, max=1, help="medium: chance of a random action at each step.")] = 0.3,
    checkpoint: Annotated[Path | None, typer.Option(help="medium: act by this earlier checkpoint instead.")] = None,
) -> None:
    """Record an agent's (or random) episodes as a dataset for offline learning, with scores to compare with."""
    with clean_exit():
        from rlalign.agents.record import record

        if out is None and minari is None:
            raise config.ConfigError("name a target: --out FILE.npz, or --minari NAME-v0.")
        found = record(source, episodes=episodes, kind=kind, seed=seed, noise=noise, checkpoint=checkpoint)
        found.save(out, minari=minari)
        print_table([(name, number(value)) for name, value in found.summary().items()])
        typer.echo(f"Dataset: {' and '.join(str(target) for target in (out, minari) if target is not None)}")


@app.command()
def report(run: Run) -> None:
    """Write report.html from a run directory, finished or not."""
    with clean_exit(run):
        if _holds_seeds(run):
            from rlalign.training.seeds_report import write_aggregate

            typer.echo(f"Report: {write_aggregate(run)}")
            return
        _require_run(run)
        from rlalign.training.report import write_report

        typer.echo(f"Report: {write_report(run)}")


@app.command(name="list")
def list_presets() -> None:
    """Name the configs that come with rlalign."""
    with clean_exit():
        found = config.presets()
        print_presets(found)
        typer.echo("\nStart one: rlalign train NAME" if found else "This installation carries no presets.")
        print_methods()


def _train_seeds(run: Path, seeds: range, text: str, overrides: list[str]) -> None:
    from rlalign.training.seeds import create, run_seeds

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise config.ConfigError("--seeds starts its own processes: call it without torchrun or accelerate launch.")
    create(run, seeds=seeds, config_text=text, settings=overrides)
    run_seeds(run, tell=typer.echo)


def _holds_seeds(run: Path) -> bool:
    return (run / "seeds.json").is_file()


def _domain(method: str) -> ModuleType:
    """The module that carries out a method: `run` beside the package's `config`."""
    package = config.METHODS[method].partition(":")[0].rpartition(".")[0]
    return import_module(f"{package}.run")


def _settings_comment(settings: list[str]) -> str:
    """A note in the run's copy of the config; `config.resolved.json` holds the settings in force."""
    shown = "".join(f"#   {' '.join(setting.splitlines())}\n" for setting in settings)
    return f"\n# Changed on the command line:\n{shown}" if settings else ""


def _require_run(run: Path) -> None:
    if (run / "config.resolved.json").is_file():
        return
    if _holds_seeds(run):
        one = next(iter(sorted(run.glob("seed-*/"))), run / "seed-0")
        raise config.ConfigError(f"{run} holds several seeds; name one of them, such as {one}.")
    inside = Path("runs") / run
    hint = f" Did you mean {inside}?" if (inside / "config.resolved.json").is_file() else ""
    raise config.ConfigError(f"{run} is not a run directory: it has no config.resolved.json.{hint}")


def _load_run(run: Path) -> Any:
    _require_run(run)
    return config.load(run / "config.resolved.json")


def _is_environment(target: str) -> bool:
    """Gymnasium's form: `Name-v0`, with `module:` or `namespace/` in front; a reward function's name has no hyphen."""
    return not Path(target).exists() and re.search(r"(^|[:/])[A-Za-z]\w*(-[\w.]+)*-v\d+$", target) is not None


def _check_environment(target: str, overrides: list[str]) -> None:
    from rlalign.agents.check_env import probe_environment

    if overrides:
        raise config.ConfigError(f"`{overrides[0]}`: settings go with a config, not with an environment.")
    found = probe_environment(target)
    typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)


def _is_reward(target: str) -> bool:
    if target.endswith(".py"):  # the function is missing, which the search for it says
        return True
    if Path(target).exists() or Path(target).suffix in (".yaml", ".yml", ".json"):
        return False
    return ":" in target or target.endswith("_reward")  # `accuracy_reward` and its like are names of trl.rewards


def _check_config(target: str, overrides: list[str]) -> None:
    path = config.locate(target)
    loaded = config.load(path, overrides)
    notes = _domain(loaded.method).check(loaded)
    typer.echo(f"{path}: ok (method {loaded.method})")
    for note in notes:
        typer.echo(f"  {note}")


def _check_reward(target: str, overrides: list[str]) -> None:
    if overrides:
        raise config.ConfigError(f"`{overrides[0]}`: settings go with a config, not with a reward function.")
    from rlalign.llm.rewards import probe_reward

    found = probe_reward(target)
    typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)
