"""What reaches the denoiser and the optimizer is what the settings say: noise, clips, averages, adapters, outcomes."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import UniPCMultistepScheduler

from rlalign.config import ConfigError
from rlalign.diffusion.config import AverageConfig, FlowGRPOConfig, SDEConfig
from rlalign.diffusion.flow_grpo import FlowGRPOTrainer
from rlalign.diffusion.policy import TunedPipeline
from rlalign.diffusion.prompts import Prompts
from rlalign.diffusion.rewards import Judge
from rlalign.diffusion.sde import stochastic_scheduler
from rlalign.diffusion.simulated import simulate
from rlalign.diffusion.step_noise import StepNoise
from rlalign.diffusion.tiny import TINY_KINDS, tiny_pipeline
from rlalign.functional.policy import step_clip
from tests.diffusion.half_plane import CLASSES, RightHalf, untrained
from tests.diffusion.small_runs import (
    SMALL,
    PretendSimulator,
    brightness,
    merged,
    points_pipeline,
    points_trainer,
    tiny_prompts,
)
from tests.diffusion.test_dso import begun
from tests.diffusion.test_policy import shaken, tuned
from tests.diffusion.test_simulated import config
from tests.diffusion.test_step_objective import SETTINGS, step_of

pytestmark = pytest.mark.usefixtures("no_report")


# ---------------------------------------------------------------- any pipeline, without a word about its noise


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_every_pipeline_trains_without_a_word_about_its_noise(tmp_path, kind):
    rows, call = tiny_prompts(kind)
    few = {"total_steps": 1, "rollout": {"prompts_per_step": 2, "group_size": 2, "num_inference_steps": 3}}
    settings = merged(SMALL, few | {"call": call, "eval": {"samples": 2}})
    trainer = FlowGRPOTrainer(tiny_pipeline(kind), rows, brightness, run_dir=tmp_path / "run", **settings).fit()
    noise = trainer.drawn.trajectories[0].transition.sde
    assert noise == (StepNoise(kind="ddim", noise_level=1.0) if "sd" in kind and kind != "sd3" else FLOW)


FLOW = StepNoise(kind="flow_sde", noise_level=0.7)


@pytest.mark.parametrize(
    ("kind", "level", "wanted"),
    [("auto", "auto", FLOW), ("dance_sde", "auto", 0.3), ("cps", "auto", 0.8), ("cps", 0.5, 0.5), ("auto", 0.1, 0.1)],
)
def test_noise_is_what_the_papers_use_unless_it_is_given(kind, level, wanted):
    scheduler = points_pipeline().scheduler
    found = StepNoise.of(SDEConfig(kind=kind, noise_level=level), scheduler)
    wanted = wanted if isinstance(wanted, StepNoise) else replace(FLOW, noise_level=wanted)
    assert found == (wanted if kind == "auto" else replace(wanted, kind=kind))


@pytest.mark.parametrize("kind", ["auto", "ddim"])
def test_a_flow_under_another_familys_scheduler_is_refused_with_what_it_takes(kind):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    told = "needs a FlowMatchEulerDiscreteScheduler, got UniPC.*; give" if kind == "auto" else "got UniPC.* of a flow"
    with pytest.raises(ValueError, match=told):
        stochastic_scheduler(scheduler, SDEConfig(kind=kind))


# ---------------------------------------------------------------- a refused trainer


@pytest.mark.parametrize("lora", [{"r": 2}, None])
def test_a_refused_trainer_leaves_the_pipeline_as_it_came(tmp_path, lora):
    pipeline = tiny_pipeline("sd3")
    rows, call = tiny_prompts("sd3")
    pipeline.transformer.train()
    pipeline.transformer.proj_out.requires_grad_(False)
    names = [name for name, _ in pipeline.transformer.named_modules()]
    state = copy.deepcopy(pipeline.transformer.state_dict())
    flags = {name: p.requires_grad for name, p in pipeline.transformer.named_parameters()}
    checkpointed = {"gradient_checkpointing": True}
    with pytest.raises(ConfigError, match=r"`sde.kind: ddim` needs a scheduler with a schedule of betas"):
        FlowGRPOTrainer(
            pipeline, rows, brightness, run_dir=tmp_path / "a", call=call, sde="ddim", lora=lora, **checkpointed
        )
    assert [name for name, _ in pipeline.transformer.named_modules()] == names
    assert {name: p.requires_grad for name, p in pipeline.transformer.named_parameters()} == flags
    assert pipeline.transformer.training and not pipeline.vae.training
    assert not pipeline.transformer.is_gradient_checkpointing
    for name, value in pipeline.transformer.state_dict().items():
        assert torch.equal(value, state[name])
    FlowGRPOTrainer(pipeline, rows, brightness, run_dir=tmp_path / "b", call=call, lora=lora)


def test_a_checkpoint_of_another_rank_is_refused_by_name(tmp_path):
    points_trainer(tmp_path / "run", total_steps=1).fit()
    with pytest.raises(ConfigError, match=r"lora_A.* has the shape \[2, .*here it is \[4, .*`lora.r`"):
        points_trainer(tmp_path / "run", total_steps=2, lora={"r": 4}).fit(resume=True)


def test_progress_bars_come_back(tmp_path):
    pipeline = points_pipeline()
    pipeline.set_progress_bar_config(desc="mine")
    trainer = points_trainer(tmp_path / "run", pipeline=pipeline)
    trainer.fit()
    assert pipeline._progress_bar_config == {"desc": "mine"}


# ---------------------------------------------------------------- objective


@pytest.mark.parametrize("name", ["plain", "guard"])
def test_the_automatic_clip_of_a_run_is_that_of_one_samples_dimensions(tmp_path, name):
    number = step_clip(2, normalized=name == "guard")  # a point: two values, whatever the batch and the steps
    given = ({}, {"clip_low": number, "clip_high": number})
    found = [
        step_of(points_trainer(tmp_path / str(k), objective=SETTINGS[name] | clip))[1] for k, clip in enumerate(given)
    ]
    assert found[0] == pytest.approx(found[1], rel=0, abs=1e-7)


def test_advantages_are_bounded_by_five_unless_told_otherwise(tmp_path):
    trainer = points_trainer(
        tmp_path / "run", rollout={"prompts_per_step": 2, "group_size": 64}, advantage={"type": "group_relative"}
    )
    rare = iter(range(10**6))
    trainer.judge = Judge(lambda samples, prompts: [float(next(rare) % 64 == 0) for _ in samples])
    trainer.step = 1
    trainer.metrics.begin()
    batch = trainer.weighted(trainer.estimator(trainer.collect()))
    assert FlowGRPOConfig().objective.advantage_clip == 5.0
    assert float(batch.advantages.max()) == 5.0  # (1 - 1/64) / std would be 7.9


def test_a_simulators_outcomes_are_learned_from_only_by_name(tmp_path):
    decomposed = {"type": "group_relative", "decompose": True}
    refused = points_trainer(tmp_path / "a", PretendSimulator(), advantage=decomposed)
    with pytest.raises(ConfigError, match=r"`advantage.part_weights`, 0 for .*: margin, robust, stable have none"):
        refused.fit()
    named = points_trainer(
        tmp_path / "b",
        PretendSimulator(),
        advantage=decomposed | {"part_weights": {"stable": 1.0, "robust": 0.0, "margin": 0.0}},
    )
    plain = points_trainer(tmp_path / "c", PretendSimulator(), advantage={"type": "group_relative"})
    for one, other in zip(named.fit().tuned.parameters.values(), plain.fit().tuned.parameters.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------- weights


def test_adapters_begin_as_gaussians_of_deviation_1_over_r_and_zeros():
    trained = tuned(tiny_pipeline("sd3"))
    down, up = ([p for n, p in trained.parameters.items() if part in n] for part in ("lora_A", "lora_B"))
    values = torch.cat([p.detach().flatten() for p in down])
    assert values.std().item() == pytest.approx(1 / 2, rel=0.1)  # peft's default would be .10
    assert not any(p.any() for p in up)


def twice_moved(model: TunedPipeline) -> None:
    """Weights, their average, and the weights that are trained are three different things."""
    shaken(model, 0.1)
    model.stepped(1)
    shaken(model, 0.1)


def test_evaluation_draws_with_the_average(tmp_path):
    trainer = points_trainer(tmp_path / "run", average={"every": 1})
    twice_moved(trainer.tuned)
    drawn = trainer.evaluator.generate()[0]
    with trainer.tuned.averaged():
        trainer.tuned.average.updates = 0  # nothing is swapped any more: the weights that stand there are used
        expected = trainer.evaluator.generate()[0]
        trainer.tuned.average.updates = 1
    np.testing.assert_array_equal(drawn, expected)
    trainer.tuned.average.updates = 0
    assert not np.allclose(trainer.evaluator.generate()[0], expected, atol=1e-4)


def test_dso_draws_its_rounds_with_the_average():
    cfg = replace(config(), average=AverageConfig(every=1))
    pipeline = untrained()
    model, prompts, judge = TunedPipeline(pipeline, cfg), Prompts.of(CLASSES, pipeline), Judge(RightHalf())
    twice_moved(model)
    accelerator = Accelerator(cpu=True)

    def draw():
        return simulate(model, prompts, judge, cfg, round_number=1, accelerator=accelerator).latents

    found = draw()
    with model.averaged():
        model.average.updates = 0
        expected = draw()
        model.average.updates = 1
    assert torch.equal(found, expected)
    model.average.updates = 0
    assert not torch.allclose(draw(), expected, atol=1e-4)


def test_the_size_of_predictions_is_compared_with_the_generator_as_it_came(tmp_path):
    trainer = points_trainer(tmp_path / "run", lora=None, average=None)
    trainer.step = 1
    trainer.metrics.begin()
    trainer.collect()
    assert trainer.norm_ratio() == pytest.approx(1.0, abs=1e-6)
    last = trainer.tuned.denoiser.out
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(1.5)
    assert trainer.norm_ratio() == pytest.approx(1.5, abs=1e-5)
    dso = begun(tmp_path / "dso", lora=None, average=None)
    ((pairs, corruption),) = dso.micro_batches(dso.pairs.draw(0, 6))
    with torch.no_grad():
        for parameter in dso.tuned.denoiser.out.parameters():
            parameter.mul_(0.5)
    assert dso.norm_ratio(pairs, corruption) == pytest.approx(0.5, abs=1e-5)


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize("shared", [True, False])
def test_winner_and_loser_meet_the_denoiser_with_the_pairs_own_noise(tmp_path, shared):
    trainer = begun(tmp_path / "run", objective={"kind": "dpo", "shared_noise": shared})
    asked = []

    def error(clean, noise, level, prompts):
        asked.append((clean, noise, level))
        return torch.zeros(len(clean))

    trainer.error = error
    ((pairs, corruption),) = trainer.micro_batches(trainer.pairs.draw(0, 6))
    trainer.errors(pairs, corruption, "win", "lose")
    trainer.errors(pairs, corruption, "lose")
    (clean, noise, level), (_, noise_again, level_again) = asked
    assert torch.equal(clean, trainer.data.latents[pairs.T.flatten()])
    assert torch.equal(noise[6:], noise_again) and torch.equal(level[6:], level_again)
    assert torch.equal(noise[:6], corruption.noise[:, 0]) and torch.equal(noise[6:], corruption.noise[:, 1])
    assert torch.equal(noise[:6], noise[6:]) is shared and torch.equal(level[:6], level[6:]) is shared
