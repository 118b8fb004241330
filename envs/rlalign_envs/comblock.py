"""The continuous combination lock of HNPG: H right choices in a row, a decoy reward, rotated noisy observations.

Zhou, Sekhari, Song & Sun 2023 (arXiv:2311.08384), section 5; constants of YifeiZhou02/HNPG lock_continuous.py.
"""

from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from rlalign_envs.rows import RowsVectorEnv

CHOICES = 10
TEMPERATURE = 0.1
NOISE = 0.1
ANTI_REWARD = 0.1
BROKEN = 2
"""Latent state after a wrong choice; it is never left. States 0 and 1 are good."""

AntiShaped = Literal["official", "paper"]
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


class Lock:
    """Dynamics of the lock over rows of episodes, with nothing of Gymnasium: every draw is from the given generator.

    Latent states 0 and 1 are good, each with one right choice per step. An action a in R^10 makes choice i with
    probability softmax(a / 0.1)_i. The right one leads to state 0 or 1 with equal chance, any other to state 2 for
    good. The right choice at the last step pays 1. Observations are

        Hadamard_D z,   D = 2^ceil(log2(H + 4)),   z = N(0, 0.1) in the first H + 3 places, + 1 at state, + 1 at 3 + h

    with h counted after the step: 0 at the start, H at the end.

    Args:
        horizon: Steps of every episode, H.
        anti_shaped: Where the decoy reward of 0.1 is paid, with probability one half: `official`, as the published code
            does, at the last step when the choice is not right or the state is 2 already; `paper`, as the text
            says, at any step that leaves the good states.
        lock_seed: Draws the right choices. Training and evaluation need the same; their other draws are apart from it.
    """

    def __init__(self, horizon: int, *, anti_shaped: AntiShaped = "official", lock_seed: int = 0) -> None:
        if horizon < 1:
            raise ValueError(f"`horizon` must be at least 1, got {horizon}.")
        if anti_shaped not in ("official", "paper"):
            raise ValueError(f"`anti_shaped` must be official or paper, got {anti_shaped!r}.")
        self.horizon, self.anti_shaped = horizon, anti_shaped
        self.right_choices = np.random.default_rng(lock_seed).integers(CHOICES, size=(2, horizon))
        """The right choice in states 0 and 1 at each step."""
        self.size = 2 ** int(np.ceil(np.log2(horizon + 4)))
        self._rotation = hadamard(self.size)

    def start(self, count: int, generator: np.random.Generator) -> Ints:
        """States of `count` new episodes: 0 or 1 with equal chance."""
        return (generator.random(count) < 0.5).astype(np.int64)

    def observe(self, states: Ints, elapsed: Ints, generator: np.random.Generator) -> NDArray[np.float32]:
        """What is seen in these states after this many steps, `[rows, D]`."""
        rows = np.arange(len(states))
        z = np.zeros((len(states), self.size))
        z[:, : self.horizon + 3] = NOISE * generator.standard_normal((len(states), self.horizon + 3))
        z[rows, states] += 1
        z[rows, 3 + elapsed] += 1
        return (z @ self._rotation).astype(np.float32)

    def advance(
        self, states: Ints, elapsed: Ints, actions: Floats, generator: np.random.Generator
    ) -> tuple[Ints, NDArray[np.float64]]:
        """Next states and rewards of actions `[rows, 10]` taken after `elapsed` steps of each row's episode."""
        draw, switch, pay = generator.random((len(states), 3)).T
        good = states < BROKEN
        right = good & (_choose(actions, draw) == self.right_choices[np.minimum(states, 1), elapsed])
        last = elapsed == self.horizon - 1
        # Which good state comes after the last step matters to nobody; the published code stays where it is.
        following = np.where(last | (switch >= 0.5), states, 1 - states)
        decoy = last & ~right if self.anti_shaped == "official" else good & ~right
        rewards = np.where(last & right, 1.0, np.where(decoy & (pay < 0.5), ANTI_REWARD, 0.0))
        return np.where(right, following, BROKEN), rewards

    def expert_actions(
        self, states: Ints, elapsed: Ints, generator: np.random.Generator, epsilon: float
    ) -> NDArray[np.float32]:
        """One-hot actions at the right choice, or uniform ones from [0, 1]^10 with probability epsilon.

        In state 2, where nothing matters, the one of state 1, as in HNPG's collect_offline.py.
        """
        best = np.eye(CHOICES, dtype=np.float32)[self.right_choices[np.minimum(states, 1), elapsed]]
        explore = generator.random(len(states)) < epsilon
        return np.where(explore[:, None], generator.random((len(states), CHOICES), dtype=np.float32), best)

    def observation_space(self) -> gym.spaces.Box:
        """Bounds ten standard deviations of noise out: finite, as most tools want them, and never reached."""
        bound = 2.0 + 10.0 * NOISE * np.sqrt(self.horizon + 3)
        return gym.spaces.Box(-bound, bound, (self.size,), dtype=np.float32)

    @staticmethod
    def action_space() -> gym.spaces.Box:
        """The published [0, 1]^10. Any real action is taken as it is; agents need not clip to the space."""
        return gym.spaces.Box(0.0, 1.0, (CHOICES,), dtype=np.float32)


