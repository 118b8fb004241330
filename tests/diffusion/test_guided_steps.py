"""Adaptive projected guidance in rollouts: recorded, replayed, and its momentum kept with each step."""

from dataclasses import replace

import pytest
import torch

from rlalign.diffusion.collect import sampler_of
from rlalign.diffusion.config import GuidanceConfig, SamplingConfig, SDEConfig
from rlalign.diffusion.guidance import AdaptiveProjection, adaptive_projected_guidance
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.tiny import tiny_call, tiny_pipeline
from tests.diffusion.custom_pipelines import custom_pipeline

CALLS = {
    "custom": {"labels": [1, 2, 3]},
    "sd3": tiny_call("sd3", 3) | {"output_type": "latent"},
    "sd15": tiny_call("sd15", 3) | {"output_type": "latent"},
    "flux_true_cfg": tiny_call("flux_true_cfg", 3) | {"output_type": "latent"},
}
SEEDS = [3, 1, 4]


def guided_sampler(kind, *, momentum=-0.5, form="plain", **settings):
    pipeline = custom_pipeline(form) if kind == "custom" else tiny_pipeline(kind)
    sde = SDEConfig(kind="ddim", noise_level=1.0) if kind == "sd15" else SDEConfig()
    projection = AdaptiveProjection(eta=0.0, norm_threshold=1.5, momentum=momentum)
    return StochasticSampler(pipeline, sde, guidance=projection, **settings)


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_guided_steps_are_replayed_in_any_order(kind, momentum):
    """Trap: the combiner of the replay is that of the rollout, momentum included."""
    sampler = guided_sampler(kind, momentum=momentum)
    trajectory = sampler.sample(CALLS[kind], seeds=SEEDS)
    rows, steps = trajectory.decisions()
    order = torch.randperm(len(rows))
    with torch.no_grad():
        again = sampler.replay(trajectory, rows[order], steps[order]).log_prob
    assert (again - trajectory.log_prob[rows[order], steps[order]]).abs().max() <= 1e-6
    assert sampler.parity(trajectory) <= 1e-6
    assert (trajectory.running is None) == (momentum == 0)


@pytest.mark.parametrize("kind", CALLS)
def test_the_running_difference_is_the_state_of_a_step(kind):
    sampler = guided_sampler(kind)
    trajectory = sampler.sample(CALLS[kind], seeds=SEEDS)
    assert trajectory.running.shape == trajectory.means.shape
    assert not trajectory.running[:, 0].any()
    assert (trajectory.running[:, 1:].flatten(2).norm(dim=2) > 0).all()
    rows, steps = trajectory.decisions()
    without = replace(trajectory, running=torch.zeros_like(trajectory.running))
    with torch.no_grad():
        forgetful = sampler.replay(without, rows, steps).mean
    moved = (forgetful - trajectory.means[rows, steps]).abs().flatten(1).amax(1)
    assert moved[steps == 0].max() <= 1e-5
    assert moved[steps > 0].min() > 1e-4


def test_the_running_difference_is_that_of_the_equation():
    """m = (D_c - D_u) + β m_previous, read off the two rows of the denoiser at each step."""
    sampler = guided_sampler("custom")
    trajectory = sampler.sample(CALLS["custom"], seeds=SEEDS)
    network, labels = sampler.denoiser, torch.tensor([1, 2, 3])
    m = torch.zeros(3, 6)
    for step in range(trajectory.steps):
        torch.testing.assert_close(trajectory.running[:, step], m, atol=1e-6, rtol=1e-5)
        x, sigma = trajectory.latents[:, step], trajectory.level[step]
        time = (1000 * sigma).expand(3)
        with torch.no_grad():
            uncond, cond = (network(x, time, which, scale=0.5)[0] for which in (torch.zeros_like(labels), labels))
        m = sigma * (uncond - cond) - 0.5 * m


