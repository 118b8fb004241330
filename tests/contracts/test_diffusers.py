"""What we rely on in the installed diffusers, and where our equations must give its numbers."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import AdaptiveProjectedGuidance
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.modular_pipelines.modular_pipeline import BlockState
from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3LoopDenoiser

from rlalign.diffusion.guidance import adaptive_projected_guidance
from rlalign.diffusion.guider import PaperAPG
from rlalign.diffusion.tiny import tiny_call, tiny_pipeline
from rlalign.functional.flow import ddim_step, sde_step
from rlalign.functional.guidance import adaptive_projected

COND, UNCOND = torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 2.0, 0.0]])


def random_pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("one_at_the_end", [True, False])
def test_ddim_step_is_the_schedulers(eta, one_at_the_end):
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=one_at_the_end, steps_offset=1)
    scheduler.set_timesteps(10)
    x, epsilon = random_pair()
    noise, _ = random_pair(seed=1)
    alphas = scheduler.alphas_cumprod
    for timestep in scheduler.timesteps.tolist():
        previous = timestep - 100
        after = alphas[previous] if previous >= 0 else scheduler.final_alpha_cumprod
        mean, std = ddim_step(x, epsilon, alphas[timestep], after, eta=eta)
        want = scheduler.step(epsilon, timestep, x, eta=eta, variance_noise=noise, return_dict=False)[0]
        torch.testing.assert_close(mean + std * noise, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
def test_sde_step_without_noise_is_flow_match_eulers_bit_for_bit(kind):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas
    x, velocity = random_pair()
    for i, timestep in enumerate(scheduler.timesteps):
        mean, std = sde_step(x, velocity, sigmas[i], sigmas[i + 1], noise_level=0.0, kind=kind, sigma_max=sigmas[1])
        assert std.item() == 0.0
        assert torch.equal(mean, scheduler.step(velocity, timestep, x, return_dict=False)[0])


def test_sde_step_tends_to_flow_match_eulers_as_noise_vanishes():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas
    x, velocity = random_pair()
    want = scheduler.step(velocity, scheduler.timesteps[0], x, return_dict=False)[0]
    for kind in ("flow_sde", "dance_sde", "cps"):
        gaps = []
        for noise_level in (0.2, 0.1, 0.05):
            mean, _ = sde_step(
                x, velocity, sigmas[0], sigmas[1], noise_level=noise_level, kind=kind, sigma_max=sigmas[1]
            )
            gaps.append(float((mean - want).abs().max()))
        assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.05)  # second order in the noise
        assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.05)


# ---------------------------------------------------------------- adaptive projected guidance


def test_diffusers_forms_on_the_worked_vector():
    """Its default starts from the unconditional prediction; its "original" form at w - 1 is the paper's at w."""
    settings = {"eta": 0.0, "norm_threshold": 2.5}
    default = normalized_guidance(COND, UNCOND, 5.0, **settings)
    assert default[0].tolist() == pytest.approx([-0.632993, 1.224745, -3.103104, 0.0], abs=1e-6)
    original = normalized_guidance(COND, UNCOND, 5.0, use_original_formulation=True, **settings)
    assert original[0].tolist() == pytest.approx([1.367007, 5.224745, -5.103104, 0.0], abs=1e-6)
    paper = normalized_guidance(COND, UNCOND, 4.0, use_original_formulation=True, **settings)
    ours, _ = adaptive_projected(COND, UNCOND, scale=5, momentum=0.0, **settings)
    torch.testing.assert_close(ours, paper)
    vanishing = normalized_guidance(COND, UNCOND, 5.0, eta=0.0, norm_threshold=1e-9)
    torch.testing.assert_close(vanishing, UNCOND)
    ours, _ = adaptive_projected(COND, UNCOND, scale=5, eta=0.0, norm_threshold=1e-9, momentum=0.0)
    torch.testing.assert_close(ours, COND)


@pytest.mark.parametrize(("eta", "limit", "momentum"), [(0.0, 15.0, -0.5), (0.5, 3.0, -0.75), (1.0, 0.0, 0.0)])
def test_the_guider_is_diffusers_own_where_their_settings_coincide(eta, limit, momentum):
    """Raw predictions, original form, w - 1: over three steps of one image and the first of the next."""
    theirs = AdaptiveProjectedGuidance(
        guidance_scale=6.5,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=limit,
        eta=eta,
        use_original_formulation=True,
    )
    ours = PaperAPG(guidance_scale=7.5, eta=eta, norm_threshold=limit, momentum=momentum)
    for step in (0, 1, 2, 0):
        cond, uncond = random_pair(seed=step)
        outputs = []
        for guider in (ours, theirs):
            guider.set_state(step=step, num_inference_steps=3, timestep=torch.tensor(500.0))
            batches = guider.prepare_inputs({"prompt": (torch.zeros(1), torch.ones(1))})
            assert [float(batch.prompt) for batch in batches] == [0.0, 1.0]
            for batch, prediction in zip(batches, (cond, uncond), strict=True):
                guider.prepare_models(torch.nn.Identity())
                batch.noise_pred = prediction
            outputs.append(guider(batches))
        torch.testing.assert_close(outputs[0].pred, outputs[1].pred)
        assert torch.equal(outputs[0].pred_cond, cond)
        assert torch.equal(outputs[0][0], outputs[0].pred)


