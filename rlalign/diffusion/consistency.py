"""Settings that contradict each other, found before torch or a model is loaded."""

import math

from rlalign.advantages.config import GAE, GreedyBaseline
from rlalign.config import ConfigError
from rlalign.diffusion.config import DiffusionConfig, FlowGRPOConfig, SamplingConfig
from rlalign.diffusion.config_dso import DSOConfig

RESERVED = ("num_inference_steps", "generator", "return_dict", "callback_on_step_end", "num_images_per_prompt")
"""Arguments of a pipeline's call that the trainer sets itself."""


def trained_steps(rollout: SamplingConfig) -> int:
    """How many steps from the first on may be trained; after the last one nothing would take the noise out again."""
    count = rollout.num_inference_steps
    # 0.29 x 100 is 28.999999999999996 in floating point.
    return min(count - 1, math.floor(count * rollout.trained_fraction + 1e-9))


def window_bounds(rollout: SamplingConfig) -> tuple[int, int]:
    """First step that a window may begin at, and one past the last that it may hold."""
    low, high = rollout.window_range or (0, rollout.num_inference_steps)
    return low, min(high, trained_steps(rollout))


def check_diffusion(cfg: DiffusionConfig, *, processes: int = 1) -> None:
    """Refuse what neither trainer can work with.

    Raises:
        ConfigError: With the keys and what to change.
    """
    for name in RESERVED:
        if name in cfg.pipeline.call:
            advice = {
                "num_inference_steps": "set `rollout.num_inference_steps` and `eval.num_inference_steps`",
                "num_images_per_prompt": "set `rollout.group_size`",
            }
            raise ConfigError(f"`pipeline.call.{name}` is the trainer's own; {advice.get(name, 'leave it out')}.")
    if cfg.lora is None and cfg.pipeline.dtype in ("bfloat16", "float16"):
        raise ConfigError(
            f"`lora: null` trains the weights themselves, which `pipeline.dtype: {cfg.pipeline.dtype}` cannot hold: "
            "an optimizer's step is smaller than their rounding. Use `float32`, or an adapter."
        )
    if "mixed_precision" in cfg.accelerate:
        raise ConfigError("`accelerate.mixed_precision` has no effect here; set `pipeline.dtype`.")
    if isinstance(cfg, DSOConfig) and cfg.data.samples < processes:
        raise ConfigError(f"`data.samples`={cfg.data.samples} are fewer than {processes} processes; raise it.")
    if cfg.eval.samples < processes:
        raise ConfigError(f"`eval.samples`={cfg.eval.samples} are fewer than {processes} processes; raise it.")


def check_flow_grpo(cfg: FlowGRPOConfig, *, processes: int = 1, simulator: bool | None = None) -> None:
    """Refuse what cannot train.

    Raises:
        ConfigError: With the keys and what to change.
    """
    check_diffusion(cfg, processes=processes)
    rollout, optim = cfg.rollout, cfg.optim
    if isinstance(cfg.advantage, GAE | GreedyBaseline):
        raise ConfigError(
            f"`advantage.type: {cfg.advantage.type}` needs a critic or a greedy sample, which a denoising run has not; "
            "use group_relative, leave_one_out, beta_normalized or per_prompt_running."
        )
    if rollout.prompts_per_step % optim.minibatches:
        raise ConfigError(
            f"`rollout.prompts_per_step`={rollout.prompts_per_step} groups cannot be dealt into "
            f"`optim.minibatches`={optim.minibatches} of equal size; make one a multiple of the other."
        )
    if rollout.prompts_per_step % processes:
        raise ConfigError(
            f"`rollout.prompts_per_step`={rollout.prompts_per_step} cannot be shared out over {processes} processes."
        )
    low, high = window_bounds(rollout)
    if trained_steps(rollout) < 1:
        raise ConfigError(
            f"`rollout.trained_fraction`={rollout.trained_fraction:g} of {rollout.num_inference_steps} steps trains "
            "none; raise it, or `rollout.num_inference_steps`."
        )
    if rollout.window is not None and rollout.window > high - low:
        raise ConfigError(
            f"`rollout.window`={rollout.window} does not fit into the trained steps from {low} to {high} (the end is "
            "not one of them); make it smaller, or widen `rollout.window_range`."
        )
    if rollout.window_range is not None and rollout.window is None:
        raise ConfigError("`rollout.window_range` has no effect without `rollout.window`; set it, or leave both out.")
    if rollout.guidance is not None and rollout.by_pipeline:
        raise ConfigError("`rollout.guidance` projects recorded predictions, which `rollout.by_pipeline` does without.")
    if cfg.objective.authors_bias and not cfg.objective.ratio_norm:
        raise ConfigError("`objective.authors_bias` is a variant of `objective.ratio_norm`, which is off.")
    if simulator is False and cfg.reward is not None and (cfg.reward.outcome or cfg.reward.graded):
        raise ConfigError(
            "`reward.outcome` and `reward.graded` name outcomes of a simulator; the reward is a function."
        )


def check_dso(cfg: DSOConfig, *, processes: int = 1) -> None:
    """Refuse what cannot train.

    Raises:
        ConfigError: With the keys and what to change.
    """
    check_diffusion(cfg, processes=processes)
    if cfg.total_updates % cfg.data.rounds:
        raise ConfigError(
            f"`total_updates`={cfg.total_updates} cannot be shared out evenly over `data.rounds`={cfg.data.rounds}."
        )
    if cfg.reward is not None and cfg.reward.graded:
        raise ConfigError("`reward.graded` has no effect in DSO, whose labels are the samples'; set `reward.outcome`.")
    if cfg.data.path is not None and cfg.data.rounds > 1:
        raise ConfigError(
            "`data.path` is a set that was drawn once; rounds after the first draw their own: leave it out."
        )
