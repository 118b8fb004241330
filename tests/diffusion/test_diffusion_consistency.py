"""Settings that contradict each other are refused before a model is loaded, each with the key to change."""

import subprocess
import sys
from dataclasses import replace

import pytest

from rlalign.advantages.config import GAE
from rlalign.config import ConfigError
from rlalign.config_keywords import config_from_keywords
from rlalign.diffusion.config import (
    FlowGRPOConfig,
    PipelineConfig,
    SampleEvalConfig,
    SampleRewardConfig,
    SamplingConfig,
    StepObjective,
    TuneConfig,
)
from rlalign.diffusion.config_dso import DSOConfig, SimulatedDataConfig
from rlalign.diffusion.consistency import check_dso, check_flow_grpo, trained_steps
from rlalign.diffusion.parts import FORMS

DEFAULT = FlowGRPOConfig()
ROLLOUT = SamplingConfig()
BAD = {
    "estimator": ({"advantage": GAE()}, "`advantage.type: gae` needs a critic"),
    "minibatches": ({"optim": TuneConfig(minibatches=3)}, "`rollout.prompts_per_step`=8 groups cannot be dealt into"),
    "window": (
        {"rollout": replace(ROLLOUT, window=10)},
        "`rollout.window`=10 does not fit into the trained steps from 0 to 9",
    ),
    "range": (
        {"rollout": replace(ROLLOUT, window=2, window_range=(4, 5))},
        "`rollout.window`=2 does not fit.* from 4 to 5",
    ),
    "range_alone": ({"rollout": replace(ROLLOUT, window_range=(0, 5))}, "`rollout.window_range` has no effect without"),
    "fraction": (
        {"rollout": replace(ROLLOUT, trained_fraction=0.05)},
        "`rollout.trained_fraction`=0.05 of 10 steps trains none",
    ),
    "bias": (
        {"objective": StepObjective(ratio_norm=False, authors_bias=True)},
        "`objective.authors_bias` is a variant",
    ),
    "steps": (
        {"pipeline": PipelineConfig(call={"num_inference_steps": 4})},
        r"`pipeline.call.num_inference_steps` is the trainer's own; set `rollout",
    ),
    "generator": (
        {"pipeline": PipelineConfig(call={"generator": 4})},
        r"`pipeline.call.generator` is the trainer's own; leave it out",
    ),
    "half": (
        {"lora": None, "pipeline": PipelineConfig(dtype="bfloat16")},
        "`lora: null` trains the weights themselves",
    ),
    "mixed": (
        {"accelerate": {"mixed_precision": "bf16"}},
        "`accelerate.mixed_precision` has no effect here; set `pipeline.dtype`",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_flow_grpo_settings_that_cannot_work(name):
    changes, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        check_flow_grpo(replace(DEFAULT, **changes))


def test_what_depends_on_the_processes_and_on_the_reward():
    check_flow_grpo(DEFAULT, processes=4)
    with pytest.raises(ConfigError, match="`rollout.prompts_per_step`=8 cannot be shared out over 3 processes"):
        check_flow_grpo(DEFAULT, processes=3)
    with pytest.raises(ConfigError, match="`eval.samples`=1 are fewer than 2 processes"):
        check_flow_grpo(replace(DEFAULT, eval=SampleEvalConfig(samples=1)), processes=2)
    graded = replace(DEFAULT, reward=SampleRewardConfig(function="a:b", graded="margin"))
    check_flow_grpo(graded, simulator=True)
    with pytest.raises(ConfigError, match="name outcomes of a simulator; the reward is a function"):
        check_flow_grpo(graded, simulator=False)


def test_dso_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="`total_updates`=400 cannot be shared out evenly over `data.rounds`=3"):
        check_dso(DSOConfig(data=SimulatedDataConfig(rounds=3)))
    with pytest.raises(ConfigError, match="`data.path` is a set that was drawn once"):
        check_dso(DSOConfig(data=SimulatedDataConfig(rounds=2, path="set")))


def test_the_trained_steps_never_hold_the_last():
    assert trained_steps(ROLLOUT) == 9
    assert trained_steps(replace(ROLLOUT, trained_fraction=1.0)) == 9
    assert trained_steps(replace(ROLLOUT, num_inference_steps=100, trained_fraction=0.29)) == 29


def test_short_names_find_their_section():
    short = {"group_size": 4, "learning_rate": 1e-3, "advantage": "leave_one_out", "sde": "cps", "call": {"height": 64}}
    cfg = config_from_keywords(FlowGRPOConfig, {**short, "lora": False, "average": True, "kl_coef": 0.1}, FORMS)
    assert (cfg.rollout.group_size, cfg.optim.learning_rate, cfg.advantage.type) == (4, 1e-3, "leave_one_out")
    assert (cfg.rollout.sde.kind, cfg.pipeline.call, cfg.lora) == ("cps", {"height": 64}, None)
    assert cfg.average == FlowGRPOConfig().average and cfg.objective.kl_coef == 0.1
    with pytest.raises(ConfigError, match=r"unknown setting `group_sizes`\. Did you mean `group_size`"):
        config_from_keywords(FlowGRPOConfig, {"group_sizes": 4}, FORMS)


def test_configs_need_no_torch():
    code = "import sys, rlalign.diffusion.config, rlalign.diffusion.consistency; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