class CombinationLock(gym.Env[Any, Any]):
    """One combination lock; the arguments are those of `Lock`."""

    metadata = {"render_modes": []}

    def __init__(
        self,
        horizon: int = 5,
        *,
        anti_shaped: AntiShaped = "official",
        lock_seed: int = 0,
        render_mode: str | None = None,
    ) -> None:
        self.lock = Lock(horizon, anti_shaped=anti_shaped, lock_seed=lock_seed)
        self.render_mode = render_mode
        self.observation_space, self.action_space = self.lock.observation_space(), self.lock.action_space()
        self.states, self.elapsed = np.zeros((2, 1), dtype=np.int64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.states = self.lock.start(1, self.np_random)
        self.elapsed = np.zeros(1, dtype=np.int64)
        return self.lock.observe(self.states, self.elapsed, self.np_random)[0], {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        if self.elapsed[0] == self.lock.horizon:
            raise ValueError(f"the episode is over after {self.lock.horizon} steps: call `reset`.")
        actions = np.asarray(action)[None]
        self.states, rewards = self.lock.advance(self.states, self.elapsed, actions, self.np_random)
        self.elapsed = self.elapsed + 1
        observation = self.lock.observe(self.states, self.elapsed, self.np_random)[0]
        return observation, float(rewards[0]), bool(self.elapsed[0] == self.lock.horizon), False, {}


class CombinationLockVectorEnv(RowsVectorEnv):
    """Many combination locks with the same right choices, stepped together; one row equals `CombinationLock`."""

    def __init__(
        self,
        num_envs: int = 1,
        *,
        horizon: int = 5,
        anti_shaped: AntiShaped = "official",
        lock_seed: int = 0,
        max_episode_steps: int | None = None,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
    ) -> None:
        self.lock = Lock(horizon, anti_shaped=anti_shaped, lock_seed=lock_seed)
        super().__init__(
            num_envs=num_envs,
            single_observation_space=self.lock.observation_space(),
            single_action_space=self.lock.action_space(),
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
        )
        self.states = np.zeros(num_envs, dtype=np.int64)

    def start(self, rows: Ints) -> NDArray[np.float32]:
        self.states[rows] = self.lock.start(len(rows), self.np_random)
        return self.lock.observe(self.states[rows], self.elapsed[rows], self.np_random)

    def advance(
        self, rows: Ints, actions: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.bool_]]:
        elapsed = self.elapsed[rows]
        self.states[rows], rewards = self.lock.advance(self.states[rows], elapsed, actions, self.np_random)
        observations = self.lock.observe(self.states[rows], elapsed + 1, self.np_random)
        return observations, rewards, elapsed + 1 == self.lock.horizon


def comblock_offline(
    horizon: int = 5,
    episodes: int = 50_000,
    *,
    epsilon: float | None = None,
    seed: int = 0,
    anti_shaped: AntiShaped = "official",
    lock_seed: int = 0,
) -> dict[str, NDArray[Any]]:
    """Play whole episodes of the epsilon-greedy expert: HNPG's offline data.

    Args:
        epsilon: Chance of a uniformly random action at each step; None is the paper's 1 / horizon.
        seed: Of the episodes; `lock_seed` is that of the right choices.

    Returns:
        Arrays with the step first, then the episode: `observations` and `next_observations` `[H, N, D]` (views of one
        array), `actions` `[H, N, 10]`, `rewards`, `terminated`, `truncated` and the latent `states` `[H, N]`.
    """
    lock = Lock(horizon, anti_shaped=anti_shaped, lock_seed=lock_seed)
    epsilon = 1 / horizon if epsilon is None else epsilon
    generator = np.random.default_rng(seed)
    observations = np.empty((horizon + 1, episodes, lock.size), dtype=np.float32)
    actions = np.empty((horizon, episodes, CHOICES), dtype=np.float32)
    rewards = np.empty((horizon, episodes), dtype=np.float32)
    states = np.empty((horizon + 1, episodes), dtype=np.int64)
    elapsed = np.zeros(episodes, dtype=np.int64)
    states[0] = lock.start(episodes, generator)
    observations[0] = lock.observe(states[0], elapsed, generator)
    for step in range(horizon):
        actions[step] = lock.expert_actions(states[step], elapsed, generator, epsilon)
        states[step + 1], rewards[step] = lock.advance(states[step], elapsed, actions[step], generator)
        elapsed = elapsed + 1
        observations[step + 1] = lock.observe(states[step + 1], elapsed, generator)
    terminated = np.zeros((horizon, episodes), dtype=bool)
    terminated[-1] = True
    return {
        "observations": observations[:-1],
        "actions": actions,
        "rewards": rewards,
        "next_observations": observations[1:],
        "terminated": terminated,
        "truncated": np.zeros_like(terminated),
        "states": states[:-1],
    }


def hadamard(size: int) -> NDArray[np.float64]:
    """Sylvester's matrix of +1 and -1 with orthogonal rows; `size` is a power of 2. It is its own transpose."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _choose(actions: Floats, draw: NDArray[np.float64]) -> Ints:
    """Draw from softmax(a / 0.1), by inversion. The largest exponent is subtracted: exp(a / 0.1) alone overflows."""
    if not np.isfinite(actions).all():
        rows = np.flatnonzero(~np.isfinite(actions).all(-1)).tolist()
        raise ValueError(f"actions must be finite numbers; those in rows {rows} are not.")
    scaled = actions.astype(np.float64) / TEMPERATURE
    cumulative = np.exp(scaled - scaled.max(-1, keepdims=True)).cumsum(-1)
    return (cumulative < draw[:, None] * cumulative[:, -1:]).sum(-1)
