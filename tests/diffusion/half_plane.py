"""A generator of points in the plane and a simulator that wants them on the right: small enough to know the answer."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rlalign.diffusion.config_pretrain import PretrainConfig
from rlalign.diffusion.generator import ConditionalFlowPipeline, FlowTransformer
from rlalign.diffusion.pretrain import pretrain

CLASSES = ["low", "high"]
HEIGHT = 1.5
"""Class `low` is a unit Gaussian about (0, -HEIGHT), `high` about (0, HEIGHT): half of each has x > 0."""


class RightHalf:
    """`right`: x > 0. `far`: x. Samples with |y| beyond `y_limit` break the simulation."""

    proxy = gold = "right"

    def __init__(self, y_limit: float = np.inf, **settings: Any):
        self.y_limit, self.more = y_limit, settings

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"simulator": "right half", "y_limit": str(self.y_limit), **self.more}

    def simulate(self, samples: np.ndarray) -> dict[str, np.ndarray]:
        x, y = samples[:, 0, 0].astype(np.float64), samples[:, 0, 1]
        broken = np.abs(y) > self.y_limit
        return {"right": np.where(broken, np.nan, x > 0), "far": np.where(broken, np.nan, x)}

    def close(self) -> None:
        pass


def points(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training data, [count, 1, 2], and labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    centres = np.stack([np.zeros(count), np.where(labels, HEIGHT, -HEIGHT)], -1)
    return (centres + rng.standard_normal((count, 2)))[:, None], labels


def untrained(seed: int = 0, *, trained_out: bool = True) -> ConditionalFlowPipeline:
    """The pipeline with random weights; its output is zero at first unless `trained_out`."""
    torch.manual_seed(seed)
    model = FlowTransformer(tokens=1, channels=2, classes=2, width=16, layers=1, heads=2)
    if trained_out:
        for layer in (model.out, model.condition, model.blocks[0].condition):
            torch.nn.init.normal_(layer.weight, std=0.05)
    return ConditionalFlowPipeline(model.eval(), FlowMatchEulerDiscreteScheduler(), {"class_names": CLASSES})


def pretrained(steps: int = 400) -> ConditionalFlowPipeline:
    """The pipeline trained on `points`; about a second."""
    config = PretrainConfig(
        width=32, layers=1, heads=2, steps=steps, batch_size=256, class_names=CLASSES, average_decay=0.98
    )
    return pretrain(*points(4096, 0), config, progress=lambda *_: None)
