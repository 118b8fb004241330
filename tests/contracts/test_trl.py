"""What the drop-in relies on in the installed TRL, and where our equations must give TRL's numbers or must not."""

import inspect
import json
import logging
import math
import os
import queue
import re
import subprocess
import sys
import typing
from collections import deque
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", reason="the extra `llm` is not installed")

from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.utils import _telemetry
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from rlalign.advantages.config import (
    GAE,
    BatchScaled,
    BetaNormalized,
    GreedyBaseline,
    GroupRelative,
    LengthWeighted,
    PerPromptRunning,
    ReinforcePlusPlus,
)
from rlalign.functional.advantages import beta_normalized, group_relative, length_weighted
from rlalign.functional.masked import aggregate
from rlalign.functional.policy import cispo, clip_fractions, clipped_surrogate, sapo, sequence_ratio
from rlalign.llm import trl_compat
from rlalign.llm.config import Aggregation, ObjectiveConfig, PolicyGradientConfig
from rlalign.llm.rewards import resolve_rewards
from rlalign.llm.trl_compat import BNPOTrainer

# TRL and transformers warn about themselves (checkpointing, pin_memory, tokenizers); ours are tested by name.
pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = ["<pad>", "<eos>", "<bos>", *"0123456789", "+", "="]
PROMPTS = ["1 + 2 =", "3 + 4 =", "5 + 1 ="]
# Three prompts of four completions with pass rates 1/4, 1/2, 3/4.
REWARDS = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
# p = .25 .5 .75: m = 1/2, v = 1/16, so a + b = m(1-m)/v - 1 = 3, a = b = 3/2, alpha = beta = 1 + a/3 = 3/2, and
# 1/f(p) = (pi/8) / sqrt(p(1-p)): .9069, .7854, .9069, times (r - p).
BNPO_ADVANTAGES = [
    *(0.68017476, -0.22672492, -0.22672492, -0.22672492),
    *(0.39269908, 0.39269908, -0.39269908, -0.39269908),
    *(0.22672492, 0.22672492, 0.22672492, -0.68017476),
]
AUTHORS = BetaNormalized(max_weight=1e6, max_concentration=None)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, padding_side="left", **special)


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def rewards_by_row(table: list[float | None], name: str = "by_row") -> Callable[..., list[float | None]]:
    def reward(completions, **columns):
        assert len(completions) == len(table)
        return list(table)

    reward.__name__ = name
    return reward


class Recipe:
    """Builds trainers that differ in one setting: twelve completions of up to six tokens per step, on the CPU."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
        self.tokenizer, self.directory = tokenizer, directory

    def config(self, **settings: Any) -> GRPOConfig:
        plain: dict[str, Any] = {
            "output_dir": str(self.directory),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            "max_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 12,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "shuffle_dataset": False,
        }
        return GRPOConfig(**(plain | settings))

    def trainer(self, kind: type[GRPOTrainer], *, rewards: Any = None, given: Any = None, **settings: Any) -> Any:
        trainer = kind(
            model=tiny_model(),
            reward_funcs=rewards_by_row(REWARDS) if rewards is None else rewards,
            args=self.config(**settings),
            train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            eval_dataset=Dataset.from_dict({"prompt": PROMPTS}),
            processing_class=self.tokenizer,
            **(given or {}),
        )
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.model.train()
        return trainer


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(make_tokenizer(), tmp_path)


def step_inputs() -> list[dict[str, str]]:
    """What TRL's sampler deals for one step: every prompt four times in a row."""
    return [{"prompt": prompt} for prompt in PROMPTS for _ in range(4)]


def groups() -> Tensor:
    return torch.arange(12) // 4


# ------------------------------------------------------------------------------------- what we rely on in TRL


def test_the_two_overridden_methods_have_the_signatures_the_drop_in_was_written_for():
    rewards = inspect.signature(GRPOTrainer._calculate_rewards).parameters
    scoring = inspect.signature(GRPOTrainer._generate_and_score_completions).parameters
    assert list(rewards) == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert list(scoring) == ["self", "inputs"]


def test_the_output_has_every_key_the_drop_in_reads_one_row_per_completion(recipe):
    output = recipe.trainer(GRPOTrainer)._generate_and_score_completions(step_inputs())
    assert output["prompt_ids"].shape[0] == output["completion_mask"].shape[0] == 12
    assert output["advantages"].shape == (12,)
    assert output["num_items_in_batch"] == output["completion_mask"].sum()


def test_trl_keeps_rewards_in_prompt_order_and_logs_one_advantage_per_completion(recipe):
    trainer = recipe.trainer(GRPOTrainer)
    trainer._generate_and_score_completions(step_inputs())
    assert list(trainer._logs["rewards"]["by_row"]) == REWARDS
    assert len(trainer._logs["advantages"]) == 12
    assert trainer.reward_weights.tolist() == [1.0]


