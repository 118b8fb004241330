"""Networks, action distributions, value heads, and Normalize-and-Project."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.nn.config import C51, MSE, HLGauss, TwoHot, ValueHeadConfig
    from rlalign.nn.mlp import MLP
    from rlalign.nn.nap import Projector, to_normalized
    from rlalign.nn.policies import ActionDistribution, Bernoulli, Categorical, Gaussian, MultiCategorical
    from rlalign.nn.value_heads import ValueHead

_HOMES = {
    **dict.fromkeys(("C51", "MSE", "HLGauss", "TwoHot", "ValueHeadConfig"), "config"),
    "MLP": "mlp",
    **dict.fromkeys(("Projector", "to_normalized"), "nap"),
    **dict.fromkeys(("ActionDistribution", "Bernoulli", "Categorical", "Gaussian", "MultiCategorical"), "policies"),
    "ValueHead": "value_heads",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
