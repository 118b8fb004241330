"""Samples on request: drawn with a run's generator, judged, and put into its media folder as pictures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlalign.config import ConfigError
from rlalign.diffusion.collect import samples_of
from rlalign.diffusion.media import draw_samples
from rlalign.diffusion.pipeline_call import quiet
from rlalign.diffusion.prompts import Prompts
from rlalign.training.seeding import derived_seed

if TYPE_CHECKING:
    from rlalign.diffusion.dso import DSOTrainer
    from rlalign.diffusion.flow_grpo import FlowGRPOTrainer


def draw_some(trainer: "FlowGRPOTrainer | DSOTrainer", prompt: str | None, *, count: int) -> list[str]:
    """Draw `count` samples with the averaged weights; return a line for each, and one that names the files.

    Sample k has the noise of evaluation's sample k.

    Args:
        prompt: A text or a class; None takes the training prompts in turn.

    Raises:
        ConfigError: The pipeline does not take this prompt.
    """
    cfg, tuned = trainer.config, trainer.tuned
    prompts = trainer.prompts if prompt is None else Prompts.of([_as_label(prompt)], tuned.pipeline)
    indices = [k % len(prompts) for k in range(count)]
    noise = [torch.Generator().manual_seed(derived_seed(cfg.seed, "held out", k)) for k in range(count)]
    call = {**prompts.call(indices), **cfg.pipeline.call, "num_inference_steps": cfg.eval.num_inference_steps}
    try:
        with torch.no_grad(), tuned.averaged(), quiet(tuned.pipeline):
            samples = samples_of(tuned.pipeline(**call, generator=noise))  # type: ignore[operator]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{type(tuned.pipeline).__name__} does not take {prompt!r}: {error}") from error
    captions = [str(text) for text in prompts.texts(indices)]
    judge = trainer.judge
    if prompt is not None and trainer.prompts.columns([0]):  # the reward asks for columns that this prompt has not
        return [*captions, *_pictures(trainer, samples, captions, None)]
    outcomes = judge(samples, prompts.texts(indices), prompts.columns(indices)).parts
    gold = outcomes[judge.gold].tolist()
    lines = [
        f"{caption}: {', '.join(f'{name} {values[k]:.3g}' for name, values in outcomes.items())}"
        for k, caption in enumerate(captions)
    ]
    return [*lines, *_pictures(trainer, samples, captions, [None if math.isnan(value) else value for value in gold])]


def _pictures(
    trainer: "FlowGRPOTrainer | DSOTrainer", samples: Any, captions: list[str], passed: list[float | None] | None
) -> list[str]:
    folder: Path = trainer.session.path / "media"
    shapes = trainer.evaluator.shapes
    try:
        files = draw_samples(
            samples, folder, step=trainer.step, captions=captions, passed=passed, shapes=shapes, name="drawn"
        )
    except ValueError as error:  # neither images nor shapes, such as points
        return [f"No pictures: {error}"]
    return [f"Pictures: {', '.join(str(file) for file in files)}"]


def _as_label(prompt: str) -> str | int:
    """A class may be given by its number."""
    return int(prompt) if prompt.isdecimal() else prompt
