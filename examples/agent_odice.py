"""O-DICE learns from a file of recorded episodes; an environment is only asked how good the result is.

python examples/agent_odice.py [STEPS]
"""

import sys

import numpy as np

from rlalign.agents import BC, ODICE
from rlalign.agents.datasets import load_dataset, save_npz
from rlalign.agents.record import record


def main(updates: int) -> None:
    # Shipped: 100 Pendulum episodes, 60 random, 30 of a half-trained agent, 10 of a trained one. Yours can be a .npz
    # file, a folder of them (`rlalign.agents.datasets` says what is in one), or a Minari id.
    data = load_dataset("rlalign_envs:pendulum_mixed")
    print(f"{len(data.transitions)} steps, mean return {data.transitions.returns().mean():.0f}, {data.reference}")

    relu = {"hidden": [64, 64], "activation": "relu"}
    adam = {"learning_rate": 1e-3, "max_grad_norm": None}
    agent = ODICE(
        "Pendulum-v1",  # for evaluation only; leave it out when there is nothing to play in
        dataset=data,
        seed=0,
        gamma=0.95,
        gradient="orthogonal",  # or "true", "semi"
        conjugate_weight=0.6,  # tuned per dataset in the paper: 0.4 to 0.8
        network=relu,
        optim=adam,
        critic_network={**relu, "layer_norm": True},
        critic_optim=adam,
    )
    agent.fit(total_updates=updates)
    print("O-DICE:", agent.evaluate(episodes=20))

    # What it does can be recorded in turn, here with a fifth of random actions, and imitated from the file.
    found = record(agent, kind="medium", noise=0.2, episodes=5, seed=1, reference=data.reference)
    save_npz(found.transitions, "pendulum_again.npz", reference=found.reference)
    clone = BC(dataset="pendulum_again.npz", seed=0, network=relu)  # no environment at all
    print("an untrained clone:", clone.predict(np.array([1.0, 0.0, 0.0], dtype=np.float32))[0])


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 10_000)
