"""Carry out a YAML run: what the `rlalign` command calls for language models."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign import config as config_files
from rlalign.config import ConfigError
from rlalign.llm.config import PolicyGradientConfig
from rlalign.llm.consistency import check_consistency

if TYPE_CHECKING:
    from rlalign.llm.trainer import PolicyGradientTrainer


def train(config: PolicyGradientConfig, *, run_dir: Path, config_text: str, resume: bool = False) -> None:
    """Train as the config says; with `resume`, go on from the newest checkpoint of `run_dir`."""
    if resume and _finished(run_dir):
        print(f"{run_dir} is finished; nothing is left to do. To train longer, start a run with a larger `total_steps`.")
        return
    _trainer(config, run_dir=run_dir, config_text=config_text).fit(resume=resume)


def evaluate(run_dir: Path, *, checkpoint: Path | None = None) -> dict[str, float]:
    """Score a run's model on its held-out data.

    Args:
        checkpoint: One of the run's checkpoints; the newest intact one when None.
    """
    return _restored(run_dir, checkpoint).evaluate()


def sample(run_dir: Path, prompt: str | None, *, count: int = 1) -> list[str]:
    """Complete `prompt`, or held-out (else training) prompts, `count` times with a run's model.

    A plain prompt is put to the model in the form the training data has: as a chat message when that is conversational.
    """
    from rlalign.llm.collect import row_uniforms
    from rlalign.llm.data import encode_prompt

    trainer = _restored(run_dir, None)
    cfg, data = trainer.config, trainer.evaluator.data or trainer.train_data
    prompts: Sequence[Any] = [data[row % len(data)]["prompt"] for row in range(count)]
    if prompt is not None:
        prompts = [prompt if isinstance(prompts[0], str) else [{"role": "user", "content": prompt}]] * count
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


def check(config: PolicyGradientConfig) -> list[str]:
    """Look for contradictions and missing parts without loading a model; return notes."""
    _require(config)
    return check_consistency(config)


def _trainer(config: PolicyGradientConfig, *, run_dir: Path, config_text: str) -> "PolicyGradientTrainer":
    from rlalign.llm.trainer import PolicyGradientTrainer

    _require(config)
    assert config.model is not None and config.data is not None
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


def _require(config: PolicyGradientConfig) -> None:
    missing = [f"`{name}`" for name in ("model", "data", "rewards") if not vars(config)[name]]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} must be set in the config. A run that was started from Python is continued by its "
            "own script: trainer.fit(resume=True)."
        )


def _finished(run_dir: Path) -> bool:
    from rlalign.training.run_directory import RunDirectory

    return RunDirectory.open(run_dir, lock=False).status()["status"] == "done"


def _as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
