"""Settings that look harmless and under which an update is not the gradient of the loss: refused, or said aloud."""

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from rlalign.config import ConfigError


def require_true_gradients(accelerator: Accelerator) -> None:
    """Refuse options, of the config or the environment, under which a backward pass gives another gradient or none.

    Raises:
        ConfigError: Accumulation or loss scaling changes its size, or another program runs it.
    """
    steps, precision = accelerator.gradient_accumulation_steps, accelerator.mixed_precision
    if steps != 1:
        raise ConfigError(
            f"`accelerate.gradient_accumulation_steps`={steps} (or ACCELERATE_GRADIENT_ACCUMULATION_STEPS) divides "
            f"every gradient by {steps}: micro-batches are added up without it. Leave it out, and lower "
            "`optim.micro_batch_tokens` if memory is short."
        )
    if precision not in ("no", "bf16"):
        raise ConfigError(
            f"`accelerate.mixed_precision`={precision} scales the loss, and gradients are used here as they are: use "
            "bf16 or no, or leave it out."
        )
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"{accelerator.distributed_type.value} wants to own the optimizer and the backward pass, which stay with "
            "the trainer here. Launch plain data parallelism: `accelerate launch --multi_gpu`."
        )


def sharding_notes(accelerator: Accelerator) -> list[str]:
    """What to expect of weights that are spread over processes."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return []
    return ["FSDP is untested: compare a few steps with plain data parallelism before you rely on it"]


def trained_dtype_notes(model: nn.Module, learning_rate: float) -> list[str]:
    """What to say about the number type of the weights that are trained.

    Raises:
        ConfigError: It is float16, in which gradients of this size vanish.
    """
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    if torch.float16 in trained:
        raise ConfigError(
            "the weights to train are float16, in which small gradients are 0 and large ones infinite. Set "
            "`model.dtype` to auto or float32, or train an adapter (`peft`) on frozen float16 weights."
        )
    if torch.bfloat16 not in trained:
        return []
    return [
        "the weights to train are bfloat16: a step below 0.2 % of a weight is rounded away, so at "
        f"`optim.learning_rate`={learning_rate:g} most will not move. Set `model.dtype` to auto or float32 (CUDA "
        "devices still compute in bfloat16), or train an adapter (`peft`)"
    ]
