"""What estimators log: the size of the advantages, the groups that carry signal, BNPO's fitted Beta distribution."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.advantages.config import BetaNormalized
from rlalign.buffers.rollout import Rollout
from rlalign.functional.advantages import beta_parameters, group_relative
from rlalign.functional.masked import masked_mean


def advantage_metrics(
    advantages: Float[Tensor, "batch time"], rollout: Rollout, whole: Float[Tensor, " batch"] | None = None
) -> dict[str, float]:
    """Measure advantages.

    Args:
        whole: One advantage per rollout where the estimator makes one: a group whose decisions are all masked still
            has signal in its baseline. None: the largest over the rollout's decisions counts.
    """
    rms = masked_mean(advantages.double() ** 2, rollout.mask).sqrt()
    size = advantages.abs().amax(1) if whole is None else whole.abs()
    live = live_groups(size, rollout.group)
    return {
        "advantage/rms": float(rms),
        "advantage/group_signal_frac": float(live.double().mean()),
        "advantage/groups_without_signal": float((~live).sum()),
    }


def live_groups(advantages: Float[Tensor, " batch"], group: Int[Tensor, " batch"]) -> Bool[Tensor, " groups"]:
    """Tell, by ascending group id, which groups have an advantage other than zero."""
    ids, index = group.unique(return_inverse=True)
    nonzero = torch.zeros(len(ids), device=group.device).index_add(0, index, (advantages != 0).float())
    return nonzero > 0


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
    low, high = cfg.reward_range
    centred = group_relative((rewards - low) / (high - low), group, scale=False, scored=scored)
    live = advantages != 0
    weights = (advantages[live] / centred[live]).abs()
    rms = advantages[live].double().square().mean().sqrt()
    return {
        f"{prefix}a": a,
        f"{prefix}b": b,
        f"{prefix}alpha": alpha if cfg.alpha is None else cfg.alpha,
        f"{prefix}beta": beta if cfg.beta is None else cfg.beta,
        f"{prefix}weight_max": float(weights.max()) if len(weights) else 0.0,
        f"{prefix}adv_rms": float(rms) if len(weights) else 0.0,
    }