def test_an_altered_trl_is_refused_and_an_untested_one_announced(caplog):
    class Changed(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts): ...

    with pytest.raises(ImportError, match=r"TRL 9\.0 has GRPOTrainer\._calculate_rewards.*install 'trl>=1\.16,<1\.17'"):
        trl_compat.check_trl("9.0", Changed)
    with caplog.at_level(logging.WARNING, "rlalign"):
        trl_compat.check_trl("1.16.3", GRPOTrainer)
        assert not caplog.records
        trl_compat.check_trl("1.17.0", GRPOTrainer)
    assert len(caplog.records) == 1
    assert "TRL 1.17.0 is untested" in caplog.text


# ------------------------------------------------------------------------------------------ equal to TRL's numbers


@pytest.mark.parametrize("scale", [True, False])
def test_group_relative_gives_trls_advantages(recipe, scale):
    trainer = recipe.trainer(GRPOTrainer, scale_rewards="group" if scale else "none")
    theirs = trainer._generate_and_score_completions(step_inputs())["advantages"]
    torch.testing.assert_close(group_relative(torch.tensor(REWARDS), groups(), scale=scale), theirs)


def test_group_relative_gives_trls_advantages_with_weights_nones_and_an_unscored_completion(recipe):
    partly = [None, 2.0, None, 1.0, None, None, 3.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    other = [1.0, 0.0, 2.0, 3.0, None, 1.0, 1.0, 0.0, 0.5, 0.5, 0.5, 0.5]
    functions = [rewards_by_row(partly, "partly"), rewards_by_row(other, "other")]
    trainer = recipe.trainer(GRPOTrainer, rewards=functions, reward_weights=[2.0, 0.5])
    theirs = trainer._generate_and_score_completions(step_inputs())["advantages"]
    drop_in = recipe.trainer(
        BNPOTrainer, rewards=functions, reward_weights=[2.0, 0.5], given={"advantage": GroupRelative()}
    )
    ours = drop_in._generate_and_score_completions(step_inputs())["advantages"]
    torch.testing.assert_close(ours, theirs)
    # Row 4 has no reward at all: advantage 0, and out of the baseline of its group {-, .5, 6.5, 2}, mean 3.
    assert ours[4] == 0
    centred = torch.tensor([0.5, 6.5, 2.0]) - 3
    torch.testing.assert_close(ours[5:8], centred / (centred.square().sum() / 2).sqrt(), rtol=1e-3, atol=0)


def shared_rollout(trainer: GRPOTrainer) -> dict[str, Tensor]:
    """Hand-made completions of unequal length, off-policy enough that both clips are active."""
    torch.manual_seed(3)
    lengths = torch.tensor([6, 2, 5, 1, 3, 6, 6, 4, 2, 5, 6, 3])
    mask = (torch.arange(6) < lengths[:, None]).long()
    prompts = torch.tensor([[0, 4, 13, 5, 14], [6, 13, 7, 3, 14], [0, 0, 8, 13, 14]]).repeat_interleave(4, 0)
    rollout = {
        "prompt_ids": prompts,
        "prompt_mask": (prompts != 0).long(),
        "completion_ids": torch.randint(3, 13, (12, 6)) * mask,
        "completion_mask": mask,
        "advantages": torch.tensor(BNPO_ADVANTAGES),
        "num_items_in_batch": mask.sum(),
    }
    with torch.no_grad():
        rollout["old_per_token_logps"] = plain_log_prob(trainer.model, rollout) + 0.4 * torch.randn(12, 6)
    return rollout


def plain_log_prob(model: LlamaForCausalLM, rollout: dict[str, Tensor]) -> Tensor:
    """Log-probabilities from the model's own logits, without TRL's fused head."""
    ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], 1)
    attention = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], 1)
    logits = model(input_ids=ids, attention_mask=attention).logits[:, -7:-1]
    return logits.log_softmax(-1).gather(2, rollout["completion_ids"][:, :, None]).squeeze(2)


def gradient(loss: Tensor, model: torch.nn.Module) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grpo": lambda objective, mask: aggregate(objective, mask, mode="sequence_mean"),
    "dapo": lambda objective, mask: aggregate(objective, mask, mode="token"),
    "dr_grpo": lambda objective, mask: aggregate(objective, mask, mode="constant", denominator=12 * 6),
    "bnpo": lambda objective, mask: aggregate(objective, mask, mode="token"),
    "luspo": lambda objective, mask: aggregate(objective, mask, mode="sequence_sum"),
}


