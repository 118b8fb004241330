"""Small offline problems, and updates of offline methods written out the authors' way."""

import torch
from torch import Tensor

from rlalign.agents.config import AgentOptimConfig, NetworkConfig
from rlalign.buffers.transitions import Episode, Transitions

SMALL = NetworkConfig(hidden=[16, 16], activation="relu")


def small(*, lr=1e-3, **changes):
    """Settings shared by quick tests: two layers of 16 units, plain Adam for every network."""
    adam = AgentOptimConfig(learning_rate=lr, eps=1e-8, max_grad_norm=None)
    return {"network": SMALL, "critic_network": SMALL, "optim": adam, "critic_optim": adam} | changes


def random_batch(seed, rows=32, features=3, *, actions=2, terminated=None):
    """Rows without order; `actions` is a count of choices, or None for two continuous dimensions."""
    generator = torch.Generator().manual_seed(seed)
    observations, following = torch.randn(2, rows, features, generator=generator)
    if actions is None:
        taken = torch.rand(rows, 2, generator=generator) * 1.8 - 0.9
    else:
        taken = torch.randint(actions, (rows,), generator=generator)
    ended = torch.rand(rows, generator=generator) < 0.2 if terminated is None else torch.full((rows,), terminated)
    return Transitions(
        observations=observations,
        actions=taken,
        rewards=torch.randn(rows, generator=generator),
        next_observations=following,
        terminated=ended,
        truncated=torch.zeros(rows, dtype=torch.bool),
        episode=torch.arange(rows),
        step=torch.zeros(rows, dtype=torch.int64),
    )


def stitched_chain(scale=1.0):
    """A fork whose better branch is only seen in pieces.

    From the fork, action 1 ends at once with 3 (seven episodes); action 0 leads to a door (three episodes), where all
    who came from the fork took action 1 for nothing. Three others began at the door and took action 0, for 10. So no
    episode from the fork has more than 3, while the best path, 0 and then 0, is worth 10.
    """
    fork, door, end = torch.eye(3)

    def episode(states: list[Tensor], actions: list[int], reward: float) -> Episode:
        last = torch.arange(len(actions)) == len(actions) - 1
        return Episode(
            observations=torch.stack(states),
            actions=torch.tensor(actions),
            rewards=scale * reward * last.float(),
            terminated=last,
            truncated=torch.zeros_like(last),
        )

    episodes = [episode([fork, end], [1], 3.0) for _ in range(7)]
    episodes += [episode([fork, door, end], [0, 1], 0.0) for _ in range(3)]
    episodes += [episode([door, end], [0], 10.0) for _ in range(3)]
    return Transitions.from_episodes(episodes), fork, door


def choice(learner, state):
    """Probability of action 0."""
    with torch.no_grad():
        return learner.policy(state[None]).softmax(-1)[0, 0].item()


def train(learner, transitions, updates, *, rows=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        learner.update(transitions.select(torch.randint(len(transitions), (rows,), generator=generator)))
    return learner


def same_weights(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
