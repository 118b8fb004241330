"""The whole sampler, over a pipeline that knows the exact velocity: the noise leaves the distribution alone."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor

from rlalign.diffusion.config import SDEConfig
from rlalign.diffusion.sampling import StochasticSampler

MEAN, STD = 1.5, 0.5


class ExactVelocity(torch.nn.Module):
    """E[noise - data | x] for data N(1.5, .5²) in each value."""

    def forward(self, x, timestep):
        t = timestep.reshape(-1, *(1,) * (x.ndim - 1)).to(x) / 1000
        spread = ((1 - t) * STD) ** 2 + t**2
        centred = x - (1 - t) * MEAN
        return (t / spread * centred - MEAN - (1 - t) * STD**2 / spread * centred,)


class Values(DiffusionPipeline):
    """Draws 5,000 independent values a sample."""

    def __init__(self, transformer: Any, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, count, num_inference_steps, generator=None):
        x = randn_tensor((count, 5000), generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x, t.expand(len(x)))[0], t, x, return_dict=False)[0]
        return SimpleNamespace(images=x)


@pytest.mark.parametrize(("kind", "noise_level"), [("flow_sde", 0.7), ("flow_sde", 1.0), ("dance_sde", 0.3)])
def test_the_sampler_keeps_the_marginals_of_a_gaussian(kind, noise_level):
    pipeline = Values(ExactVelocity(), FlowMatchEulerDiscreteScheduler())
    sampler = StochasticSampler(pipeline, SDEConfig(kind=kind, noise_level=noise_level))
    trajectory = sampler.sample({"count": 4, "num_inference_steps": 200}, seeds=[1, 2, 3, 4])
    for k in (100, 150, 200):  # on the way too; noise without its drift would be off by .03 and more
        sigma = 0.0 if k == 200 else float(trajectory.level[k])
        x = trajectory.latents[:, k]
        assert float(x.mean()) == pytest.approx((1 - sigma) * MEAN, abs=0.02)
        assert float(x.std()) == pytest.approx(math.hypot((1 - sigma) * STD, sigma), abs=0.012)
