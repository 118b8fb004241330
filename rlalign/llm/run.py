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
        print(f"{run_dir} is finished. To train longer, start a run with a larger `total_steps`.")
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


def check(config: PolicyGradientConfig) -> list[str]:
    """Look for contradictions, missing parts and unusable data without torch or a model, in seconds; return notes.

    Data is read and linted, unless it would come from the Hub: that is left to training.

    Raises:
        ConfigError: What training would stop at.
    """
    _require(config)
    return [*check_consistency(config), *_reward_notes(config), *_data_notes(config)]


def _reward_notes(config: PolicyGradientConfig) -> list[str]:
    from rlalign.llm.rewards import resolve_rewards

    asked = {"rewards": config.rewards, "eval.metrics": config.eval.metrics}
    asked |= {f"eval.baselines.{n}.metrics": baseline.metrics for n, baseline in enumerate(config.eval.baselines)}
    found = {key: resolve_rewards(rewards, key=key) for key, rewards in asked.items() if rewards}
    return [
        f"`{key}`: {', '.join(f'{function.name} (weight {function.weight:g})' for function in functions)}"
        for key, functions in found.items()
    ]


def _data_notes(config: PolicyGradientConfig) -> list[str]:
    from rlalign.llm.data import is_local, load_prompts
    from rlalign.llm.data_lint import check_prompts

    data = config.data
    assert data is not None
    wording = {"template": data.template, "system_prompt": data.system_prompt}
    asked = {"data.train": (data.train, wording)} | ({"data.eval": (data.eval, wording)} if data.eval else {})
    asked |= {f"eval.baselines.{n}.data": (baseline.data, {}) for n, baseline in enumerate(config.eval.baselines)}
    read = {
        name: load_prompts(source, name=name, **words)
        for name, (source, words) in asked.items()
        if is_local(source.source)
    }
    notes = [
        f"`{name}`: {source.source} is not read here; training loads it"
        for name, (source, _) in asked.items()
        if name not in read
    ]
    for name, prompts in read.items():
        columns = ", ".join(prompts.reward_columns) or "no columns"
        notes.append(f"`{name}`: {len(prompts)} prompts; the rewards get {columns}")
        notes += check_prompts(prompts, held_out=read.get("data.eval") if name == "data.train" else None)
    return notes


def _trainer(config: PolicyGradientConfig, *, run_dir: Path, config_text: str) -> "PolicyGradientTrainer":
    from transformers.utils import logging as transformers_logging

    from rlalign.llm.trainer import PolicyGradientTrainer

    # Its bars for reading and writing weights would tear the live board.
    transformers_logging.disable_progress_bar()

    _require(config)
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
