"""Adaptive projected guidance from outside: known answers on every scheduler, identity, restoration, refusals."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

import diffusers

from rlalign.diffusion.guidance import adaptive_projected_guidance, denoisers
from rlalign.diffusion.prediction_space import prediction_space
from rlalign.diffusion.tiny import tiny_call, tiny_pipeline

# NumPy's migration from `__array__(dtype)`, in several of diffusers' schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

OFF = {"eta": 1.0, "norm_threshold": 0, "momentum": 0.0}
GUIDED = ["sd15", "sdxl", "sd3", "flux_true_cfg"]
COND, UNCOND = [[3.0, 4.0, 0.0, 0.0]], [[1.0, 0.0, 2.0, 0.0]]
WORKED = [1.693606, 4.979796, -4.082483, 0.0]
"""APG of these two denoised predictions with w = 5, η = 0, r = 2.5."""


class Oracle(nn.Module):
    """A denoiser that predicts, in its scheduler's terms, whatever makes given denoised samples of the latents."""

    def __init__(self, scheduler, denoised):
        super().__init__()
        self.scheduler = scheduler
        self.denoised = denoised

    def forward(self, latents, timestep, which):
        space = prediction_space(self.scheduler, timestep)
        made = [space.prediction(self.denoised[side], latents) for side in which]
        return (torch.cat(made).to(latents.dtype),)


class HandPipeline:
    """The smallest guided pipeline: one call of 2 B rows, or two calls in either order."""

    def __init__(self, scheduler, cond=COND, uncond=UNCOND, order="uc", together=True):
        self.scheduler = scheduler
        rows = {"c": torch.tensor(cond, dtype=torch.float64), "u": torch.tensor(uncond, dtype=torch.float64)}
        self.transformer = Oracle(scheduler, rows)
        self.components = {"transformer": self.transformer, "scheduler": scheduler}
        self.order = order
        self.together = together
        self.guided_steps = 1000

    def predict(self, latents, timestep, scale, step):
        if step >= self.guided_steps or scale == 1:
            return self.transformer(latents, timestep, "c")[0]
        if self.together:
            parts = self.transformer(latents, timestep, self.order)[0].chunk(2)
        else:
            parts = [self.transformer(latents, timestep, side)[0] for side in self.order]
        side = dict(zip(self.order, parts, strict=True))
        return side["u"] + scale * (side["c"] - side["u"])

    def __call__(self, steps=2, scale=5.0, dtype=torch.float64):
        latents = torch.full_like(self.transformer.denoised["c"], 0.7).to(dtype)
        self.scheduler.set_timesteps(steps)
        for step, timestep in enumerate(self.scheduler.timesteps):
            if "scale_model_input" in dir(self.scheduler):
                self.scheduler.scale_model_input(latents, timestep)  # the oracle knows the unscaled ones
            prediction = self.predict(latents, timestep, scale, step)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        return latents


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def sample(pipeline, kind, count=2, seed=3, **changes):
    call = tiny_call(kind, count) | changes
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**call, output_type="latent", generator=generator).images


def apart(a, b):
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------- known answers