@pytest.mark.parametrize("loss_type", AGGREGATIONS)
def test_clipped_surrogate_and_aggregate_reproduce_trls_loss_and_gradient(recipe, loss_type):
    trainer = recipe.trainer(GRPOTrainer, loss_type=loss_type, epsilon=0.2, epsilon_high=0.28)
    rollout = shared_rollout(trainer)
    theirs = trainer._compute_loss(trainer.model, rollout)
    their_gradient = gradient(theirs, trainer.model)

    mask = rollout["completion_mask"].bool()
    log_ratio = plain_log_prob(trainer.model, rollout) - rollout["old_per_token_logps"]
    advantages = rollout["advantages"][:, None].expand(12, 6)
    low, high = clip_fractions(log_ratio.detach(), advantages, mask, clip_low=0.2, clip_high=0.28)
    assert low > 0.03 and high > 0.03, "the comparison must see both clips at work"
    assert math.isclose(float(low), trainer._metrics["train"]["clip_ratio/low_mean"][0], abs_tol=1e-6)
    assert math.isclose(float(high), trainer._metrics["train"]["clip_ratio/high_mean"][0], abs_tol=1e-6)
    objective = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.28)
    ours = AGGREGATIONS[loss_type](objective, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient(ours, trainer.model), their_gradient, rtol=1e-4, atol=1e-6)


def test_dapo_micro_batches_add_up_to_the_token_mean_of_the_whole_step(recipe):
    trainer = recipe.trainer(
        GRPOTrainer, loss_type="dapo", per_device_train_batch_size=4, gradient_accumulation_steps=3, epsilon_high=0.28
    )
    rollout = shared_rollout(trainer)
    rows = [{k: v[i : i + 4] if v.ndim else v for k, v in rollout.items()} for i in (0, 4, 8)]
    theirs = sum(trainer._compute_loss(trainer.model, part) for part in rows)
    log_ratio = plain_log_prob(trainer.model, rollout) - rollout["old_per_token_logps"]
    objective = clipped_surrogate(log_ratio, rollout["advantages"][:, None], clip_low=0.2, clip_high=0.28)
    parts = [
        aggregate(objective[i : i + 4], rollout["completion_mask"][i : i + 4].bool(), mode="token", denominator=49)
        for i in (0, 4, 8)
    ]
    assert int(rollout["num_items_in_batch"]) == 49
    torch.testing.assert_close(sum(parts), theirs, rtol=0, atol=1e-6)


