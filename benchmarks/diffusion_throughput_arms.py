"""What one process of `diffusion_throughput` does: run epochs of Flow-GRPO one way, and say what they cost.

python benchmarks/diffusion_throughput_arms.py SPEC_JSON RESULT_FILE        (started by diffusion_throughput.py)
"""

import copy
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from rlalign.diffusion import FlowGRPOTrainer
from rlalign.diffusion.config_pretrain import PretrainConfig
from rlalign.diffusion.pretrain import cached_generator
from rlalign.diffusion.tiny import tiny_call, tiny_pipeline
from rlalign.diffusion.trajectory import Trajectory

PROMPTS, GROUP, STEPS, KL = 8, 8, 10, 0.04
CLIP, LEARNING_RATE, NOISE = 1e-3, 3e-4, 0.7
BATCH = {"literal": 8, "tuned": 32, "rlalign": 64}
"""Samples per call of the denoiser in training, of the public loop; decisions per call, of rlalign."""
DRAWN_AT_ONCE = {"literal": 8, "tuned": 64, "rlalign": 64}


def main() -> None:
    spec = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):  # Linux alone can pin
        os.sched_setaffinity(0, {spec["core"]})
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = made(spec["task"], spec["arm"], Path(scratch) / "run")
        with trainer.session.open(trainer, resume=False):
            outcome = measured(trainer, spec)
    Path(sys.argv[2]).write_text(json.dumps({"arm": spec["arm"], **outcome}))


def made(task: str, arm: str, run_dir: Path) -> FlowGRPOTrainer:
    if task == "tiny_sd3":
        pipeline, call = tiny_pipeline("sd3"), tiny_call("sd3", PROMPTS)
        fixed = {name: value for name, value in call.items() if not isinstance(value, Tensor | list)}
        rows = [
            {name: value[k] for name, value in call.items() if isinstance(value, Tensor | list)} for k in range(PROMPTS)
        ]
        fixed.pop("num_inference_steps", None)
    else:
        pipeline = cached_generator(PretrainConfig(data="rlalign_envs.assemblies:training_set", seed=0))
        rows, fixed = [k % 5 for k in range(PROMPTS)], {}
    return FlowGRPOTrainer(
        pipeline,
        rows,
        brightness,
        call=fixed | ({"output_type": "latent"} if task == "tiny_sd3" else {}),
        total_steps=10**6,
        rollout={
            "prompts_per_step": PROMPTS,
            "group_size": GROUP,
            "num_inference_steps": STEPS,
            "batch_size": DRAWN_AT_ONCE[arm],
            "sde": {"kind": "flow_sde", "noise_level": NOISE},
        },
        objective={
            "ratio_norm": False,
            "reweight": False,
            "clip_low": CLIP,
            "clip_high": CLIP,
            "kl_coef": KL,
        },
        optim={"learning_rate": LEARNING_RATE, "minibatches": 2, "micro_batch": BATCH["rlalign"]},
        average=None,
        run_dir=run_dir,
    )


def brightness(samples: Any, prompts: Any, **columns: Any) -> list[float]:
    return [float(torch.as_tensor(sample).float().mean()) for sample in samples]


