"""Running out of memory says where, and what to set to which value."""

import pytest
import torch

from rlalign.llm.config import ModelConfig, OptimConfig, PolicyGradientConfig, RolloutConfig
from rlalign.llm.memory import MemoryAdvice, OutOfMemory, ran_out
from rlalign.llm.policy import Policy
from tests.llm.tiny_runs import make_trainer

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def config(**changes) -> PolicyGradientConfig:
    """8 prompts x 4 completions: 32 rows at once unless `decode_rows` says less."""
    return PolicyGradientConfig(
        rollout=RolloutConfig(prompts_per_step=8, group_size=4, decode_rows=changes.get("decode_rows")),
        optim=OptimConfig(micro_batch_tokens=1000),
        model=ModelConfig(name="m", gradient_checkpointing=changes.get("gradient_checkpointing", False)),
    )


def test_the_sentence_names_the_phase_and_three_smaller_values():
    advice = MemoryAdvice(config(), processes=1)
    assert advice.sentence("generate") == (
        "Out of memory in sampling completions (phase `generate`): try `rollout.decode_rows`=16 (now 32), "
        "`optim.micro_batch_tokens`=500 (now 1000) or `model.gradient_checkpointing`=true (now false), which does not "
        "change what is learned."
    )
    assert advice.sentence("train").startswith(
        "Out of memory in the forward and backward pass (phase `train`): try `optim.micro_batch_tokens`=500"
    )
    assert "(phase `score`): try `optim.micro_batch_tokens`=500" in advice.sentence("score")


@pytest.mark.parametrize(
    ("changes", "processes", "said"),
    [
        ({}, 2, "`rollout.decode_rows`=8 (now 16)"),  # each process decodes half of the prompts
        ({"decode_rows": 14}, 1, "`rollout.decode_rows`=4 (now 12)"),  # three whole groups; half of them is one
        ({"decode_rows": 100}, 1, "`rollout.decode_rows`=16 (now 32)"),  # there are no more than 32
        ({"decode_rows": 4}, 1, "; `rollout.decode_rows` is down to one group (`rollout.group_size`=4)."),
        ({"decode_rows": 1}, 1, "; `rollout.decode_rows` is down to one group (`rollout.group_size`=4)."),
        ({"gradient_checkpointing": True}, 1, "; `model.gradient_checkpointing` is on."),
    ],
)
def test_values_are_smaller_than_what_is_in_force(changes, processes, said):
    for phase in ("generate", "score", "train"):
        assert said in MemoryAdvice(config(**changes), processes=processes).sentence(phase)


def test_one_knob_left_is_named_alone():
    advice = MemoryAdvice(config(decode_rows=4, gradient_checkpointing=True), processes=1)
    assert ": try `optim.micro_batch_tokens`=500 (now 1000), which does not" in advice.sentence("train")


@pytest.mark.parametrize(("tokens", "value"), [(5000, 500), (300, 150), (1, 1)])
def test_a_budget_above_what_is_there_would_not_bind(tokens, value):
    assert f"`optim.micro_batch_tokens`={value} (now 1000)" in MemoryAdvice(config(), processes=1).sentence(
        "train", tokens
    )


@pytest.mark.parametrize("error", [CPU, CUDA, MemoryError(), RuntimeError("MPS backend out of memory (18 GB)")])
def test_allocators_of_all_kinds_are_recognised(error):
    assert ran_out(error)
    with pytest.raises(OutOfMemory) as caught, MemoryAdvice(config(), processes=1)("score"):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    if str(error):
        assert f"[{str(error)[:30]}" in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory?"), OSError("disk")])
def test_other_errors_pass_as_they_are(error):
    with pytest.raises(type(error)) as caught, MemoryAdvice(config(), processes=1)("train"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(("method", "phase"), [("sample", "generate"), ("complete", "score"), ("shares", "train")])
@pytest.mark.parametrize("error", [CPU, CUDA])
def test_every_phase_of_a_step_explains_itself(tiny_model, tiny_tokenizer, tmp_path, monkeypatch, method, phase, error):
    def greedy(*args, **options):
        raise error

    monkeypatch.setattr(Policy, method, greedy)
    trainer = make_trainer(tiny_model, tiny_tokenizer, tmp_path / "run")
    with pytest.raises(OutOfMemory, match=rf"phase `{phase}`.*`optim.micro_batch_tokens`=\d+ \(now 8192\)"):
        trainer.fit()


def test_the_budget_of_a_step_is_bounded_by_its_tokens(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """4 prompts `say N` of 5 tokens and 16 completions of at most 6: 116 tokens, half of which are tried next."""

    def greedy(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Policy, "complete", greedy)
    trainer = make_trainer(tiny_model, tiny_tokenizer, tmp_path / "run")
    with pytest.raises(OutOfMemory) as caught:
        trainer.collect()
    value = int(str(caught.value).partition("`optim.micro_batch_tokens`=")[2].split()[0])
    assert (20 + 16) // 2 <= value <= (20 + 16 * 6) // 2


def test_memory_that_a_reward_eats_is_the_rewards_affair(tiny_model, tiny_tokenizer, tmp_path):
    def hungry(completions, **columns):
        raise MemoryError("in the grader")

    trainer = make_trainer(tiny_model, tiny_tokenizer, tmp_path / "run", hungry)
    with pytest.raises(Exception, match="in the grader") as caught:
        trainer.fit()
    assert not isinstance(caught.value, OutOfMemory)