def test_gspo_cispo_sapo_and_the_dual_clip_reproduce_trls_losses(recipe):
    trainer = recipe.trainer(GRPOTrainer, loss_type="grpo", importance_sampling_level="sequence", epsilon=0.02)
    rollout = shared_rollout(trainer)
    mask, advantages = rollout["completion_mask"].bool(), rollout["advantages"][:, None]
    log_prob = plain_log_prob(trainer.model, rollout)
    log_ratio = log_prob - rollout["old_per_token_logps"]

    theirs = trainer._compute_loss(trainer.model, rollout)
    objective = clipped_surrogate(sequence_ratio(log_ratio, mask), advantages, clip_low=0.02, clip_high=0.02)
    ours = aggregate(objective.expand(12, 6), mask, mode="sequence_mean")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    trainer.importance_sampling_level, trainer.loss_type, trainer.epsilon_high = "token", "cispo", 1.3
    theirs = trainer._compute_loss(trainer.model, rollout)
    ours = aggregate(cispo(log_prob, log_ratio, advantages.expand(12, 6), cap=1.3), mask, mode="token")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    trainer.loss_type = "sapo"
    theirs = trainer._compute_loss(trainer.model, rollout)
    ours = aggregate(sapo(log_ratio, advantages.expand(12, 6)), mask, mode="sequence_mean")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    # TRL's `delta` caps the ratio of rollouts with negative advantages: with delta >= 1 + epsilon_high, a dual clip.
    trainer.loss_type, trainer.epsilon_low, trainer.epsilon_high, trainer.args.delta = "luspo", 0.2, 0.28, 1.5
    theirs = trainer._compute_loss(trainer.model, rollout)
    capped = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.28, dual_clip=1.5)
    uncapped = clipped_surrogate(log_ratio, advantages, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(aggregate(capped, mask, mode="sequence_sum"), theirs, rtol=0, atol=1e-6)
    assert abs(aggregate(uncapped, mask, mode="sequence_sum") - theirs) > 1e-2


# ----------------------------------------------------------------------------------- and different where it must be


def test_trls_bnpo_loss_type_leaves_grpos_advantages_and_the_drop_in_gives_the_papers(recipe):
    stock = recipe.trainer(GRPOTrainer, loss_type="bnpo")._generate_and_score_completions(step_inputs())
    grpo = group_relative(torch.tensor(REWARDS), groups())
    torch.testing.assert_close(stock["advantages"], grpo)

    ours = recipe.trainer(BNPOTrainer, loss_type="bnpo", given={"advantage": AUTHORS})
    advantages = ours._generate_and_score_completions(step_inputs())["advantages"]
    torch.testing.assert_close(advantages, torch.tensor(BNPO_ADVANTAGES), rtol=0, atol=1e-7)
    torch.testing.assert_close(advantages, authors_formula(torch.tensor(REWARDS), 4), rtol=0, atol=1e-7)
    assert (advantages - grpo).abs().min() > 0.1


def authors_formula(rewards: Tensor, group_size: int) -> Tensor:
    """arXiv:2506.02864: A = (R - p) / f(p; 1 + a/3, 1 + b/3), with a and b by the method of moments over prompts."""
    reward = rewards.double().view(-1, group_size)
    rate = reward.mean(1)
    concentration = rate.mean() * (1 - rate.mean()) / rate.var() - 1
    alpha, beta = 1 + concentration * rate.mean() / 3, 1 + concentration * (1 - rate.mean()) / 3
    density = torch.distributions.Beta(alpha, beta).log_prob(rate).exp()
    return ((reward - rate[:, None]) / density[:, None]).flatten().float()


def test_on_one_rollout_the_papers_loss_is_not_trls_bnpo_loss(recipe):
    trainer = recipe.trainer(GRPOTrainer, loss_type="bnpo")
    rollout = shared_rollout(trainer)
    del rollout["old_per_token_logps"]  # on-policy: every ratio is 1, so the objective is -A
    mask, rewards = rollout["completion_mask"].bool(), torch.tensor(REWARDS)
    theirs = trainer._compute_loss(trainer.model, rollout | {"advantages": group_relative(rewards, groups())})
    advantages = beta_normalized(rewards, groups(), max_weight=1e6, max_concentration=None)
    on_policy = torch.zeros(12, 6)
    paper = aggregate(
        clipped_surrogate(on_policy, advantages[:, None], clip_low=0.2, clip_high=0.28), mask, mode="sequence_sum"
    )
    # -(1/12) sum_i A_i |o_i|, lengths as in `shared_rollout`
    lengths = torch.tensor([6.0, 2, 5, 1, 3, 6, 6, 4, 2, 5, 6, 3])
    torch.testing.assert_close(paper, -(torch.tensor(BNPO_ADVANTAGES) * lengths).sum() / 12)
    torch.testing.assert_close(theirs, -(group_relative(rewards, groups()) * lengths).sum() / 49)
    assert abs(paper - theirs) > 0.05


# --------------------------------------------------------------------------------------------------- the drop-in


def test_two_training_steps_on_the_cpu_use_bnpo_advantages_and_log_them(recipe):
    trainer = recipe.trainer(
        BNPOTrainer, given={"advantage": AUTHORS}, log_completions=True, num_completions_to_print=0
    )
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    seen = []
    compute_loss = trainer._compute_loss
    trainer._compute_loss = lambda model, inputs: (seen.append(inputs["advantages"]), compute_loss(model, inputs))[1]
    trainer.train()

    assert trainer.state.global_step == 2
    assert any((old != new).any() for old, new in zip(before, trainer.model.parameters(), strict=True))
    for advantages in seen:  # TRL shuffles the rows of a step before it trains on them
        torch.testing.assert_close(advantages.sort().values, torch.tensor(BNPO_ADVANTAGES).sort().values)
    torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), torch.tensor(BNPO_ADVANTAGES))
    log = trainer.state.log_history[0]
    assert math.isclose(log["bnpo/alpha"], 1.5, rel_tol=1e-6)
    assert math.isclose(log["bnpo/weight_max"], 0.90689968, rel_tol=1e-6)
    assert log["advantage/groups_without_signal"] == 0
    assert log["reward"] == 0.5
    assert math.isclose(log["rewards/by_row/mean"], 0.5)


def test_the_completions_table_shows_the_advantages_trained_on(recipe):
    import pandas

    trainer = recipe.trainer(
        BNPOTrainer, given={"advantage": AUTHORS}, log_completions=True, num_completions_to_print=0, max_steps=1
    )
    trainer.train()
    table = pandas.read_parquet(recipe.directory / "completions" / "completions_00001.parquet")
    torch.testing.assert_close(torch.tensor(table["advantage"].to_numpy()).float(), torch.tensor(BNPO_ADVANTAGES))
    assert table["by_row"].tolist() == REWARDS


