"""Generators and runs small enough for unit tests: a flow of 2-D points, tiny pipelines, a pretend simulator."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rlalign.diffusion.flow_grpo import FlowGRPOTrainer
from rlalign.diffusion.generator import ConditionalFlowPipeline, FlowTransformer
from rlalign.diffusion.tiny import tiny_call

SMALL: dict[str, Any] = {
    "total_steps": 3,
    "learning_rate": 1e-3,
    "rollout": {"prompts_per_step": 4, "group_size": 4, "num_inference_steps": 5},
    "eval": {"samples": 8, "num_inference_steps": 4, "pictures": 0},
    "lora": {"r": 2, "alpha": 6.0},
    "checkpoint": {"every": 1},
}
"""Settings of a run that takes well under a second."""


def points_pipeline(
    *, seed: int = 0, spread: float = 0.05, width: int = 16, layers: int = 1
) -> ConditionalFlowPipeline:
    """A flow of one 2-D point per sample and two classes, with small random weights where it begins with zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = FlowTransformer(
            tokens=1, channels=2, classes=2, width=width, layers=layers, heads=2, positions=False
        )
        for parameter in denoiser.parameters():
            parameter.data.add_(spread * torch.randn_like(parameter))
    pipeline = ConditionalFlowPipeline(denoiser.eval(), FlowMatchEulerDiscreteScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def to_the_right(samples: Any, prompts: Any) -> list[float]:
    """First coordinate of the point."""
    return [float(sample[0, 0]) for sample in samples]


def brightness(samples: Any, prompts: Any) -> list[float]:
    """Mean of the picture, from 0 to 1."""
    return [float(np.asarray(sample, dtype=np.float64).mean() / 255) for sample in samples]


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, key by key."""
    both = dict(base)
    for key, value in more.items():
        inner = both.get(key)
        both[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return both


def points_trainer(
    folder: Any, reward: Any = to_the_right, *, pipeline: Any = None, **settings: Any
) -> FlowGRPOTrainer:
    """A trainer of `points_pipeline`."""
    callback = settings.pop("callback", None)
    return FlowGRPOTrainer(
        pipeline or points_pipeline(),
        [0, 1],
        reward,
        run_dir=folder,
        callback=callback,
        **merged(SMALL, settings),
    )


def tiny_prompts(kind: Any, count: int = 2) -> tuple[list[Any], dict[str, Any]]:
    """Prompts of a tiny pipeline as rows, and the other arguments of its calls."""
    call = tiny_call(kind, count)
    columns = {name: value for name, value in call.items() if isinstance(value, torch.Tensor | list)}
    rows = [{name: value[k] for name, value in columns.items()} for k in range(count)]
    rest = {name: value for name, value in call.items() if name not in columns and name != "num_inference_steps"}
    return rows, rest


class PretendSimulator:
    """A point right of the line x = 0 stands; far to the left nothing is known."""

    proxy = "stable"
    gold = "robust"

    def __init__(self, unknown_below: float = -np.inf, threshold: float = 0.0):
        self.settings = {"threshold": threshold}
        self.unknown_below, self.threshold, self.closed = unknown_below, threshold, False

    def simulate(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        x = samples[:, 0, 0].astype(np.float64)
        stable = np.where(x < self.unknown_below, np.nan, (x > self.threshold).astype(float))
        return {"stable": stable, "robust": (x > 0.5).astype(float), "margin": 1 / (1 + np.exp(-x))}

    def close(self) -> None:
        self.closed = True
