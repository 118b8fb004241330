"""Population-based training with Ray Tune: weak trials go on from copies of strong ones, at other learning rates.

python examples/agent_ray_tune.py [STEPS]
"""

import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

from rlalign.agents import PPO
from rlalign.training.metrics import read

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before the import: Ray reports nothing
import ray
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining


def train(run: Path, until: int, rate: float, seed: int) -> dict:
    """Begin a run, or continue it exactly but for its learning rate; returns what its files say happened."""
    agent = PPO("CartPole-v1", run_dir=run, seed=seed, rollout_steps=32, learning_rate=rate, video=False)
    agent.fit(total_env_steps=until, resume=run.exists())
    *_, last, evaluation = read(run / "metrics.jsonl")
    return last | evaluation


def trial(config: dict, runs: Path, stretch: int) -> None:
    run, step = runs / f"tune-{tune.get_context().get_trial_id()}", 0
    if (given := tune.get_checkpoint()) is not None:  # its own run after a pause, or the run of a better trial
        shutil.rmtree(run, ignore_errors=True)
        step = read(Path(given.to_directory(run)) / "metrics.jsonl")[-1]["step"]
    while True:  # Ray ends it inside `report`, where the run is saved and not locked
        metrics = {"run": str(run)} | train(run, step + stretch, config["learning_rate"], seed=0)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(run))
        step = metrics["step"]


def main(steps: int) -> None:
    rates = {"learning_rate": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]}
    pbt = PopulationBasedTraining("training_iteration", perturbation_interval=1, hyperparam_mutations=rates, synch=True)
    with ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False):  # two trials at a time; the others wait
        results = tune.Tuner(
            tune.with_parameters(trial, runs=Path("runs").absolute(), stretch=max(1, steps // 8)),
            param_space={"learning_rate": tune.grid_search([1e-5, 1e-4, 1e-3, 1e-2])},  # where the four trials begin
            tune_config=tune.TuneConfig(metric="eval/return_mean", mode="max", scheduler=pbt, reuse_actors=True),
            run_config=tune.RunConfig(storage_path=str(Path("tune").absolute()), stop={"step": steps}, verbose=0),
        ).fit()
    best = results.get_best_result().metrics["run"]
    log = read(Path(best, "metrics.jsonl"))  # that of its ancestors too: it came with the copies
    schedule = [(end["step"], last["optim/learning_rate"]) for last, end in pairwise(log) if end["kind"] == "eval"]
    for seed in (1, 2):  # the best of several on one seed is partly luck: the same learning rates on others
        ends = [train(Path(f"{best}-seed-{seed}"), until, rate, seed) for until, rate in schedule]
        print(f"seed {seed}:", *(f"{end['eval/return_mean']:.0f} ({end['optim/learning_rate']:.0e})" for end in ends))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 20_000)
