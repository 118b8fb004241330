"""Settings that are fine one by one and wrong together. No torch: `rlalign check` runs this in a moment."""

import math
from collections.abc import Sequence

from rlalign.advantages.config import GAE, BetaNormalized, GroupEstimatorConfig, GroupRelative, MaxLikelihood
from rlalign.config import ConfigError
from rlalign.llm.config import GSPO, PolicyGradientConfig, Reinforce, VLLMServer


def check_consistency(
    cfg: PolicyGradientConfig, *, processes: int = 1, weights: Sequence[float] | None = None, adapter: bool = False
) -> list[str]:
    """Return notes on what is unusual.

    Args:
        weights: Of the reward functions; those in `rewards` when None.
        adapter: An adapter is trained although `peft` does not say so.

    Raises:
        ConfigError: With every contradiction, one per line.
    """
    problems = [text for text in (*_problems(cfg, processes), *_reward_problems(cfg), _dtype(cfg, adapter)) if text]
    if problems:
        raise ConfigError("\n".join(problems))
    weights = [reward.weight for reward in cfg.rewards] if weights is None else weights
    return [text for text in (*_notes(cfg), _sum_leaves_range(cfg, weights)) if text]


def _problems(cfg: PolicyGradientConfig, processes: int) -> list[str | None]:
    rollout, optim = cfg.rollout, cfg.optim
    served = isinstance(rollout.engine, VLLMServer)
    prompts, updates = rollout.prompts_per_step, optim.updates_per_rollout
    return [
        f"`rollout.prompts_per_step`={prompts} cannot be dealt to {processes} processes; choose a multiple."
        if prompts % processes
        else None,
        f"`optim.minibatches`={optim.minibatches} does not divide `rollout.prompts_per_step`={prompts}: groups stay "
        f"whole, so choose one of {[n for n in range(1, prompts + 1) if prompts % n == 0]}."
        if prompts % optim.minibatches
        else None,
        f"`objective: reinforce` has no ratio, so it is wrong after the first of {updates} updates per rollout; set "
        "`optim.update_epochs` and `optim.minibatches` to 1, or use `clipped_surrogate`."
        if isinstance(cfg.objective, Reinforce) and updates > 1
        else None,
        "`advantage: gae` needs a critic, and language models here have none; use a group estimator such as "
        "`group_relative`, `leave_one_out` or `beta_normalized`."
        if isinstance(cfg.advantage, GAE)
        else None,
        "`kl.estimator: k1` in the loss has an expected gradient of zero; use `k2` or `k3`, or `kl.where: reward`."
        if cfg.kl.coef and cfg.kl.where == "loss" and cfg.kl.estimator == "k1"
        else None,
        "`eval.patience` counts evaluations during training: set `eval.every`."
        if cfg.eval.patience is not None and not cfg.eval.every
        else None,
        "`rollout.engine.type: vllm_server` gets its weights over NCCL, from CUDA devices only: set `model.device` to "
        "cuda or auto, or `rollout.engine.type` to transformers."
        if served and cfg.model is not None and cfg.model.device in ("cpu", "mps")
        else None,
        "`rollout.decode_rows` is for `rollout.engine.type: transformers`; a vLLM server batches by itself: leave it "
        "out."
        if served and rollout.decode_rows is not None
        else None,
    ]


def _reward_problems(cfg: PolicyGradientConfig) -> list[str | None]:
    (low, high), guard = reward_bounds(cfg), cfg.guard
    bounded = low > -math.inf
    penalised = cfg.kl.coef > 0 and cfg.kl.where == "reward"
    return [
        f"`kl.where: reward` takes rewards out of the range that `advantage: {cfg.advantage.type}` is defined on; use "
        "`kl.where: loss`."
        if penalised and bounded
        else None,
        "`kl.where: reward` has no effect with `advantage.decompose: true`, which looks at each function's own reward; "
        "use `kl.where: loss`."
        if penalised and not bounded and decomposed(cfg)
        else None,
        f"`guard.penalty`={guard.penalty:g} is outside [{low:g}, {high:g}], where `advantage: {cfg.advantage.type}` "
        "needs its rewards, so the first row that fails would end the run; choose a value inside"
        + (", or widen `advantage.reward_range`." if isinstance(cfg.advantage, BetaNormalized) else ".")
        if guard.on_error == "penalty" and not low <= guard.penalty <= high
        else None,
    ]


