"""Which of a pipeline's parts predicts, and without dropout."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_DENOISERS = ("transformer", "transformer_2", "unet")
_NOT_DENOISERS = ("vae", "text_encoder", "image_encoder", "safety_checker", "vocoder", "controlnet")


def denoisers(pipeline: Any) -> list[nn.Module]:
    """Find the networks that a pipeline asks for its predictions.

    Raises:
        ValueError: Nothing, or more than one unknown network, could be it.
    """
    networks = _networks(pipeline)
    named = [networks[name] for name in _DENOISERS if name in networks]
    if named:
        return named
    others = {name: part for name, part in networks.items() if not name.startswith(_NOT_DENOISERS)}
    if len(others) != 1:
        raise ValueError(
            f"the denoiser of {type(pipeline).__name__} is not to be told among its components {sorted(others)}; name "
            f"it {' or '.join(_DENOISERS)}, or give a sampler `denoiser=` one of them."
        )
    return list(others.values())


def denoiser_named(pipeline: Any, name: str | None) -> nn.Module:
    """The network of this name; without one, the only one that could be it, or the first where a pipeline has two.

    Raises:
        ValueError: It is not to be told.
    """
    if name is None:
        return denoisers(pipeline)[0]
    networks = _networks(pipeline)
    if name not in networks:
        raise ValueError(
            f"{type(pipeline).__name__} has no network {name!r}; give `denoiser=` one of {sorted(networks)}."
        )
    return networks[name]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the context: a step must be replayed by the function that took it."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _networks(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
