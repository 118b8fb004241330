"""The trainer: one step's parts, advantages on binary outcomes, runs that end early, resume to the last bit, faults."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlalign import config as config_files
from rlalign.config import ConfigError
from rlalign.diffusion.flow_grpo import FlowGRPOTrainer
from rlalign.diffusion.rewards import Judged
from rlalign.diffusion.tiny import tiny_pipeline
from rlalign.training.metrics import metrics_hash, read
from rlalign.training.reward_call import RewardError
from rlalign.training.seeding import derived_seed
from rlalign.training.signals import Interrupted
from tests.diffusion.small_runs import (
    SMALL,
    PretendSimulator,
    brightness,
    merged,
    points_pipeline,
    points_trainer,
    tiny_prompts,
    to_the_right,
)

pytestmark = pytest.mark.usefixtures("no_report")


def collected(trainer):
    trainer.step = 1  # the parity check of step 0 needs an open run
    trainer.metrics.begin()
    return trainer.collect()


def batch_of(trainer):
    return trainer.weighted(trainer.estimator(collected(trainer)))


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("guard", [True, False])
def test_the_first_minibatch_has_ratio_1(tmp_path, kind, guard):
    sde = {"kind": kind, "noise_level": 0.5}
    trainer = points_trainer(tmp_path / "run", guard=guard, rollout={"sde": sde}, update_epochs=2)
    assert trainer.config.objective.ratio_norm is guard and trainer.config.objective.reweight is guard
    batch = batch_of(trainer)
    shifts = []
    for minibatch in trainer.minibatches(batch):
        trainer.metrics.sums.clear()
        trainer.update(minibatch)
        shifts.append([abs(v) for name, v in trainer.metrics.sums.items() if name.endswith("shift")])
    assert max(shifts[0]) < 1e-6  # before any update; later ones are off-policy
    assert max(shifts[-1]) > 1e-6
    assert trainer.tuning.updates == 4


def test_minibatches_hold_whole_groups_and_every_row_once(tmp_path):
    trainer = points_trainer(tmp_path / "run")
    batch = batch_of(trainer)
    parts = list(trainer.minibatches(batch))
    assert [sorted(torch.bincount(p.group - batch.group.min(), minlength=4).tolist()) for p in parts] == [
        [0, 0, 4, 4]
    ] * 2
    assert sorted(torch.cat([p.inputs["place"].value for p in parts]).tolist()) == list(range(16))


def test_the_metrics_of_a_step_say_how_often_each_denoising_step_was_clipped(tmp_path):
    trainer = points_trainer(tmp_path / "run")
    trainer.metrics.begin()
    log_ratio = torch.tensor([0.1, -0.1, 0.1, -0.1, 2e-8]).log1p()
    trainer.metrics.scored(
        log_ratio, torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1]), (0.05, 0.05)
    )
    sums = trainer.metrics.sums
    # Only what the clip holds back counts: up with a gain, down with a loss.
    assert [sums[f"0/{name}"] for name in ("count", "low", "high")] == [3, 1, 1]
    assert [sums[f"1/{name}"] for name in ("count", "low", "high")] == [2, 0, 0]
    assert sums["0/shift"] == pytest.approx(0.1, abs=1e-6)


def test_a_shift_below_float32s_resolution_at_1_is_seen(tmp_path):
    trainer = points_trainer(tmp_path / "run")
    trainer.metrics.begin()
    trainer.metrics.scored(torch.tensor([2e-9]), torch.tensor([1.0]), torch.tensor([0]), (1e-9, 1e-9))
    assert trainer.metrics.sums["0/shift"] == pytest.approx(2e-9) and trainer.metrics.sums["0/high"] == 1


def test_guidance_that_is_no_combination_is_refused_and_trained_by_the_pipelines_own_code(tmp_path):
    rows, call = tiny_prompts("sd15")
    settings = merged(
        SMALL,
        {
            "total_steps": 1,
            "rollout": {"prompts_per_step": 2, "group_size": 2, "num_inference_steps": 3, "sde": {"kind": "ddim"}},
            "call": {**call, "guidance_rescale": 0.7},
        },
    )
    refused = FlowGRPOTrainer(tiny_pipeline("sd15"), rows, brightness, run_dir=tmp_path / "refused", **settings)
    with pytest.raises(ConfigError, match="cannot be replayed.*`guidance_rescale`.*`rollout.by_pipeline: true`"):
        refused.fit()
    settings = merged(settings, {"rollout": {"by_pipeline": True}})
    trainer = FlowGRPOTrainer(tiny_pipeline("sd15"), rows, brightness, run_dir=tmp_path / "run", **settings)
    (metrics,) = trainer.steps()
    assert metrics["optim/grad_norm"] > 0 and trainer.tuning.updates == 2


def test_evaluation_is_the_stock_pipeline_from_noise_that_no_step_or_batch_changes(tmp_path):
    trainer = points_trainer(tmp_path / "run", rollout={"batch_size": 3})
    trainer.step = 7
    samples, indices = trainer.evaluator.generate()
    seeds = [derived_seed(0, "held out", k) for k in range(8)]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = points_pipeline()([k % 2 for k in range(8)], generator=noise, num_inference_steps=4).samples
    assert indices == [k % 2 for k in range(8)]
    np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- advantages of binary outcomes


def with_outcomes(trainer, outcomes):
    """Advantages that the trainer gives to these outcomes, NaN where unknown; one per sample."""
    values = torch.tensor(outcomes).flatten()
    scored = ~values.isnan()
    trainer.judge = lambda *_: Judged(torch.where(scored, values, 0.0), scored, {"stable": values, "margin": values})
    trainer.judge.target = "stable"
    batch = batch_of(trainer)
    return batch.advantages[:, 0].reshape(len(outcomes), -1), batch


BINARY = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0] * 4]
S = math.sqrt(1 / 3)


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ({"type": "leave_one_out"}, [[1, -1 / 3, -1 / 3, -1 / 3], [2 / 3, 2 / 3, -2 / 3, -2 / 3], [1 / 3] * 3 + [-1]]),
        (
            {"type": "group_relative", "eps": 0.0},
            [[1.5, -0.5, -0.5, -0.5], [0.5 / S, 0.5 / S, -0.5 / S, -0.5 / S], [0.5] * 3 + [-1.5]],
        ),
        (
            {"type": "group_relative", "scale": False},
            [[0.75, -0.25, -0.25, -0.25], [0.5, 0.5, -0.5, -0.5], [0.25] * 3 + [-0.75]],
        ),
        # Beta(2, 2) has density 6 p (1 - p): 9/8 at 1/4 and 3/4, 3/2 at 1/2.
        (
            {"type": "beta_normalized", "alpha": 2.0, "beta": 2.0},
            [[2 / 3, -2 / 9, -2 / 9, -2 / 9], [1 / 3, 1 / 3, -1 / 3, -1 / 3], [2 / 9] * 3 + [-2 / 3]],
        ),
    ],
)
def test_advantages_of_binary_outcomes(tmp_path, advantage, expected):
    trainer = points_trainer(tmp_path / "run", PretendSimulator(), advantage=advantage)
    found, _ = with_outcomes(trainer, BINARY)
    torch.testing.assert_close(found, torch.tensor([*expected, [0.0] * 4]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "beta_normalized",
        "batch_scaled",
        "per_prompt_running",
        "reinforce_plus_plus",
        "reinforce_plus_plus_baseline",
        "max_likelihood",
        "length_weighted",
    ],
)
def test_every_shared_estimator_takes_denoising_runs(tmp_path, name):
    trainer = points_trainer(tmp_path / "run", PretendSimulator(), advantage=name)
    found, batch = with_outcomes(trainer, BINARY)
    assert found.isfinite().all()
    assert (found[0, 0] > found[0, 1]) and (found[1, :2] > 0).all() and (found[1, 2:] < 0).all()
    assert batch.advantages[~batch.mask].eq(0).all()  # the last step is never trained


def test_unknown_outcomes_leave_every_baseline_and_the_rest_is_computed_anew(tmp_path):
    nan = math.nan
    trainer = points_trainer(tmp_path / "run", PretendSimulator(), advantage="leave_one_out")
    found, batch = with_outcomes(
        trainer, [[1.0, 0.0, nan, nan], [nan, 1.0, 0.0, 0.0], [1.0, nan, nan, nan], [nan, 1.0, 1.0, 1.0]]
    )
    expected = [[1, -1, 0, 0], [0, 1, -0.5, -0.5], [0] * 4, [0] * 4]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert trainer.metrics.live == 2 and trainer.metrics.groups == 4
    metrics = trainer.metrics.finish(batch, {})
    assert metrics["reward/unknown_frac"] == 7 / 16 and metrics["signal/groups_skipped"] == 2
    assert metrics["reward/mean"] == pytest.approx(6 / 9)


def test_advantages_are_bounded(tmp_path):
    trainer = points_trainer(
        tmp_path / "run", objective={"advantage_clip": 1.2}, advantage={"type": "group_relative", "eps": 0.0}
    )
    found, _ = with_outcomes(trainer, BINARY)
    assert found[0].tolist() == pytest.approx([1.2, -0.5, -0.5, -0.5])


# ---------------------------------------------------------------- runs that end early


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.tuned.parameters.items()}


def test_without_any_signal_there_is_no_step_it_is_counted_and_the_run_stops(tmp_path):
    trainer = points_trainer(tmp_path / "run", lambda samples, prompts: [1.0] * len(samples), total_steps=9)
    before = weights(trainer)
    metrics = list(trainer.steps())
    assert len(metrics) == 3  # `stop_without_signal`
    assert all(m["signal/group_frac"] == 0 and m["signal/groups_skipped"] == 4 for m in metrics)
    assert trainer.tuning.updates == 0 and trainer.tuning.optimizer.state_dict()["state"] == {}
    assert all(torch.equal(p, before[name]) for name, p in trainer.tuned.parameters.items())
    assert trainer.saturation.ended.startswith("Stopped after step 3")


class Always(PretendSimulator):
    def simulate(self, samples):
        return {**super().simulate(samples), "stable": np.ones(len(samples))}


def test_a_saturated_reward_hands_over_to_the_graded_outcome(tmp_path):
    reward = {"function": "given", "graded": "margin"}
    settings = config_with(total_steps=5, stop_without_signal=2, reward=reward)
    trainer = FlowGRPOTrainer(points_pipeline(), [0, 1], Always(), settings, run_dir=tmp_path / "run")
    signal_of = [m["signal/group_frac"] for m in trainer.steps()]
    assert signal_of == [0, 0, 1, 1, 1]
    assert trainer.judge.target == "margin" and trainer.saturation.ended == ""
    assert trainer.tuning.updates == 6


def config_with(**more):
    small = {key: value for key, value in SMALL.items() if key != "learning_rate"}
    return config_files.build({"method": "flow_grpo", **merged(small, more)}, source="test")


def test_a_limit_of_the_watch_ends_the_run_and_stays_after_a_resume(tmp_path):
    calls = []

    def reward(samples, prompts):
        calls.append(len(samples))
        return [5.0 * (len(calls) > 1) + value for value in to_the_right(samples, prompts)]

    settings = {"eval": {"every": 1, "stop_above": {"reward": 3.0}}, "total_steps": 5}
    trainer = points_trainer(tmp_path / "run", reward, **settings).fit()
    assert trainer.step == 1
    assert str(trainer.evaluator.limit).startswith("`reward` has reached 5")
    again = points_trainer(tmp_path / "run", reward, **settings)
    again.fit(resume=True)
    assert again.step == 1


def test_a_limit_may_be_put_on_the_gold_outcome_by_any_of_its_names(tmp_path):
    for name in ("gold", "robust", "eval/robust_mean"):
        settings = {"eval": {"stop_below": {name: 1.1}}}
        trainer = points_trainer(tmp_path / name.replace("/", "_"), PretendSimulator(), **settings).fit()
        assert trainer.step == 0 and trainer.evaluator.limit.name == name


def test_a_limit_on_nothing_that_is_measured_is_refused_with_what_is(tmp_path):
    trainer = points_trainer(tmp_path / "run", PretendSimulator(), eval={"stop_above": {"distance": 1.0}})
    with pytest.raises(
        ConfigError, match="`eval.stop_above` names 'distance', which is none of gold, margin, reward, robust, stable"
    ):
        trainer.fit()


# ---------------------------------------------------------------- resume

RUNS = {
    "guard": {
        "average": {"every": 2},
        "eval": {"every": 2},
        "update_epochs": 2,
        "schedule": "linear",
        "warmup_steps": 2,
    },
    "full_kl": {"lora": None, "objective": {"kl_coef": 0.1}, "learning_rate": 1e-4},
    "running": {
        "advantage": "per_prompt_running",
        "rollout": {"window": 2, "same_noise": True, "batch_size": 5},
        "guard": False,
    },
}


def run_of(name, folder, **more):
    return points_trainer(folder, **merged({"total_steps": 4, **RUNS[name]}, more))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    finished = {}

    def run(name):
        if name not in finished:
            finished[name] = tmp_path_factory.mktemp("whole") / name
            run_of(name, finished[name]).fit()
        return finished[name]

    return run


def assert_same_run(one, other):
    """Weights, optimizer, average, random numbers, evaluations and all metrics but the clock's, to the last bit."""
    assert metrics_hash(one / "metrics.jsonl") == metrics_hash(other / "metrics.jsonl")
    for folder in ("model", "checkpoints/ckpt-000004"):
        # Type checks of the test process draw from Python's random numbers, which nothing of the run does.
        files = [p.relative_to(one) for p in (one / folder).rglob("*.safetensors") if p.stem != "rng"]
        assert files
        for name in files:
            expected, found = load_file(one / name), load_file(other / name)
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    for path in (one / "samples").iterdir():
        assert path.read_bytes() == (other / "samples" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "at"), [("guard", 1), ("guard", 2), ("guard", 3), ("full_kl", 2), ("running", 1), ("running", 3)]
)
def test_stopped_in_a_step_and_resumed_it_ends_with_the_same_bits(whole, tmp_path, name, at):
    steps = run_of(name, tmp_path / "run").steps()
    for _ in range(at):
        next(steps)
    steps.close()  # before this step could be saved
    run_of(name, tmp_path / "run").fit(resume=True)
    assert_same_run(whole(name), tmp_path / "run")


