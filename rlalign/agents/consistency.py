"""Find settings that contradict each other before anything is built."""

from importlib.util import find_spec

from rlalign.advantages.config import GAE, GroupEstimatorConfig
from rlalign.agents.config import AgentConfig, GroupConfig, OnPolicyConfig, PPOConfig
from rlalign.config import ConfigError
from rlalign.nn.config import C51, MSE


def check_consistency(config: AgentConfig) -> list[str]:
    """Raise at a contradiction; return what is worth knowing, for which the environment is made once.

    Raises:
        ConfigError: Settings that cannot work together, or an environment that cannot be made, with the fix.
    """
    check_settings(config)
    if not config.env.id:
        return []
    if find_spec("gymnasium") is None:
        raise ConfigError('gymnasium is not installed. Run: pip install "rlalign[agents]"')
    # A vector form may have arguments and an id of its own.
    return [_described(config)] if config.env.vectorization in ("sync", "async") else []


def check_settings(config: AgentConfig) -> None:
    """Raise at a contradiction.

    Raises:
        ConfigError: Settings that cannot work together, with the fix.
    """
    if config.env.step_timeout_s is not None and config.env.vectorization != "async":
        raise ConfigError(
            "`env.step_timeout_s` needs copies in processes of their own: set `env.vectorization` to async (it is "
            f"{config.env.vectorization}), or the limit to null."
        )
    if isinstance(config, OnPolicyConfig):
        _check_on_policy(config)
    if isinstance(config, GroupConfig):
        _check_group(config)


def unregistered(error: Exception) -> str:
    """What to do about an id whose package has not registered it."""
    import gymnasium as gym

    if not isinstance(error, gym.error.NamespaceNotFound):
        return ""
    return " A module that registers it goes in front of the id: `module:Id-v0`, such as `ale_py:ALE/Pong-v5`."


def _check_on_policy(config: OnPolicyConfig) -> None:
    if not isinstance(config.advantage, GAE):
        raise ConfigError(
            f"`advantage.type`={config.advantage.type} compares whole episodes from equal starts; "
            f"{type(config).__name__.removesuffix('Config')} has a critic and needs `gae`. Group estimators belong to "
            "`method: policy_gradient_agent`."
        )
    if isinstance(config.value_head, C51):
        raise ConfigError(
            "`value_head.type: c51` learns from the next state's distribution, and returns are numbers; use `hl_gauss` "
            "or `two_hot`."
        )
    if isinstance(config, PPOConfig):
        decisions = config.rollout_steps * config.env.num_envs
        if config.minibatch_size > decisions:
            raise ConfigError(
                f"`minibatch_size`={config.minibatch_size} is more than a rollout has: `rollout_steps`="
                f"{config.rollout_steps} x `env.num_envs`={config.env.num_envs} = {decisions} decisions."
            )
        if config.value_clip is not None and not isinstance(config.value_head, MSE):
            raise ConfigError("`value_clip` has no meaning for a classification head; set it to null.")


def _check_group(config: GroupConfig) -> None:
    if not isinstance(config.advantage, GroupEstimatorConfig):
        raise ConfigError(
            f"`advantage.type`={config.advantage.type} needs more than episode outcomes; use a group one."
        )
    if config.normalize.rewards:
        raise ConfigError(
            "`normalize.rewards` has no meaning here: outcomes are compared within groups, and estimators scale them "
            "as `advantage` says; set it to false."
        )
    if config.env.num_envs % config.group_size:
        raise ConfigError(
            f"`env.num_envs`={config.env.num_envs} must be a multiple of `group_size`={config.group_size}."
        )


def _described(config: AgentConfig) -> str:
    import gymnasium as gym

    try:
        env = gym.make(config.env.id, disable_env_checker=True, **config.env.kwargs)
    except Exception as error:  # whatever an environment's own code raises when it is made
        hint = unregistered(error)
        raise ConfigError(f"`env.id`={config.env.id}: {type(error).__name__}: {error}{hint}") from error
    text = f"`env.id`: observations {env.observation_space}, actions {env.action_space}"
    env.close()
    return text
