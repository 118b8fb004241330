"""The scenarios of `test_two_processes`, run by one process or by two: argv is the tiny checkpoint and a folder."""

import json
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
    # Last: accelerate fixes the precision of a process once.
    "autocast": {"accelerate": {"mixed_precision": "bf16"}, **merged(TWICE, {"optim": {"micro_batch_tokens": 19}})},
}


def one_group(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Only the last prompt, which belongs to the second process, has anything to learn from."""
    even = even_length(completions)
    return [value if prompt == PROMPTS[3] else 1.0 for prompt, value in zip(prompts, even, strict=True)]


def abstains(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Judges only the longer prompts, so one process has fewer scored rows than the other."""
    even = even_length(completions)
    return [None if prompt in PROMPTS[:1] else value for prompt, value in zip(prompts, even, strict=True)]


REWARDS = {"one_group_with_signal": one_group, "one_group_twice": one_group, "abstains": abstains}


def run(name: str, checkpoint: str, out: Path) -> None:
    from rlalign.llm.trainer import PolicyGradientTrainer

    base = {"total_steps": 3, "eval": {"every": 2}, "model": {"name": checkpoint, "device": "cpu"}}
    torch.manual_seed(0)
    trainer = PolicyGradientTrainer(
        checkpoint,
        REWARDS.get(name, even_length),
        PROMPTS,
        settings(**merged(base, SCENARIOS[name])),
        eval_dataset=[f"tell {number}" for number in range(5)],
        run_dir=out / name,
    )
    rollouts, collect = [], trainer.collect

    def recorded():
        rollouts.append(collect())
        return rollouts[-1]

    trainer.collect = recorded  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit()
    if trainer.accelerator.is_main_process:
        save_file({n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}, out / f"{name}.weights")
        state = {
            f"{step}/{key}": value for step, item in enumerate(rollouts) for key, value in item.state_dict().items()
        }
        save_file({key: value.contiguous() for key, value in state.items()}, out / f"{name}.rollouts")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    checkpoint, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[3:] or SCENARIOS:
        print(json.dumps({"scenario": name}), flush=True)
        run(name, checkpoint, out)


if __name__ == "__main__":
    main()
