"""What estimators log: the size of the advantages, the groups that carry signal, BNPO's fitted Beta distribution."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.advantages.config import BetaNormalized
from rlalign.buffers.rollout import Rollout
from rlalign.functional.advantages import beta_normalized, beta_parameters, group_relative
from rlalign.functional.masked import masked_mean


def advantage_metrics(
    advantages: Float[Tensor, "batch time"], rollout: Rollout, whole: Float[Tensor, " batch"] | None = None
) -> dict[str, float]:
    """Measure advantages.

    Args:
        whole: One advantage per rollout where the estimator makes one: a group whose decisions are all masked still
            has signal in its baseline. None: the largest over the rollout's decisions counts.
    """
    size = advantages.abs().amax(1) if whole is None else whole.abs()
    live = live_groups(size, rollout.group)
    return {
        "advantage/rms": advantage_rms(advantages, rollout),
        "advantage/group_signal_frac": float(live.double().mean()),
        "advantage/groups_without_signal": float((~live).sum()),
    }


def advantage_rms(advantages: Float[Tensor, "batch time"], rollout: Rollout) -> float:
    """Root mean square over the real decisions."""
    return float(masked_mean(advantages.double() ** 2, rollout.mask).sqrt())


def live_groups(advantages: Float[Tensor, " batch"], group: Int[Tensor, " batch"]) -> Bool[Tensor, " groups"]:
    """Tell, by ascending group id, which groups have an advantage other than zero."""
    ids, index = group.unique(return_inverse=True)
    nonzero = torch.zeros(len(ids), device=group.device).index_add(0, index, (advantages != 0).float())
    return nonzero > 0


def groups_that_differ(rollout: Rollout, *, by_part: bool = False) -> Bool[Tensor, " groups"]:
    """Tell, by ascending group id, where at least two rollouts are scored and not all the same.

    This is about rewards alone. Advantages can tell another story: those with a baseline from outside the group are
    not 0 where a group agrees.

    Args:
        by_part: The outcome of any one reward function counts, not only their sum.
    """
    parts = list(rollout.reward_parts.values()) if by_part else [rollout.outcome]
    differ = torch.zeros_like(rollout.outcome)
    for part in parts:
        scored = rollout.scored & ~part.isnan()
        differ += (group_relative(part.to(differ), rollout.group, scale=False, scored=scored) != 0).to(differ)
    return live_groups(differ, rollout.group)


def beta_metrics(
    cfg: BetaNormalized,
    rewards: Float[Tensor, " batch"],
    advantages: Float[Tensor, " batch"],
    group: Int[Tensor, " batch"],
    scored: Bool[Tensor, " batch"],
    prefix: str,
) -> dict[str, float]:
    """Report the fitted distribution (a, b), the normaliser (alpha, beta), and their effect on groups with signal."""
    fitted = beta_parameters(
        rewards, group, reward_range=cfg.reward_range, max_concentration=cfg.max_concentration, scored=scored
    )
    a, b, alpha, beta = (float(value) for value in fitted)
    alpha, beta = (alpha, beta) if cfg.alpha is None or cfg.beta is None else (cfg.alpha, cfg.beta)
    low, high = cfg.reward_range
    centred = group_relative((rewards - low) / (high - low), group, scale=False, scored=scored)
    live = advantages != 0
    weights = (advantages[live] / centred[live]).abs()
    # Before `normalize_weights` changes their scale; up to the rounding of the rewards' dtype.
    unscaled = beta_normalized(
        rewards,
        group,
        alpha=alpha,
        beta=beta,
        reward_range=cfg.reward_range,
        max_weight=cfg.max_weight,
        scored=scored,
    )
    groups = int(live_groups(advantages, group).sum())
    capped = live & (unscaled.abs() >= (1 - 1e-5) * cfg.max_weight * centred.abs())
    rms = advantages[live].double().square().mean().sqrt()
    return {
        f"{prefix}a": a,
        f"{prefix}b": b,
        f"{prefix}alpha": alpha,
        f"{prefix}beta": beta,
        f"{prefix}fit_fallback": float(cfg.alpha is None and a <= 0 and b <= 0),
        f"{prefix}weight_max": float(weights.max()) if len(weights) else 0.0,
        f"{prefix}weight_capped_frac": int(live_groups(capped.float(), group).sum()) / max(groups, 1),
        f"{prefix}adv_rms": float(rms) if len(weights) else 0.0,
    }
