"""What is minimised: objective, aggregation, correction for the sampling engine, KL penalty. Data only, no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rlalign.config_fields import STRICT, Fraction, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """-A log pi: the plain policy gradient, for strictly on-policy steps."""

    __pydantic_config__ = STRICT
    type: Literal["reinforce"] = "reinforce"


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate:
    """PPO's clipped ratio (Schulman et al. 2017); asymmetric as in DAPO, with an optional dual clip."""

    __pydantic_config__ = STRICT
    type: Literal["clipped_surrogate"] = "clipped_surrogate"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    clip_high: NonNegative = 0.28
    dual_clip: Annotated[float, Field(gt=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """Truncated importance weight times log pi (MiniMax-M1; ScaleRL). `cap` is absolute."""

    __pydantic_config__ = STRICT
    type: Literal["cispo"] = "cispo"
    cap: Annotated[float, Field(ge=1)] = 5.0


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """Sequence-level ratio, clipped (Zheng et al. 2025). `per_token` keeps token gradients (GSPO-token)."""

    __pydantic_config__ = STRICT
    type: Literal["gspo"] = "gspo"
    clip_low: Annotated[float, Field(ge=0, le=1)] = 3e-4
    clip_high: NonNegative = 4e-4
    per_token: bool = False


@dataclass(frozen=True, kw_only=True)
class SAPO:
    """Soft sigmoid gate on the ratio in place of a clip."""

    __pydantic_config__ = STRICT
    type: Literal["sapo"] = "sapo"
    tau_positive: Positive = 1.0
    tau_negative: Positive = 1.05


ObjectiveConfig = Annotated[Reinforce | ClippedSurrogate | CISPO | GSPO | SAPO, Field(discriminator="type")]
Aggregation = Literal["token", "sequence_mean", "sequence_sum", "group", "constant"]


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """Importance weight between the sampling engine and the trainer; only matters with an external engine."""

    __pydantic_config__ = STRICT

    kind: Literal["none", "truncated", "masked"] = "truncated"
    cap: Annotated[float, Field(ge=1)] = 2.0
    floor: Fraction = 0.5
    """`masked` zeroes tokens whose weight leaves [floor, cap]."""


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Penalty towards the reference model (the model as it was before training)."""

    __pydantic_config__ = STRICT

    coef: NonNegative = 0.0
    """0 loads no reference at all."""
    where: Literal["loss", "reward"] = "loss"
    estimator: Literal["k1", "k2", "k3"] | None = None
    """None: `k3` in the loss, `k1` in the reward."""
