"""From a config's `objective`, `kl` and `correction` to the equations of `functional`."""

from dataclasses import replace
from typing import assert_never

from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.buffers import Rollout
from rlalign.functional import divergence, policy
from rlalign.llm.config import (
    CISPO,
    GSPO,
    SAPO,
    ClippedSurrogate,
    CorrectionConfig,
    KLConfig,
    ObjectiveConfig,
    Reinforce,
)

KL = {"k1": divergence.kl_k1, "k2": divergence.kl_k2, "k3": divergence.kl_k3}


def policy_objective(
    cfg: ObjectiveConfig,
    log_prob: Float[Tensor, "batch time"],
    log_prob_old: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """The per-decision quantity to minimise that `cfg` names."""
    log_ratio = log_prob - log_prob_old
    match cfg:
        case Reinforce():
            return policy.reinforce(log_prob, advantages)
        case ClippedSurrogate():
            return policy.clipped_surrogate(
                log_ratio, advantages, clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip
            )
        case CISPO():
            return policy.cispo(log_prob, log_ratio, advantages, cap=cfg.cap)
        case GSPO():
            level = policy.sequence_token_ratio if cfg.per_token else policy.sequence_ratio
            return policy.clipped_surrogate(
                level(log_ratio, mask), advantages, clip_low=cfg.clip_low, clip_high=cfg.clip_high
            )
        case SAPO():
            return policy.sapo(log_ratio, advantages, tau_positive=cfg.tau_positive, tau_negative=cfg.tau_negative)
        case _:
            assert_never(cfg)


def clipped_shares(
    cfg: ObjectiveConfig,
    log_ratio: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> tuple[float, float]:
    """Share of real decisions that the objective clips from below and from above; 0 where it has no clip."""
    match cfg:
        case ClippedSurrogate():
            ratio = log_ratio
        case GSPO():
            ratio = policy.sequence_ratio(log_ratio, mask)
        case CISPO():
            above = (log_ratio.exp() > cfg.cap) & mask
            return 0.0, float(above.sum() / mask.sum().clamp(min=1))
        case _:
            return 0.0, 0.0
    low, high = policy.clip_fractions(ratio, advantages, mask, clip_low=cfg.clip_low, clip_high=cfg.clip_high)
    return float(low), float(high)


def kl_penalty(
    cfg: KLConfig, log_prob: Float[Tensor, "batch time"], log_prob_ref: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """The estimator of the divergence from the reference that `cfg` names, per decision, in nats."""
    return KL[cfg.estimator or ("k3" if cfg.where == "loss" else "k1")](log_prob, log_prob_ref)


def penalised(rollout: Rollout, cfg: KLConfig) -> Rollout:
    """The rollout with the divergence from the reference taken off every token's reward, when `kl.where: reward`."""
    if not cfg.coef or cfg.where == "loss":
        return rollout
    assert rollout.log_prob_ref is not None
    penalty = cfg.coef * kl_penalty(cfg, rollout.log_prob_old, rollout.log_prob_ref)
    return replace(rollout, rewards=rollout.rewards - penalty.masked_fill(~rollout.mask, 0))


def engine_weights(
    cfg: CorrectionConfig,
    log_prob_old: Float[Tensor, "batch time"],
    log_prob_engine: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """Importance weights from the sampling engine's policy to the trainer's at collection."""
    match cfg.kind:
        case "truncated":
            return policy.truncated_correction(log_prob_old, log_prob_engine, mask, cap=cfg.cap)
        case "masked":
            return policy.masked_correction(log_prob_old, log_prob_engine, mask, low=cfg.floor, high=cfg.cap)
        case "none":
            return mask.to(log_prob_old.dtype)
