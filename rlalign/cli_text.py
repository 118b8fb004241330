"""What the command line prints: the guide, tables, presets and methods by domain."""

from pathlib import Path
from typing import Any

import typer

from rlalign import config

GUIDE = """\
rlalign {version}: reinforcement learning for language models and agents, by command, script or YAML

  rlalign train ppo_cartpole             teach an agent to balance a pole, with a film and a report at the end
  rlalign train bnpo_arithmetic          fine-tune a small language model on arithmetic
  rlalign check my_reward.py:my_reward   try your reward function; an environment: rlalign check CartPole-v1
  rlalign resume runs/ppo_cartpole       continue a run exactly where it stopped (Ctrl-C saves and stops)

Change any setting:   rlalign train ppo_cartpole optim.learning_rate=5e-4 seed=1
Five seeds at once:   rlalign train ppo_cartpole --seeds 5
Ready-made configs:   rlalign list
All commands:         rlalign --help          one command: rlalign train --help"""

# Domain or folder of presets -> how it is called.
DOMAINS = {
    "agents": "agents",
    "llm": "language models",
    "diffusion": "diffusion models",
    "smoke": "smoke tests (seconds; do they run here?)",
}


def print_presets(found: dict[str, Path]) -> None:
    """Presets with what they are for, by folder; headings only where there are several."""
    width = max((len(name) for name in found), default=0)
    folders = dict.fromkeys(path.parent.name for path in found.values())
    for folder in folders:
        if len(folders) > 1:
            typer.echo(f"{'' if folder == next(iter(folders)) else chr(10)}{DOMAINS.get(folder, folder)}:")
        for name, path in found.items():
            if path.parent.name == folder:
                typer.echo(f"{name:<{width}}  {config.describe(path)}".rstrip())


def print_table(rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        typer.echo(f"{name:<{width}}  {text}".rstrip())


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_methods() -> None:
    """The values of `method`, by domain."""
    methods: dict[str, list[str]] = {}
    for method, target in config.METHODS.items():
        methods.setdefault(target.split(".")[1], []).append(method)
    typer.echo("\nMethods, for `method:` of a config of your own:")
    print_table([(f"  {DOMAINS[name]}", ", ".join(found)) for name, found in methods.items() if name in DOMAINS])
