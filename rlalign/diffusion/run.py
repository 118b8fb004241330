"""Carry out a YAML run: what the `rlalign` command calls for diffusion models."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign import config as config_files
from rlalign.config import ConfigError
from rlalign.diffusion.check import check, require
from rlalign.diffusion.config import DiffusionConfig

__all__ = ["check", "evaluate", "sample", "train"]

if TYPE_CHECKING:
    from rlalign.diffusion.dso import DSOTrainer
    from rlalign.diffusion.flow_grpo import FlowGRPOTrainer


def train(config: DiffusionConfig, *, run_dir: Path, config_text: str, resume: bool = False) -> None:
    """Train as the config says; with `resume`, go on from the newest checkpoint of `run_dir`."""
    from rlalign.training.run_directory import RunDirectory

    if resume and RunDirectory.open(run_dir, lock=False).status()["status"] == "done":
        print(f"{run_dir} is finished. To train longer, start a run with a larger total.")
        return
    check(config)  # before torch is imported, which takes longer than all of it
    trainer = _trainer(config, run_dir=run_dir, config_text=config_text)
    try:
        trainer.fit(resume=resume)
    finally:
        trainer.judge.close()


def evaluate(run_dir: Path, *, checkpoint: Path | None = None) -> dict[str, float]:
    """Generate held-out samples with a run's generator and judge them.

    Args:
        checkpoint: One of the run's checkpoints; the newest intact one when None.
    """
    trainer = _restored(run_dir, checkpoint)
    try:
        return trainer.evaluate()
    finally:
        trainer.judge.close()


def sample(run_dir: Path, prompt: str | None, *, count: int = 1) -> list[str]:
    """Draw `count` samples of a prompt, or of the training prompts, into `media/` and say where and how they fare.

    Raises:
        ConfigError: The pipeline does not take the prompt.
    """
    from rlalign.diffusion.drawn_samples import draw_some

    trainer = _restored(run_dir, None)
    try:
        return draw_some(trainer, prompt, count=count)
    finally:
        trainer.judge.close()


def _trainer(config: Any, *, run_dir: Path, config_text: str) -> "FlowGRPOTrainer | DSOTrainer":
    from diffusers.utils import logging as diffusers_logging

    # Its bars for reading weights would tear the live board.
    diffusers_logging.disable_progress_bar()
    require(config)
    match config.method:
        case "flow_grpo":
            from rlalign.diffusion.flow_grpo import FlowGRPOTrainer

            return FlowGRPOTrainer(config=config, run_dir=run_dir, config_text=config_text)
        case "dso":
            from rlalign.diffusion.dso import DSOTrainer

            return DSOTrainer(config=config, run_dir=run_dir, config_text=config_text)
    raise ConfigError(f"`method: {config.method}` is not one of flow_grpo and dso.")


def _restored(run_dir: Path, checkpoint: Path | None) -> "FlowGRPOTrainer | DSOTrainer":
    from rlalign.training.checkpoint import Checkpoints

    config = config_files.load(run_dir / "config.resolved.json")
    trainer = _trainer(config, run_dir=run_dir, config_text="")
    trainer.load_state_dict(Checkpoints(run_dir / "checkpoints").load(checkpoint).state)
    return trainer
