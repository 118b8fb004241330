"""Contradictions are refused by the names of their keys, all at once; what is merely unusual is said."""

import subprocess
import sys
from typing import Any

import pytest

from rlalign import config
from rlalign.config import ConfigError
from rlalign.llm.consistency import check_consistency

BNPO = {"type": "beta_normalized"}
GSPO = {"type": "gspo"}
SERVED = {"engine": {"type": "vllm_server"}}


MAXRL = {"type": "max_likelihood"}


def penalty(value: float) -> dict[str, Any]:
    return {"on_error": "penalty", "penalty": value}


def build(method: str = "policy_gradient", **settings):
    return config.build({"method": method, **settings})


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"rollout": {"prompts_per_step": 6}, "optim": {"minibatches": 4}}, ["optim.minibatches", "[1, 2, 3, 6]"]),
        (
            {"objective": {"type": "reinforce"}, "optim": {"update_epochs": 2}},
            ["objective: reinforce", "optim.update_epochs", "optim.minibatches", "2 updates"],
        ),
        (
            {"objective": {"type": "reinforce"}, "optim": {"minibatches": 2}},
            ["objective: reinforce", "optim.minibatches"],
        ),
        ({"advantage": {"type": "gae"}}, ["advantage: gae", "group_relative"]),
        ({"advantage": BNPO, "kl": {"coef": 0.1, "where": "reward"}}, ["kl.where: reward", "kl.where: loss"]),
        ({"advantage": MAXRL, "kl": {"coef": 0.1, "where": "reward"}}, ["max_likelihood", "kl.where: loss"]),
        (
            {"advantage": {"type": "group_relative", "decompose": True}, "kl": {"coef": 0.1, "where": "reward"}},
            ["kl.where: reward", "advantage.decompose: true", "kl.where: loss"],
        ),
        ({"advantage": BNPO, "guard": penalty(-1)}, ["guard.penalty`=-1", "[0, 1]", "advantage.reward_range"]),
        ({"advantage": {**BNPO, "decompose": True}, "guard": penalty(2)}, ["guard.penalty`=2", "[0, 1]"]),
        ({"advantage": MAXRL, "guard": penalty(-0.5)}, ["guard.penalty`=-0.5", "[0, inf]", "max_likelihood"]),
        ({"model": {"name": "x", "dtype": "float16"}}, ["model.dtype: float16", "float32", "peft"]),
        ({"kl": {"coef": 0.1, "estimator": "k1"}}, ["kl.estimator: k1", "k2", "kl.where: reward"]),
        ({"eval": {"patience": 3}}, ["eval.patience", "eval.every"]),
        ({"rollout": SERVED, "model": {"name": "x", "device": "cpu"}}, ["rollout.engine.type", "model.device"]),
        ({"rollout": {**SERVED, "decode_rows": 8}}, ["rollout.decode_rows"]),
    ],
)
def test_contradictions_name_the_keys_to_change(settings, keys):
    with pytest.raises(ConfigError) as caught:
        check_consistency(build(**settings))
    assert len(str(caught.value).splitlines()) == 1
    for key in keys:
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rollout": {"prompts_per_step": 6}, "optim": {"minibatches": 3}},
        {"objective": {"type": "reinforce"}},
        {"optim": {"update_epochs": 4}},
        {"advantage": BNPO, "kl": {"coef": 0.1, "where": "loss"}},
        {"advantage": BNPO, "kl": {"coef": 0.0, "where": "reward"}},
        {"kl": {"coef": 0.1, "where": "reward", "estimator": "k1"}},
        {"kl": {"coef": 0.1}, "advantage": {"type": "group_relative", "decompose": True}},
        {"advantage": BNPO, "guard": penalty(0.5)},
        {"advantage": {**BNPO, "reward_range": [-1, 1]}, "guard": penalty(-1)},
        {"advantage": BNPO, "guard": {"penalty": -1.0}},  # which nothing gets under `on_error: abstain`
        {"guard": penalty(-1)},
        {"model": {"name": "x", "dtype": "float16"}, "peft": {"r": 4}},
        {"model": {"name": "x", "dtype": "bfloat16"}},
        {"kl": {"coef": 0.0, "estimator": "k1"}},
        {"eval": {"patience": 3, "every": 5}},
        {"rollout": SERVED, "model": {"name": "x", "device": "cuda"}},
        {"rollout": {"decode_rows": 8}},
    ],
)
def test_what_goes_together_passes(settings):
    assert check_consistency(build(**settings))


def test_every_contradiction_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        check_consistency(build(advantage={"type": "gae"}, eval={"patience": 1}), processes=3)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0] == "`rollout.prompts_per_step`=32 cannot be dealt to 3 processes; choose a multiple."


def test_prompts_are_dealt_evenly_to_processes():
    assert check_consistency(build(rollout={"prompts_per_step": 6}), processes=3)


def notes(**settings) -> str:
    return "\n".join(check_consistency(build(**settings)))


def test_notes_say_what_a_step_is_and_what_is_unusual():
    rollout = {"prompts_per_step": 4, "group_size": 8}
    plain = check_consistency(build(rollout=rollout, total_steps=100))
    assert plain == ["4 prompts x 8 completions = 32 rollouts per step, 1 update each, 100 steps"]
    assert "6 updates each" in notes(rollout=rollout, optim={"update_epochs": 3, "minibatches": 2})
    assert "`sequence_mean`" in notes(objective=GSPO, aggregation="token")
    assert "`sequence_mean`" not in notes(objective=GSPO, aggregation="sequence_mean")
    assert "`optim.warmup_steps`=6" in notes(total_steps=10, optim={"warmup_steps": 6})
    assert "warmup" not in notes(total_steps=10, optim={"warmup_steps": 5})
    assert "warmup" not in notes(total_steps=10, optim={"warmup_steps": 10, "update_epochs": 2})
    assert "arXiv:2506.02864" in notes(method="bnpo")


@pytest.mark.parametrize(
    ("advantage", "weights", "told"),
    [
        (BNPO, [1.0], None),
        (BNPO, [0.5, 0.5], None),
        (BNPO, [1.0, 1.0], "from 0 to 2"),
        (BNPO, [2.0], "from 0 to 2"),
        (BNPO, [1.0, -0.5], "from -0.5 to 1"),
        (BNPO | {"decompose": True}, [1.0, -0.5], None),
        (BNPO | {"reward_range": [0.0, 2.0]}, [1.0, 1.0], None),
        (MAXRL, [3.0, 1.0], None),
        (MAXRL, [1.0, -0.5], "from -0.5 to 1"),
        ({"type": "group_relative"}, [1.0, -5.0], None),
    ],
)
def test_rewards_that_can_add_up_to_what_the_estimator_refuses_are_told(advantage, weights, told):
    rewards = [{"function": "x:y", "weight": weight} for weight in weights]
    from_file = check_consistency(build(advantage=advantage, rewards=rewards))
    assert from_file == check_consistency(build(advantage=advantage), weights=weights)
    found = [note for note in from_file if "add up to values" in note]
    assert len(found) == (told is not None)
    assert all(told in note and "`advantage.decompose: true`" in note for note in found)


def test_an_adapter_may_stand_on_float16_whoever_asks_for_it():
    assert check_consistency(build(model={"name": "x", "dtype": "float16"}), adapter=True)


def test_the_check_needs_no_torch():
    code = (
        "import sys; from rlalign import config; from rlalign.llm.consistency import check_consistency;"
        "check_consistency(config.build({'method': 'bnpo'})); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
