"""An environment of your own: write it, have it checked, train on it.

python examples/agent_write_your_own_env.py [STEPS]
"""

import sys

import gymnasium as gym
import numpy as np

from rlalign.agents import PPO
from rlalign.agents.check_env import probe_environment


class Thermostat(gym.Env):
    """Keep a leaking room at 20 degrees: the action is the heating, the reward the distance."""

    def __init__(self):
        self.observation_space = gym.spaces.Box(-5.0, 5.0, (2,), np.float32)
        self.action_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.inside = self.outside = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)  # seeds self.np_random: draw everything from it, and episodes can be replayed
        self.inside, self.outside = self.np_random.uniform(10, 25), self.np_random.uniform(-5, 10)
        return self.observation(), {}

    def step(self, action):
        self.inside += 3.0 * float(action[0]) - 0.1 * (self.inside - self.outside)
        # observation, reward, terminated (the world ended), truncated (the clock did), info
        return self.observation(), -abs(self.inside - 20.0), False, False, {}

    def observation(self):
        return np.array([(self.inside - 20.0) / 10.0, self.outside / 10.0], dtype=np.float32).clip(-5, 5)


# In a module of yours, say rooms.py, this line makes `env.id: rooms:Thermostat-v0` work in every config,
# and `rlalign check rooms:Thermostat-v0` on the command line.
gym.register("Thermostat-v0", entry_point=lambda **_: Thermostat(), max_episode_steps=100)


def main(steps: int) -> None:
    print(probe_environment("Thermostat-v0"))
    agent = PPO("Thermostat-v0", num_envs=8, rollout_steps=128, minibatch_size=128, gamma=0.9, before=True)
    agent.fit(total_env_steps=steps)
    print(agent.evaluate(episodes=20))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 60_000)
