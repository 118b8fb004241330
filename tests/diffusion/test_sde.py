"""Swapped schedulers: the stock step where nothing is drawn, a Gaussian of known density where something is."""

import inspect
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, StableDiffusionPipeline

from rlalign.diffusion.config import SDEConfig
from rlalign.diffusion.sde import stochastic_scheduler
from rlalign.diffusion.tiny import TINY_KINDS, tiny_call, tiny_pipeline

FLOW_KINDS = ("sd3", "flux", "flux_true_cfg")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def sde_of(kind):
    return SDEConfig(kind="flow_sde" if kind in FLOW_KINDS else "ddim", noise_level=0.7)


def latents(pipeline, kind, **changed):
    call = tiny_call(kind, 2) | {"output_type": "latent"} | changed
    return pipeline(**call, generator=[torch.Generator().manual_seed(k) for k in range(2)]).images


def flow(sde, steps=4, **config):
    """A swapped flow scheduler in the mode that draws, with noise of 1 everywhere, and the steps that it took."""
    scheduler = stochastic_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0, **config), sde)
    scheduler.mode, scheduler.noise = "sample", lambda position, like: torch.ones_like(like)
    taken = []
    scheduler.listener = taken.append
    scheduler.set_timesteps(steps)
    return scheduler, taken


# ---------------------------------------------------------------- the stock scheduler, where nothing is drawn


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_ode_mode_is_the_stock_scheduler_exactly(kind):
    pipeline = tiny_pipeline(kind)
    if kind not in FLOW_KINDS:
        pipeline.scheduler = DDIMScheduler(**BETAS, steps_offset=1, clip_sample=False)
    stock = latents(pipeline, kind)
    pipeline.scheduler = stochastic_scheduler(pipeline.scheduler, sde_of(kind))
    assert torch.equal(latents(pipeline, kind), stock)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_sampling_without_noise_is_the_stock_scheduler_exactly(kind):
    pipeline = tiny_pipeline(kind)
    stock = latents(pipeline, kind)
    pipeline.scheduler = stochastic_scheduler(pipeline.scheduler, SDEConfig(noise_level=0.5))
    pipeline.scheduler.mode = "sample"
    pipeline.scheduler.window = (9, 10)
    assert torch.equal(latents(pipeline, kind), stock)


def test_the_original_is_left_alone():
    original = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = dict(vars(original))
    copied = stochastic_scheduler(original, SDEConfig())
    copied.set_timesteps(3)
    assert type(original) is FlowMatchEulerDiscreteScheduler
    assert vars(original).keys() == before.keys()
    assert len(original.timesteps) == 1000
    assert isinstance(copied, FlowMatchEulerDiscreteScheduler)


def test_swapping_the_class_keeps_what_a_pipeline_patched():
    """Trap: `from_config` drops Stable Diffusion's `steps_offset`, and every timestep moves by one."""
    parts = tiny_pipeline("sd15").components
    with pytest.warns(FutureWarning, match="steps_offset"):
        pipeline = StableDiffusionPipeline(
            **parts | {"scheduler": DDIMScheduler(**BETAS, clip_sample=False)}, requires_safety_checker=False
        )
    swapped = stochastic_scheduler(pipeline.scheduler, SDEConfig(kind="ddim"))
    rebuilt = DDIMScheduler.from_config(pipeline.scheduler.config)
    for scheduler in (pipeline.scheduler, swapped, rebuilt):
        scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [751, 501, 251, 1]
    assert swapped.timesteps.tolist() == [751, 501, 251, 1]
    assert rebuilt.timesteps.tolist() == [750, 500, 250, 0]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_another_familys_noise_schedule_becomes_ddim(kind):
    stock = tiny_pipeline(kind).scheduler
    swapped = stochastic_scheduler(stock, SDEConfig(kind="ddim"))
    swapped.set_timesteps(4)
    assert isinstance(swapped, DDIMScheduler)
    assert torch.equal(swapped.alphas_cumprod, stock.alphas_cumprod)
    assert swapped.timesteps.tolist() == [751, 501, 251, 1]
    assert swapped.config.clip_sample is False


def test_pipelines_find_the_signatures_they_look_for():
    """Trap: Flux refuses a scheduler whose `set_timesteps` shows no `sigmas`; Stable Diffusion looks for `eta`."""
    swapped = stochastic_scheduler(FlowMatchEulerDiscreteScheduler(), SDEConfig())
    assert {"sigmas", "mu", "timesteps"} <= set(inspect.signature(swapped.set_timesteps).parameters)
    ddim = stochastic_scheduler(DDIMScheduler(clip_sample=False), SDEConfig(kind="ddim"))
    assert {"eta", "generator"} <= set(inspect.signature(ddim.step).parameters)
    assert "self" not in inspect.signature(ddim.step).parameters


# ---------------------------------------------------------------- the step that draws


