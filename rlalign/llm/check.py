"""Look a configuration over without torch or a model, in seconds: what training would stop at, and what is unusual."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlalign.config import ConfigError
from rlalign.llm.config import ModelConfig, PolicyGradientConfig
from rlalign.llm.consistency import check_consistency
from rlalign.llm.data import Prompts, is_local, load_prompts
from rlalign.llm.data_lint import check_prompts
from rlalign.llm.model_names import check_name
from rlalign.llm.reward_source import required_parameters
from rlalign.llm.reward_trial import try_rewards
from rlalign.llm.rewards import resolve_rewards
from rlalign.training.reward_call import RewardError
from rlalign.training.reward_function import RewardFunction
from rlalign.training.reward_request import check_columns

_TOKENS_PER_STEP = 200_000
"""Of completions; more than this in a step is nothing for a CPU."""
_ALWAYS = ("prompts", "completions", "completion_ids")

Rewards = Mapping[str, Sequence[RewardFunction]]


def check(config: PolicyGradientConfig) -> list[str]:
    """Find contradictions, missing parts, unusable data and rewards that fail on sample completions; return notes.

    Data is read and linted, unless it would come from the Hub: that is left to training.

    Raises:
        ConfigError: What training would stop at.
    """
    notes, rewards, data = _look(config)
    return [*notes, *try_rewards(config, rewards["rewards"], data.get("data.train"))]


def refuse(config: PolicyGradientConfig) -> None:
    """The same before training begins, less the trial of the rewards: its first batch is one.

    Raises:
        ConfigError: What training would stop at.
    """
    _look(config)


def require(config: PolicyGradientConfig) -> None:
    """A run from YAML names its model, data and rewards.

    Raises:
        ConfigError: One of them is missing.
    """
    missing = [f"`{name}`" for name in ("model", "data", "rewards") if not vars(config)[name]]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} must be set in the config. A run that was started from Python is continued by its "
            "own script: trainer.fit(resume=True)."
        )


def _look(config: PolicyGradientConfig) -> tuple[list[str], Rewards, dict[str, Prompts]]:
    require(config)
    assert config.model is not None
    notes = [*check_consistency(config), *_size_notes(config, config.model)]
    check_name(config.model.name)
    rewards = _rewards(config)
    for key, functions in rewards.items():
        named = (f"{function.name} (weight {function.weight:g})" for function in functions)
        notes.append(f"`{key}`: {', '.join(named)}")
    data = _data(config, notes)
    _require_columns(config, rewards, data)
    return notes, rewards, data


def _size_notes(config: PolicyGradientConfig, model: ModelConfig) -> list[str]:
    rollout = config.rollout
    limit = rollout.max_completion_tokens
    notes = [f"a completion ends after {limit} tokens at the latest (`rollout.max_completion_tokens`)"]
    tokens = rollout.prompts_per_step * rollout.group_size * limit
    if tokens > _TOKENS_PER_STEP and _on_cpu(model.device):
        notes.append(
            f"up to {tokens:,} tokens a step: this is sized for GPUs; for a CPU see configs/llm/bnpo_arithmetic.yaml "
            "(the preset `bnpo_arithmetic`)"
        )
    return notes


def _on_cpu(device: str) -> bool:
    """Whether the model would be on a CPU, as far as can be told without torch."""
    drivers = any(Path(place).exists() for place in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    return device == "cpu" or (device == "auto" and sys.platform == "linux" and not drivers)


def _rewards(config: PolicyGradientConfig) -> dict[str, list[RewardFunction]]:
    asked = {"rewards": config.rewards, "eval.metrics": config.eval.metrics}
    asked |= {f"eval.baselines.{n}.metrics": baseline.metrics for n, baseline in enumerate(config.eval.baselines)}
    return {key: resolve_rewards(rewards, key=key) for key, rewards in asked.items() if rewards}


def _data(config: PolicyGradientConfig, notes: list[str]) -> dict[str, Prompts]:
    """Read what is on this machine, and add to the notes."""
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
    notes += [
        f"`{name}`: {source.source} is not read here; training loads it"
        for name, (source, _) in asked.items()
        if name not in read
    ]
    for name, prompts in read.items():
        columns = ", ".join(prompts.reward_columns) or "no columns"
        notes.append(f"`{name}`: {len(prompts)} prompts; the rewards get {columns}")
        notes += check_prompts(prompts, held_out=read.get("data.eval") if name == "data.train" else None)
    return read


def _require_columns(config: PolicyGradientConfig, rewards: Rewards, data: Mapping[str, Prompts]) -> None:
    metrics = "eval.metrics" if "eval.metrics" in rewards else "rewards"
    pairs = [("rewards", "data.train"), (metrics, "data.eval")]
    for number in range(len(config.eval.baselines)):
        own = f"eval.baselines.{number}.metrics"
        pairs.append((own if own in rewards else metrics, f"eval.baselines.{number}.data"))
    for key, name in pairs:
        for index, function in enumerate(rewards[key] if name in data else ()):
            try:
                check_columns(function, required_parameters(function), {*data[name].reward_columns, *_ALWAYS})
            except RewardError as error:
                raise ConfigError(f"`{key}.{index}.function` with `{name}`: {error}") from None
