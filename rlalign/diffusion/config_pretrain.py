"""Settings of a small generator that is trained from scratch: data only, no torch."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field

from rlalign.config_fields import STRICT, Count, CountOrZero, NonNegative, Positive


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Flow matching on labelled token sets. The defaults give the generator of five-box objects, in about a minute."""

    __pydantic_config__ = STRICT

    data: str = "rlalign_envs.assemblies:training_set"
    """`module:function` of (count, seed, **data_args) -> (samples [N, tokens, channels], labels [N])."""
    data_args: dict[str, Any] = field(default_factory=dict)
    count: Count = 20_000
    """Samples asked of `data`."""
    class_names: list[str] = field(default_factory=lambda: ["table", "chair", "lamp", "crane", "tower"])
    """In the order of the labels; as many as there are classes."""
    width: Annotated[int, Field(ge=8)] = 64
    """Of a token; divisible by `heads`."""
    layers: Count = 3
    heads: Count = 4
    positions: bool = True
    """Give every token its place. False: the model is equivariant to the order of the tokens, a true set model."""
    steps: Count = 3000
    batch_size: Count = 128
    learning_rate: Positive = 2e-3
    warmup_steps: CountOrZero = 200
    """Linear; a cosine down to zero follows."""
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0
    label_drop: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the samples whose label is hidden, so that the model also learns the unconditional velocity that
    classifier-free guidance needs."""
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.998
    """Of the moving average of the weights, which is what is kept."""
    seed: CountOrZero = 0
    threads: Count = 1
    """Of the CPU. Fixed, because sums in another order give other bits; small models gain nothing from more."""
