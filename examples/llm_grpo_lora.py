"""GRPO with a LoRA adapter and a KL penalty; the reference is the model with the adapter switched off.

python examples/llm_grpo_lora.py [STEPS]
"""

import sys

from peft import LoraConfig

from rlalign.advantages import GroupRelative
from rlalign.llm import PolicyGradientConfig, PolicyGradientTrainer
from rlalign.llm.config import ClippedSurrogate, KLConfig, OptimConfig, RolloutConfig
from rlalign_envs.arithmetic import exact_match, problems


def main(steps: int) -> None:
    config = PolicyGradientConfig(
        total_steps=steps,
        rollout=RolloutConfig(prompts_per_step=8, group_size=8, max_completion_tokens=16),
        advantage=GroupRelative(),  # (r - mean) / (std + 1e-4) within each group
        objective=ClippedSurrogate(clip_low=0.2, clip_high=0.2),
        aggregation="sequence_mean",  # a completion counts once, however long it is
        kl=KLConfig(coef=0.04),
        optim=OptimConfig(learning_rate=2e-4, warmup_steps=5),  # adapters take larger steps than whole models
    )
    trainer = PolicyGradientTrainer(
        "smollm2-135m",
        exact_match,  # the last number of the answer must be right
        problems(digits=1),  # chat messages: "What is 3 + 4?"
        config,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for metrics in trainer.steps():  # the same as `fit()`, with your own code between the steps
        if metrics.get("policy/kl", 0.0) > 0.5:
            print(f"drifting: {metrics['policy/kl']:.2f} nats from the reference")
    trainer.save_model("smollm2-sums-adapter")  # loads with peft


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 40)
