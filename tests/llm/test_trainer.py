"""The trainer against arithmetic done by hand: in float64, row by row, without packing, padding, cache or batching."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor

from rlalign.buffers import TrainBatch
from rlalign.config import ConfigError
from rlalign.llm import trainer as trainer_module
from rlalign.llm.config import BNPOConfig, ClippedSurrogate
from rlalign.llm.trainer import BNPOTrainer, PolicyGradientTrainer
from rlalign.training.metrics import read
from rlalign.training.signals import Interrupted
from tests.llm.tiny_runs import PROMPTS, constant, even_length, largest_difference, make_trainer, weights
from tests.reference import advantages as reference_advantages
from tests.reference import beta as reference_beta

Make = Callable[..., PolicyGradientTrainer]


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path) -> Make:
    """A trainer of a float64 copy of the tiny model, in a run directory of its own."""
    numbers = iter(range(100))

    def build(*arguments: Any, dtype: torch.dtype = torch.float64, **changes: Any) -> PolicyGradientTrainer:
        model = copy.deepcopy(tiny_model).to(dtype)
        return make_trainer(model, tiny_tokenizer, tmp_path / f"run-{next(numbers)}", *arguments, **changes)

    return build


def collected(trainer: PolicyGradientTrainer) -> TrainBatch:
    """The batch of one step, as `steps` makes it."""
    trainer.metrics.begin()
    trainer.buffer.add(trainer.collect())
    return trainer.estimator(trainer.buffer.drain())


def rows_of(batch: TrainBatch) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and completion of every row."""
    groups = batch.group.unique().tolist()
    inputs = {name: entry.value.tolist() for name, entry in batch.inputs.items()}
    for row in range(batch.batch_size):
        place = groups.index(int(batch.group[row]))
        prompt = inputs["prompt_ids"][place][: inputs["prompt_length"][place]]
        yield prompt, inputs["completion_ids"][row][: inputs["completion_length"][row]]


def by_hand(model: Any, batch: TrainBatch, *, temperature: float = 1.0) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of every row's completion, from one plain call of the model per row."""
    log_probs, entropies = [], []
    for prompt, completion in rows_of(batch):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
        table = logits.log_softmax(-1)
        log_probs.append(table.gather(1, torch.tensor(completion)[:, None])[:, 0])
        entropies.append(-(table.exp() * table).sum(-1))
    return log_probs, entropies


