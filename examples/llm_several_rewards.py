"""Two rewards with weights: BNPO estimates each on its own and averages the advantages.

python examples/llm_several_rewards.py [STEPS]
"""

import sys

from rlalign.advantages import BetaNormalized
from rlalign.llm import BNPOConfig, BNPOTrainer
from rlalign.llm.config import OptimConfig, RewardConfig, RolloutConfig
from rlalign_envs.arithmetic import problems

REWARDS = [
    RewardConfig(function="rlalign_envs.arithmetic:exact_match", weight=1.0),  # is the number right?
    RewardConfig(function="rlalign_envs.arithmetic:format_reward", weight=0.5),  # is it nothing but a number?
]


def main(steps: int) -> None:
    config = BNPOConfig(
        total_steps=steps,
        rollout=RolloutConfig(prompts_per_step=8, group_size=8, max_completion_tokens=16),
        # A = sum_k w_k A_k / sum_k w_k. Each function keeps its own pass rates and Beta fit (bnpo/<function>_a ...), so
        # `reward_range` is that of a single function, and one that is equal everywhere does not drown the other.
        advantage=BetaNormalized(decompose=True, reward_range=(0.0, 1.0)),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=5),
    )
    train = problems(digits=1, template="answer_only")
    trainer = BNPOTrainer("smollm2-135m", REWARDS, train, config, callback=show)
    trainer.fit()


def show(step: int, metrics) -> None:
    """Called after every step."""
    parts = {name: value for name, value in metrics.items() if name.startswith("reward/") and name.endswith("_mean")}
    print(step, {name: round(value, 3) for name, value in parts.items()})


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 40)