def test_the_default_advantage_is_bnpo_with_both_caps(recipe):
    trainer = recipe.trainer(BNPOTrainer)
    assert trainer.advantage == BetaNormalized()
    advantages = trainer._generate_and_score_completions(step_inputs())["advantages"]
    torch.testing.assert_close(advantages, beta_normalized(torch.tensor(REWARDS), groups()), rtol=0, atol=1e-7)


def test_reward_weights_and_nones_go_into_one_outcome(recipe):
    correct = rewards_by_row([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0], "correct")
    style = rewards_by_row([None, 1.0, 0.0, None, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0], "style")
    trainer = recipe.trainer(
        BNPOTrainer, rewards=[correct, style], reward_weights=[0.75, 0.25], given={"advantage": AUTHORS}
    )
    got = trainer._generate_and_score_completions(step_inputs())["advantages"]
    outcome = torch.tensor([0.75, 0.25, 0.0, 0.0, 1.0, 0.75, 0.25, 0.0, 0.75, 0.75, 1.0, 0.25])
    torch.testing.assert_close(got, authors_formula(outcome, 4), rtol=0, atol=1e-6)


def test_a_completion_without_any_reward_has_advantage_zero_and_no_say_in_the_baseline(recipe):
    trainer = recipe.trainer(
        BNPOTrainer, rewards=rewards_by_row([1.0, None, 0.0, *REWARDS[3:]]), given={"advantage": AUTHORS}
    )
    got = trainer._generate_and_score_completions(step_inputs())["advantages"]
    assert got[1] == 0
    # Group 0 is {1, 0, 0} now: p = 1/3, so the two failures weigh half of the success.
    torch.testing.assert_close(got[[2, 3]], -got[[0, 0]] / 2)


def test_decompose_averages_one_estimate_per_reward_function_with_trls_weights(recipe):
    formatted = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    functions = [rewards_by_row(REWARDS, "correct"), rewards_by_row(formatted, "formatted")]
    # a = b of `formatted`: p = .75, 1, .5; its own estimate, by the authors' code, is the second row of each pair.
    mean = [
        *(0.43946081, -0.01398903, -0.41148275, -0.01398903),
        *(0.19634954, 0.19634954, -0.19634954, -0.19634954),
        *(-0.10349494, 0.33021986, 0.33021986, -0.55694478),
    ]
    advantage = replace(AUTHORS, decompose=True)
    trainer = recipe.trainer(BNPOTrainer, rewards=functions, given={"advantage": advantage})
    got = trainer._generate_and_score_completions(step_inputs())["advantages"]
    torch.testing.assert_close(got, torch.tensor(mean), rtol=0, atol=1e-6)
    assert {"bnpo/correct_alpha", "bnpo/formatted_alpha"} <= set(trainer._metrics["train"])

    weighted = recipe.trainer(BNPOTrainer, rewards=functions, reward_weights=[3.0, 1.0], given={"advantage": advantage})
    got = weighted._generate_and_score_completions(step_inputs())["advantages"]
    one, two = torch.tensor(BNPO_ADVANTAGES), 2 * torch.tensor(mean) - torch.tensor(BNPO_ADVANTAGES)
    torch.testing.assert_close(got, (3 * one + two) / 4, rtol=0, atol=1e-6)


def test_reward_functions_of_one_name_do_not_hide_each_other(recipe):
    functions = [rewards_by_row(REWARDS, "same"), rewards_by_row([0.0] * 12, "same")]
    trainer = recipe.trainer(BNPOTrainer, rewards=functions, given={"advantage": replace(AUTHORS, decompose=True)})
    got = trainer._generate_and_score_completions(step_inputs())["advantages"]
    torch.testing.assert_close(got, torch.tensor(BNPO_ADVANTAGES), rtol=0, atol=1e-6)
    native = [function.name for function in resolve_rewards(functions)]
    assert trainer._reward_names == native == ["same", "same_2"]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_gets_its_slice_of_advantages_estimated_over_all(recipe, monkeypatch, rank):
    # Two processes of six rows: the middle group's four rewards arrive from both.
    trainer = recipe.trainer(BNPOTrainer, given={"advantage": AUTHORS})

    def stock(self, inputs):
        mask = torch.ones(6, 3, dtype=torch.long)
        self._rewards_per_func = torch.tensor(REWARDS)[:, None]
        self._logs["advantages"].extend([9.0] * 12)
        return {"prompt_ids": torch.zeros(6, 4), "completion_mask": mask, "advantages": torch.zeros(6)}

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", stock)
    gather = lambda local: torch.cat([local, local])  # noqa: E731
    trainer.accelerator = SimpleNamespace(process_index=rank, gather=gather, device=torch.device("cpu"))
    output = trainer._generate_and_score_completions(step_inputs()[6 * rank : 6 * rank + 6])
    expected = torch.tensor(BNPO_ADVANTAGES)
    torch.testing.assert_close(output["advantages"], expected[6 * rank : 6 * rank + 6], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), expected, rtol=0, atol=1e-6)


