"""Make the offline datasets that ship in `envs/rlalign_envs/data`: train two experts, record, and write checksums.

    python benchmarks/make_datasets.py                  # about two minutes on one core

CartPole and Pendulum come from PPO agents trained here (seed 0) and recorded with seed 0; four rooms and the lock from
their own generators (seed 0). On another kind of processor PPO rounds differently, so the agents, and the bytes, may
differ; `datasets.json` holds the fingerprints of what is shipped. Scores are rlalign scores, not D4RL's.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlalign.agents import PPO
from rlalign.agents.datasets import Reference, save_npz
from rlalign.agents.record import Recording, record
from rlalign.buffers.transitions import Episode, Transitions
from rlalign_envs.comblock import comblock_offline
from rlalign_envs.four_room import four_room_offline

DATA = Path(__file__).parents[1] / "envs" / "rlalign_envs" / "data"
PPO_SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "total_env_steps": 100_000,
        "num_envs": 8,
        "rollout_steps": 32,
        "minibatch_size": 256,
        "update_epochs": 20,
        "advantage": {"type": "gae", "gamma": 0.98, "gae_lambda": 0.8},
    },
    "Pendulum-v1": {
        "total_env_steps": 150_000,
        "num_envs": 16,
        "rollout_steps": 256,
        "minibatch_size": 256,
        "update_epochs": 10,
        "advantage": {"type": "gae", "gamma": 0.9, "gae_lambda": 0.95},
        "normalize": {"rewards": True},
    },
}
"""Learning rate 1e-3, falling linearly, for both."""
PENDULUM_MEDIUM_STEP = 28_000
"""The Pendulum checkpoint that counts as medium is the first after this step."""
CARTPOLE_NOISE = 0.5
"""CartPole's medium is the expert with this share of uniform actions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DATA)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    runs = Path(tempfile.mkdtemp())
    try:
        sets = cartpole(runs) | pendulum(runs)
    finally:
        shutil.rmtree(runs)
    sets |= {"four_room": four_room(), "lock_5": lock()}
    facts = {name: written(out / f"{name}.npz", *made) for name, made in sets.items()}
    (out / "datasets.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{sum(fact['bytes'] for fact in facts.values()) / 1e6:.2f} MB in {out}")


Made = tuple[Transitions, Reference, str]


def cartpole(runs: Path) -> dict[str, Made]:
    run = trained("CartPole-v1", runs)
    random = record(run, kind="random", episodes=450)
    shared = {"seed": 1, "reference": random.reference}
    mixed = (
        record(run, kind="random", episodes=450, **shared),
        record(run, kind="medium", episodes=60, noise=CARTPOLE_NOISE, **shared),
        record(run, kind="expert", episodes=3, **shared),
    )
    expert = record(run, kind="expert", episodes=20, reference=random.reference)
    return {"cartpole_random": made(random), "cartpole_expert": made(expert), "cartpole_mixed": made(*mixed)}


def pendulum(runs: Path) -> dict[str, Made]:
    run = trained("Pendulum-v1", runs)
    early = {"checkpoint": checkpoint_after(run, PENDULUM_MEDIUM_STEP)}
    random = record(run, kind="random", episodes=100)
    shared = {"seed": 1, "reference": random.reference}
    mixed = (
        record(run, kind="random", episodes=60, **shared),
        record(run, kind="medium", episodes=30, **early, **shared),
        record(run, kind="expert", episodes=10, **shared),
    )
    medium = record(run, kind="medium", episodes=100, reference=random.reference, **early)
    return {"pendulum_random": made(random), "pendulum_medium": made(medium), "pendulum_mixed": made(*mixed)}


def trained(env_id: str, runs: Path) -> Path:
    """Train PPO with checkpoints all along; return the run."""
    run = runs / env_id
    PPO(
        env_id,
        seed=0,
        run_dir=run,
        learning_rate=1e-3,
        schedule="linear",
        video=False,
        checkpoint={"every": 4_000, "keep": 1_000},
        **PPO_SETTINGS[env_id],
    ).fit()
    return run


def checkpoint_after(run: Path, step: int) -> Path:
    return next(path for path in sorted((run / "checkpoints").glob("ckpt-*")) if int(path.name[5:]) >= step)


def made(*parts: Recording) -> Made:
    """One set of several recordings, which share their reference scores."""
    how = " Then ".join(f"{len(part.transitions.returns())} episodes: {part.description}" for part in parts)
    return Transitions.concatenate([part.transitions for part in parts]), parts[0].reference, how


def four_room() -> Made:
    env_id = "rlalign_envs:FourRoom-v0"
    flat = four_room_offline(2000, seed=0)
    rows = {name: torch.from_numpy(flat[name]) for name in Transitions.__annotations__ if name in flat}
    low = record(env_id, kind="random", episodes=1).reference.ref_min_score
    reference = Reference(env_id=env_id, ref_min_score=low, ref_max_score=1.0)
    how = (
        "four_room_offline(2000, seed=0): a fifth of the episodes by an epsilon-greedy expert (0.4), the rest random "
        "walks. The upper right room is never entered."
    )
    return Transitions(**rows), reference, how


def lock() -> Made:
    env_id = "rlalign_envs:CombinationLock-v0"
    best = comblock_offline(5, 100, epsilon=0.0, seed=1)["rewards"].sum(0).mean()
    low = record(env_id, kind="random", episodes=1).reference.ref_min_score
    reference = Reference(env_id=env_id, ref_min_score=low, ref_max_score=float(best))
    how = "comblock_offline(5, 2000, seed=0): an expert with epsilon 1/5. HNPG's experiments have 50,000 such episodes."
    return Transitions.from_episodes(lock_episodes(comblock_offline(5, 2000, seed=0))), reference, how


def lock_episodes(arrays: dict[str, Any]) -> Sequence[Episode]:
    """From arrays with the step first."""
    parts = {
        name: torch.from_numpy(arrays[name]).transpose(0, 1)
        for name in ("actions", "rewards", "terminated", "truncated")
    }
    before = torch.from_numpy(arrays["observations"]).transpose(0, 1)
    last = torch.from_numpy(arrays["next_observations"][-1:]).transpose(0, 1)
    seen = torch.cat([before, last], 1)
    return [Episode(observations=seen[i], **{name: part[i] for name, part in parts.items()}) for i in range(len(seen))]


def written(file: Path, transitions: Transitions, reference: Reference, how: str) -> dict[str, Any]:
    """Write a set and say what it is."""
    scores = {name: round(float(getattr(reference, name)), 6) for name in ("ref_min_score", "ref_max_score")}
    save_npz(transitions, file, reference=replace(reference, **scores))
    returns = transitions.returns()
    fact = {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "fingerprint": transitions.fingerprint(),
        "bytes": file.stat().st_size,
        "episodes": len(returns),
        "transitions": len(transitions),
        "env_id": reference.env_id,
        **scores,
        "return_mean": round(float(returns.mean()), 4),
        "return_min": round(float(returns.min()), 4),
        "return_max": round(float(returns.max()), 4),
        "how": how,
    }
    size = f"{fact['bytes'] / 1e6:.2f} MB, {fact['episodes']} episodes, {fact['transitions']} transitions"
    print(f"{file.name:22s} {size}, return {fact['return_mean']:g}, references {scores}", flush=True)
    return fact


if __name__ == "__main__":
    main()