@pytest.mark.parametrize("kind", ["custom", "sd3"])
def test_nearly_noiseless_steps_end_where_the_context_manager_does(kind):
    """Without noise in its steps, the guided sampler is the guided pipeline."""
    sampler = guided_sampler(kind)
    sampler.sde = SDEConfig(noise_level=1e-6)
    trajectory = sampler.sample(CALLS[kind], seeds=SEEDS)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    apg = adaptive_projected_guidance(sampler.pipeline, eta=0.0, norm_threshold=1.5, momentum=-0.5)
    with torch.no_grad(), apg:
        image = sampler.pipeline(**CALLS[kind], generator=noise).images
    torch.testing.assert_close(trajectory.latents[:, -1], image, atol=1e-4, rtol=1e-4)


def test_every_run_begins_without_a_past():
    sampler = guided_sampler("custom")
    first, second = (sampler.sample(CALLS["custom"], seeds=SEEDS) for _ in range(2))
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.running, second.running)


def test_selected_samples_bring_their_state():
    sampler = guided_sampler("custom", storage="cpu")
    trajectory = sampler.sample(CALLS["custom"], seeds=SEEDS)
    part = trajectory.select(torch.tensor([2, 0]))
    assert torch.equal(part.running, trajectory.running[[2, 0]])
    assert sampler.parity(part) <= 1e-6
    # 4 steps x 3 samples x 6 values in float32
    assert trajectory.nbytes - replace(trajectory, running=None).nbytes == 4 * 3 * 6 * 4


def test_gradient_flows_through_both_branches():
    """The gradient of a guided prediction along a direction of the weights is its finite difference."""
    sampler = guided_sampler("custom")
    sampler.denoiser.double()
    trajectory = sampler.sample(CALLS["custom"], seeds=SEEDS)
    rows, steps = trajectory.decisions()
    table = sampler.denoiser.label.weight
    sampler.replay(trajectory, rows, steps).mean.square().sum().backward()
    gradient, table.grad = table.grad.clone(), None
    assert (gradient.norm(dim=1) > 0).all()  # label 0 is the unguided branch
    with torch.no_grad():
        found = []
        for shift in (1e-4, -1e-4):
            table += shift * gradient
            found.append(sampler.replay(trajectory, rows, steps).mean.square().sum())
            table -= shift * gradient
    torch.testing.assert_close((found[0] - found[1]) / 2e-4, gradient.square().sum(), rtol=1e-4, atol=1e-6)


def test_steps_after_a_guidance_interval_pass_as_they_are():
    sampler = guided_sampler("custom", form="interval")
    trajectory = sampler.sample(CALLS["custom"], seeds=SEEDS)
    assert sampler.parity(trajectory) <= 1e-6
    assert torch.equal(trajectory.running[:, 2], trajectory.running[:, 3])


@pytest.mark.parametrize(
    ("kind", "call", "words"),
    [
        ("sd3", {"guidance_scale": 1.0}, "no classifier-free guidance runs"),
        ("custom", {"guidance_scale": 0.5}, "guidance scale is 0.5"),
    ],
)
def test_a_pipeline_that_does_not_guide_is_refused(kind, call, words):
    with pytest.raises(ValueError, match=words):
        guided_sampler(kind).sample(CALLS[kind] | call, seeds=SEEDS)


def test_a_renormalised_prediction_is_refused():
    with pytest.raises(ValueError, match="do not add up"):
        guided_sampler("custom", form="renormalised").sample(CALLS["custom"], seeds=SEEDS)


def test_replay_by_the_pipeline_is_refused():
    with pytest.raises(ValueError, match="by_pipeline"):
        guided_sampler("custom", by_pipeline=True)
    sampler = guided_sampler("custom")
    trajectory = sampler.sample(CALLS["custom"], seeds=SEEDS)
    with pytest.raises(ValueError, match="replayed by `replay` alone"):
        sampler.replay_by_pipeline(trajectory, torch.tensor([0]), 0)


def test_the_settings_reach_the_sampler():
    plain, guided = (
        sampler_of(custom_pipeline(), SamplingConfig(guidance=given))
        for given in (None, GuidanceConfig(eta=0.25, norm_threshold=3.0, momentum=-0.75))
    )
    assert plain.guidance is None
    assert guided.guidance == AdaptiveProjection(eta=0.25, norm_threshold=3.0, momentum=-0.75)
