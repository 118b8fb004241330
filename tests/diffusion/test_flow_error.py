"""The forward process by hand, and the denoiser asked without its pipeline: the same answer as with it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlalign.config import ConfigError
from rlalign.diffusion.conditions import Conditions, ModelTime, _model_time
from rlalign.diffusion.config_dso import DSOObjective
from rlalign.diffusion.flow_error import DenoisingError, draw_corruption
from rlalign.diffusion.prompts import Prompts
from rlalign.diffusion.tiny import TINY_KINDS, tiny_pipeline
from tests.diffusion.half_plane import CLASSES, untrained
from tests.diffusion.small_runs import tiny_prompts


class Answering(Conditions):
    """Stands in for `Conditions`: answers as told, and remembers what it was asked."""

    def __init__(self, answer: Any, *, kind: str = "flow", alpha_bars: Tensor | None = None):
        self.answer, self.kind, self.alpha_bars = answer, kind, alpha_bars
        self.sampler = SimpleNamespace(denoiser=nn.Identity())

    def predict(self, x: Tensor, level: Tensor, prompts: Tensor) -> Tensor:
        self.x, self.level = x, level
        return self.answer


def error_of(conditions: Any, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
    return DenoisingError(conditions)(clean, noise, level, torch.zeros(len(clean), dtype=torch.long))


CLEAN, NOISE = torch.tensor([[2.0, -2.0]]), torch.tensor([[0.0, 4.0]])


def test_flow_error_by_hand():
    asked = Answering(torch.tensor([[-1.0, 6.0]]))
    got = error_of(asked, CLEAN, NOISE, torch.tensor([0.25]))
    assert asked.x.tolist() == [[1.5, -0.5]]  # .75 x0 + .25 eps
    assert asked.level.tolist() == [0.25]
    assert got.tolist() == [0.5]  # target eps - x0 = [-2, 6]: mean of 1 and 0


@pytest.mark.parametrize(
    ("kind", "target"), [("epsilon", [0.0, 4.0]), ("v_prediction", [-1.2, 4.4]), ("sample", [2.0, -2.0])]
)
def test_error_of_models_with_discrete_timesteps_by_hand(kind, target):
    # alpha_bar = .64: signal .8, noise .6; v = .8 eps - .6 x0 = [-1.2, 3.2 + 1.2]
    asked = Answering(torch.tensor([target]) + 1.0, kind=kind, alpha_bars=torch.tensor([0.9, 0.64, 0.1]))
    got = error_of(asked, CLEAN, NOISE, torch.tensor([0.5]))  # floor(.5 * 3) = 1
    torch.testing.assert_close(asked.x, torch.tensor([[1.6, 0.8]]))
    assert asked.level.tolist() == [1.0]
    torch.testing.assert_close(got, torch.tensor([1.0]))


def test_the_last_timestep_takes_the_levels_up_to_one():
    asked = Answering(torch.zeros(1, 2), kind="epsilon", alpha_bars=torch.tensor([0.9, 0.5]))
    error_of(asked, CLEAN, NOISE, torch.tensor([1.0]))
    assert asked.level.tolist() == [1.0]


def heard_calls(pipeline: Any, name: str, call: dict[str, Any]) -> list[tuple[dict[str, Any], Tensor]]:
    """Arguments and answers of the denoiser in a plain run."""
    calls: list[Any] = []
    denoiser = pipeline.components[name]
    handle = denoiser.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((kwargs | dict(enumerate(args)), out[0])), with_kwargs=True
    )
    pipeline(**call)
    handle.remove()
    return calls


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_conditional_branch_is_asked_as_the_pipeline_asks_it(kind):
    pipeline = tiny_pipeline(kind)
    if kind == "sdxl":  # a scheduler that hands its denoiser the latents as they are
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    rows, rest = tiny_prompts(kind, 3)
    prompts = Prompts.of(rows, pipeline)
    conditions = Conditions(pipeline, prompts, rest, batch_size=2)  # recorded in two runs, and joined
    conditions.record([0, 1, 2])
    name = "unet" if kind in ("sd15", "sdxl") else "transformer"
    noise = [torch.Generator().manual_seed(k) for k in range(3)]
    call = prompts.call([0, 1, 2]) | rest | {"num_inference_steps": 5, "generator": noise, "output_type": "latent"}
    heard = heard_calls(pipeline, name, call)
    given, answer = heard[2 if kind != "flux_true_cfg" else 4]  # the third step; true CFG calls twice, condition first
    x = given.get(0, given.get("hidden_states"))
    told = given.get(1, given.get("timestep"))
    if kind in ("sd15", "sdxl", "sd3"):
        x, answer = x.chunk(2)[1], answer.chunk(2)[1]
    level = torch.as_tensor(told).flatten()[0].float() / (1000 if kind == "sd3" else 1)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        got = conditions.predict(x[order], level.expand(3), order)
    torch.testing.assert_close(got, answer[order], rtol=1e-5, atol=1e-6)
    others = torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert not torch.allclose(conditions.predict(x[order], level.expand(3), others), got)


def test_conditions_of_the_small_generator_with_guidance():
    pipeline = untrained()
    prompts = Prompts.of(CLASSES, pipeline)
    conditions = Conditions(pipeline, prompts, {"guidance_scale": 3.0})
    conditions.record([0, 1])
    x, sigma = torch.randn(2, 1, 2), torch.tensor([0.3, 0.8])
    expected = pipeline.transformer(x, 1000 * sigma, torch.tensor([1, 0]), return_dict=False)[0]
    torch.testing.assert_close(conditions.predict(x, sigma, torch.tensor([1, 0])), expected)


def test_conditions_leave_the_pipeline_as_it_was():
    pipeline = untrained()
    scheduler, hooks = pipeline.scheduler, len(pipeline.transformer._forward_hooks)
    Conditions(pipeline, Prompts.of(CLASSES, pipeline), {}).record([0])
    assert pipeline.scheduler is scheduler
    assert "step" not in vars(scheduler)
    assert len(pipeline.transformer._forward_hooks) == hooks


def test_model_time_is_read_off_and_a_stranger_is_refused():
    assert _model_time([1000.0, 666.6667, 333.3333], [1.0, 2 / 3, 1 / 3], torch.float32, "x") == ModelTime(
        0, 1000, torch.float32
    )
    assert _model_time([0.0, 0.25, 0.5], [1.0, 0.75, 0.5], torch.float32, "x") == ModelTime(1, -1, torch.float32)
    half = torch.tensor([1.0, 0.7, 0.4]).bfloat16().tolist()
    assert _model_time(half, [1.0, 0.7, 0.4], torch.bfloat16, "x") == ModelTime(0, 1, torch.bfloat16)
    with pytest.raises(ConfigError, match="argument 4 of the denoiser changes from step to step"):
        _model_time([1.0, 0.3, 0.4], [1.0, 0.7, 0.4], torch.float32, "argument 4")


def test_a_pair_shares_noise_and_level_unless_told_otherwise():
    shared = draw_corruption(DSOObjective(), (1, 2), count=5, step=3, seed=0)
    assert torch.equal(shared.noise[:, 0], shared.noise[:, 1])
    assert torch.equal(shared.level[:, 0], shared.level[:, 1])
    two = draw_corruption(DSOObjective(shared_noise=False), (1, 2), count=5, step=3, seed=0)
    assert not torch.isclose(two.noise[:, 0], two.noise[:, 1]).any()
    assert not torch.isclose(two.level[:, 0], two.level[:, 1]).any()


def test_levels_are_logistic_normal_and_a_function_of_the_step():
    cfg = DSOObjective(time_mean=1.0, time_std=0.5)
    drawn = draw_corruption(cfg, (2,), count=4000, step=7, seed=0)
    logits = drawn.level[:, 0].logit()
    assert abs(float(logits.mean()) - 1.0) < 0.03  # 4 x .5 / sqrt(4000)
    assert abs(float(logits.std()) - 0.5) < 0.03
    again = draw_corruption(cfg, (2,), count=4000, step=7, seed=0)
    assert torch.equal(again.noise, drawn.noise)
    assert not torch.equal(draw_corruption(cfg, (2,), count=4000, step=8, seed=0).noise, drawn.noise)
