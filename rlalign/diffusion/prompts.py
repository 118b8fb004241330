"""What is generated from: prompts, class labels or rows of columns, as arguments of a pipeline's call."""

import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rlalign.config import ConfigError
from rlalign.diffusion.config import PromptsConfig
from rlalign.training.seeding import generator

PLACES = ("prompt", "labels", "class_labels")
"""Parameters of a pipeline's call that a plain prompt may be meant for, in this order."""


@dataclass(frozen=True)
class Prompts:
    """Rows of call arguments and of columns for the reward.

    Args:
        rows: One per prompt.
        place: The call's parameter that a plain prompt goes to.
        parameters: All of them; columns of other names go to the reward alone.
    """

    rows: tuple[Mapping[str, Any], ...]
    place: str
    parameters: frozenset[str]

    @classmethod
    def of(cls, prompts: Sequence[Any], pipeline: Any) -> "Prompts":
        """Read texts, labels, or mappings whose names are parameters of the call or columns of the reward.

        Raises:
            ConfigError: There is none, the pipeline takes none of `PLACES`, or the rows differ in their names.
        """
        parameters = list(inspect.signature(type(pipeline).__call__).parameters)
        if isinstance(prompts, str) or not len(prompts):
            raise ConfigError(f"`prompts` must be a list with at least one entry, got {prompts!r}.")
        plain = not all(isinstance(row, Mapping) for row in prompts)
        place = next((name for name in PLACES if name in parameters), "" if not plain else None)
        if place is None:
            raise ConfigError(
                f"{type(pipeline).__name__} takes none of {', '.join(PLACES)}; give `prompts` as mappings whose names "
                "are parameters of its call."
            )
        rows = tuple(dict(row) if isinstance(row, Mapping) else {place: row} for row in prompts)
        if len({frozenset(row) for row in rows}) > 1:
            raise ConfigError("`prompts` must all have the same columns; leave none out.")
        if not any(name in parameters or name == "prompt" for name in rows[0]):
            raise ConfigError(
                f"`prompts` have the columns {', '.join(map(str, rows[0]))}, none of which {type(pipeline).__name__} "
                f"takes; one must be a parameter of its call, such as {place or parameters[1]}."
            )
        rows = tuple(
            {place if name == "prompt" and "prompt" not in parameters and place else name: v for name, v in row.items()}
            for row in rows
        )
        return cls(rows, place, frozenset(parameters))

    def require_fit(self, pipeline: DiffusionPipeline, call: Mapping[str, Any]) -> None:
        """Refuse what the pipeline would trip over: texts without an encoder, arguments that it does not take.

        Raises:
            ConfigError: With what to give instead.
        """
        encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder")]
        if "prompt" in self.call([0]) and encoders and all(part is None for part in encoders):
            embeddings = ", ".join(sorted(name for name in self.parameters if name.endswith("prompt_embeds")))
            raise ConfigError(
                f"this {type(pipeline).__name__} has no text encoder for `prompts` that are texts; give mappings with "
                f"{embeddings}."
            )
        takes = inspect.signature(type(pipeline).__call__).parameters  # type: ignore[operator]
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        for name in call:
            near = difflib.get_close_matches(name, takes)
            # Some pipelines take any name, and ignore those that they do not know.
            if name not in takes and (near or not anything):
                near = near or [known for known in takes if known != "self"]
                raise ConfigError(
                    f"`pipeline.call.{name}` is no parameter of {type(pipeline).__name__}; there is {', '.join(near)}."
                )

    def __len__(self) -> int:
        return len(self.rows)

    def call(self, indices: Sequence[int]) -> dict[str, Any]:
        """Arguments of one call for these rows; tensors are stacked, everything else is a list."""
        return {name: self._column(name, indices) for name in self.rows[0] if name in self.parameters}

    def texts(self, indices: Sequence[int]) -> list[Any]:
        """What the reward and the report call the prompts: the plain prompt, else the row's number."""
        return [self.rows[k].get("prompt", self.rows[k].get(self.place, k)) for k in indices]

    def columns(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        """Columns for the reward: those that are no arguments of the call."""
        names = [name for name in self.rows[0] if name not in self.parameters and name != "prompt"]
        return {name: [self.rows[k][name] for k in indices] for name in names}

    def draw(self, step: int, *, count: int, seed: int) -> list[int]:
        """The rows of step `step`: every prompt once per pass, in an order that is a function of (seed, pass)."""
        order: list[int] = []
        shuffled: list[int] = []
        for place in range(step * count, (step + 1) * count):
            lap, within = divmod(place, len(self))
            if not shuffled or within == 0:
                shuffled = torch.randperm(len(self), generator=generator(seed, "prompts", lap)).tolist()
            order.append(shuffled[within])
        return order

    def _column(self, name: str, indices: Sequence[int]) -> Any:
        values = [self.rows[k][name] for k in indices]
        return torch.stack(values) if isinstance(values[0], Tensor) else values


def read_prompts(cfg: PromptsConfig) -> list[Any]:
    """The prompts that a config names.

    Raises:
        ConfigError: There are none, both ways are used, or the file cannot be read.
    """
    if bool(cfg.values) == bool(cfg.file):
        raise ConfigError("give either `prompts.values` or `prompts.file`.")
    if cfg.file is None:
        return list(cfg.values)
    path = Path(cfg.file).expanduser()
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`prompts.file`={cfg.file}: {error}") from error
    if path.suffix != ".jsonl":
        return lines
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: a row is a mapping with `prompt`, got {line[:60]}")
        rows.append(row)
    return rows