VP = {"clip_sample": False}
SCHEDULERS = {
    "flow_euler": flow,
    "flow_heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "ddim_epsilon": lambda: diffusers.DDIMScheduler(**VP),
    "ddim_v": lambda: diffusers.DDIMScheduler(**VP, prediction_type="v_prediction"),
    "ddim_sample": lambda: diffusers.DDIMScheduler(**VP, prediction_type="sample"),
    "ddim_zero_snr": lambda: diffusers.DDIMScheduler(
        **VP, prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "ddpm": lambda: diffusers.DDPMScheduler(**VP),
    "euler_epsilon": lambda: diffusers.EulerDiscreteScheduler(),
    "euler_v": lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
    "euler_karras": lambda: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "lms": lambda: diffusers.LMSDiscreteScheduler(),
    "dpm_epsilon": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm_v": lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction"),
    "dpm_flow": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "dpm_single": lambda: diffusers.DPMSolverSinglestepScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(final_sigmas_type="zero"),
    "edm": lambda: diffusers.EDMEulerScheduler(),
    "edm_v": lambda: diffusers.EDMEulerScheduler(prediction_type="v_prediction", sigma_data=1.0),
    "edm_dpm": lambda: diffusers.EDMDPMSolverMultistepScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_last_step_lands_on_the_guided_sample_by_hand(name):
    """The scheduler's own step to σ = 0 returns its own denoised sample: that of the worked vector."""
    pipeline = HandPipeline(SCHEDULERS[name]())
    torch.testing.assert_close(pipeline().float(), torch.tensor([[11.0, 20.0, -8.0, 0.0]]), rtol=1e-3, atol=2e-3)
    with adaptive_projected_guidance(pipeline, eta=0.0, norm_threshold=2.5, momentum=0.0):
        guided = pipeline()
    torch.testing.assert_close(guided.float(), torch.tensor([WORKED]), rtol=1e-3, atol=2e-3)


def test_deis_lands_beside_it_because_it_ends_above_zero():
    """Its last step goes to the smallest trained σ, .03: that share of the noise is left."""
    pipeline = HandPipeline(diffusers.DEISMultistepScheduler())
    assert (pipeline().float() - torch.tensor([[11.0, 20.0, -8.0, 0.0]])).abs().max() < 0.03
    with adaptive_projected_guidance(pipeline, eta=0.0, norm_threshold=2.5, momentum=0.0):
        guided = pipeline()
    assert 1e-5 < (guided.float() - torch.tensor([WORKED])).abs().max() < 0.03


def test_momentum_runs_from_step_to_step():
    """Step 1: m = [2, 4, -2, 0]. Step 2: d = [1, 1, 1, 1], m = [0, -1, 2, 1], and by hand [4.92, 2.56, 8, 4]."""
    pipeline = HandPipeline(flow())
    pipeline.transformer.register_forward_hook(
        lambda module, *_: module.denoised.update(u=torch.tensor(COND, dtype=torch.float64) - 1)
    )
    with adaptive_projected_guidance(pipeline, eta=0.0, norm_threshold=2.5, momentum=-0.5) as log:
        guided = pipeline()
    torch.testing.assert_close(
        guided, torch.tensor([[4.92, 2.56, 8.0, 4.0]], dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(log.running, torch.tensor([[0.0, -1.0, 2.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize("order", ["uc", "cu"])
@pytest.mark.parametrize("together", [True, False])
def test_either_order_in_one_call_or_two_gives_the_same(order, together):
    """The scale is above 1, so the pipeline's own prediction tells which of the two is the conditional one."""
    pipeline = HandPipeline(flow(), order=order, together=together)
    with adaptive_projected_guidance(pipeline, eta=0.0, norm_threshold=2.5, momentum=0.0) as log:
        assert pipeline()[0].tolist() == pytest.approx(WORKED, abs=1e-5)
    assert [step.scale for step in log.steps] == pytest.approx([5.0, 5.0])


def test_the_log_tells_the_norms_to_choose_a_threshold_by():
    """|D_c - D_u| = sqrt(24); its part along D_c is 22 / 5; the limit 2.5 cuts both steps."""
    pipeline = HandPipeline(flow())
    with adaptive_projected_guidance(pipeline, norm_threshold=2.5, momentum=0.0) as log:
        with pytest.raises(ValueError, match="no step was guided yet"):
            log.metrics()
        pipeline()
    assert log.metrics() == pytest.approx(
        {
            "apg/scale": 5.0,
            "apg/difference_norm": math.sqrt(24),
            "apg/running_norm": math.sqrt(24),
            "apg/limited_frac": 1.0,
            "apg/parallel_frac": 4.4**2 / 24,
        },
        rel=1e-6,
    )


def test_guidance_that_ends_early_is_left_alone_from_there():
    pipeline = HandPipeline(flow())
    pipeline.guided_steps = 1
    with adaptive_projected_guidance(pipeline, norm_threshold=2.5) as log:
        assert pipeline(steps=3)[0].tolist() == pytest.approx(COND[0], abs=1e-6)
    assert len(log.steps) == 1


def test_equal_predictions_pass():
    pipeline = HandPipeline(flow(), uncond=COND)
    with adaptive_projected_guidance(pipeline):
        assert pipeline()[0].tolist() == pytest.approx(COND[0], abs=1e-6)


def test_half_precision_predictions_are_guided_in_float64():
    pipeline = HandPipeline(flow())
    with adaptive_projected_guidance(pipeline, eta=0.0, norm_threshold=2.5, momentum=0.0):
        guided = pipeline(dtype=torch.bfloat16)
    assert guided.dtype == torch.bfloat16
    assert guided[0].tolist() == pytest.approx(WORKED, abs=0.1)


# ---------------------------------------------------------------- unmodified pipelines


@pytest.mark.parametrize("kind", GUIDED)
def test_the_identity_setting_is_the_untouched_pipeline(kind):
    pipeline = tiny_pipeline(kind)
    untouched = sample(pipeline, kind)
    with adaptive_projected_guidance(pipeline, **OFF):
        assert apart(sample(pipeline, kind), untouched) < 1e-6
    assert torch.equal(sample(pipeline, kind), untouched)


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize("change", [{"eta": 0.0}, {"norm_threshold": 0.1}, {"momentum": -0.5}])
def test_each_setting_changes_the_image(kind, change):
    pipeline = tiny_pipeline(kind)
    untouched = sample(pipeline, kind)
    with adaptive_projected_guidance(pipeline, **(OFF | change)):
        assert apart(sample(pipeline, kind), untouched) > 1e-4


def test_flux_takes_true_guidance_and_refuses_distilled():
    pipeline = tiny_pipeline("flux")
    untouched = sample(pipeline, "flux")
    with adaptive_projected_guidance(pipeline), pytest.raises(ValueError, match="Flux guides with true_cfg_scale > 1"):
        sample(pipeline, "flux")
    assert torch.equal(sample(pipeline, "flux"), untouched)


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3"])
def test_without_guidance_there_is_nothing_to_project(kind):
    pipeline = tiny_pipeline(kind)
    with adaptive_projected_guidance(pipeline), pytest.raises(ValueError, match="Pass guidance_scale > 1"):
        sample(pipeline, kind, guidance_scale=1.0)


def test_a_scale_between_zero_and_one_is_refused():
    pipeline = HandPipeline(flow())
    with adaptive_projected_guidance(pipeline), pytest.raises(ValueError, match="needs one > 1"):
        pipeline(scale=0.5)


def test_a_changed_combination_is_noticed():
    """Trap: `guidance_rescale`, as Qwen-Image's renormalisation, changes the prediction after guidance."""
    pipeline = tiny_pipeline("sd15")
    with adaptive_projected_guidance(pipeline), pytest.raises(ValueError, match="is not u \\+ w \\(c - u\\)"):
        sample(pipeline, "sd15", guidance_rescale=0.7)


def test_a_third_prediction_is_noticed():
    pipeline = tiny_pipeline("sd3")
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    with adaptive_projected_guidance(pipeline), pytest.raises(ValueError, match="combines 3 predictions per sample"):
        sample(pipeline, "sd3", **skipping)


def test_samples_of_a_batch_are_guided_alone():
    pipeline = tiny_pipeline("sd3")
    call = tiny_call("sd3", 2)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with adaptive_projected_guidance(pipeline, norm_threshold=0.3):
        together = pipeline(**call, latents=latents, output_type="latent").images
        for i in range(2):
            one = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in call.items()}
            alone = pipeline(**one, latents=latents[i : i + 1], output_type="latent").images
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", GUIDED)
def test_every_image_starts_without_momentum(kind):
    pipeline = tiny_pipeline(kind)
    with adaptive_projected_guidance(pipeline, momentum=-0.7) as log:
        first = sample(pipeline, kind)
        again = sample(pipeline, kind)
        steps = len(log.steps)
    assert torch.equal(first, again)
    assert steps == (5 if kind == "sd15" else 4)  # PNDM evaluates its first step twice


def test_stochastic_steps_keep_their_noise():
    """DDIM's eta and generator reach the step only if its signature still shows them."""
    pipeline = tiny_pipeline("sd15")
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    untouched = sample(pipeline, "sd15", eta=1.0)
    assert apart(sample(pipeline, "sd15", eta=0.0), untouched) > 0.1
    with adaptive_projected_guidance(pipeline, **OFF):
        assert apart(sample(pipeline, "sd15", eta=1.0), untouched) < 1e-6


# ---------------------------------------------------------------- restoration and refusals


def fingerprint(pipeline):
    hooks = [len(part._forward_hooks) for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return hooks, sorted(vars(pipeline.scheduler))


def test_signatures_stay_and_everything_is_restored_after_an_exception():
    pipeline = tiny_pipeline("sd3")
    before, untouched = fingerprint(pipeline), sample(pipeline, "sd3")
    before = fingerprint(pipeline)  # the call left the scheduler's timesteps
    signatures = [inspect.signature(pipeline.scheduler.step), inspect.signature(pipeline.scheduler.set_timesteps)]
    inside = []

    def look_and_stop():
        inside.append([inspect.signature(pipeline.scheduler.step), inspect.signature(pipeline.scheduler.set_timesteps)])
        inside.append(fingerprint(pipeline))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), adaptive_projected_guidance(pipeline):
        look_and_stop()
    assert inside[0] == signatures
    assert inside[1] != before
    assert fingerprint(pipeline) == before
    assert torch.equal(sample(pipeline, "sd3"), untouched)


def test_an_exception_in_the_middle_of_an_image_leaves_nothing_behind():
    pipeline = tiny_pipeline("sd3")
    untouched = sample(pipeline, "sd3")

    def stop(*_):
        raise RuntimeError("stop")

    with adaptive_projected_guidance(pipeline):
        with pytest.raises(RuntimeError, match="stop"):
            sample(pipeline, "sd3", callback_on_step_end=stop)
        after = sample(pipeline, "sd3")
    with adaptive_projected_guidance(pipeline):
        assert torch.equal(sample(pipeline, "sd3"), after)
    assert torch.equal(sample(pipeline, "sd3"), untouched)


def test_a_wrapper_of_the_users_own_survives():
    pipeline = HandPipeline(flow())
    counted, step = [], pipeline.scheduler.step
    own = pipeline.scheduler.step = lambda *args, **kwargs: counted.append(1) or step(*args, **kwargs)
    with adaptive_projected_guidance(pipeline, norm_threshold=2.5, momentum=0.0), pytest.raises(KeyError):
        pipeline()  # its signature hides what the step takes
    assert pipeline.scheduler.step is own


def test_nesting_is_refused_and_the_outer_block_goes_on():
    pipeline = HandPipeline(flow())
    with adaptive_projected_guidance(pipeline, eta=0.0, norm_threshold=2.5, momentum=0.0):
        with pytest.raises(ValueError, match="already on for this pipeline"), adaptive_projected_guidance(pipeline):
            pass
        assert pipeline()[0].tolist() == pytest.approx(WORKED, abs=1e-5)


def test_a_copy_of_the_scheduler_is_refused():
    """Its step would be the original's."""
    pipeline = HandPipeline(flow())
    with adaptive_projected_guidance(pipeline), pytest.raises(RuntimeError, match="cannot be copied"):
        copy.deepcopy(pipeline.scheduler)
    copy.deepcopy(pipeline.scheduler)


def test_a_scheduler_put_in_later_is_noticed():
    pipeline = tiny_pipeline("sd3")
    with adaptive_projected_guidance(pipeline):
        pipeline.scheduler = flow()
        with pytest.raises(ValueError, match="set `pipeline.scheduler` before the block"):
            sample(pipeline, "sd3", num_inference_steps=6)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("HeunDiscreteScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("PNDMScheduler", {"skip_prk_steps": False}),
    ],
)
def test_momentum_is_refused_where_a_step_asks_several_times(name, config):
    scheduler = getattr(diffusers, name)(**config)
    with (
        pytest.raises(ValueError, match="times per step, and momentum would count each; pass momentum=0"),
        adaptive_projected_guidance(HandPipeline(scheduler)),
    ):
        pass
    with adaptive_projected_guidance(HandPipeline(scheduler), momentum=0.0):
        pass


def test_an_unknown_scheduler_or_denoiser_is_refused():
    pipeline = HandPipeline(diffusers.LCMScheduler())
    with (
        pytest.raises(ValueError, match="not known what the predictions given to LCMScheduler mean"),
        adaptive_projected_guidance(pipeline),
    ):
        pass
    pipeline = HandPipeline(flow())
    pipeline.components = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1), "vae": nn.Linear(1, 1)}
    with pytest.raises(ValueError, match=r"components \['a', 'b'\]; name it transformer or"):
        denoisers(pipeline)
    pipeline.components.pop("b")
    assert denoisers(pipeline) == [pipeline.components["a"]]