def stepped(model: Any, loss: Tensor, cfg: Any) -> dict[str, Tensor]:
    """The weights after clipping and the first step of Adam, whose bias-corrected moments are g and g squared."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    scale = min(1.0, cfg.optim.max_grad_norm / (norm + 1e-6))
    return {
        name: p.detach() - cfg.optim.learning_rate * scale * g / (scale * g.abs() + cfg.optim.eps)
        for name, p, g in zip(names, parameters, gradients, strict=True)
    }


def bits_of(text: str) -> list[float]:
    """A reward between 0 and 1 that differs within most groups."""
    return [float(len(text) % 3 == 0), float(len(text) % 2)]


def thirds(completions: list[str], **columns: Any) -> list[float]:
    return [bits_of(text)[0] for text in completions]


def odd(completions: list[str], **columns: Any) -> list[float]:
    return [bits_of(text)[1] for text in completions]


# --- one update ------------------------------------------------------------------------------------------------------


def test_a_bnpo_update_is_the_papers_gradient(make):
    """-(R - p) / f(p; 1 + a/3, 1 + b/3) log pi(completion), averaged over completions; clipped; Adam."""
    uncapped = {"type": "beta_normalized", "max_weight": 1e6, "max_concentration": None}
    options = {"temperature": 0.7, "prompts_per_step": 6, "group_size": 5}
    trainer = make(
        method="bnpo", aggregation="sequence_sum", advantage=uncapped, rollout=options, optim={"max_grad_norm": 0.5}
    )
    model = copy.deepcopy(trainer.policy.model)
    batch = collected(trainer)
    prompts = [batch.outcome[batch.group == group].tolist() for group in batch.group.unique()]
    advantages = reference_beta.advantages(prompts)
    assert len({round(value, 6) for value in advantages}) > 4

    log_probs, _ = by_hand(model, batch, temperature=0.7)
    loss = -sum(a * log_prob.sum() for a, log_prob in zip(advantages, log_probs, strict=True)) / len(advantages)
    expected = stepped(model, loss, trainer.config)
    trainer.update(batch)
    assert largest_difference(weights(trainer.policy.model), expected) < 1e-9
    assert largest_difference(weights(model), expected) > 1e-4
    assert trainer.updates == 1


AGGREGATIONS = {
    "token": lambda terms, groups: sum(t.sum() for t in terms) / sum(map(len, terms)),
    "sequence_mean": lambda terms, groups: sum(t.mean() for t in terms) / len(terms),
    "sequence_sum": lambda terms, groups: sum(t.sum() for t in terms) / len(terms),
    "constant": lambda terms, groups: sum(t.sum() for t in terms) / (len(terms) * 6),
    "group": lambda terms, groups: (
        sum(torch.cat([t for t, g in zip(terms, groups, strict=True) if g == one]).mean() for one in set(groups))
        / len(set(groups))
    ),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_grpo_update_is_the_policy_gradient_under_every_aggregation(make, aggregation):
    trainer = make(aggregation=aggregation)
    model = copy.deepcopy(trainer.policy.model)
    batch = collected(trainer)
    groups = batch.group.tolist()
    advantages = reference_advantages.group_relative(batch.outcome.tolist(), groups, unbiased=True, eps=1e-4)
    assert any(advantages)

    log_probs, _ = by_hand(model, batch)
    terms = [-a * log_prob for a, log_prob in zip(advantages, log_probs, strict=True)]
    expected = stepped(model, AGGREGATIONS[aggregation](terms, groups), trainer.config)
    trainer.update(batch)
    assert largest_difference(weights(trainer.policy.model), expected) < 1e-8
    assert largest_difference(weights(model), expected) > 1e-5


@pytest.mark.parametrize(
    ("aggregation", "mask_truncated"),
    [("token", True), ("sequence_mean", True), ("sequence_sum", False), ("constant", False), ("group", False)],
)
def test_micro_batches_change_nothing(make, tiny_model, aggregation, mask_truncated):
    """Budgets below one completion, below one prompt and above everything."""
    ends_early(tiny_model)
    found = []
    for budget in (1, 14, 8192):
        options = {"group_size": 6, "mask_truncated": mask_truncated}
        trainer = make(thirds, aggregation=aggregation, optim={"micro_batch_tokens": budget}, rollout=options)
        before = weights(trainer.policy.model)
        batch = collected(trainer)
        trainer.update(batch)
        found.append(weights(trainer.policy.model))
        assert largest_difference(found[-1], before) > 1e-6
    assert len(batch.lengths.unique()) > 2
    assert all(largest_difference(found[0], other) < 1e-8 for other in found[1:])


def test_the_padded_path_gives_the_same_update(make):
    packed, padded = (make(packing=packing) for packing in ("prefix_shared", "padded"))
    for trainer in (packed, padded):
        trainer.update(collected(trainer))
    # The norms of this architecture compute in float32 whatever the weights are.
    assert largest_difference(weights(packed.policy.model), weights(padded.policy.model)) < 1e-8


def test_what_is_compared_stays_compared_when_a_prompt_comes_twice(make):
    """Three rows of data, four prompts a step: one prompt makes two groups, each with a baseline of its own."""
    trainer = make(prompts=PROMPTS[:3])
    batch = collected(trainer)
    assert len(batch.group.unique()) == 4
    assert len(batch.prompt_id.unique()) == 3
    for group in batch.group.unique():
        assert float(batch.advantages[batch.group == group][:, 0].sum()) == pytest.approx(0.0, abs=1e-5)


# --- ratios ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ratios(monkeypatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What every micro-batch handed to the objective: new and old log-probabilities, and where."""
    seen, objective = [], trainer_module.policy_objective

    def spy(cfg, log_prob, log_prob_old, advantages, mask):
        seen.append((log_prob.detach().clone(), log_prob_old.clone(), mask.clone()))
        return objective(cfg, log_prob, log_prob_old, advantages, mask)

    monkeypatch.setattr(trainer_module, "policy_objective", spy)
    return seen


def test_on_policy_the_ratio_is_exactly_one(make, ratios):
    trainer = make(dtype=torch.float32)
    metrics = list(trainer.steps())
    assert len(ratios) == 2
    assert all(bool((new == old).all()) for new, old, _ in ratios)
    assert [record["policy/clip_low_frac"] + record["policy/clip_high_frac"] for record in metrics] == [0.0, 0.0]
    # What sampling said about the same tokens differs by rounding: 0 would mean that it was not looked at.
    assert all(0 < record["policy/sampling_gap_nats"] < 1e-4 for record in metrics)


def test_two_updates_per_rollout_take_ratios_against_the_sampled_log_probs(make, ratios):
    """Both updates by hand: the second with PPO's clipped ratio to what was sampled, and Adam's second moments."""
    trainer = make(optim={"update_epochs": 2, "learning_rate": 0.03}, objective={"type": "clipped_surrogate"})
    model = copy.deepcopy(trainer.policy.model)
    batch = collected(trainer)
    for minibatch in trainer.minibatches(batch):
        trainer.update(minibatch)
    cfg = trainer.config.optim
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.learning_rate, eps=cfg.eps, weight_decay=0.0)
    clipped = 0
    for _ in range(2):
        log_probs, _ = by_hand(model, batch)
        terms = []
        for row, log_prob in enumerate(log_probs):
            ratio = (log_prob - batch.log_prob_old[row, : len(log_prob)]).exp()
            advantage = batch.advantages[row, 0].double()
            kept = ratio.clamp(0.8, 1.28)
            clipped += int(((kept != ratio) & (kept * advantage < ratio * advantage)).sum())
            terms.append(-torch.minimum(ratio * advantage, kept * advantage))
        optimizer.zero_grad()
        (sum(term.sum() for term in terms) / sum(map(len, terms))).backward()
        optimizer.step()
    assert clipped > 0
    assert largest_difference(weights(trainer.policy.model), weights(model)) < 1e-7
    for new, old, mask in ratios:
        assert all(value in batch.log_prob_old for value in old[mask])
        assert bool(((new - old)[mask] != 0).any())
    assert float((ratios[1][0] - ratios[1][1])[ratios[1][2]].abs().max()) > 0.05