def test_stopped_by_a_signal_it_saves_and_goes_on(whole, tmp_path):
    def strike(step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="Saved step 2. Continue: the same script") as caught:
        run_of("guard", tmp_path / "run", callback=strike).fit()
    assert caught.value.exit_code == 75
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "interrupted"
    run_of("guard", tmp_path / "run").fit(resume=True)
    assert_same_run(whole("guard"), tmp_path / "run")


def test_one_seed_has_one_story_and_another_seed_another(whole, tmp_path):
    run_of("guard", tmp_path / "same").fit()
    run_of("guard", tmp_path / "other", seed=1).fit()
    assert_same_run(whole("guard"), tmp_path / "same")
    assert metrics_hash(whole("guard") / "metrics.jsonl") != metrics_hash(tmp_path / "other/metrics.jsonl")


def test_looking_at_a_run_does_not_change_it(whole, tmp_path):
    trainer = run_of("guard", tmp_path / "run")
    for _ in trainer.steps():
        trainer.evaluate()
        trainer.save_lora(tmp_path / "lora")
        trainer.tuned.pipeline([0, 1], num_inference_steps=2)
    one, other = (load_file(p / "model/pytorch_lora_weights.safetensors") for p in (whole("guard"), tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_run_leaves_an_adapter_that_the_pipeline_loads(whole):
    fresh = points_pipeline()
    fresh.load_lora_weights(whole("guard") / "model")
    noise = [torch.Generator().manual_seed(k) for k in range(2)]
    moved = fresh([0, 1], generator=noise, num_inference_steps=4).samples
    noise = [torch.Generator().manual_seed(k) for k in range(2)]
    assert not np.allclose(moved, points_pipeline()([0, 1], generator=noise, num_inference_steps=4).samples, atol=1e-6)


# ---------------------------------------------------------------- the report's data


def test_evaluations_are_kept_sample_by_sample(whole):
    rows = [json.loads(line) for line in (whole("guard") / "samples/eval-000004.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == list(range(8))
    logged = [r for r in read(whole("guard") / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["step"] for r in logged] == [0, 2, 4]
    assert np.mean([row["reward"] for row in rows]) == pytest.approx(logged[-1]["eval/reward_mean"])


# ---------------------------------------------------------------- faults


def test_faults_are_one_sentence_with_the_fix(tmp_path):
    rows, call = tiny_prompts("sd15")
    with pytest.raises(
        ConfigError,
        match=r"`sde.kind: flow_sde` needs a FlowMatchEulerDiscreteScheduler, got PNDMScheduler; use `sde.kind: ddim`",
    ):
        FlowGRPOTrainer(tiny_pipeline("sd15"), rows, brightness, run_dir=tmp_path / "a", call=call, sde="flow_sde")
    with pytest.raises(ConfigError, match=r"`prompts` must be a list with at least one entry, got \[\]"):
        FlowGRPOTrainer(points_pipeline(), [], to_the_right, run_dir=tmp_path / "b")
    with pytest.raises(ConfigError, match="there is no reward: pass `reward`, or set `reward.function`"):
        FlowGRPOTrainer(points_pipeline(), [0], run_dir=tmp_path / "c")
    with pytest.raises(ConfigError, match="unknown setting `groupsize`. Did you mean `group_size`"):
        FlowGRPOTrainer(points_pipeline(), [0], to_the_right, run_dir=tmp_path / "d", groupsize=3)
    with pytest.raises(ConfigError, match="there is no generator: pass a pipeline, or set `pipeline.source`"):
        FlowGRPOTrainer(None, [0], to_the_right, run_dir=tmp_path / "e")
    with pytest.raises(ConfigError, match="`pipeline` must be a diffusers pipeline, a Hub id, a directory .* got int"):
        FlowGRPOTrainer(3, [0], to_the_right, run_dir=tmp_path / "f")
    nowhere = "tests.diffusion.small_runs:nothing"
    with pytest.raises(ConfigError, match=f"`pipeline.source`={nowhere}: .* has no 'nothing'"):
        FlowGRPOTrainer(nowhere, [0], to_the_right, run_dir=tmp_path / "g")
    with pytest.raises(ConfigError, match="`pipeline.call.guidance` is no parameter of Con.*; there is guidance_scale"):
        points_trainer(tmp_path / "h", call={"guidance": 4.0})
    misspelt = call | {"guidance_scal": 4.0}  # this pipeline takes any name
    with pytest.raises(ConfigError, match="`pipeline.call.guidance_scal` is no parameter of .*; there is guidance_sc"):
        FlowGRPOTrainer(tiny_pipeline("sd15"), rows, brightness, run_dir=tmp_path / "k", call=misspelt)
    with pytest.raises(ConfigError, match="`pipeline.call.num_images_per_prompt` is the trainer's own; set `rollout.g"):
        points_trainer(tmp_path / "i", call={"num_images_per_prompt": 2})
    embeddings = "negative_pooled_prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, prompt_embeds"
    with pytest.raises(ConfigError, match=f"has no text encoder for `prompts` that are texts; .* with {embeddings}"):
        FlowGRPOTrainer(tiny_pipeline("sd3"), ["a red cube"], brightness, run_dir=tmp_path / "j")
    assert not list(tmp_path.iterdir())


def replaying_with_an_error(folder, error, **settings):
    """A run whose replayed log-probabilities are off by as much."""
    trainer = points_trainer(folder, total_steps=1, **settings)
    replay = trainer.sampler.replay

    def off(*args):
        score = replay(*args)
        return dataclasses.replace(score, log_prob=score.log_prob + error)

    trainer.sampler.replay = off
    return trainer


def test_a_replay_that_drowns_the_clip_is_refused_before_training(tmp_path):
    trainer = replaying_with_an_error(tmp_path / "run", 2e-3, guard=False, clip_low=1e-3, clip_high=1e-3)
    with pytest.raises(
        ConfigError,
        match=r"replaying the first rollout, before any update, gives log-ratios of up to 2.0e-03, and the clip is "
        "1.0e-03, so every ratio would be rounding noise. Use `pipeline.dtype: float32`",
    ):
        trainer.fit()
    assert trainer.tuning.updates == 0


def test_a_parity_error_near_the_clip_is_told_as_the_loss_sees_it(tmp_path, capsys):
    # Guard multiplies by s, at most .7 here (a sqrt(1 / (1 - .8)) sqrt(.2)): 1.2e-3 nats are 8.4e-4, within the clip.
    replaying_with_an_error(tmp_path / "run", 1.2e-3, guard=True, clip_low=1e-3, clip_high=1e-3).fit()
    said = capsys.readouterr().out
    assert "Parity: replaying the first rollout, before any update, gives log-ratios of up to 8.4e-04" in said


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda samples, prompts: None, "returned None for the whole batch"),
        (lambda samples, prompts: [1.0], "returned 1 rewards for 8 samples"),
        (lambda samples, prompts: [math.nan] * len(samples), "returned nan; return None where the reward is undefined"),
        (PretendSimulator(unknown_below=math.inf), "judged none of 8 samples"),
    ],
)
def test_a_failing_reward_ends_the_run_with_its_words(tmp_path, reward, message):
    with pytest.raises(RewardError, match=message):
        points_trainer(tmp_path / "run", reward).fit()
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "failed"
