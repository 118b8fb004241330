"""The numbers of one step: summed where they arise, averaged over processes once, at the end."""

import math
import warnings
from typing import Any

from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.advantages.config import AdvantageConfig, GroupEstimatorConfig
from rlalign.advantages.metrics import groups_that_differ, live_groups
from rlalign.buffers import Rollout, TrainBatch
from rlalign.llm.collect import Scored
from rlalign.llm.config import LogConfig, PolicyGradientConfig
from rlalign.llm.engine import LARGEST_GAP, gap_note
from rlalign.llm.generate import Generations
from rlalign.llm.objectives import clipped_shares, kl_penalty
from rlalign.training.distributed import sum_over_processes
from rlalign.training.no_signal import NoSignalWarning, SignalWatch
from rlalign.training.stopwatch import Stopwatch

SUMS = (
    *("decisions", "entropy", "clip_low", "clip_high", "kl", "reference_decisions", "gap", "gap_decisions"),
    *("rows", "reward/error_frac", "reward/timeout_count"),
)


class StepMetrics:
    """Collects what `PolicyGradientTrainer` logs. `docs/methods/bnpo.md` defines every name."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.clock = accelerator, Stopwatch()
        self.gap, self.gap_told = 0.0, False
        self.begin()

    def begin(self) -> None:
        self.clock.restart()
        self.sums: dict[str, float] = dict.fromkeys(SUMS, 0.0)
        # Sums over processes are all there is, so each has a place of its own for its largest.
        self.sums |= dict.fromkeys(map(_gap_max, range(self.accelerator.num_processes)), 0.0)
        self.norms: list[float] = []
        self.learning_rate = 0.0
        self.skipped = 0

    def collected(self, generations: Generations, scored: Scored) -> None:
        """After sampling and scoring, on this process's rows."""
        self.generations, self.rows = generations, scored
        self._add("rows", float(len(scored.texts)))
        for name, value in scored.table.metrics.items():
            # Shares of this process's rows become counts, so that processes can be added up.
            self._add(name, value * (len(scored.texts) if name.endswith("_frac") else 1))

    def rewarded(self, rollout: Rollout, cfg: AdvantageConfig) -> None:
        """After gathering, before a KL penalty joins the rewards and hides which groups the functions tell apart."""
        self.rewards = rollout.outcome[rollout.scored].tolist()
        self.differ = groups_that_differ(rollout, by_part=isinstance(cfg, GroupEstimatorConfig) and cfg.decompose)

    def scored(
        self,
        cfg: PolicyGradientConfig,
        batch: TrainBatch,
        log_prob: Float[Tensor, "batch time"],
        old: Float[Tensor, "batch time"],
        entropy: Float[Tensor, "batch time"],
        here: Bool[Tensor, "batch time"],
    ) -> None:
        """After the forward pass of one micro-batch."""
        count = float(here.sum())
        low, high = clipped_shares(cfg.objective, log_prob - old, batch.advantages, here)
        self._add("decisions", count)
        self._add("entropy", float((entropy * here).sum()))
        self._add("clip_low", low * count)
        self._add("clip_high", high * count)
        self._add_gap(log_prob, old, batch, here)
        if batch.log_prob_ref is not None:
            self._add("kl", float((kl_penalty(cfg.kl, log_prob, batch.log_prob_ref) * here).sum()))
            self._add("reference_decisions", count)

    def stepped(self, norm: float, learning_rate: float) -> None:
        """After one optimizer step."""
        self.norms.append(norm)
        self.learning_rate = learning_rate

    def finish(self, cfg: PolicyGradientConfig, batch: TrainBatch, estimator: dict[str, float]) -> dict[str, float]:
        """All metrics of the step. `batch` is the gathered one, so every process returns the same numbers."""
        sums = sum_over_processes(self.sums, self.accelerator)
        decisions = max(sums["decisions"], 1.0)
        lengths, cut = batch.inputs["completion_length"].value.float(), batch.truncated.any(1)
        outcome = batch.outcome[batch.scored]
        live = live_groups(batch.advantages.abs().amax(1), batch.group)
        metrics = {
            "reward/mean": float(outcome.mean()) if len(outcome) else math.nan,
            "reward/std": float(outcome.std()) if len(outcome) > 1 else math.nan,
            **{f"reward/{name}_mean": float(part.nanmean()) for name, part in batch.reward_parts.items()},
            "reward/error_frac": sums["reward/error_frac"] / max(sums["rows"], 1.0),
            "reward/timeout_count": sums["reward/timeout_count"],
            "reward/constant_group_frac": float((~self.differ).double().mean()),
            **{f"custom/{name}": value for name, value in self.rows.logged.items()},
            "signal/group_frac": float(live.double().mean()),
            "signal/groups_skipped": self.skipped / cfg.optim.update_epochs,
            "policy/entropy_nats": sums["entropy"] / decisions,
            "policy/clip_low_frac": sums["clip_low"] / decisions,
            "policy/clip_high_frac": sums["clip_high"] / decisions,
            "policy/sampling_gap_nats": sums["gap"] / max(sums["gap_decisions"], 1.0),
            "policy/sampling_gap_max_nats": max(sums[_gap_max(rank)] for rank in range(self.accelerator.num_processes)),
            "optim/grad_norm": sum(self.norms) / len(self.norms) if self.norms else 0.0,
            "optim/learning_rate": self.learning_rate,
            "optim/updates": float(len(self.norms)),
            "rollout/completion_tokens_mean": float(lengths.mean()),
            "rollout/completion_tokens_max": float(lengths.max()),
            "rollout/truncated_frac": float(cut.float().mean()),
            **_lengths_by_outcome(batch, lengths),
            **estimator,
        }
        if sums["reference_decisions"]:
            metrics["policy/kl"] = sums["kl"] / sums["reference_decisions"]
        self.gap = metrics["policy/sampling_gap_nats"]
        times = self.clock.lap()
        return metrics | times | {"throughput/tokens_per_s": float(lengths.sum()) / times["time/step_s"]}

    def sample_rows(self, step: int, batch: TrainBatch, cfg: LogConfig) -> list[dict[str, Any]]:
        """What the samples file gets: this process's first rollouts, as the reward functions saw them."""
        rows, table = self.rows, self.rows.table
        first = self.accelerator.process_index * len(rows.texts)
        return [
            {
                "step": step,
                "prompt_id": int(batch.prompt_id[first + index]),
                "group": int(batch.group[first + index]),
                "prompt": rows.prompts[index],
                "completion": rows.texts[index],
                "reward": float(rows.outcome[index]) if bool(rows.scored[index]) else None,
                "parts": {
                    name: None if math.isnan(value) else value
                    for name, value in zip(table.names, table.values[index].tolist(), strict=True)
                },
                "advantage": float(batch.advantages[first + index].abs().max() * _sign(batch, first + index)),
                "tokens": int(self.generations.lengths[index]),
                "truncated": bool(self.generations.truncated[index]),
                **({"extra": {n: v[index] for n, v in rows.extras.items()}} if rows.extras else {}),
            }
            for index in range(min(cfg.samples_rows, len(rows.texts)))
        ]

    def watch(self, watch: SignalWatch, step: int, batch: TrainBatch) -> list[str]:
        """Tell the watch about the finished step; return what it has to say."""
        live = self.differ & live_groups(batch.advantages.abs().amax(1), batch.group)
        with warnings.catch_warnings():
            # The journal shows the text; a warning would tear the live board.
            warnings.simplefilter("ignore", NoSignalWarning)
            text = watch.update(
                step,
                groups=len(live),
                groups_without_signal=int((~live).sum()),
                rewards=self.rewards,
            )
        notes = [] if text is None else [text]
        if self.gap > LARGEST_GAP and not self.gap_told:
            self.gap_told = True
            notes.append(gap_note(self.gap, external=batch.log_prob_engine is not None))
        return notes

    def _add_gap(self, log_prob: Tensor, old: Tensor, batch: TrainBatch, here: Tensor) -> None:
        """How far the log-probabilities that sampling reported are from the trainer's.

        Updates since then do not count: an engine's are compared with the trainer's at collection, and those of the
        trained model itself only before the rollout's first update.
        """
        engine = batch.log_prob_engine
        if engine is None and self.norms:
            return
        gap = (log_prob - batch.log_prob_old if engine is None else old - engine).abs()[here]
        known = gap[~gap.isnan()]
        name = _gap_max(self.accelerator.process_index)
        self._add("gap", float(known.sum()))
        self._add("gap_decisions", float(len(known)))
        self.sums[name] = max(self.sums[name], float(known.max()) if len(known) else 0.0)

    def _add(self, name: str, value: float) -> None:
        self.sums[name] += value


def _gap_max(rank: int) -> str:
    return f"gap_max_of_process_{rank}"


def _sign(batch: TrainBatch, row: int) -> float:
    return float(batch.advantages[row].sum().sign())


def _lengths_by_outcome(batch: TrainBatch, lengths: Tensor) -> dict[str, float]:
    """Mean length of rollouts above and below the middle of the step's rewards: a length bias shows here first."""
    outcome = batch.outcome[batch.scored]
    if not len(outcome) or bool(outcome.min() == outcome.max()):
        return {}
    middle = (outcome.min() + outcome.max()) / 2
    scored = lengths[batch.scored]
    return {
        "rollout/tokens_if_rewarded_mean": float(scored[outcome > middle].mean()),
        "rollout/tokens_if_unrewarded_mean": float(scored[outcome <= middle].mean()),
    }
