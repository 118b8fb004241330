"""Settings and trainers of a fraction of a second, for tests that run whole steps."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rlalign import config
from rlalign.llm.trainer import PolicyGradientTrainer

PROMPTS = [f"say {number}" for number in range(10)]
HELD_OUT = [f"say {number}" for number in range(10, 16)]
SETTINGS: dict[str, Any] = {
    "method": "policy_gradient",
    "total_steps": 2,
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_completion_tokens": 6},
    # The root of Adam's second moment is small beside this eps, so a wrong scale of the gradient shows in the weights.
    "optim": {"learning_rate": 1e-2, "warmup_steps": 0, "eps": 0.1, "max_grad_norm": 1e3},
    "guard": {"isolation": "none"},
    "checkpoint": {"every": 0},
    "log": {"samples_every": 0},
}


def settings(**changes: Any) -> Any:
    """A config from `SETTINGS`; `changes` are nested as in a YAML."""
    return config.build(merged(SETTINGS, changes))


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` put over it, mapping by mapping; a `type` starts a mapping anew."""
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping) and "type" not in value
        result[name] = merged(result[name], value) if both else value
    return result


def even_length(completions: list[str], **columns: Any) -> list[float]:
    """1 for about half of the completions of a random model."""
    return [float(len(text) % 2 == 0) for text in completions]


def constant(completions: list[str], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def make_trainer(
    model: Any,
    tokenizer: Any,
    run_dir: Path,
    reward: Any = even_length,
    *,
    prompts: Any = PROMPTS,
    eval_dataset: Any = None,
    peft_config: Any = None,
    callback: Callable[[int, Mapping[str, float]], None] | None = None,
    **changes: Any,
) -> PolicyGradientTrainer:
    """A trainer of the tiny model on the CPU."""
    return PolicyGradientTrainer(
        model,
        reward,
        prompts,
        settings(**changes),
        tokenizer=tokenizer,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
        run_dir=run_dir,
        callback=callback,
    )


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all trained tensors."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