def _dtype(cfg: PolicyGradientConfig, adapter: bool) -> str | None:
    if cfg.model is None or cfg.model.dtype != "float16" or cfg.peft is not None or adapter:
        return None
    return (
        "`model.dtype: float16` cannot hold the small gradients of training all weights; use auto or float32, or train "
        "an adapter (`peft`) on frozen float16 weights."
    )


def _sum_leaves_range(cfg: PolicyGradientConfig, weights: Sequence[float]) -> str | None:
    """Whether functions between 0 and 1, the usual kind, add up to what the estimator refuses in mid-run."""
    low, high = reward_bounds(cfg)
    least, most = sum(min(weight, 0) for weight in weights), sum(max(weight, 0) for weight in weights)
    if decomposed(cfg) or (low <= least and most <= high):
        return None
    fix = "weights" if isinstance(cfg.advantage, MaxLikelihood) else "`advantage.reward_range`, change weights"
    return (
        f"rewards between 0 and 1 with these weights add up to values from {least:g} to {most:g}, and `advantage: "
        f"{cfg.advantage.type}` stops the run at one outside [{low:g}, {high:g}]: change {fix}, or set "
        "`advantage.decompose: true`"
    )


def reward_bounds(cfg: PolicyGradientConfig) -> tuple[float, float]:
    """What outcomes (or parts of them, with `decompose`) the estimator takes."""
    match cfg.advantage:
        case BetaNormalized():
            return cfg.advantage.reward_range
        case MaxLikelihood():
            return 0.0, math.inf
        case _:
            return -math.inf, math.inf


def decomposed(cfg: PolicyGradientConfig) -> bool:
    return isinstance(cfg.advantage, GroupEstimatorConfig) and cfg.advantage.decompose


def _notes(cfg: PolicyGradientConfig) -> list[str | None]:
    optim, rollout = cfg.optim, cfg.rollout
    updates = optim.updates_per_rollout
    return [
        f"{rollout.prompts_per_step} prompts x {rollout.group_size} completions = "
        f"{rollout.prompts_per_step * rollout.group_size} rollouts per step, {updates} "
        f"update{'s' if updates > 1 else ''} each, {cfg.total_steps} steps",
        "`objective: gspo` with an aggregation other than `sequence_mean` weighs sequences by their length"
        if isinstance(cfg.objective, GSPO) and cfg.aggregation != "sequence_mean"
        else None,
        f"`optim.warmup_steps`={optim.warmup_steps} is more than half of the run"
        if optim.warmup_steps > cfg.total_steps * updates / 2
        else None,
        "`denominator: signal` has no effect beside a KL or entropy term: rollouts without signal then carry a "
        "gradient too"
        if cfg.denominator == "signal" and ((cfg.kl.coef and cfg.kl.where == "loss") or cfg.entropy_coef)
        else None,
        "`kl.where: reward` with `advantage: group_relative` and `scale: true` divides by a deviation that is KL noise "
        "where a group agrees; consider `scale: false`"
        if cfg.kl.coef and cfg.kl.where == "reward" and isinstance(cfg.advantage, GroupRelative) and cfg.advantage.scale
        else None,
        "advantages by Beta Normalization Policy Optimization (arXiv:2506.02864), which is not TRL's "
        '`loss_type="bnpo"` (a token mean)'
        if isinstance(cfg.advantage, BetaNormalized)
        else None,
    ]