def test_the_guider_asks_once_where_it_does_not_guide():
    off = [PaperAPG(guidance_scale=1.0), PaperAPG(enabled=False), PaperAPG(start=0.5), PaperAPG(stop=0.0)]
    for guider in off:
        guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(900.0))
        (batch,) = guider.prepare_inputs({"prompt": (torch.zeros(1), torch.ones(1))})
        batch.noise_pred = COND
        assert torch.equal(guider([batch]).pred, COND)
    guider = off[2]
    guider.set_state(step=2, num_inference_steps=4, timestep=torch.tensor(400.0))
    assert guider.num_conditions == 2


def test_the_guiders_settings_are_saved_and_copied(tmp_path):
    guider = PaperAPG(guidance_scale=9.0, momentum=-0.2, space="flow")
    guider.save_pretrained(tmp_path)
    for copy in (PaperAPG.from_pretrained(tmp_path), guider.new()):
        assert copy.config["guidance_scale"] == 9.0
        assert copy.projection == guider.projection
        assert copy.space == "flow"
    assert guider.new(momentum=0.0).projection.momentum == 0.0


def denoise_by_blocks(pipeline, call, latents, guider):
    """The modular Stable Diffusion 3 loop around its own denoiser block."""
    components = SimpleNamespace(guider=guider, transformer=pipeline.transformer)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(call["num_inference_steps"])
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    state = BlockState(
        latents=latents,
        num_inference_steps=call["num_inference_steps"],
        joint_attention_kwargs=None,
        **{name: call[name] for name in names},
    )
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            StableDiffusion3LoopDenoiser()(components, state, i=i, t=timestep)
            state.latents = scheduler.step(state.noise_pred, timestep, state.latents, return_dict=False)[0]
    return state.latents


def test_in_flow_space_the_guider_is_the_context_manager():
    """The paper's algorithm from both ends: inside a modular pipeline, and around the classic one."""
    pipeline, call = tiny_pipeline("sd3"), tiny_call("sd3", 2)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"eta": 0.0, "norm_threshold": 0.3, "momentum": -0.5}
    with adaptive_projected_guidance(pipeline, **settings):
        classic = pipeline(**call, latents=latents, output_type="latent").images
    modular = denoise_by_blocks(
        pipeline, call, latents, PaperAPG(guidance_scale=call["guidance_scale"], space="flow", **settings)
    )
    torch.testing.assert_close(modular, classic, rtol=1e-4, atol=1e-5)
    raw = denoise_by_blocks(pipeline, call, latents, PaperAPG(guidance_scale=call["guidance_scale"], **settings))
    assert (raw - classic).abs().max() > 1e-3


def test_flow_space_needs_the_latents():
    guider = PaperAPG(space="flow")
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(900.0))
    batches = guider.prepare_inputs({"prompt": (torch.zeros(1), torch.ones(1))})
    for batch, prediction in zip(batches, (COND, UNCOND), strict=True):
        batch.noise_pred = prediction
    with pytest.raises(ValueError, match='keeps its latents from the guider, so PaperAPG\\(space="flow"\\) cannot'):
        guider(batches)


def test_block_states_show_the_latents_of_pipelines_that_pass_them_whole():
    guider = PaperAPG(guidance_scale=5.0, space="flow", eta=0.0, norm_threshold=2.5, momentum=0.0)
    guider.set_state(step=0, num_inference_steps=4, timestep=torch.tensor(500.0))
    x = torch.tensor([[5.0, 7.0, -2.0, 1.0]])
    state = BlockState(latents=x, positive=torch.zeros(1), negative=torch.ones(1))
    batches = guider.prepare_inputs_from_block_state(state, {"prompt": ("positive", "negative")})
    assert [float(batch.prompt) for batch in batches] == [0.0, 1.0]
    for batch, denoised in zip(batches, (COND, UNCOND), strict=True):
        batch.noise_pred = (x - denoised) / 0.5
    guided = x - 0.5 * guider(batches).pred
    assert guided[0].tolist() == pytest.approx([1.693606, 4.979796, -4.082483, 0.0], abs=1e-5)
