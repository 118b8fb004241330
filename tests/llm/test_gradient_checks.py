"""Options under which an update would not be the gradient of the loss are refused before a model is read."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig

from rlalign.config import ConfigError
from rlalign.llm.gradient_checks import require_true_gradients, sharding_notes
from tests.llm.tiny_runs import largest_difference, make_trainer, weights


@pytest.fixture(autouse=True)
def a_fresh_accelerator() -> Iterator[None]:
    """Its settings are those of the whole process."""
    for state in (AcceleratorState._reset_state, GradientState._reset_state):
        state()
    yield
    for state in (AcceleratorState._reset_state, GradientState._reset_state):
        state()


class Stated(Accelerator):
    """What an `Accelerator` on other machines would say of itself."""

    gradient_accumulation_steps = 1
    mixed_precision = "no"
    distributed_type = DistributedType.MULTI_GPU

    def __init__(self, **stated: Any):
        vars(self).update(stated)


def test_accumulation_would_divide_the_gradient_so_it_is_refused(tiny_model, tiny_tokenizer, tmp_path):
    parameter = torch.zeros(1, requires_grad=True)
    Accelerator(cpu=True, gradient_accumulation_steps=4).backward(parameter.sum())
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.25]  # what accelerate does
    with pytest.raises(ConfigError, match=r"`accelerate.gradient_accumulation_steps`=4 .*`optim.micro_batch_tokens`"):
        make_trainer(tiny_model, tiny_tokenizer, tmp_path / "run", accelerate={"gradient_accumulation_steps": 4})


def test_accumulation_from_the_environment_is_refused_too(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(ConfigError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        make_trainer(tiny_model, tiny_tokenizer, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_one_step_of_accumulation_and_no_mixed_precision_change_nothing(tiny_model, tiny_tokenizer, tmp_path):
    plain, named = (
        make_trainer(copy.deepcopy(tiny_model), tiny_tokenizer, tmp_path / name, accelerate=options).fit()
        for name, options in {
            "plain": {},
            "named": {"gradient_accumulation_steps": 1, "mixed_precision": "no"},
        }.items()
    )
    assert largest_difference(weights(plain.policy.model), weights(named.policy.model)) == 0.0


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_precisions_that_scale_the_loss_are_refused(precision):
    with pytest.raises(ConfigError, match=f"`accelerate.mixed_precision`={precision}.*bf16 or no"):
        require_true_gradients(Stated(mixed_precision=precision))


@pytest.mark.parametrize("kind", [DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_programs_that_own_the_backward_pass_are_refused(kind):
    with pytest.raises(ConfigError, match=f"{kind.value} wants to own the optimizer"):
        require_true_gradients(Stated(distributed_type=kind))


def test_sharded_weights_are_said_to_be_untested():
    sharded = Stated(distributed_type=DistributedType.FSDP)
    require_true_gradients(sharded)
    assert "FSDP is untested" in sharding_notes(sharded)[0]
    assert sharding_notes(Stated()) == []


def test_float16_weights_are_not_trained_but_may_carry_an_adapter(tiny_model, tiny_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="the weights to train are float16"):
        make_trainer(copy.deepcopy(tiny_model).half(), tiny_tokenizer, tmp_path / "run")
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(tiny_model.half(), tiny_tokenizer, tmp_path / "run", peft_config=adapter)
    assert {value.dtype for value in weights(trainer.policy.model).values()} == {torch.float32}


def test_bfloat16_weights_are_said_not_to_move(tiny_model, tiny_tokenizer, tmp_path):
    """Trap: 1 + 1e-6 is 1 in bfloat16, and so is 1 + 0.003."""
    assert float(torch.tensor(1.0).bfloat16() + 0.003) == 1.0
    options = {"optim": {"learning_rate": 1e-6}}
    low = make_trainer(copy.deepcopy(tiny_model).bfloat16(), tiny_tokenizer, tmp_path / "low", **options)
    (note,) = [note for note in low.notes if "bfloat16" in note]
    assert "`optim.learning_rate`=1e-06 most will not move" in note
    high = make_trainer(tiny_model, tiny_tokenizer, tmp_path / "high", **options)
    assert not any("bfloat16" in note for note in high.notes)
