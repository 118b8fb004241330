"""The policy's weights as a sampling engine knows them: plain names, adapters merged, one tensor at a time."""

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

Announcement = tuple[str, str, list[int]]
"""Name, data type and shape of one tensor: what a receiver must know before the first one arrives."""


def announcements(model: PreTrainedModel | PeftModel) -> list[Announcement]:
    """What `served_weights` will give, in the same order."""
    return [
        (name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape))
        for name, parameter in _served_parameters(model)
    ]


def served_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Every weight under the name that the plain model has for it; tied weights once.

    An adapter is merged layer by layer into copies, and the frozen weights stay what they are to the last bit: adding
    and subtracting an update rounds, which over many steps would move weights that nobody trains.

    Raises:
        ValueError: The adapter is of a kind that cannot be merged, such as prompt tuning.
    """
    adapted = _adapted_layers(model)
    for name, parameter in _served_parameters(model):
        layer = adapted.get(id(parameter))
        yield name, parameter.detach() if layer is None else _merged(layer, parameter)


def _served_parameters(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(model, PeftModel):
        yield from model.named_parameters()
        return
    tuner = model.base_model
    if not isinstance(tuner, BaseTuner):
        kind = type(model.active_peft_config).__name__
        raise ValueError(
            f"an adapter of type {kind} cannot be merged into weights for a sampling engine; use LoRA, or "
            "`rollout.engine.type: transformers`."
        )
    for name, parameter in model.named_parameters():
        if tuner.prefix in name or "original_module." in name:
            continue
        plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
        yield plain.replace(f"modules_to_save.{model.active_adapter}.", ""), parameter


def _adapted_layers(model: PreTrainedModel | PeftModel) -> dict[int, BaseTunerLayer]:
    """The adapter layer around each frozen parameter that has one, by the parameter's id."""
    return {
        id(parameter): layer
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for parameter in layer.get_base_layer().parameters()
    }


@torch.no_grad()
def _merged(layer: BaseTunerLayer, parameter: Tensor) -> Tensor:
    frozen = list(layer.get_base_layer().parameters())
    before = [weight.clone() for weight in frozen]
    layer.merge()
    merged = parameter.detach().clone()
    layer.unmerge()
    for weight, old in zip(frozen, before, strict=True):
        weight.copy_(old)
    return merged
