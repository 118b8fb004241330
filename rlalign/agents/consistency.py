"""Find settings that contradict each other before anything is built."""

from importlib.util import find_spec

from rlalign.advantages.config import GAE, GroupEstimatorConfig
from rlalign.agents.config import AgentConfig, GroupConfig, OnPolicyConfig, PPOConfig
from rlalign.config import ConfigError
from rlalign.nn.config import C51, MSE


def check_consistency(config: AgentConfig) -> list[str]:
    """Raise at a contradiction; return what is worth knowing.

    Raises:
        ConfigError: Settings that cannot work together, with the fix.
    """
    if isinstance(config, OnPolicyConfig):
        _check_on_policy(config)
    if isinstance(config, GroupConfig):
        _check_group(config)
    if not config.env.id:
        return []
    if find_spec("gymnasium") is None:
        raise ConfigError('gymnasium is not installed. Run: pip install "rlalign[agents]"')
    return [_described(config)]


def _check_on_policy(config: OnPolicyConfig) -> None:
    if not isinstance(config.advantage, GAE):
        raise ConfigError(
            f"`advantage.type`={config.advantage.type} compares whole episodes from equal starts; "
            f"{type(config).__name__} has a critic and needs `gae`. Group estimators belong to "
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
    if config.env.num_envs % config.group_size:
        raise ConfigError(
            f"`env.num_envs`={config.env.num_envs} must be a multiple of `group_size`={config.group_size}."
        )


def _described(config: AgentConfig) -> str:
    import gymnasium as gym

    try:
        env = gym.make(config.env.id, disable_env_checker=True, **config.env.kwargs)
    except Exception as error:  # whatever an environment's own code raises when it is made
        raise ConfigError(f"`env.id`={config.env.id}: {type(error).__name__}: {error}") from error
    text = f"`env.id`: observations {env.observation_space}, actions {env.action_space}"
    env.close()
    return text
