"""What a step of Flow-GRPO says about itself: gathered while it runs, worked out once at its end."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor

from rlalign.advantages.metrics import groups_that_differ
from rlalign.buffers import Rollout, TrainBatch
from rlalign.diffusion.collect import Drawn
from rlalign.training.distributed import sum_over_processes


class StepMetrics:
    """Counts in sums, so that several processes add theirs up."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.begin()

    def begin(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.sums: dict[str, float] = defaultdict(float)
        self.norms: list[float] = []
        self.learning_rate = 0.0
        self.nbytes = 0
        self.groups = self.live = 0

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def collected(self, drawn: Drawn, rollout: Rollout) -> None:
        self.nbytes = drawn.nbytes
        differ = groups_that_differ(rollout)
        self.groups, self.live = len(differ), int(differ.sum())

    def scored(self, log_ratio: Tensor, advantages: Tensor, steps: Tensor, clips: tuple[float, float]) -> None:
        """Take in the log-ratios of one micro-batch, by denoising step."""
        low, high = clips
        shift = log_ratio.detach().cpu().double().expm1()  # ratios lie so near to 1 that float32 would round them
        advantages, steps = advantages.cpu(), steps.cpu()
        below = (shift < -low) & (advantages < 0)
        above = (shift > high) & (advantages > 0)
        for step in steps.unique().tolist():
            here = steps == step
            self.sums[f"{step}/count"] += float(here.sum())
            self.sums[f"{step}/low"] += float(below[here].sum())
            self.sums[f"{step}/high"] += float(above[here].sum())
            self.sums[f"{step}/shift"] += float(shift[here].sum())

    def penalised(self, kl: Tensor) -> None:
        self.sums["kl"] += float(kl.detach().sum())
        self.sums["kl_count"] += kl.numel()

    def stepped(self, norm: float, learning_rate: float) -> None:
        self.norms.append(norm)
        self.learning_rate = learning_rate

    def finish(self, batch: TrainBatch, estimator: dict[str, float]) -> dict[str, float]:
        """Metrics of the step, over all processes."""
        sums = sum_over_processes(self._padded(batch.time), self.accelerator)
        steps = [t for t in range(batch.time) if sums[f"{t}/count"]]
        total = max(sum(sums[f"{t}/count"] for t in steps), 1.0)
        outcome = batch.outcome[batch.scored]
        metrics = {
            "reward/mean": float(outcome.mean()),
            "reward/std": float(outcome.std()) if len(outcome) > 1 else 0.0,
            "reward/unknown_frac": float((~batch.scored).float().mean()),
            "signal/group_frac": self.live / max(self.groups, 1),
            "signal/groups_skipped": float(self.groups - self.live),
            "policy/clip_low_frac": sum(sums[f"{t}/low"] for t in steps) / total,
            "policy/clip_high_frac": sum(sums[f"{t}/high"] for t in steps) / total,
            "policy/ratio_shift": sum(sums[f"{t}/shift"] for t in steps) / total,
            "optim/grad_norm": sum(self.norms) / len(self.norms) if self.norms else 0.0,
            "optim/learning_rate": self.learning_rate,
            "rollout/trajectory_mib": self.nbytes / 2**20,
        }
        for name, values in batch.reward_parts.items() if len(batch.reward_parts) > 1 else ():
            known = values[~values.isnan()]
            metrics[f"reward/{name}_mean"] = float(known.mean()) if len(known) else float("nan")
        for t in steps:
            count = sums[f"{t}/count"]
            metrics[f"denoising/clip_low_frac_{t:02d}"] = sums[f"{t}/low"] / count
            metrics[f"denoising/clip_high_frac_{t:02d}"] = sums[f"{t}/high"] / count
            metrics[f"denoising/ratio_shift_{t:02d}"] = sums[f"{t}/shift"] / count
        if sums["kl_count"]:
            metrics["policy/kl"] = sums["kl"] / sums["kl_count"]
        times = {f"time/{name}_s": spent for name, spent in self.seconds.items()}
        return metrics | estimator | times | {"time/step_s": time.perf_counter() - self.started}

    def _padded(self, time_: int) -> dict[str, float]:
        """Every process names the same sums, whatever it has seen."""
        names = [f"{t}/{what}" for t in range(time_) for what in ("count", "low", "high", "shift")]
        return {name: self.sums[name] for name in [*names, "kl", "kl_count"]}
