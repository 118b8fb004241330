"""What an update of DSO says about itself: gathered over its micro-batches and processes, worked out at its end."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor

from rlalign.diffusion.config_dso import DSOObjective
from rlalign.diffusion.pair_objective import PairErrors
from rlalign.diffusion.pairs import Pairs
from rlalign.diffusion.simulated import SimulatedSet
from rlalign.functional.preference import pair_accuracy
from rlalign.training.distributed import sum_over_processes

_SUMS = ("pairs", "loss", "win", "losers", "lose", "compared", "accuracy", "margin", "floored")
_SUMS += ("win_now", "win_ref", "lose_now", "lose_ref")


class DSOMetrics:
    """Counts in sums, so that several processes add theirs up."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.begin()

    def begin(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.sums: dict[str, float] = defaultdict(float)
        self.once: dict[str, float] = {}
        self.norm = self.learning_rate = 0.0
        self.norm_ratio: float | None = None

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def collected(self, found: SimulatedSet, labels: Tensor, pairs: Pairs, outcome: Tensor, nbytes: int) -> None:
        """Take in a new round's samples."""
        used = labels != 0
        failed = outcome.isnan()
        self.seconds |= found.seconds
        self.once = {
            "data/samples": float(len(found)),
            "data/win_frac": float((labels[used] > 0).float().mean()) if used.any() else float("nan"),
            "data/failed_frac": float(failed.float().mean()),
            "data/near_threshold_frac": float((~used & ~failed).float().mean()),
            "data/prompts_with_pairs": float(len(pairs)),
            "data/prompts_without_pairs": float(pairs.without),
            "data/conditions_mib": nbytes / 2**20,
        }
        for name, values in found.outcomes.items():
            known = values[~values.isnan()]
            self.once[f"data/{name}_mean"] = float(known.mean()) if len(known) else float("nan")

    def scored(self, cfg: DSOObjective, errors: PairErrors, objective: Tensor) -> None:
        """Take in the errors of one micro-batch."""
        win = errors.win.detach()
        self._add(pairs=len(win), loss=objective.detach().sum(), win=win.sum())
        if errors.lose is None:
            return
        lose, win_ref, lose_ref = errors.lose.detach(), errors.win_ref, errors.lose_ref
        self._add(losers=len(win), lose=lose.sum())
        if win_ref is None or lose_ref is None:
            return
        self._add(
            compared=len(win),
            win_now=win.sum(),
            win_ref=win_ref.sum(),
            lose_now=lose.sum(),
            lose_ref=lose_ref.sum(),
            margin=((lose - win) - (lose_ref - win_ref)).sum(),
            accuracy=len(win) * pair_accuracy(win, lose, win_ref, lose_ref),
            floored=(lose > cfg.floor * lose_ref).sum(),
        )

    def stepped(self, norm: float, learning_rate: float) -> None:
        self.norm, self.learning_rate = norm, learning_rate

    def finish(self) -> dict[str, float]:
        """Metrics of the update, over all processes."""
        sums = sum_over_processes({name: self.sums[name] for name in _SUMS}, self.accelerator)
        pairs = max(sums["pairs"], 1.0)
        metrics = {
            "optim/loss": sums["loss"] / pairs,
            "optim/grad_norm": self.norm,
            "optim/learning_rate": self.learning_rate,
            "policy/err_win": sums["win"] / pairs,
        }
        if sums["losers"]:
            metrics["policy/err_lose"] = sums["lose"] / sums["losers"]
        if compared := sums["compared"]:
            metrics |= {
                "policy/implicit_accuracy": sums["accuracy"] / compared,
                "policy/margin": sums["margin"] / compared,
                "policy/err_win_ratio": sums["win_now"] / sums["win_ref"],
                "policy/err_lose_ratio": sums["lose_now"] / sums["lose_ref"],
                "policy/floored_frac": sums["floored"] / compared,
            }
        if self.norm_ratio is not None:
            metrics["policy/norm_ratio"] = self.norm_ratio
        times = {f"time/{name}_s": spent for name, spent in self.seconds.items()}
        return metrics | self.once | times | {"time/step_s": time.perf_counter() - self.started}

    def _add(self, **values: float | int | Tensor) -> None:
        for name, value in values.items():
            self.sums[name] += float(value)
