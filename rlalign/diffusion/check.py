"""Look a configuration over without torch or a model: what training would stop at, and what is unusual."""

from pathlib import Path

from rlalign.config import ConfigError
from rlalign.diffusion.config import DiffusionConfig, FlowGRPOConfig
from rlalign.diffusion.config_dso import DSOConfig
from rlalign.diffusion.consistency import check_dso, check_flow_grpo, trained_steps
from rlalign.training.reward_function import import_object


def check(config: DiffusionConfig) -> list[str]:
    """Find contradictions, missing parts, and names that lead nowhere; return notes.

    Raises:
        ConfigError: What training would stop at.
    """
    require(config)
    _require_names(config)
    match config:
        case FlowGRPOConfig():
            check_flow_grpo(config)
            return _flow_grpo_notes(config)
        case DSOConfig():
            check_dso(config)
            return _dso_notes(config)
    raise AssertionError(config)


def require(config: DiffusionConfig) -> None:
    """A run from YAML names its generator, prompts and reward.

    Raises:
        ConfigError: One of them is missing, or given twice.
    """
    pipeline, prompts = config.pipeline, config.prompts
    missing = [] if config.reward is not None else ["`reward.function`"]
    missing += [] if pipeline.source or pipeline.pretrain else ["`pipeline.source` or `pipeline.pretrain`"]
    missing += [] if prompts.values or prompts.file else ["`prompts.values` or `prompts.file`"]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} must be set in the config. A run that was started from Python is continued by its "
            "own script: trainer.fit(resume=True)."
        )
    if pipeline.source and pipeline.pretrain:
        raise ConfigError("`pipeline.source` and `pipeline.pretrain` are two generators; leave one out.")
    if prompts.values and prompts.file:
        raise ConfigError("give either `prompts.values` or `prompts.file`.")


def _require_names(config: DiffusionConfig) -> None:
    """What the settings name can be imported, and files are there."""
    file, data = config.prompts.file, config.data.path if isinstance(config, DSOConfig) else None
    source = config.pipeline.source
    folder = source if source is not None and source.startswith(("/", "./", "../", "~")) and ":" not in source else None
    for key, name in (("prompts.file", file), ("data.path", data), ("pipeline.source", folder)):
        if name is not None and not Path(name).expanduser().exists():
            raise ConfigError(f"`{key}`={name}: no such file or folder.")
    assert config.reward is not None
    named = {"reward.function": config.reward.function, "eval.watch": config.eval.watch}
    named |= {"eval.render": config.eval.render}
    named |= {} if config.pipeline.pretrain is None else {"pipeline.pretrain.data": config.pipeline.pretrain.data}
    for key, name in named.items():
        if name is None:
            continue
        try:
            import_object(name)
        except ImportError as error:
            raise ConfigError(f"`{key}`={name}: {error}") from error


def _flow_grpo_notes(config: FlowGRPOConfig) -> list[str]:
    rollout, optim = config.rollout, config.optim
    samples = rollout.prompts_per_step * rollout.group_size
    steps = rollout.window or trained_steps(rollout)
    notes = [
        f"a step draws {samples:,} samples and trains {steps} of {rollout.num_inference_steps} denoising steps of "
        f"each, in {optim.update_epochs * optim.minibatches} optimizer steps"
    ]
    return notes + _evaluation_notes(config, "step", config.total_steps)


def _dso_notes(config: DSOConfig) -> list[str]:
    data, updates = config.data, config.total_updates
    rounds = f"in each of {data.rounds} rounds" if data.rounds > 1 else "once"
    drawn = f"{data.samples:,} samples are drawn and judged {rounds}"
    notes = [f"samples are read from {data.path}" if data.path else drawn]
    notes.append(
        f"{updates:,} updates of {config.optim.pairs_per_step} pairs, `objective.kind: {config.objective.kind}`"
    )
    if config.objective.kind == "dro" and not (config.eval.stop_below or config.eval.stop_above):
        notes.append(
            "`dro` has no bound and ends in samples that win and look like nothing: set `eval.every` with "
            "`eval.stop_below` or `eval.stop_above` on a metric of fidelity, or use `anchored_dro` or `floored_dro`"
        )
    return notes + _evaluation_notes(config, "update", updates)


def _evaluation_notes(config: DiffusionConfig, unit: str, total: int) -> list[str]:
    limits = config.eval.stop_below or config.eval.stop_above
    if limits and not 0 < config.eval.every < total:
        return [f"`eval.stop_below` and `eval.stop_above` are looked at every `eval.every` {unit}s, which is none here"]
    return []
