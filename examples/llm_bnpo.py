"""Fine-tune SmolLM2-135M-Instruct on two-digit sums with BNPO: no download, two CPU cores are enough.

python examples/llm_bnpo.py [STEPS]
"""

import re
import sys

from rlalign.llm import BNPOConfig, BNPOTrainer
from rlalign.llm.config import OptimConfig, RolloutConfig
from rlalign_envs.arithmetic import problems

EXAMPLES = "7 + 2 = 9\n15 + 11 = 26\n36 + 22 = 58\n{left} {operator} {right} ="


def correct(completions, answer, **_):
    """1 where the first number of the completion is the answer. Columns of the dataset arrive under their names."""
    found = [re.search(r"\d+", text) for text in completions]
    return [float(match is not None and match[0] == right) for match, right in zip(found, answer, strict=True)]


def main(steps: int) -> None:
    # Rows with a `prompt`; no number in the eval split is ever an operand in the train split.
    sums = {"high": 50, "held_out_share": 0.5, "template": EXAMPLES, "conversational": False}
    train, held_out = problems(**sums), problems(200, split="eval", **sums)

    config = BNPOConfig(
        total_steps=steps,
        rollout=RolloutConfig(prompts_per_step=16, group_size=8, max_completion_tokens=5, stop=["\n"]),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=5),
    )
    trainer = BNPOTrainer("smollm2-135m", correct, train, config, eval_dataset=held_out)
    trainer.fit()
    trainer.save_model("smollm2-sums")  # loads with plain transformers


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 60)
