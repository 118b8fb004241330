"""No critic: episodes from the same start are compared with each other, weighted by BNPO as for language models.

The task is to cross four rooms within 50 steps, from anywhere: each episode succeeds (1) or does not (0).

python examples/agent_group_bnpo.py [STEPS]
"""

import sys

from rlalign.advantages import BetaNormalized
from rlalign.agents import PolicyGradientAgent


def main(steps: int) -> None:
    agent = PolicyGradientAgent(
        "rlalign_envs:FourRoom-v0",  # module:Id imports the module, which registers the environment
        kwargs={"random_start": True},
        seed=0,
        num_envs=64,  # eight starts ...
        group_size=8,  # ... with eight episodes each
        advantage=BetaNormalized(),  # any group estimator: LeaveOneOut(), GroupRelative(), MaxLikelihood(), ...
        update_epochs=4,
        minibatches=2,
        learning_rate=3e-3,
        before=True,
        deterministic=False,  # evaluate the policy as it is, not its most probable actions
        episodes=100,
    )
    for metrics in agent.steps(total_env_steps=steps):  # the same as `fit()`, with your own code in between
        if agent.iteration % 20 == 0:
            print(f"{metrics['signal/group_frac']:.0%} of the starts were sometimes reached and sometimes not")
    print(f"crosses the rooms in {agent.evaluate()['eval/return_mean']:.0%} of the episodes")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 100_000)
