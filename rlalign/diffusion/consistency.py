"""Settings that contradict each other, found before torch or a model is loaded."""

from rlalign.advantages.config import GAE, GreedyBaseline
from rlalign.config import ConfigError
from rlalign.diffusion.config import DSOConfig, FlowGRPOConfig


def check_flow_grpo(cfg: FlowGRPOConfig, *, processes: int = 1, simulator: bool | None = None) -> None:
    """Refuse what cannot train.

    Raises:
        ConfigError: With the keys and what to change.
    """
    rollout, optim = cfg.rollout, cfg.optim
    if isinstance(cfg.advantage, GAE | GreedyBaseline):
        raise ConfigError(
            f"`advantage.type: {cfg.advantage.type}` needs a critic or a greedy sample, which a denoising run has not; "
            "use group_relative, leave_one_out, beta_normalized or per_prompt_running."
        )
    if rollout.prompts_per_step % (optim.minibatches):
        raise ConfigError(
            f"`rollout.prompts_per_step`={rollout.prompts_per_step} groups cannot be dealt into "
            f"`optim.minibatches`={optim.minibatches} of equal size; make one a multiple of the other."
        )
    if rollout.prompts_per_step % processes:
        raise ConfigError(
            f"`rollout.prompts_per_step`={rollout.prompts_per_step} cannot be shared out over {processes} processes."
        )
    low, high = rollout.window_range or (0, rollout.num_inference_steps)
    if rollout.window is not None and rollout.window > min(high, rollout.num_inference_steps) - low:
        end = min(high, rollout.num_inference_steps)
        raise ConfigError(f"`rollout.window`={rollout.window} does not fit into steps {low} to {end}.")
    if rollout.window_range is not None and rollout.window is None:
        raise ConfigError("`rollout.window_range` has no effect without `rollout.window`; set it, or leave both out.")
    if cfg.objective.authors_bias and not cfg.objective.ratio_norm:
        raise ConfigError("`objective.authors_bias` is a variant of `objective.ratio_norm`, which is off.")
    if simulator is False and cfg.reward is not None and (cfg.reward.outcome or cfg.reward.graded):
        raise ConfigError(
            "`reward.outcome` and `reward.graded` name outcomes of a simulator; the reward is a function."
        )


def check_dso(cfg: DSOConfig) -> None:
    """Refuse what cannot train.

    Raises:
        ConfigError: With the keys and what to change.
    """
    if cfg.total_updates % cfg.data.rounds:
        raise ConfigError(
            f"`total_updates`={cfg.total_updates} cannot be shared out evenly over `data.rounds`={cfg.data.rounds}."
        )
    if cfg.data.path is not None and cfg.data.rounds > 1:
        raise ConfigError(
            "`data.path` is a set that was drawn once; rounds after the first draw their own: leave it out."
        )
