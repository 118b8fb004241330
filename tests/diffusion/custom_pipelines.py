"""Pipelines that nobody wrote an adapter for, small enough to read: each tests one way of asking a denoiser."""

from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

SIZE = 6


class Network(ModelMixin, ConfigMixin):
    """Velocity of [B, 6] latents from latents, time and a label."""

    @register_to_config
    def __init__(self, labels: int = 4, dropout: float = 0.0):
        super().__init__()
        self.label = nn.Embedding(labels, SIZE)
        self.mix = nn.Linear(2 * SIZE + 1, SIZE)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, timestep, labels, scale=1.0, table=None):
        time = torch.as_tensor(timestep).to(x).reshape(-1, 1).expand(len(x), 1) / 1000
        given = self.label(labels) + (0 if table is None else table.sum())
        return (scale * self.mix(self.drop(torch.cat([x, given, time], 1))),)


class Custom(DiffusionPipeline):
    """Guidance in one call of [unguided, guided] rows, as most; `form` is another way to ask or to combine."""

    _optional_components = ["other"]

    def __init__(self, network, scheduler, form="plain", other=None):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler, other=other)
        self.form = form

    def guided(self, x, t, labels, scale):
        """Both predictions, and the prediction that they make."""
        time, both = t.expand(2 * len(x)), torch.cat([torch.zeros_like(labels), labels])
        if self.form == "scalar_time":
            time = t
        if self.form == "listed":
            parts = [self.network(x, t.expand(len(x)), which)[0] for which in both.chunk(2)]
        else:
            parts = self.network(torch.cat([x, x]), time, both, scale=0.5)[0].chunk(2)
        plain, conditional = parts
        prediction = plain + scale * (conditional - plain)
        if self.form == "renormalised":
            prediction = prediction * (conditional.norm(dim=1) / prediction.norm(dim=1))[:, None]
        return -prediction if self.form == "negated" else prediction

    def __call__(
        self,
        labels,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=None,
        generator=None,
        output_type="np",
        fail_at=None,
    ):
        from diffusers.utils.torch_utils import randn_tensor

        x = latents if latents is not None else randn_tensor((len(labels), SIZE), generator=generator)
        labels = torch.as_tensor(labels)
        self.scheduler.set_timesteps(num_inference_steps)
        for i, t in enumerate(self.scheduler.timesteps):
            if i == fail_at:
                raise RuntimeError("the disk is full")
            if self.form == "interval" and i >= 2:
                prediction = self.network(x, t.expand(len(x)), labels)[0]
            else:
                prediction = self.guided(x, t, labels, guidance_scale)
            x = self.scheduler.step(prediction, t, x, return_dict=False)[0]
        return SimpleNamespace(images=x)


def custom_pipeline(form="plain", *, dropout=0.0):
    torch.manual_seed(0)
    return Custom(Network(dropout=dropout).eval(), FlowMatchEulerDiscreteScheduler(shift=3.0), form)