def measured(trainer: FlowGRPOTrainer, spec: dict[str, Any]) -> dict[str, Any]:
    process = psutil.Process()
    before = process.memory_info().rss
    loop = None if spec["arm"] == "rlalign" else PublicLoop(trainer, literal=spec["arm"] == "literal")
    epoch = loop or partial(rlalign_epoch, trainer)
    epochs, peak = [], Peak(process)
    for number in range(spec["epochs"] + 1):
        trainer.metrics.begin()
        wall, cpu = time.perf_counter(), time.process_time()
        with peak:
            epoch()
        if number:
            epochs.append({"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu})
        trainer.step += 1
    # Last, because it runs both ways and would leave the memory of both behind.
    difference = 0.0 if loop is None else gradient_difference(trainer, loop)
    return {"epochs": epochs, "memory_mib": (peak.most - before) / 2**20, "gradient_difference": difference}


def rlalign_epoch(trainer: FlowGRPOTrainer) -> None:
    trainer.buffer.add(trainer.collect())
    batch = trainer.weighted(trainer.estimator(trainer.buffer.drain()))
    for minibatch in trainer.minibatches(batch):
        trainer.update(minibatch)


class PublicLoop:
    """The training loop of flow_grpo's script: samples in minibatches, one denoising step per backward pass.

    Args:
        literal: With its settings: few samples per call, and a deep copy of the denoiser for the KL term. Otherwise
            many samples per call, and the adapter switched off.
    """

    def __init__(self, trainer: FlowGRPOTrainer, *, literal: bool):
        self.trainer, self.size = trainer, BATCH["literal" if literal else "tuned"]
        trainer.tuned.folded = nullcontext  # peft's layers as they are, in sampling too
        self.reference = copy.deepcopy(trainer.tuned.denoiser) if literal else None
        if self.reference is not None:
            self.reference.disable_adapters()

    def __call__(self) -> None:
        trainer = self.trainer
        batch = trainer.weighted(trainer.estimator(trainer.collect()))
        for rows in torch.arange(batch.batch_size).split(batch.batch_size // trainer.config.optim.minibatches):
            self.accumulate(rows, batch.advantages)
            trainer.tuning.take_step()

    def accumulate(self, rows: Tensor, advantages: Tensor) -> None:
        """Add up the gradients of a minibatch, one backward pass for each denoising step of each batch of samples."""
        assert self.trainer.drawn is not None
        for piece, own, here in self.trainer.drawn.locate(rows):
            trained = piece.scored.any(0).nonzero().squeeze(1).tolist()
            for part in torch.arange(len(own)).split(self.size):
                share = len(part) / len(rows) / len(trained)
                for step in trained:
                    weight = advantages[rows[here[part]], step]
                    (share * self.loss(piece, own[part], step, weight)).backward()

    def loss(self, piece: Trajectory, rows: Tensor, step: int, weight: Tensor) -> Tensor:
        at = torch.full_like(rows, step)
        new = self.trainer.sampler.replay(piece, rows, at)
        with torch.no_grad():
            frozen = self.frozen_mean(piece, rows, at)
        ratio = (new.log_prob - piece.log_prob[rows, step]).exp()
        surrogate = torch.maximum(-weight * ratio, -weight * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        variance = 2 * new.std.reshape(-1, *(1,) * (new.mean.ndim - 1)) ** 2
        return surrogate + KL * ((new.mean - frozen) ** 2 / variance).flatten(1).mean(1).mean()

    def frozen_mean(self, piece: Trajectory, rows: Tensor, steps: Tensor) -> Tensor:
        if self.reference is None:
            self.trainer.tuned.denoiser.disable_adapters()
            mean = self.trainer.sampler.replay(piece, rows, steps).mean
            self.trainer.tuned.denoiser.enable_adapters()
            return mean
        x, _ = piece.moves(rows, steps)
        prediction = piece.tape.predict(self.reference, x, rows, steps)
        return piece.transition(x, prediction, piece.level[steps], piece.level_next[steps])[0]


def gradient_difference(trainer: FlowGRPOTrainer, loop: PublicLoop) -> float:
    """Relative difference between this loop's gradient of a first minibatch and the trainer's own."""
    trainer.metrics.begin()
    batch = trainer.weighted(trainer.estimator(trainer.collect()))
    rows = torch.arange(batch.batch_size // 2)
    half = batch.select(rows)
    loop.accumulate(rows, batch.advantages)
    theirs = gathered(trainer)
    for piece, own, steps, at in trainer.micro_batches(half):
        trainer.loss(half, piece, own, steps, at, int(half.mask.sum())).backward()
    ours = gathered(trainer)
    return float((ours - theirs).norm() / theirs.norm())


def gathered(trainer: FlowGRPOTrainer) -> Tensor:
    """The gradient as one vector; cleared afterwards."""
    found = torch.cat([p.grad.flatten() for p in trainer.tuned.parameters.values() if p.grad is not None])
    for parameter in trainer.tuned.parameters.values():
        parameter.grad = None
    return found


class Peak:
    """Largest resident memory inside the block, looked at every five milliseconds."""

    def __init__(self, process: psutil.Process):
        self.process, self.most = process, 0

    def __enter__(self) -> None:
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stop.wait(0.005):
            self.most = max(self.most, self.process.memory_info().rss)


if __name__ == "__main__":
    main()
