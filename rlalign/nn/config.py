"""Settings of the value heads: data only, no torch. `type` picks one."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rlalign.config_fields import STRICT, Finite, Positive

Bins = Annotated[int, Field(ge=2)]


@dataclass(frozen=True, kw_only=True)
class MSE:
    """One number, trained by squared error."""

    __pydantic_config__ = STRICT

    type: Literal["mse"] = "mse"


@dataclass(frozen=True, kw_only=True)
class CategoricalHead:
    """What the heads share that classify a value into bins between `low` and `high`."""

    __pydantic_config__ = STRICT

    low: Finite | None = None
    """Lower end of the support; None for both ends: found from the first targets and widened when needed."""
    high: Finite | None = None
    num_bins: Bins = 101

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"set both `low` and `high` or neither, got low={self.low}, high={self.high}.")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"`low` must be below `high`, got low={self.low}, high={self.high}.")


@dataclass(frozen=True, kw_only=True)
class TwoHot(CategoricalHead):
    """Probability on the two bins next to the target."""

    type: Literal["two_hot"] = "two_hot"


@dataclass(frozen=True, kw_only=True)
class HLGauss(CategoricalHead):
    """A Gaussian around the target, as a histogram (Farebrother et al. 2024, arXiv:2403.03950)."""

    type: Literal["hl_gauss"] = "hl_gauss"
    sigma_ratio: Positive = 0.75
    """Standard deviation of the Gaussian in bins."""
    edges: Literal["range", "centers"] = "range"
    """Whether `low` and `high` are the outer edges of the bins (the paper) or their outer centers."""


@dataclass(frozen=True, kw_only=True)
class C51(CategoricalHead):
    """The distribution of the return itself (Bellemare et al. 2017, arXiv:1707.06887): needs a next distribution."""

    type: Literal["c51"] = "c51"


ValueHeadConfig = Annotated[MSE | TwoHot | HLGauss | C51, Field(discriminator="type")]
