"""A trained agent as a folder: its config as JSON, its weights and statistics as safetensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from rlalign import config as config_files
from rlalign.config import ConfigError
from rlalign.training.files import share_as_umask_says
from rlalign.training.state_tree import decode, encode

SETTINGS, WEIGHTS = "agent.json", "agent.safetensors"


@dataclass(frozen=True)
class Saved:
    """What a folder holds."""

    config: Any
    step: int
    """Where the clock stood."""
    description: Mapping[str, Any]
    """What is needed to build the agent again beyond its config."""
    learned: Mapping[str, Any]
    """Weights and statistics."""

    def write(self, path: str | Path) -> None:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tree, tensors = encode(self.learned)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        settings = {
            "config": config_files.dump(self.config),
            "step": self.step,
            "description": self.description,
            "learned": tree,
        }
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        share_as_umask_says(folder)

    @classmethod
    def read(cls, path: str | Path) -> "Saved":
        """Read what `write` wrote, or the model of a run directory.

        Raises:
            ConfigError: There is no agent.
        """
        folder = Path(path) / "model" if (Path(path) / "model" / SETTINGS).is_file() else Path(path)
        if not (folder / SETTINGS).is_file():
            raise ConfigError(f"{path} holds no agent: there is no {SETTINGS} in it.")
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        config = config_files.build(settings["config"], source=str(folder / SETTINGS))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return cls(config, settings["step"], settings["description"], decode(settings["learned"], tensors))