def test_a_step_matches_hand_arithmetic():
    # shift 3: sigmas 3s / (1 + 2s); from sigma .75 (s = .5) to 0.5 (s = .25), a = .5:
    # sigma_t = .5 sqrt(3), std = sigma_t sqrt(.25) = .4330; x1 = x + .25 v = 1.5
    # mean = x - .25 v - .25 x .75 / 1.5 x x1 = 1 - .5 - .1875 = .3125
    scheduler, taken = flow(SDEConfig(noise_level=0.5), steps=3)
    scheduler.sigmas = torch.tensor([1.0, 0.75, 0.5, 0.0])
    x, v = torch.full((1, 2), 1.0), torch.full((1, 2), 2.0)
    scheduler.step(v, scheduler.timesteps[0], x)
    moved = scheduler.step(v, scheduler.timesteps[1], x, return_dict=False)[0]
    std = 0.5 * math.sqrt(3) * 0.5
    assert taken[1].mean.tolist() == [pytest.approx([0.3125, 0.3125])]
    assert taken[1].std.tolist() == pytest.approx([std])
    assert moved.tolist() == [pytest.approx([0.3125 + std] * 2)]
    assert taken[1].log_prob.tolist() == pytest.approx([-0.5 - math.log(std) - 0.5 * math.log(2 * math.pi)])
    assert (taken[1].position, float(taken[1].level), float(taken[1].level_next)) == (1, 0.75, 0.5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_ddim_step_is_diffusers_own(prediction_type):
    stock = DDIMScheduler(**BETAS, clip_sample=False, prediction_type=prediction_type)
    swapped = stochastic_scheduler(stock, SDEConfig(kind="ddim", noise_level=0.6))
    x, prediction, z = torch.randn(3, 2, 4, 4).unbind(0)
    swapped.mode, swapped.noise = "sample", lambda position, like: z
    for scheduler in (stock, swapped):
        scheduler.set_timesteps(5)
    wanted = stock.step(prediction, 600, x, eta=0.6, variance_noise=z).prev_sample
    torch.testing.assert_close(swapped.step(prediction, 600, x).prev_sample, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_the_last_step_draws_nothing(kind):
    """Trap: at sigma_next = 0 a step has no density, or a deviation so small that ratios explode."""
    scheduler, taken = flow(SDEConfig(kind=kind, noise_level=0.5), steps=3)
    x = torch.randn(2, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
    assert [step.log_prob is None for step in taken] == [False, False, True]
    assert taken[2].x_next.equal(taken[2].x + (0 - scheduler.sigmas[2]) * taken[2].prediction)


def test_only_steps_inside_the_window_draw():
    scheduler, taken = flow(SDEConfig(), steps=6)
    scheduler.window = (2, 4)
    x = torch.randn(2, 4)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x, return_dict=False)[0]
    assert [step.log_prob is not None for step in taken] == [False, False, True, True, False, False]


def test_the_pole_uses_the_second_sigma():
    """Trap: sigma_t is infinite at sigma = 1."""
    scheduler, taken = flow(SDEConfig(noise_level=0.7), steps=4)
    scheduler.step(torch.zeros(1, 2), scheduler.timesteps[0], torch.zeros(1, 2))
    second = float(scheduler.sigmas[1])
    assert scheduler.sigmas[0] == 1
    assert taken[0].std.tolist() == pytest.approx([0.7 * math.sqrt(1 / (1 - second)) * math.sqrt(1 - second)])


def test_a_sample_is_rounded_before_it_is_scored():
    """Trap: in bfloat16 the drawn latents move by up to 1/256 when they are stored."""
    scheduler, taken = flow(SDEConfig(kind="dance_sde", noise_level=0.01), steps=4)
    scheduler.noise = lambda position, like: torch.zeros_like(like)
    x = torch.randn(2, 64).bfloat16()
    x_next = scheduler.step(0.1 * x, scheduler.timesteps[0], x, return_dict=False)[0]
    step = taken[0]
    assert (x_next.dtype, step.mean.dtype, step.log_prob.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    z = (x_next.float() - step.mean) / step.std[:, None]
    wanted = (-0.5 * z**2).mean(1) - step.std.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(step.log_prob, wanted)
    assert z.abs().max() > 0.3  # of the rounding alone: nothing was drawn


def test_levels_stay_float32_in_a_half_precision_pipeline():
    """Trap: bfloat16 timesteps are not found in the schedule again, and bfloat16 steps of sigma are off by percents."""
    pipeline = tiny_pipeline("sd3").to(torch.bfloat16)
    call = {k: v.bfloat16() if isinstance(v, torch.Tensor) else v for k, v in tiny_call("sd3", 2).items()}
    scheduler = stochastic_scheduler(pipeline.scheduler, SDEConfig())
    scheduler.mode, scheduler.noise = "sample", lambda position, like: torch.randn_like(like)
    taken = []
    scheduler.listener = taken.append
    pipeline.scheduler = scheduler
    pipeline(**call, output_type="latent")
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert [float(step.level) for step in taken] == scheduler.sigmas[:-1].tolist()
    assert all(step.x_next.dtype == torch.bfloat16 for step in taken)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("scheduler", "kind", "message"),
    [
        (
            DDIMScheduler(clip_sample=False),
            "flow_sde",
            "needs a FlowMatchEulerDiscreteScheduler, got DDIMScheduler; use",
        ),
        (EulerDiscreteScheduler(), "cps", "got EulerDiscreteScheduler; use `sde.kind: ddim`"),
        (FlowMatchEulerDiscreteScheduler(), "ddim", "needs a scheduler with a schedule of betas"),
        (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "flow_sde", "`stochastic_sampling` leaves a step"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "flow_sde", "`invert_sigmas` leaves a step"),
        (DDIMScheduler(), "ddim", "`clip_sample` leaves a step without gradient; set it to False"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(scheduler, kind, message):
    with pytest.raises(ValueError, match=message):
        stochastic_scheduler(scheduler, SDEConfig(kind=kind))


def test_a_wrapped_step_is_refused():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.step = scheduler.step
    with pytest.raises(ValueError, match="`scheduler.step` is wrapped"):
        stochastic_scheduler(scheduler, SDEConfig())


def test_a_call_that_changes_the_noise_is_refused():
    pipeline = tiny_pipeline("sd15")
    pipeline.scheduler = stochastic_scheduler(pipeline.scheduler, SDEConfig(kind="ddim"))
    pipeline.scheduler.mode = "sample"
    with pytest.raises(ValueError, match=r"asks its scheduler for \{'eta': 0.5\}.*`sde.noise_level`"):
        pipeline(**tiny_call("sd15", 1), eta=0.5)
