"""The scenarios of `test_two_processes`, run by one process or by two: argv is the tiny checkpoint and a folder."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.llm.tiny_runs import even_length, merged, settings

PROMPTS = [f"say {number}{'!' * number}" for number in range(4)]
TWICE = {"optim": {"update_epochs": 2, "minibatches": 2}}
SCENARIOS: dict[str, dict[str, Any]] = {
    "token": {},
    "token_twice": TWICE,
    "group_twice": {"aggregation": "group", **TWICE},
    "sequence_sum_bnpo": {"method": "bnpo", "aggregation": "sequence_sum"},
    "small_micro_batches": {"aggregation": "sequence_mean", "optim": {"micro_batch_tokens": 16}},
    "kl_and_entropy": {"kl": {"coef": 0.1}, "entropy_coef": 0.01, **TWICE},
    "kl_in_reward": {"kl": {"coef": 0.1, "where": "reward"}},
    "greedy_baseline": {"advantage": {"type": "greedy_baseline"}},
    "adapter": {"peft": {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": True}},
    "one_group_with_signal": {},
    "one_group_twice": TWICE,
    "abstains": {},
    "fails_on_one_process": {},
    "stopped_by_one_process": {"checkpoint": {"every": 1}},
}


def one_group(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Only one prompt has anything to learn from, so in most steps one process has no gradient of its own."""
    even = even_length(completions)
    return [value if prompt == PROMPTS[3] else 1.0 for prompt, value in zip(prompts, even, strict=True)]


def abstains(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Judges all prompts but one, so one process has fewer scored rows than the other."""
    even = even_length(completions)
    return [None if prompt == PROMPTS[0] else value for prompt, value in zip(prompts, even, strict=True)]


def fails(prompts: list[str], completions: list[str], trainer_state: Any, **columns: Any) -> list[float]:
    """Cannot grade one of the prompts after the first step."""
    if PROMPTS[1] in prompts and trainer_state.global_step > 0:
        raise KeyError("answer")
    return even_length(completions)


REWARDS = {
    "one_group_with_signal": one_group,
    "one_group_twice": one_group,
    "abstains": abstains,
    "fails_on_one_process": fails,
}


def make(name: str, checkpoint: str, out: Path, callback: Any = None) -> Any:
    from rlalign.llm.trainer import PolicyGradientTrainer

    base = {"total_steps": 3, "eval": {"every": 2}, "model": {"name": checkpoint, "device": "cpu"}}
    return PolicyGradientTrainer(
        checkpoint,
        REWARDS.get(name, even_length),
        PROMPTS,
        settings(**merged(base, SCENARIOS[name])),
        eval_dataset=[f"tell {number}" for number in range(5)],
        run_dir=out / name,
        callback=callback,
    )


def run(name: str, checkpoint: str, out: Path) -> None:
    trainer = make(name, checkpoint, out)
    rollouts = record_rollouts(trainer)
    trainer.fit()
    keep(trainer, rollouts, out / name)


def run_and_stop(name: str, checkpoint: str, out: Path) -> None:
    """A signal reaches the last process only, and all of them must stop at the same step; then they go on."""
    from rlalign.training.signals import Interrupted

    def strike(step: int, metrics: Any) -> None:
        accelerator = stopped.accelerator
        if step == 2 and accelerator.process_index == accelerator.num_processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = make(name, checkpoint, out, callback=strike)
    rollouts = record_rollouts(stopped)
    try:
        stopped.fit()
    except Interrupted:
        again = make(name, checkpoint, out)
        rollouts = rollouts[:2]
        rollouts.extend(record_rollouts(again, fit=True))
        keep(again, rollouts, out / name)


def record_rollouts(trainer: Any, *, fit: bool = False) -> list[Any]:
    rollouts, collect = [], trainer.collect

    def recorded() -> Any:
        rollouts.append(collect())
        return rollouts[-1]

    trainer.collect = recorded
    if fit:
        trainer.fit(resume=True)
    return rollouts


def keep(trainer: Any, rollouts: list[Any], path: Path) -> None:
    """Every process's weights, and the rollouts as the first process saw them."""
    weights = {name: value.detach().clone() for name, value in trainer.policy.model.named_parameters()}
    save_file(weights, f"{path}.weights-{trainer.accelerator.process_index}")
    if trainer.accelerator.is_main_process:
        named = {
            f"{step}/{key}": value for step, item in enumerate(rollouts) for key, value in item.state_dict().items()
        }
        save_file({key: value.contiguous() for key, value in named.items()}, f"{path}.rollouts")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    checkpoint, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[3:] or SCENARIOS:
        print(json.dumps({"scenario": name}), flush=True)
        (run_and_stop if name == "stopped_by_one_process" else run)(name, checkpoint, out)


if __name__ == "__main__":
    main()