TWO_PROCESSES = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_trl import AUTHORS, BNPO_ADVANTAGES, PROMPTS, REWARDS, Recipe, make_tokenizer, rewards_by_row
from pathlib import Path
from rlalign.llm.trl_compat import BNPOTrainer

recipe = Recipe(make_tokenizer(), Path(sys.argv[2]))
rank = int(__import__("os").environ["RANK"])
mine = slice(6 * rank, 6 * rank + 6)
trainer = recipe.trainer(
    BNPOTrainer, rewards=rewards_by_row(REWARDS[mine]), given={"advantage": AUTHORS}, per_device_train_batch_size=6
)
seen = []
stock = trainer._generate_and_score_completions
trainer._generate_and_score_completions = lambda inputs: (seen.append(stock(inputs)), seen[-1])[1]
trainer.train()
for output in seen:
    torch.testing.assert_close(output["advantages"], torch.tensor(BNPO_ADVANTAGES)[mine], rtol=0, atol=1e-6)
torch.testing.assert_close(torch.tensor(list(trainer._logs["advantages"])), torch.tensor(BNPO_ADVANTAGES))
parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
both = trainer.accelerator.gather(parameters).view(2, -1)
assert torch.equal(both[0], both[1])
print(f"rank {rank} trained {trainer.state.global_step} steps")
trainer.accelerator.end_training()  # at Python's end gloo's threads, still running, may abort the process
"""


@pytest.mark.e2e
def test_two_processes_share_groups_and_train_on_the_same_advantages(tmp_path):
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    done = subprocess.run(
        [*command, str(tmp_path / "run.py"), str(Path(__file__).parent), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0 trained 2 steps" in done.stdout and "rank 1 trained 2 steps" in done.stdout


def test_estimators_that_need_lengths_get_the_completions_own(recipe):
    trainer = recipe.trainer(BNPOTrainer, given={"advantage": LengthWeighted()})
    output = trainer._generate_and_score_completions(step_inputs())
    lengths = output["completion_mask"].sum(1)
    assert lengths.unique().numel() > 1, "the comparison needs completions of unequal length"
    expected = length_weighted(torch.tensor(REWARDS), groups(), lengths)
    torch.testing.assert_close(output["advantages"], expected)


def test_tool_tokens_do_not_count_and_masked_truncations_count_in_full():
    output = {
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]),
    }
    assert trl_compat.decision_count(output).tolist() == [2, 2, 4]


def test_evaluation_uses_its_own_group_size_and_leaves_running_statistics_of_training_alone(recipe):
    trainer = recipe.trainer(
        BNPOTrainer, given={"advantage": PerPromptRunning(window=8, min_count=2)}, num_generations_eval=6
    )
    trainer._generate_and_score_completions(step_inputs())
    remembered = trainer._estimators["train"].state_dict()["outcomes"].tolist()
    trainer.model.eval()
    output = trainer._generate_and_score_completions(step_inputs())
    assert output["advantages"].shape == (12,)
    assert trainer._estimators["train"].state_dict()["outcomes"].tolist() == remembered
    assert "advantage/rms" in trainer._metrics["eval"]

    bnpo = recipe.trainer(BNPOTrainer, given={"advantage": AUTHORS}, num_generations_eval=6)
    bnpo.model.eval()
    got = bnpo._generate_and_score_completions(step_inputs())["advantages"]
    # Both groups of six pass three times: equal pass rates fit no Beta distribution, so A = r - p.
    torch.testing.assert_close(got, torch.tensor(REWARDS) - 0.5, rtol=0, atol=1e-6)


def test_evaluation_with_single_completions_keeps_trls_zeros(recipe):
    trainer = recipe.trainer(BNPOTrainer, num_generations_eval=1)
    trainer.model.eval()
    assert not trainer._generate_and_score_completions(step_inputs())["advantages"].any()


def test_a_groups_prompt_keeps_its_id_across_processes_and_runs():
    ids = trl_compat.prompt_hash([{"prompt": "a"}, {"prompt": [{"role": "user", "content": "a"}]}, {"prompt": "a"}])
    assert ids[0] == ids[2] != ids[1]
    assert ids[0] == 60598014089710490, "sha256 of the prompt's repr, first seven bytes"


def test_the_table_overwrites_only_what_the_step_appended():
    log = deque([1.0, 2.0, 3.0], maxlen=4)
    trl_compat.replace_newest(log, [7.0, 8.0])
    assert list(log) == [1.0, 7.0, 8.0]
    trl_compat.replace_newest(log, [1.0, 2.0, 3.0, 4.0, 5.0])  # an evaluation larger than the table
    assert list(log) == [2.0, 3.0, 4.0, 5.0]


# ------------------------------------------------------------------------------------------- settings and messages


def test_the_notes_are_two_lines_at_most_and_say_what_is_ignored(recipe, caplog):
    with caplog.at_level(logging.WARNING, "rlalign"):
        recipe.trainer(BNPOTrainer)
    assert len(caplog.records) == 1
    assert "scale_rewards='group' is ignored" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rlalign"):
        recipe.trainer(BNPOTrainer, loss_type="bnpo")
    assert len(caplog.records) == 2
    assert "loss_type='bnpo' is TRL's name for a token mean over the local micro-batch; it is not" in caplog.text
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("advantage", "message"),
    [
        (GAE(), "advantage=GAE needs next_values, values, which TRL's GRPOTrainer does not produce"),
        (GreedyBaseline(), "advantage=GreedyBaseline needs baseline_reward"),
        (ReinforcePlusPlus(gamma=0.99), "one advantage per token, TRL takes one per completion: set gamma=1"),
    ],
)
def test_estimators_trl_cannot_feed_are_refused_before_the_model_is_loaded(recipe, advantage, message):
    with pytest.raises(ValueError, match=message):
        BNPOTrainer(model="no/such-model", reward_funcs=rewards_by_row(REWARDS), advantage=advantage)


def test_a_second_normalisation_inside_trl_is_refused(recipe):
    with pytest.raises(
        ValueError, match=r"multi_objective_aggregation='normalize_then_sum'.*BatchScaled\(decompose=True\)"
    ):
        recipe.trainer(
            BNPOTrainer, given={"advantage": BatchScaled()}, multi_objective_aggregation="normalize_then_sum"
        )


def test_two_different_sets_of_weights_are_refused(recipe):
    advantage = BetaNormalized(decompose=True, part_weights={"by_row": 2.0})
    with pytest.raises(ValueError, match=r"reward_weights=\{'by_row': 3.0\} and advantage.part_weights=.* disagree"):
        recipe.trainer(BNPOTrainer, given={"advantage": advantage}, reward_weights=[3.0])
    assert recipe.trainer(BNPOTrainer, given={"advantage": advantage}).advantage == advantage


def test_an_infinite_reward_is_an_error_that_names_function_and_completion(recipe):
    trainer = recipe.trainer(BNPOTrainer, rewards=rewards_by_row([*REWARDS[:5], math.inf, *REWARDS[6:]]))
    with pytest.raises(ValueError, match="reward function by_row returned inf for completion 5"):
        trainer._generate_and_score_completions(step_inputs())


def test_reinforce_plus_plus_without_discount_gives_one_value_per_completion(recipe):
    trainer = recipe.trainer(BNPOTrainer, given={"advantage": ReinforcePlusPlus()})
    output = trainer._generate_and_score_completions(step_inputs())
    lengths = output["completion_mask"].sum(1)
    tokens = torch.tensor(REWARDS).repeat_interleave(lengths)
    expected = (torch.tensor(REWARDS) - tokens.mean()) / tokens.std()
    torch.testing.assert_close(output["advantages"], expected, rtol=1e-4, atol=1e-5)


def test_the_model_card_names_the_method(recipe):
    recipe.trainer(BNPOTrainer).create_model_card(model_name="tiny")
    card = (recipe.directory / "README.md").read_text()
    assert "2506.02864" in card and "BNPO" in card
    recipe.trainer(BNPOTrainer, given={"advantage": GroupRelative()}).create_model_card(model_name="tiny")
    assert "2506.02864" not in (recipe.directory / "README.md").read_text()


def test_saved_state_is_trls_own(recipe):
    trainer = recipe.trainer(BNPOTrainer, max_steps=1)
    trainer.train()
    trainer.save_model(str(recipe.directory / "final"))
    assert json.loads((recipe.directory / "final" / "config.json").read_text())["model_type"] == "llama"
    LlamaForCausalLM.from_pretrained(recipe.directory / "final")


# ----------------------------------------------------------------------------------------------- the migration page

PAGE = (Path(__file__).parents[2] / "docs" / "coming_from_trl.md").read_text(encoding="utf-8")


def table_below(heading: str) -> list[list[list[str]]]:
    """Cells of the table whose first header cell is `heading`; of each cell, what stands in backticks."""
    lines = PAGE[PAGE.index(f"| {heading} |") :].split("\n\n", 1)[0].splitlines()[2:]
    return [[re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|")] for line in lines]


def has_key(path: str, holders: list[Any]) -> bool:
    """Whether the dotted path names a field, looking into every member of a union on the way."""
    for name in path.split("."):
        fields = [typing.get_type_hints(holder).get(name) for holder in holders if is_dataclass(holder)]
        found = [field for field in fields if field is not None]
        if not found:
            return False
        holders = [member for field in found for member in (field, *typing.get_args(field))]
    return True


def test_every_setting_in_the_migration_table_exists_on_both_sides():
    rows = table_below("TRL `GRPOConfig`")
    assert len(rows) > 25
    known = {field.name for field in fields(GRPOConfig)}
    for trl_names, our_names, _ in rows:
        assert set(trl_names) <= known
        assert [name for name in our_names if not has_key(name, [PolicyGradientConfig])] == []


def test_every_loss_type_of_the_table_names_an_objective_and_an_aggregation_of_ours():
    objectives = {member().type for member in typing.get_args(typing.get_args(ObjectiveConfig)[0])}
    rows = table_below("TRL")
    assert {row[0][0] for row in rows} >= {"grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo"}
    for _, objective, aggregation in rows:
        assert objective[0] in objectives
        assert aggregation[0] in typing.get_args(Aggregation)


def test_every_metric_trl_logs_under_the_name_the_table_gives(recipe):
    trainer = recipe.trainer(GRPOTrainer, max_steps=1, beta=0.0)
    trainer.train()
    logged = set(trainer.state.log_history[0])
    assert "kl" not in logged, "only with a reference"
    promised = {name.replace("<fn>", "by_row") for row in table_below("TRL's metric") for name in row[0]}
    assert promised - {"kl", "eval_reward"} <= logged


def test_the_papers_recipe_in_trls_words_is_accepted_and_cispo_needs_its_cap(recipe):
    recipe.config(
        loss_type="luspo", importance_sampling_level="token", epsilon=0.2, epsilon_high=0.28, delta=10.0, beta=0.0
    )
    assert recipe.trainer(GRPOTrainer, loss_type="cispo").epsilon_high == 0.2


def test_the_numbers_of_the_page_are_the_equations():
    rates = torch.tensor([1.0, 2.0, 3.0]) / 4
    rewards, group = torch.tensor(REWARDS), groups()
    page = [
        [float(cell) for cell in line.split("|")[2:5]] for line in PAGE.splitlines() if line.startswith("| TRL, any")
    ]
    successes = torch.tensor([0, 4, 8])
    torch.testing.assert_close(group_relative(rewards, group)[successes], torch.tensor(page[0]), rtol=0, atol=5e-3)
    page = [[float(cell) for cell in line.split("|")[2:5]] for line in PAGE.splitlines() if line.startswith("| BNPO")]
    torch.testing.assert_close(torch.tensor(BNPO_ADVANTAGES)[successes], torch.tensor(page[0]), rtol=0, atol=5e-3)
    assert rewards.view(3, 4).mean(1).equal(rates)

    ones = torch.tensor([0, 1, 3, 5, 8])
    rewards, group = (torch.arange(8) < ones[:, None]).float().flatten(), torch.arange(40) // 8
    first = torch.tensor([8, 16, 24])
    ours = beta_normalized(rewards, group, max_weight=1e6, max_concentration=None)[first]
    torch.testing.assert_close(ours, torch.tensor([0.87, 0.59, 0.36]), rtol=0, atol=5e-3)
    theirs = group_relative(rewards, group)[first]
    torch.testing.assert_close(theirs, torch.tensor([2.47, 1.21, 0.72]), rtol=0, atol=6e-3)


@pytest.mark.parametrize("disabled", [True, False])
def test_making_a_trainer_reports_nothing_to_the_hub(recipe, monkeypatch, disabled):
    """False: what TRL would have sent, so that the empty queue means something."""
    sent: queue.Queue[Any] = queue.Queue()
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: None)
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", sent)
    assert constants.HF_HUB_DISABLE_TELEMETRY is True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", disabled)
    recipe.trainer(BNPOTrainer)
    assert sent.empty() is disabled


@pytest.mark.parametrize(("given", "disabled"), [({}, "True"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False")])
def test_telemetry_is_off_however_late_the_drop_in_is_imported_unless_it_was_asked_for(given, disabled):
    code = "from huggingface_hub import constants; import rlalign.llm.trl_compat\n"
    code += "print(constants.HF_HUB_DISABLE_TELEMETRY)"
    others = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_TELEMETRY"}
    done = subprocess.run([sys.executable, "-c", code], env=others | given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == disabled
