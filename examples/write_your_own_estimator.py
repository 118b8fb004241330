"""An advantage estimator of your own: an object from `Rollout` to `TrainBatch`, put in the place of the built-in one.

python examples/write_your_own_estimator.py [STEPS]
"""

import sys

import torch

from rlalign.advantages.metrics import advantage_metrics
from rlalign.buffers import Rollout, TrainBatch
from rlalign.functional.masked import spread
from rlalign.llm import PolicyGradientConfig, PolicyGradientTrainer
from rlalign.llm.config import OptimConfig, RolloutConfig
from rlalign_envs.arithmetic import exact_match, problems


class WinRate:
    """A_i = mean over the group of sign(r_i - r_j): only the order of the rewards counts, not their scale."""

    needs: frozenset[str] = frozenset()  # optional fields of the rollout this one cannot do without

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}  # of the last call; joins the step's metrics

    def __call__(self, rollout: Rollout) -> TrainBatch:
        scored = rollout.scored  # False: the reward failed or abstained; such a rollout is compared with nobody
        rivals = (rollout.group[:, None] == rollout.group) & scored[:, None] & scored
        wins = torch.sign(rollout.outcome[:, None] - rollout.outcome) * rivals
        advantages = wins.sum(1) / rivals.sum(1).clamp(min=1)
        per_token = spread(advantages, rollout.mask)  # [B] -> [B, T], 0 at padding
        self.metrics = advantage_metrics(per_token, rollout, advantages)
        return TrainBatch.from_rollout(rollout, per_token)

    def state_dict(self) -> dict:  # what a resumed run must know; nothing here
        return {}

    def load_state_dict(self, state: dict) -> None:
        return None


def main(steps: int) -> None:
    config = PolicyGradientConfig(
        total_steps=steps,
        rollout=RolloutConfig(prompts_per_step=8, group_size=8, max_completion_tokens=16),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=5),
    )
    trainer = PolicyGradientTrainer("smollm2-135m", exact_match, problems(digits=1), config)
    trainer.estimator = WinRate()
    trainer.fit()


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 40)
