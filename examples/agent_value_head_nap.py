"""Two options of any critic and any network: values learned by classification, and weights that keep their size.

Prints, for the plain agent and for the one with both, how it plays, what its critic foresees, and what its weights did.

python examples/agent_value_head_nap.py [STEPS]
"""

import sys

from rlalign.agents import PPO
from rlalign.nn import HLGauss

SETTINGS = {
    "num_envs": 8,
    "rollout_steps": 128,
    "minibatch_size": 256,
    "learning_rate": 1e-3,
    "advantage": {"type": "gae", "gamma": 0.98, "gae_lambda": 0.9},
}
OPTIONS = {
    "plain": {},
    "both": {
        # A distribution over 51 bins. Without `low` and `high` its range is found from the returns, and widened.
        "value_head": HLGauss(num_bins=51),
        # A norm before each nonlinearity, and hidden weights scaled back after each step, or after every tenth.
        "normalize_and_project": {"every": 1},
        # Weights that do not grow take no effective learning rate away, so a schedule has to.
        "schedule": "linear",
    },
}


def main(steps: int) -> None:
    for name, options in OPTIONS.items():
        agent = PPO("CartPole-v1", seed=0, video=False, **SETTINGS, **options)
        metrics = list(agent.steps(total_env_steps=steps))[-1]
        print(f"\n{name}: return {agent.evaluate(episodes=20)['eval/return_mean']:.0f}")
        for metric in (
            "value/explained_variance",
            "value/support_low",
            "value/support_high",
            "value/outside_frac",
            "nap/norm_growth",
            "nap/effective_learning_rate",
        ):
            if metric in metrics:
                print(f"  {metric:<28} {metrics[metric]:.4g}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 40_000)