def test_two_minibatches_are_off_policy_too(make, ratios):
    trainer = make(optim={"minibatches": 2, "learning_rate": 0.05})
    batch = collected(trainer)
    for minibatch in trainer.minibatches(batch):
        trainer.update(minibatch)
    assert len(ratios) == trainer.updates == 2
    assert all(value in batch.log_prob_old for _, old, mask in ratios for value in old[mask])
    gaps = [float((new - old)[mask].abs().max()) for new, old, mask in ratios]
    assert gaps[0] < 1e-5
    assert gaps[1] > 0.01


def test_minibatches_are_whole_groups_dealt_anew_each_pass(make):
    trainer = make(optim={"update_epochs": 2, "minibatches": 2})
    batch = collected(trainer)
    dealt = [sorted(part.group.unique().tolist()) for part in trainer.minibatches(batch)]
    assert [len(part) for part in dealt] == [2, 2, 2, 2]
    assert sorted(dealt[0] + dealt[1]) == sorted(dealt[2] + dealt[3]) == [0, 1, 2, 3]
    seeds = {
        tuple(
            map(
                tuple,
                (
                    sorted(p.group.unique().tolist())
                    for p in make(seed=seed, optim={"minibatches": 2}).minibatches(batch)
                ),
            )
        )
        for seed in range(6)
    }
    assert len(seeds) > 1


# --- groups without signal -------------------------------------------------------------------------------------------


