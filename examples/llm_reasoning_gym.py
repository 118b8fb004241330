"""A task of reasoning-gym as it is: its problems as data, its own scorer as reward. Needs `pip install reasoning-gym`.

python examples/llm_reasoning_gym.py [STEPS]
"""

import sys

from rlalign.advantages import GroupRelative
from rlalign.llm import PolicyGradientConfig, PolicyGradientTrainer
from rlalign.llm.config import DataConfig, DatasetConfig, OptimConfig, RolloutConfig

TASK = "reasoning_gym:chain_sum"
EASY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
PROMPT = "State the final answer to the following arithmetic problem: 2 + 4 =\n6\n{prompt}\n"


def main(steps: int) -> None:
    data = DataConfig(
        train=DatasetConfig(source=TASK, args={"size": 300, "seed": 1, **EASY}),
        eval=DatasetConfig(source=TASK, args={"size": 100, "seed": 2, **EASY}),
        template=PROMPT,
    )
    config = PolicyGradientConfig(
        total_steps=steps,
        data=data,  # here for its template
        rollout=RolloutConfig(prompts_per_step=8, group_size=8, max_completion_tokens=8, stop=["\n"]),
        advantage=GroupRelative(scale=False),  # partial credit makes small spreads: do not blow them up
        aggregation="constant",
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=5),
    )
    trainer = PolicyGradientTrainer("smollm2-135m", TASK, data.train, config, eval_dataset=data.eval)
    trainer.fit()
    print(trainer.evaluate())


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 40)
