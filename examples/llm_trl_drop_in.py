"""Stay in TRL: its GRPOTrainer with BNPO's advantages. One import differs from a TRL script.

python examples/llm_trl_drop_in.py [STEPS]
"""

import sys

from datasets import Dataset
from trl import GRPOConfig

from rlalign.llm.config import ModelConfig
from rlalign.llm.models import resolve_source
from rlalign.llm.trl_compat import BNPOTrainer as GRPOTrainer  # was: from trl import GRPOTrainer
from rlalign_envs.arithmetic import exact_match, problems


def main(steps: int) -> None:
    args = GRPOConfig(
        output_dir="runs/trl-bnpo",
        max_steps=steps,
        learning_rate=1e-5,
        num_generations=8,
        per_device_train_batch_size=16,
        max_completion_length=16,
        # The paper's objective in TRL's words: mean over completions of token sums, clip 0.2/0.28, dual clip 10.
        loss_type="luspo",
        importance_sampling_level="token",
        epsilon=0.2,
        epsilon_high=0.28,
        delta=10.0,
        beta=0.0,
        # TRL's defaults are bfloat16 and gradient checkpointing, both slow on most CPUs.
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = GRPOTrainer(
        model=resolve_source(ModelConfig(name="smollm2-135m")),  # TRL takes a Hub id or a directory
        reward_funcs=exact_match,
        args=args,
        train_dataset=Dataset.from_list(problems(digits=1)),
    )
    trainer.train()
    trainer.save_model("smollm2-sums-trl")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 20)
