"""What an agent stands in: environments to learn and to be measured in, a device, data, a run's session and its end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from rlalign import config as config_files
from rlalign.agents.config import AgentConfig, EnvConfig
from rlalign.agents.dataset_parts import OfflineDataset
from rlalign.agents.envs import Environments, make_environments
from rlalign.buffers.transitions import Transitions
from rlalign.config import ConfigError
from rlalign.config_schema import hints_of
from rlalign.training.seeding import derived_seed
from rlalign.training.session import Session

if TYPE_CHECKING:
    from rlalign.agents.agent import Agent

RAW_SCORES = {"ale_py.vector_env:AtariVectorEnv": {"reward_clipping": False, "episodic_life": False}}
"""Vector form -> arguments with which it plays whole games for their own score, as it does not unless told to."""


def check_given(name: str, env: object, dataset: object, keywords: dict[str, Any]) -> None:
    """Refuse what a caller may take for an environment, a dataset or settings: it would be passed over in silence.

    Raises:
        ConfigError: It is something else; the message says what to give instead.
    """
    if isinstance(env, AgentConfig) or "config" in keywords:
        raise ConfigError(f"a config object goes to {name}.from_config(config); {name}(...) takes settings by name.")
    if not isinstance(env, str | VectorEnv | None):
        raise ConfigError(
            f"`env` must be an id such as 'CartPole-v1' or a gymnasium VectorEnv, got {type(env).__name__}. One "
            "environment cannot be copied: register it (gymnasium.register) and give its id, or pass "
            "gymnasium.vector.SyncVectorEnv([make, make, ...])."
        )
    if not isinstance(dataset, str | Path | Transitions | OfflineDataset | None):
        raise ConfigError(
            f"`dataset` must be a path, a name, Transitions or an OfflineDataset, got {type(dataset).__name__}; "
            "rlalign.agents.datasets.load_dataset reads .npz files and Minari."
        )


def check_device(device: str) -> None:
    """Make sure that a tensor can be put there.

    Raises:
        ConfigError: This machine or this build of PyTorch has no such device.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"`device`={device}: {str(error).splitlines()[0][:160]}. Set it to cpu.") from error


def training_environments(config: AgentConfig, vector: VectorEnv | None) -> Environments | None:
    """The user's own vector environment, or copies of what `env.id` names; None without either."""
    if vector is not None:
        name = vector.spec.id if isinstance(vector.spec, EnvSpec) else type(vector).__name__
        return Environments(vector, name=name, seed=derived_seed(config.seed, "env"))
    return make_environments(config.env, seed=config.seed) if config.env.id else None


def play_config(config: AgentConfig, learned_in: Environments | None) -> EnvConfig:
    """How whole episodes are played from given starts, for evaluation and film: copies stepped one after the other.

    Where a vector form shows agents something else than one copy does (Atari's stacks frames), in that form.
    """
    cfg = replace(config.env, vectorization="sync")
    if config.env.vectorization in ("sync", "async") or learned_in is None:
        return cfg
    try:
        one = make_environments(cfg, seed=config.seed, num_envs=1)
    except ConfigError:  # `env.kwargs` may be the vector form's own, and the id may be known to EnvPool alone
        return _for_raw_scores(config.env, learned_in)
    one.close()
    alike = (one.observation_space, one.action_space) == (learned_in.observation_space, learned_in.action_space)
    return cfg if alike else _for_raw_scores(config.env, learned_in)


def _for_raw_scores(cfg: EnvConfig, learned_in: Environments) -> EnvConfig:
    spec = learned_in.vector.spec
    form = spec.vector_entry_point if isinstance(spec, EnvSpec) else None
    return replace(cfg, kwargs={**cfg.kwargs, **RAW_SCORES.get(str(form), {})})


def session_of(agent: "Agent") -> Session:
    """The run that `fit` opens."""
    config: Any = agent.config
    resolved = config_files.dump(config)
    session = Session(
        agent.run_dir,
        name=config.method,
        config_text=agent.config_text or f"# Started from Python.\n{json.dumps(resolved, indent=2)}\n",
        resolved=resolved,
        total_steps=agent.total,
        save_every=config.checkpoint.every,
        keep=config.checkpoint.keep,
        trackers=tuple(config.log.trackers),
        project=config.log.project,
    )
    if agent.foreign or agent.dataset is not None:
        session.resume_with = f"the same script with run_dir={str(session.path)!r} and fit(resume=True)"
    return session


def with_total(
    config: AgentConfig, total_env_steps: int | None, total_updates: int | None, *, name: str
) -> AgentConfig:
    """The config with another end of its clock.

    Raises:
        ConfigError: The agent has another clock, or the total is less than 1.
    """
    given = {"total_env_steps": total_env_steps, "total_updates": total_updates}
    for clock, value in given.items():
        if value is None:
            continue
        if clock not in hints_of(type(config)):
            other = next(key for key in given if key != clock)
            raise ConfigError(f"{name} counts `{other}`, not `{clock}`.")
        if value < 1:
            raise ConfigError(f"`{clock}` must be at least 1, got {value}.")
        config = replace(config, **{clock: value})
    return config
