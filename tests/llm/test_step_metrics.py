"""What a step reports of rewards and of sampling, where advantages and updates would hide it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rlalign.llm.trainer import PolicyGradientTrainer
from rlalign.training.checkpoint import Checkpoints
from rlalign.training.journal import Journal
from rlalign.training.no_signal import NoSignalError
from tests.llm.tiny_runs import PROMPTS, constant, even_length, make_trainer

Make = Callable[..., PolicyGradientTrainer]


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path) -> Make:
    numbers = iter(range(100))

    def build(*arguments: Any, **changes: Any) -> PolicyGradientTrainer:
        model = copy.deepcopy(tiny_model)
        return make_trainer(model, tiny_tokenizer, tmp_path / f"run-{next(numbers)}", *arguments, **changes)

    return build


@pytest.fixture
def notes(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(Journal, "note", lambda self, text: said.append(text))
    return said


# --- groups whose rewards agree --------------------------------------------------------------------------------------


def by_prompt(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(prompt in PROMPTS[:2]) for prompt in prompts]


def worse_when_greedy(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(prompts) == 16)] * len(prompts)  # the greedy completions are four


def by_step(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    return [float(trainer_state.global_step % 2)] * len(completions)


@pytest.mark.parametrize(
    ("reward", "settings"),
    [
        (by_prompt, {"advantage": {"type": "reinforce_plus_plus"}}),
        (worse_when_greedy, {"advantage": {"type": "greedy_baseline"}}),
        (by_step, {"advantage": {"type": "per_prompt_running", "window": 8, "min_count": 2}}),
        (constant, {"kl": {"coef": 0.3, "where": "reward"}}),
    ],
    ids=["reinforce_plus_plus", "greedy_baseline", "per_prompt_running", "kl in the reward"],
)
def test_equal_rewards_are_seen_where_advantages_are_not_zero(make, reward, settings):
    trainer = make(reward, prompts=PROMPTS[:4], total_steps=9, stop_without_signal=4, **settings)
    with torch.no_grad():  # away from the reference, so that a divergence tells completions apart
        for number, parameter in enumerate(trainer.policy.model.parameters()):
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    records = []
    with pytest.raises(NoSignalError, match="Stopped by `stop_without_signal`=4"):
        records.extend(trainer.steps())
    assert trainer.step == 4
    assert Checkpoints(trainer.session.path / "checkpoints").steps() == [4]


@pytest.mark.parametrize("kl", [{}, {"coef": 0.3, "where": "reward"}])
def test_the_share_of_groups_with_equal_rewards(make, kl):
    def some(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        even = even_length(completions)
        return [value if prompt in PROMPTS[:5] else 1.0 for prompt, value in zip(prompts, even, strict=True)]

    trainer = make(some, kl=kl)
    trainer.metrics.begin()
    batch = trainer.estimator(trainer.collect())
    metrics = trainer.metrics.finish(trainer.config, batch, trainer.estimator.metrics)
    rewards = batch.reward_parts["some"].view(4, 4).tolist()
    assert metrics["reward/constant_group_frac"] == sum(len(set(group)) == 1 for group in rewards) / 4
    assert 0 < metrics["reward/constant_group_frac"] < 1


def test_rewards_that_cancel_are_told_apart_when_each_is_estimated_alone(make):
    def odd_length(completions: list[str], **columns: Any) -> list[float]:
        return [1 - value for value in even_length(completions)]

    shares = []
    for decompose in (False, True):
        trainer = make([even_length, odd_length], advantage={"type": "group_relative", "decompose": decompose})
        shares.append(next(trainer.steps())["reward/constant_group_frac"])
    assert shares[0] == 1.0
    assert shares[1] < 1.0


# --- sampling against training ---------------------------------------------------------------------------------------


def misreport(trainer: PolicyGradientTrainer, shift: float) -> None:
    """Let sampling claim log-probabilities that are off by `shift`."""
    sample = trainer.policy.sample

    def shifted(*arguments: Any, **options: Any) -> Any:
        made = sample(*arguments, **options)
        return replace(made, log_prob=made.log_prob + shift)

    trainer.policy.sample = shifted  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("shift", "told"), [(0.05, 1), (0.01, 0)])
def test_a_gap_to_the_models_own_sampling_is_told_once(make, notes, shift, told):
    trainer = make(total_steps=3)
    misreport(trainer, shift)
    gaps = [metrics["policy/sampling_gap_nats"] for metrics in trainer.steps()]
    assert gaps == pytest.approx([shift] * 3, abs=1e-4)
    assert sum("Sampling and training differ by 0.05" in note for note in notes) == told


def test_updates_of_the_same_rollout_are_no_gap(make, notes):
    trainer = make(total_steps=3, optim={"update_epochs": 3, "learning_rate": 0.1})
    records = list(trainer.steps())
    assert all(0 < record["policy/sampling_gap_nats"] < 1e-4 for record in records)
    assert all(0 < record["policy/sampling_gap_max_nats"] < 1e-3 for record in records)
    assert not any("differ by" in note for note in notes)
