"""Reward functions of your own: TRL's signature, any subset of the arguments, one number or None per completion.

rlalign check examples/write_your_own_reward.py:close      # try it on sample completions, in seconds
python examples/write_your_own_reward.py [STEPS]
"""

import sys

from rlalign_envs.arithmetic import numbers_in, problems


def close(completions, answer):
    """Partial credit, from the dataset's column `answer`: 1 for the number itself, less the further away."""
    return [_credit(_text(completion), right) for completion, right in zip(completions, answer, strict=True)]


def brief(completion_ids, answer, **_):
    """Half a point for at most four tokens; None where the function has no opinion: here, three-digit answers."""
    lengths = map(len, completion_ids)
    return [0.5 * (n <= 4) if len(right) < 3 else None for n, right in zip(lengths, answer, strict=True)]


def _text(completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]  # plain text, or a chat message


def _credit(text: str, right: str) -> float:
    found = numbers_in(text)
    return 1.0 / (1.0 + abs(float(found[0]) - float(right))) if found else 0.0


def main(steps: int) -> None:
    # Imported here, because each reward function gets a process of its own that imports this file and needs no torch.
    from rlalign.advantages import BetaNormalized
    from rlalign.llm import BNPOConfig, BNPOTrainer
    from rlalign.llm.config import OptimConfig, RolloutConfig

    config = BNPOConfig(
        total_steps=steps,
        rollout=RolloutConfig(prompts_per_step=8, group_size=8, max_completion_tokens=8, stop=["\n"]),
        advantage=BetaNormalized(reward_range=(0.0, 1.5)),  # what the weighted sum of the rewards can reach
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=5),
    )
    # Named by file, a function runs in its own process: a crash or an endless loop costs one row, not the run.
    rewards = [f"{__file__}:close", f"{__file__}:brief"]
    train = problems(500, digits=2, template="examples", conversational=False)
    BNPOTrainer("smollm2-135m", rewards, train, config).fit()


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 40)
