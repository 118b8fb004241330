"""The scenarios of `test_two_diffusion_processes`, run by one process or by two: argv is a folder."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlalign.diffusion.dso import DSOTrainer
from tests.diffusion.half_plane import CLASSES, RightHalf, untrained
from tests.diffusion.small_runs import PretendSimulator, merged, points_trainer, to_the_right

SCENARIOS: dict[str, dict[str, Any]] = {
    "guard": {"eval": {"every": 2, "samples": 7}, "average": {"every": 1}, "update_epochs": 2},
    "plain_kl": {"guard": False, "objective": {"kl_coef": 0.1}, "micro_batch": 5},
    "window": {"rollout": {"window": 2, "same_noise": True, "batch_size": 3}, "advantage": "per_prompt_running"},
    "one_group_with_signal": {"minibatches": 4},
    "unknown_outcomes": {"advantage": "beta_normalized"},
}
ROUNDS: dict[str, dict[str, Any]] = {
    "dso_two_rounds": {"lora": {"r": 2, "alpha": 4.0}, "average": {"decay": 0.5, "every": 1}},
    "dso_all_weights": {"objective": {"kind": "anchored_dro", "beta": 2.0}, "optim": {"micro_batch": 2}},
}
"""Of DSO. Counts of samples and pairs are odd, so that the processes have unequal shares."""
DSO: dict[str, Any] = {
    "total_updates": 4,
    "data": {"samples": 25, "rounds": 2, "num_inference_steps": 3, "batch_size": 5},
    "optim": {"pairs_per_step": 7, "learning_rate": 1e-3},
    "eval": {"every": 2, "samples": 7, "num_inference_steps": 3, "pictures": 0},
    "lora": None,
}


def one_group(samples: Any, prompts: Any) -> list[float]:
    """Only samples of the first label differ, so in some minibatches one process has no gradient of its own."""
    return [
        value if prompt == 0 else 1.0 for value, prompt in zip(to_the_right(samples, prompts), prompts, strict=True)
    ]


def run(name: str, out: Path) -> None:
    rewards = {"one_group_with_signal": one_group, "unknown_outcomes": PretendSimulator(unknown_below=-0.5)}
    settings = merged({"total_steps": 3, "guard": True}, SCENARIOS[name])
    trainer = points_trainer(out / name, rewards.get(name, to_the_right), **settings)
    rollouts, collect = [], trainer.collect

    def recorded() -> Any:
        rollouts.append(collect())
        return rollouts[-1]

    trainer.collect = recorded  # type: ignore[method-assign]
    trainer.fit()
    save_weights(trainer, name, out)
    if trainer.accelerator.is_main_process:
        named = {f"{k}/{key}": value for k, item in enumerate(rollouts) for key, value in item.state_dict().items()}
        save_file({key: value.contiguous() for key, value in named.items()}, f"{out / name}.rollouts")


def run_rounds(name: str, out: Path) -> None:
    """The main process leaves each round's samples in the run's folder; the others look nowhere but into memory."""
    prompts = [*CLASSES, "low"]  # three, so that a process does not get all samples of one prompt
    trainer = DSOTrainer(untrained(), prompts, RightHalf(y_limit=1.5), run_dir=out / name, **merged(DSO, ROUNDS[name]))
    trainer.fit()
    save_weights(trainer, name, out)


def save_weights(trainer: Any, name: str, out: Path) -> None:
    weights = {key: value.detach().clone() for key, value in trainer.tuned.parameters.items()}
    save_file(weights, f"{out / name}.weights-{trainer.accelerator.process_index}")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[2:] or [*SCENARIOS, *ROUNDS]:
        print(json.dumps({"scenario": name}), flush=True)
        (run if name in SCENARIOS else run_rounds)(name, out)


if __name__ == "__main__":
    main()
