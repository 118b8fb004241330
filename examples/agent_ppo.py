"""PPO balances a pole with a critic that classifies returns (HL-Gauss): half a minute on one core.

python examples/agent_ppo.py [STEPS]
"""

import sys

import gymnasium as gym

from rlalign.agents import PPO


def main(steps: int) -> None:
    agent = PPO(
        "CartPole-v1",
        seed=0,
        num_envs=8,  # finds env.num_envs, as learning_rate finds optim.learning_rate
        rollout_steps=32,
        minibatch_size=256,
        update_epochs=20,
        learning_rate=1e-3,
        advantage={"type": "gae", "gamma": 0.98, "gae_lambda": 0.8},
        value_head="hl_gauss",  # with "mse" it is the PPO you know
        before=True,  # evaluate before training too: the report compares start by start
    )
    agent.fit(total_env_steps=steps)
    print(agent.evaluate(episodes=20))

    # The same agent, loaded from its files, plays one episode in an environment of your own making.
    agent.save("pole")
    agent = PPO.load("pole")
    env = gym.make("CartPole-v1")
    observation, _ = env.reset(seed=1)
    total, over = 0.0, False
    while not over:
        action, known = agent.predict(observation)  # `known` has log_prob and value
        observation, reward, terminated, truncated, _ = env.step(action)
        total, over = total + float(reward), terminated or truncated
    print(f"one more episode: {total:g}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 60_000)
