"""Tiny random models reach answers that are known in advance, with and without a penalty for leaving the reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlalign import config
from rlalign.llm.trainer import PolicyGradientTrainer

pytestmark = pytest.mark.learning
WORDS = tuple("abcdefgh")
END = len(WORDS)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Eight words and an end of sequence."""
    vocabulary = {word: index for index, word in enumerate((*WORDS, "<end>"))}
    made = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<end>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<end>", unk_token="<end>", padding_side="left"
    )


def random_model(seed: int, *, spread: float = 0.1) -> LlamaForCausalLM:
    settings = LlamaConfig(
        vocab_size=END + 1,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        initializer_range=spread,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(settings).eval()


@torch.no_grad()
def next_word(model: Any, prompt: str) -> torch.Tensor:
    """The exact distribution of the only token of a completion."""
    ids = [WORDS.index(word) for word in prompt.split()]
    return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def train(
    model: Any, tokenizer: Any, reward: Callable[..., Any], prompts: list[str], run_dir: Path, **settings: Any
) -> PolicyGradientTrainer:
    base = {
        "method": "policy_gradient",
        "guard": {"isolation": "none"},
        "checkpoint": {"every": 0},
        "log": {"samples_every": 0},
    }
    trainer = PolicyGradientTrainer(
        model, reward, prompts, config.build(base | settings), tokenizer=tokenizer, run_dir=run_dir
    )
    return trainer.fit()


# --- the right answer ------------------------------------------------------------------------------------------------

ANSWERS = {"a b": "c", "c d": "e", "e f": "g", "h a": "b"}
METHODS: dict[str, dict[str, Any]] = {
    "bnpo": {"method": "bnpo"},
    "grpo": {"advantage": {"type": "group_relative"}},
    "dr_grpo": {"advantage": {"type": "group_relative", "scale": False}, "aggregation": "constant"},
    "rloo": {"advantage": {"type": "leave_one_out"}, "objective": {"type": "reinforce"}},
    "maxrl": {"advantage": {"type": "max_likelihood"}, "objective": {"type": "reinforce"}},
    "remax": {"advantage": {"type": "greedy_baseline"}, "objective": {"type": "reinforce"}},
}


def right(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(ANSWERS[prompt] == text) for prompt, text in zip(prompts, completions, strict=True)]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_finds_the_answer_of_every_prompt(method, seed, tokenizer, tmp_path):
    """Nine words, each as likely as the other at first; one is right, and which one depends on the prompt."""
    model = random_model(seed)
    before = [float(next_word(model, prompt)[WORDS.index(word)]) for prompt, word in ANSWERS.items()]
    assert max(before) < 0.3
    options = {"prompts_per_step": 8, "group_size": 16, "max_completion_tokens": 1, "max_prompt_tokens": 4}
    train(
        model,
        tokenizer,
        right,
        list(ANSWERS),
        tmp_path / "run",
        seed=seed,
        total_steps=50,
        rollout=options,
        optim={"learning_rate": 0.02, "warmup_steps": 0},
        **METHODS[method],
    )
    after = [float(next_word(model, prompt)[WORDS.index(word)]) for prompt, word in ANSWERS.items()]
    assert min(after) > 0.98, after


def test_several_updates_per_rollout_find_it_too(tokenizer, tmp_path):
    model = random_model(3)
    options = {"prompts_per_step": 8, "group_size": 16, "max_completion_tokens": 1, "max_prompt_tokens": 4}
    optim = {"learning_rate": 0.02, "warmup_steps": 0, "update_epochs": 2, "minibatches": 2}
    train(model, tokenizer, right, list(ANSWERS), tmp_path / "run", total_steps=25, rollout=options, optim=optim)
    assert min(float(next_word(model, p)[WORDS.index(w)]) for p, w in ANSWERS.items()) > 0.9


def test_every_token_of_a_completion_is_credited(tokenizer, tmp_path):
    """Only the whole phrase pays, so each of its words must be learned, and the end after them."""

    def phrase(completions: list[str], **columns: Any) -> list[float]:
        return [sum(a == b for a, b in zip(text.split(), ["d", "a", "h"], strict=False)) / 3 for text in completions]

    model = random_model(4)
    options = {"prompts_per_step": 4, "group_size": 16, "max_completion_tokens": 4, "max_prompt_tokens": 4}
    trainer = train(
        model,
        tokenizer,
        phrase,
        ["a b", "c"],
        tmp_path / "run",
        method="bnpo",
        total_steps=80,
        rollout=options,
        optim={"learning_rate": 0.02, "warmup_steps": 0},
    )
    rollout = trainer.collect()
    assert float(rollout.outcome.mean()) > 0.95


# --- the best compromise between reward and reference ----------------------------------------------------------------

REWARD = dict(zip((*WORDS, ""), (0.0, 1.0, 0.3, 0.6, 0.0, 0.8, 0.2, 0.5, 0.4), strict=True))
BETA = 0.3


def table(completions: list[str], **columns: Any) -> list[float]:
    return [REWARD[text] for text in completions]


def compromise(kl: dict[str, Any], tokenizer: Any, run_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's distribution and the trained one, after an unbiased policy gradient with 256 samples a step."""
    model = random_model(7, spread=0.2)
    reference = next_word(model, "a")
    train(
        model,
        tokenizer,
        table,
        ["a"],
        run_dir,
        total_steps=120,
        rollout={"prompts_per_step": 8, "group_size": 32, "max_completion_tokens": 1, "max_prompt_tokens": 2},
        advantage={"type": "leave_one_out"},
        objective={"type": "reinforce"},
        optim={"learning_rate": 0.02, "warmup_steps": 0, "schedule": "linear"},
        kl={"coef": BETA, **kl},
    )
    return reference, next_word(model, "a")


def tilted(reference: torch.Tensor) -> torch.Tensor:
    """argmax over pi of E[r] - beta KL(pi || pi_ref)  =  pi_ref exp(r / beta) / Z."""
    rewards = torch.tensor(list(REWARD.values()), dtype=torch.float64)
    weight = reference * (rewards / BETA).exp()
    return weight / weight.sum()


@pytest.mark.parametrize(
    "kl", [{"where": "loss", "estimator": "k2"}, {"where": "reward"}], ids=["k2 in the loss", "k1 in the reward"]
)
def test_the_optimum_under_a_kl_penalty_is_the_tilted_reference(kl, tokenizer, tmp_path):
    reference, found = compromise(kl, tokenizer, tmp_path / "run")
    optimum = tilted(reference)
    assert float((optimum - reference).abs().sum()) > 0.5
    assert float((found - optimum).abs().max()) < 0.015
    assert float((found * (found / optimum).log()).sum()) < 0.001


def test_k3_in_the_loss_settles_where_its_own_gradient_vanishes(tokenizer, tmp_path):
    """E[(1 - pi_ref / pi) grad log pi] is the gradient of KL(pi_ref || pi), so pi = beta pi_ref / (beta + J - r)."""
    reference, found = compromise({"where": "loss", "estimator": "k3"}, tokenizer, tmp_path / "run")
    rewards = torch.tensor(list(REWARD.values()), dtype=torch.float64)
    low, high = float(rewards.max()) - BETA + 1e-9, float(rewards.max()) + 1.0
    for _ in range(200):  # the J for which the probabilities sum to 1
        mean = (low + high) / 2
        total = float((BETA * reference / (BETA + mean - rewards)).sum())
        low, high = (mean, high) if total > 1 else (low, mean)
    settled = BETA * reference / (BETA + mean - rewards)
    assert float((settled - tilted(reference)).abs().max()) > 0.03
    assert float((found - settled).abs().max()) < 0.015
