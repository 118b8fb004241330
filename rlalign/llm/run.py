"""Carry out a YAML run: what the `rlalign` command calls for language models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign import config as config_files
from rlalign.llm.check import check, refuse, require
from rlalign.llm.config import PolicyGradientConfig

__all__ = ["check", "evaluate", "sample", "train"]

if TYPE_CHECKING:
    from rlalign.llm.trainer import PolicyGradientTrainer


def train(config: PolicyGradientConfig, *, run_dir: Path, config_text: str, resume: bool = False) -> None:
    """Train as the config says; with `resume`, go on from the newest checkpoint of `run_dir`."""
    if resume and _finished(run_dir):
        print(f"{run_dir} is finished. To train longer, start a run with a larger `total_steps`.")
        return
    if not resume:
        refuse(config)  # before torch is imported, which takes longer than all of it
    _trainer(config, run_dir=run_dir, config_text=config_text).fit(resume=resume)


def evaluate(run_dir: Path, *, checkpoint: Path | None = None) -> dict[str, float]:
    """Score a run's model on its held-out data.

    Args:
        checkpoint: One of the run's checkpoints; the newest intact one when None.
    """
    return _restored(run_dir, checkpoint).evaluate()


def sample(run_dir: Path, prompt: str | None, *, count: int = 1) -> list[str]:
    """Complete `prompt`, or held-out (else training) prompts, `count` times with a run's model.

    A prompt is put to the model in the form the data has: in `data.template`, after `data.system_prompt`, or as a
    chat message where that is made of messages.

    Raises:
        ConfigError: `data.template` needs columns that a prompt alone does not have.
    """
    from rlalign.llm.collect import row_uniforms
    from rlalign.llm.data import encode_prompt
    from rlalign.llm.data_wording import in_training_form

    trainer = _restored(run_dir, None)
    cfg, data = trainer.config, trainer.evaluator.data or trainer.train_data
    prompts: Sequence[Any] = [data[row % len(data)]["prompt"] for row in range(count)]
    if prompt is not None:
        assert cfg.data is not None  # `_trainer` saw to it
        words = {"template": cfg.data.template, "system_prompt": cfg.data.system_prompt}
        prompts = [in_training_form(prompt, prompts[0], **words)] * count
    time = cfg.rollout.max_completion_tokens
    generations = trainer.policy.generate(
        [encode_prompt(text, trainer.tokenizer) for text in prompts],
        group_size=1,
        max_new_tokens=time,
        temperature=cfg.rollout.temperature,
        uniforms=row_uniforms(-2, range(count), group_size=1, time=time, seed=cfg.seed),
    )
    lines = zip(generations.ids.tolist(), generations.lengths.tolist(), strict=True)
    texts = trainer.tokenizer.batch_decode([ids[:length] for ids, length in lines], skip_special_tokens=True)
    if prompt is not None:
        return texts
    return [f"{_as_text(asked)}\n-> {text}" for asked, text in zip(prompts, texts, strict=True)]


def _trainer(config: PolicyGradientConfig, *, run_dir: Path, config_text: str) -> "PolicyGradientTrainer":
    from transformers.utils import logging as transformers_logging

    from rlalign.llm.trainer import PolicyGradientTrainer

    # Its bars for reading and writing weights would tear the live board.
    transformers_logging.disable_progress_bar()

    require(config)
    assert config.model is not None
    assert config.data is not None
    return PolicyGradientTrainer(
        config.model,
        config.rewards,
        config.data.train,
        config,
        eval_dataset=config.data.eval,
        run_dir=run_dir,
        config_text=config_text,
    )


def _restored(run_dir: Path, checkpoint: Path | None) -> "PolicyGradientTrainer":
    from rlalign.training.checkpoint import Checkpoints

    config = config_files.load(run_dir / "config.resolved.json")
    trainer = _trainer(config, run_dir=run_dir, config_text="")
    trainer.load_state_dict(Checkpoints(run_dir / "checkpoints").load(checkpoint).state)
    return trainer


def _finished(run_dir: Path) -> bool:
    from rlalign.training.run_directory import RunDirectory

    return RunDirectory.open(run_dir, lock=False).status()["status"] == "done"


def _as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