def only_first(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    even = even_length(completions)
    return [value if prompt in PROMPTS[:5] else 1.0 for prompt, value in zip(prompts, even, strict=True)]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_skipping_groups_without_signal_changes_no_weight(make, aggregation):
    skips, all_in = (make(only_first, aggregation=aggregation, skip_without_signal=skip) for skip in (True, False))
    records = [list(trainer.steps()) for trainer in (skips, all_in)]
    assert largest_difference(weights(skips.policy.model), weights(all_in.policy.model)) < 1e-12
    frac = [record["signal/group_frac"] for record in records[0]]
    assert frac == [record["signal/group_frac"] for record in records[1]]
    assert any(0 < f < 1 for f in frac)
    assert [record["signal/groups_skipped"] for record in records[0]] == [4 * (1 - f) for f in frac]
    assert [record["signal/groups_skipped"] for record in records[1]] == [0.0, 0.0]


def test_a_group_that_every_pass_skips_counts_once(make):
    records = list(make(only_first, optim={"update_epochs": 2}).steps())
    assert any(0 < record["signal/group_frac"] < 1 for record in records)
    assert [record["signal/groups_skipped"] for record in records] == [
        4 * (1 - r["signal/group_frac"]) for r in records
    ]


def test_skipped_groups_are_not_computed(make, ratios):
    trainer = make(only_first)
    batch = collected(trainer)
    live = batch.group[(batch.advantages != 0).any(1)].unique()
    assert 0 < len(live) < 4
    trainer.update(batch)
    assert sum(int(mask.sum()) for _, _, mask in ratios) == int(batch.mask[torch.isin(batch.group, live)].sum())


def test_the_effective_batch_averages_over_groups_with_signal(make):
    """With the denominator of the groups that teach, the gradient is larger by 4 / (groups with signal)."""
    whole, effective = (make(only_first, aggregation="sequence_mean", denominator=d) for d in ("all", "signal"))
    norms = []
    for trainer in (whole, effective):
        batch = collected(trainer)
        trainer.update(batch)
        norms.append(trainer.metrics.norms[0])
    live = len(batch.group[(batch.advantages != 0).any(1)].unique())
    assert 0 < live < 4
    assert norms[1] / norms[0] == pytest.approx(4 / live, rel=1e-9)


def test_without_any_signal_neither_optimizer_nor_schedule_moves(make):
    """The learning rate warms up over the steps that teach: the one in between does not count."""

    def silent_at_first(completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
        return constant(completions) if trainer_state.global_step < 2 else even_length(completions)

    trainer = make(silent_at_first, total_steps=4, optim={"warmup_steps": 3, "learning_rate": 0.3})
    untouched = weights(trainer.policy.model)
    steps = trainer.steps()
    for _ in range(2):
        record = next(steps)
        assert (record["optim/updates"], record["optim/grad_norm"], record["signal/groups_skipped"]) == (0.0, 0.0, 4.0)
    assert trainer.updates == 0
    assert trainer.optimizer.state_dict()["state"] == {}
    assert all(torch.equal(value, untouched[name]) for name, value in weights(trainer.policy.model).items())
    assert [next(steps)["optim/learning_rate"] for _ in range(2)] == pytest.approx([0.1, 0.2])
    steps.close()


def test_linear_schedule_with_warm_up(make):
    trainer = make(total_steps=5, optim={"warmup_steps": 2, "learning_rate": 0.4, "schedule": "linear"})
    rates = [record["optim/learning_rate"] for record in trainer.steps()]
    assert rates == pytest.approx([0.2, 0.4, 0.4, 0.4 * 2 / 3, 0.4 / 3])


def test_the_schedule_runs_over_all_updates_of_all_rollouts(make):
    """2 rollouts x 2 passes x 2 minibatches are 8 updates; each step's last is the 4th, at 5/8, or the 8th, at 1/8."""
    several = {"update_epochs": 2, "minibatches": 2, "learning_rate": 0.08, "schedule": "linear"}

    def length(completions: list[str], **columns: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    records = list(make(length, optim=several).steps())
    assert [record["optim/updates"] for record in records] == [4.0, 4.0]
    assert [record["optim/learning_rate"] for record in records] == pytest.approx([0.05, 0.01])


# --- divergence from the reference, entropy, truncation --------------------------------------------------------------


def moved(trainer: PolicyGradientTrainer) -> tuple[Any, Any]:
    """Shift the policy away from its reference; return both, as plain models."""
    reference = copy.deepcopy(trainer.policy.model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.policy.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return copy.deepcopy(trainer.policy.model), reference


def test_kl_in_the_loss_is_k3_against_the_first_weights(make):
    trainer = make(kl={"coef": 0.3})
    policy, reference = moved(trainer)
    batch = collected(trainer)
    log_probs, _ = by_hand(policy, batch)
    with torch.no_grad():
        references, _ = by_hand(reference, batch)
    terms, divergence = [], 0.0
    for row, (log_prob, ref) in enumerate(zip(log_probs, references, strict=True)):
        k3 = (ref - log_prob).exp() - (ref - log_prob) - 1
        terms.append(-batch.advantages[row, 0].double() * log_prob + 0.3 * k3)
        divergence += float(k3.detach().sum())
    tokens = sum(map(len, terms))
    expected = stepped(policy, sum(term.sum() for term in terms) / tokens, trainer.config)
    trainer.update(batch)
    assert largest_difference(weights(trainer.policy.model), expected) < 1e-7
    assert trainer.metrics.sums["kl"] / tokens == pytest.approx(divergence / tokens, rel=1e-5)
    assert divergence / tokens > 0.01


def test_a_loss_with_kl_keeps_groups_without_signal(make, ratios):
    trainer = make(only_first, kl={"coef": 0.3})
    batch = collected(trainer)
    trainer.update(batch)
    assert sum(int(mask.sum()) for _, _, mask in ratios) == int(batch.mask.sum())


def test_kl_in_the_reward_is_taken_off_every_token_before_the_baseline(make):
    trainer = make(kl={"coef": 0.3, "where": "reward"})
    policy, reference = moved(trainer)
    rollout = trainer.collect()
    with torch.no_grad():
        log_probs, references = by_hand(policy, rollout)[0], by_hand(reference, rollout)[0]
    # The outcome that the reward functions gave stays on record beside the penalised one.
    outcome = rollout.reward_parts["even_length"].tolist()
    penalised = [r - 0.3 * float((lp - ref).sum()) for r, lp, ref in zip(outcome, log_probs, references, strict=True)]
    assert rollout.outcome.tolist() == pytest.approx(penalised, abs=1e-4)
    assert max(abs(a - b) for a, b in zip(outcome, penalised, strict=True)) > 0.05
    batch = trainer.estimator(rollout)
    expected = reference_advantages.group_relative(penalised, rollout.group.tolist(), unbiased=True, eps=1e-4)
    assert batch.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-3)
    trainer.metrics.begin()
    terms = [
        -a * log_prob for a, log_prob in zip(batch.advantages[:, 0].double(), by_hand(policy, batch)[0], strict=True)
    ]
    loss = sum(term.sum() for term in terms) / sum(map(len, terms))
    trainer.update(batch)
    assert largest_difference(weights(trainer.policy.model), stepped(policy, loss, trainer.config)) < 1e-7


def test_without_kl_there_is_no_reference(make):
    trainer = make()
    assert trainer.policy.reference is None
    assert collected(trainer).log_prob_ref is None


def test_the_entropy_bonus_is_the_gradient_of_entropy(make):
    trainer = make(constant, entropy_coef=0.2)
    model = copy.deepcopy(trainer.policy.model)
    batch = collected(trainer)
    _, entropies = by_hand(model, batch)
    tokens = sum(map(len, entropies))
    expected = stepped(model, -0.2 * sum(e.sum() for e in entropies) / tokens, trainer.config)
    trainer.update(batch)
    assert largest_difference(weights(trainer.policy.model), expected) < 1e-9
    assert largest_difference(weights(model), expected) > 1e-6
    assert trainer.metrics.sums["entropy"] / tokens == pytest.approx(
        sum(float(e.detach().sum()) for e in entropies) / tokens
    )


def ends_early(model: Any) -> None:
    """Let about a quarter of all tokens end a completion, so that lengths differ and some reach the limit."""
    model.generation_config.eos_token_id = [model.config.eos_token_id, *range(60)]


def test_truncated_completions_leave_the_loss_and_stay_in_the_baseline(make, tiny_model):
    ends_early(tiny_model)
    trainer = make(thirds, rollout={"mask_truncated": True, "group_size": 6})
    model = copy.deepcopy(trainer.policy.model)
    batch = collected(trainer)
    cut = batch.truncated.any(1)
    assert 0 < int(cut.sum()) < batch.batch_size
    assert bool((batch.mask.any(1) == ~cut).all())
    # Every group's baseline is over all six, the cut ones too.
    every = reference_advantages.group_relative(batch.outcome.tolist(), batch.group.tolist(), unbiased=True, eps=1e-4)
    kept = [a for a, masked in zip(every, cut.tolist(), strict=True) if not masked]
    assert batch.advantages[~cut, 0].tolist() == pytest.approx(kept, abs=1e-5)
    log_probs, _ = by_hand(model, batch)
    terms = [-a * lp for a, lp, masked in zip(every, log_probs, cut.tolist(), strict=True) if not masked]
    expected = stepped(model, sum(t.sum() for t in terms) / sum(map(len, terms)), trainer.config)
    trainer.update(batch)
    assert largest_difference(weights(trainer.policy.model), expected) < 1e-8


def test_when_every_completion_is_cut_nothing_is_learned_and_nothing_breaks(make):
    trainer = make(rollout={"mask_truncated": True, "max_completion_tokens": 1})
    untouched = weights(trainer.policy.model)
    records = list(trainer.steps())
    assert [record["rollout/truncated_frac"] for record in records] == [1.0, 1.0]
    assert [record["optim/updates"] for record in records] == [0.0, 0.0]
    assert largest_difference(weights(trainer.policy.model), untouched) == 0.0


# --- rewards ---------------------------------------------------------------------------------------------------------


def test_remax_takes_the_reward_of_the_most_probable_completion_as_baseline(make):
    trainer = make(advantage={"type": "greedy_baseline"})
    model = copy.deepcopy(trainer.policy.model)
    batch = collected(trainer)
    for group in batch.group.unique():
        rows = (batch.group == group).nonzero().squeeze(1)
        tokens = list(rows_of(batch))[int(rows[0])][0]
        start = len(tokens)
        for _ in range(6):
            tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
            if tokens[-1] == trainer.tokenizer.eos_token_id:
                break
        text = trainer.tokenizer.decode(tokens[start:], skip_special_tokens=True)
        assert batch.baseline_reward is not None
        assert batch.baseline_reward[rows].tolist() == even_length([text]) * 4
    assert torch.equal(batch.advantages[:, 0], batch.outcome - batch.baseline_reward)
    assert len(batch.advantages[:, 0].unique()) > 1


def test_a_group_whose_greedy_completion_has_no_reward_is_not_scored(make):
    def greedy_fails(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        greedy = len(prompts) == 4  # one completion for each prompt of the step
        even = even_length(completions)
        return [None if greedy and prompt == prompts[1] else v for prompt, v in zip(prompts, even, strict=True)]

    trainer = make(greedy_fails, advantage={"type": "greedy_baseline"})
    batch = collected(trainer)
    lost = batch.group == batch.group.unique()[1]
    assert batch.scored.tolist() == (~lost).tolist()
    assert not batch.advantages[lost].any()
    assert bool(batch.advantages[~lost].any())
    trainer.update(batch)
    assert trainer.updates == 1


def test_several_rewards_add_up_by_their_weights(make):
    from rlalign.training.guard import RewardFunction

    rewards = [
        RewardFunction(name="thirds", call=thirds, weight=2.0),
        RewardFunction(name="odd", call=odd, weight=-0.5),
    ]
    trainer = make(rewards)
    batch = collected(trainer)
    texts = [trainer.tokenizer.decode(completion, skip_special_tokens=True) for _, completion in rows_of(batch)]
    first, second = thirds(texts), odd(texts)
    assert batch.reward_parts["thirds"].tolist() == first
    assert batch.reward_parts["odd"].tolist() == second
    assert batch.outcome.tolist() == [2 * a - 0.5 * b for a, b in zip(first, second, strict=True)]
    metrics = trainer.metrics.finish(trainer.config, batch, trainer.estimator.metrics)
    assert metrics["reward/thirds_mean"] == pytest.approx(sum(first) / 16)
    assert metrics["reward/odd_mean"] == pytest.approx(sum(second) / 16)
    assert metrics["reward/mean"] == pytest.approx((2 * sum(first) - 0.5 * sum(second)) / 16)


def test_decomposed_advantages_are_the_weighted_mean_of_each_rewards_own(make):
    from rlalign.training.guard import RewardFunction

    rewards = [RewardFunction(name="thirds", call=thirds, weight=3.0), RewardFunction(name="odd", call=odd, weight=1.0)]
    trainer = make(
        rewards, method="bnpo", advantage={"type": "beta_normalized", "decompose": True, "alpha": 1.5, "beta": 2.0}
    )
    batch = collected(trainer)
    groups = [batch.group == group for group in batch.group.unique()]
    each = [
        reference_beta.advantages([batch.reward_parts[name][rows].tolist() for rows in groups], 1.5, 2.0)
        for name in ("thirds", "odd")
    ]
    expected = [(3 * a + b) / 4 for a, b in zip(*each, strict=True)]
    assert batch.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert any(each[0])
    assert any(each[1])


def test_rows_a_reward_abstains_on_are_out_of_baseline_and_loss(make):
    def abstains(completions: list[str], **columns: Any) -> list[float | None]:
        even = even_length(completions)
        return [None if index % 4 == 0 else value for index, value in enumerate(even)]

    trainer = make(abstains)
    batch = collected(trainer)
    assert batch.scored.tolist() == [index % 4 != 0 for index in range(16)]
    scored = [i for i in range(16) if i % 4]
    outcomes, groups = [batch.outcome.tolist()[i] for i in scored], [batch.group.tolist()[i] for i in scored]
    expected = reference_advantages.group_relative(outcomes, groups, unbiased=True, eps=1e-4)
    assert batch.advantages[batch.scored, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert not batch.advantages[~batch.scored].any()
    metrics = trainer.metrics.finish(trainer.config, batch, trainer.estimator.metrics)
    assert metrics["reward/mean"] == pytest.approx(sum(outcomes) / 12)


def test_rewards_get_trls_arguments(make):
    seen: dict[str, Any] = {}

    def spy(prompts, completions, completion_ids, answer, trainer_state, **columns):
        seen.update(prompts=prompts, completions=completions, ids=completion_ids, answer=answer)
        seen.update(step=trainer_state.global_step, columns=columns)
        return even_length(completions)

    rows = [{"prompt": prompt, "answer": prompt[-1]} for prompt in PROMPTS]
    trainer = make(spy, prompts=rows)
    batch = collected(trainer)
    assert seen["prompts"] == [PROMPTS[index] for index in batch.prompt_id.tolist()]
    assert seen["answer"] == [prompt[-1] for prompt in seen["prompts"]]
    assert seen["ids"] == [completion for _, completion in rows_of(batch)]
    assert seen["completions"] == [trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in seen["ids"]]
    assert seen["step"] == 0


# --- adapters and saving ---------------------------------------------------------------------------------------------

LORA = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


def test_an_adapter_is_all_that_trains_and_the_reference_is_the_model_without_it(make):
    trainer = make(peft_config=copy.deepcopy(LORA), kl={"coef": 0.1}, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    metrics = list(trainer.steps())[-1]
    changed = {n for n, p in trainer.policy.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {name for name in before if "lora_" in name}
    assert metrics["policy/kl"] > 0
    batch = collected(trainer)
    with torch.no_grad(), trainer.policy.model.disable_adapter():
        base, _ = by_hand(trainer.policy.model, batch)
    assert batch.log_prob_ref is not None
    for row, log_prob in enumerate(base):
        torch.testing.assert_close(batch.log_prob_ref[row, : len(log_prob)], log_prob, rtol=0, atol=1e-4)
    assert set(trainer.state_dict()["model"]["weights"]) == changed


def test_an_adapter_that_does_not_start_at_zero_gets_a_frozen_copy_as_reference(make):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make(peft_config=config, kl={"coef": 0.1}, dtype=torch.float32)
    batch = collected(trainer)
    with torch.no_grad():
        started, _ = by_hand(copy.deepcopy(trainer.policy.model), batch)
    trainer.update(batch)
    later = trainer.collect()
    assert batch.log_prob_ref is not None
    assert later.log_prob_ref is not None
    for row, log_prob in enumerate(started):
        torch.testing.assert_close(batch.log_prob_ref[row, : len(log_prob)], log_prob, rtol=0, atol=1e-4)
    with trainer.policy.reference() as reference:
        torch.testing.assert_close(trainer.policy.score(later, reference), later.log_prob_ref)


PLAIN = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rlalign", "rlalign_envs"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

whole, base, adapter, ids = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
ids = torch.tensor([ids])
model = AutoModelForCausalLM.from_pretrained(whole)
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
tokenizer = AutoTokenizer.from_pretrained(whole)
assert AutoTokenizer.from_pretrained(adapter)("say 1")["input_ids"] == tokenizer("say 1")["input_ids"]
logits = [m.eval()(ids).logits[0, -1].tolist() for m in (model, adapted)]
print(json.dumps({"logits": logits, "tokens": tokenizer("say 1")["input_ids"]}))
"""


def test_saved_models_load_with_plain_transformers_and_peft_where_rlalign_does_not_exist(
    make, tiny_checkpoint, tiny_tokenizer, tmp_path
):
    whole = make(dtype=torch.float32).fit()
    adapted = make(peft_config=copy.deepcopy(LORA), dtype=torch.float32).fit()
    whole.save_model(tmp_path / "whole")
    adapted.save_model(str(tmp_path / "adapter"))
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))
    ids = tiny_tokenizer("say 7")["input_ids"]
    folders = [str(tmp_path / "whole"), str(tiny_checkpoint), str(tmp_path / "adapter")]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *folders, json.dumps(ids)],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["tokens"] == tiny_tokenizer("say 1")["input_ids"]
    with torch.no_grad():
        for trainer, logits in zip((whole, adapted), found["logits"], strict=True):
            expected = trainer.policy.model(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-5)
    # `fit` leaves the same beside the checkpoints.
    for trainer, saved in ((whole, tmp_path / "whole"), (adapted, tmp_path / "adapter")):
        for path in saved.glob("*.safetensors"):
            assert path.read_bytes() == (trainer.session.path / "model" / path.name).read_bytes()


# --- the loop --------------------------------------------------------------------------------------------------------


def test_steps_yields_what_the_log_and_the_callback_get(make):
    heard = []
    trainer = make(total_steps=3, callback=lambda step, metrics: heard.append((step, dict(metrics))))
    yielded = []
    for metrics in trainer.steps():
        yielded.append(metrics)
        assert trainer.step == len(yielded)
    assert heard == list(enumerate(yielded, 1))
    logged = read(trainer.session.path / "metrics.jsonl")
    assert [(record.pop("kind"), record.pop("step")) for record in logged] == [("train", 1), ("train", 2), ("train", 3)]
    assert logged == yielded


def test_a_loop_left_early_can_be_resumed_to_the_same_end(make, tiny_model, tiny_tokenizer):
    whole = make(total_steps=4, checkpoint={"every": 1}).fit()
    left = make(total_steps=4, checkpoint={"every": 1})
    for _ in left.steps():
        if left.step == 3:
            break
    assert json.loads((left.session.path / "status.json").read_text())["status"] == "interrupted"
    again = make_trainer(
        tiny_model.double(), tiny_tokenizer, left.session.path, total_steps=4, checkpoint={"every": 1}
    ).fit(resume=True)
    assert largest_difference(weights(whole.policy.model), weights(again.policy.model)) == 0.0
    one, other = (read(trainer.session.path / "metrics.jsonl") for trainer in (whole, again))
    names = [name for name in one[0] if not name.startswith(("time/", "throughput/"))]
    assert [[r[n] for n in names] for r in one] == [[r[n] for n in names] for r in other]


def test_the_same_trainer_goes_on_after_an_interruption(make):
    """In a notebook: interrupt, look, `fit(resume=True)`. The signal of before must not stop it again."""
    trainer = make(total_steps=3, callback=lambda step, metrics: trainer.session.stop.request() if step == 1 else None)
    message = r"Saved step 1. Continue: the same script with run_dir=.*run-0.* and fit\(resume=True\)"
    with pytest.raises(Interrupted, match=message):
        trainer.fit()
    trainer.callback = None
    trainer.fit(resume=True)
    assert trainer.step == 3
    whole = make(total_steps=3).fit()
    assert largest_difference(weights(whole.policy.model), weights(trainer.policy.model)) == 0.0


def test_looking_at_a_run_changes_nothing_about_it(make):
    """Evaluation, samples and a callback that draws random numbers: training has random numbers of its own."""
    plain = make(total_steps=3).fit()
    watched = make(
        total_steps=3,
        eval_dataset=["tell 1", "tell 2"],
        eval={"every": 1, "temperature": 1.0},
        log={"samples_every": 1},
        callback=lambda step, metrics: torch.rand(step),
    ).fit()
    assert largest_difference(weights(plain.policy.model), weights(watched.policy.model)) == 0.0


def test_samples_say_what_was_rewarded_and_how_much_it_counted(make):
    trainer = make(log={"samples_every": 2, "samples_rows": 5})
    batches = []
    estimate = trainer.estimator.__call__

    def recorded(rollout):
        batches.append(estimate(rollout))
        return batches[-1]

    trainer.estimator = type("Recorded", (), {"__call__": lambda self, r: recorded(r)})()
    for name in ("needs", "metrics", "state_dict", "load_state_dict"):
        setattr(type(trainer.estimator), name, property(lambda self, name=name: getattr(estimate.__self__, name)))
    trainer.fit()
    folder = trainer.session.path / "samples"
    assert [path.name for path in folder.iterdir()] == ["step-000002.jsonl"]
    rows = [json.loads(line) for line in (folder / "step-000002.jsonl").read_text().splitlines()]
    batch = batches[1]
    assert len(rows) == 5
    for index, row in enumerate(rows):
        ids = list(rows_of(batch))[index][1]
        assert row["completion"] == trainer.tokenizer.decode(ids, skip_special_tokens=True)
        assert row["prompt"] == PROMPTS[row["prompt_id"]]
        assert (row["step"], row["group"], row["tokens"]) == (2, int(batch.group[index]), len(ids))
        assert row["reward"] == row["parts"]["even_length"] == float(batch.outcome[index])
        assert row["advantage"] == pytest.approx(float(batch.advantages[index, 0]))


def test_every_prompt_comes_once_per_pass_over_the_data(make):
    trainer = make(rollout={"prompts_per_step": 5, "max_completion_tokens": 1})
    ids = []
    for step in range(4):
        trainer.step = step
        ids.append(sorted(trainer.collect().prompt_id.unique().tolist()))
    assert sorted(ids[0] + ids[1]) == sorted(ids[2] + ids[3]) == list(range(10))
    assert ids[:2] != ids[2:]


def test_lengths_are_told_apart_by_outcome(make, tiny_model):
    ends_early(tiny_model)
    trainer = make(rollout={"group_size": 6})
    batch = collected(trainer)
    metrics = trainer.metrics.finish(trainer.config, batch, trainer.estimator.metrics)
    lengths = [len(completion) for _, completion in rows_of(batch)]
    assert len(set(lengths)) > 1
    for name, wanted in (("rollout/tokens_if_rewarded_mean", 1.0), ("rollout/tokens_if_unrewarded_mean", 0.0)):
        chosen = [n for n, outcome in zip(lengths, batch.outcome.tolist(), strict=True) if outcome == wanted]
        assert metrics[name] == pytest.approx(sum(chosen) / len(chosen))
    assert metrics["rollout/completion_tokens_mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert metrics["rollout/completion_tokens_max"] == max(lengths)
    cut = [ids[-1] not in trainer.policy.end_ids for n, (_, ids) in zip(lengths, rows_of(batch), strict=True)]
    assert metrics["rollout/truncated_frac"] == pytest.approx(sum(cut) / len(cut))


# --- settings and refusals -------------------------------------------------------------------------------------------


def test_defaults_of_bnpo_are_the_papers():
    """arXiv:2506.02864 and its repository's run script; the caps are ours and documented."""
    cfg = BNPOConfig()
    assert (cfg.rollout.prompts_per_step, cfg.rollout.group_size, cfg.rollout.temperature) == (32, 16, 1.0)
    assert (cfg.rollout.max_prompt_tokens, cfg.rollout.max_completion_tokens) == (1024, 3072)
    assert cfg.objective == ClippedSurrogate(clip_low=0.2, clip_high=0.28, dual_clip=10.0)
    assert cfg.advantage.type == "beta_normalized"
    assert (cfg.advantage.alpha, cfg.advantage.beta, cfg.advantage.reward_range) == (None, None, (0.0, 1.0))
    assert (cfg.aggregation, cfg.kl.coef, cfg.entropy_coef) == ("sequence_sum", 0.0, 0.0)
    assert (cfg.optim.learning_rate, cfg.optim.warmup_steps, cfg.optim.schedule) == (1e-6, 10, "constant")
    assert (cfg.optim.update_epochs, cfg.optim.minibatches, cfg.optim.max_grad_norm) == (1, 1, 1.0)
    assert cfg.method == "bnpo"


def test_bnpo_trainer_is_the_trainer_with_those_defaults(tiny_model, tiny_tokenizer, tmp_path):
    reward = lambda completions, **columns: even_length(completions)  # noqa: E731 - a lambda starts no process
    trainer = BNPOTrainer(tiny_model, reward, PROMPTS * 4, tokenizer=tiny_tokenizer, run_dir=tmp_path / "run")
    assert trainer.config == BNPOConfig()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": {"minibatches": 3}}, "`optim.minibatches`=3 does not divide `rollout.prompts_per_step`=4"),
        ({"objective": {"type": "reinforce"}, "optim": {"update_epochs": 2}}, "`objective: reinforce` has no ratio"),
        ({"advantage": {"type": "gae"}}, "needs a critic"),
        ({"eval": {"patience": 2}}, "`eval.patience` counts evaluations during training: set `eval.every`"),
        (
            {"method": "bnpo", "advantage": {"type": "beta_normalized"}, "kl": {"coef": 0.1, "where": "reward"}},
            "`kl.where: reward` takes rewards out of the range",
        ),
    ],
)
def test_contradictions_are_refused_before_anything_is_made(make, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)
    assert not list(tmp_path.glob("run-*"))


def test_a_model_object_needs_a_tokenizer_and_no_second_adapter(tiny_model, tiny_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs its tokenizer: pass `tokenizer=`"):
        make_trainer(tiny_model, None, tmp_path / "run")
    adapted = PeftModel(tiny_model, copy.deepcopy(LORA))
    with pytest.raises(ValueError, match="already carries an adapter: leave out `peft_config`"):
        make_trainer(adapted, tiny_tokenizer, tmp_path / "other", peft_config=copy.deepcopy(LORA))


def test_the_checkpoint_of_another_model_is_refused(make):
    whole, adapted = make(dtype=torch.float32), make(peft_config=copy.deepcopy(LORA), dtype=torch.float32)
    with pytest.raises(ValueError, match="the checkpoint is of another model"):
        adapted.load_state_dict(whole.state_dict())
    state = whole.state_dict()
    name = next(iter(state["model"]["weights"]))
    state["model"]["weights"][name] = state["model"]["weights"][name][:5]
    with pytest.raises(ValueError, match=r"is \[5, 32\] in the checkpoint"):
        whole.load_state_dict(state)
