"""Held-out evaluation: before the first step, during training and after it, with its own sampling and interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlalign.config import ConfigError
from rlalign.llm.collect import Scored, row_uniforms, score_completions
from rlalign.llm.config import PolicyGradientConfig
from rlalign.llm.data import Prompts, encode_prompt
from rlalign.llm.generate import Generations
from rlalign.llm.policy import Policy
from rlalign.training.distributed import gather_json, gather_ragged, own_share
from rlalign.training.guard import RewardGuard
from rlalign.training.journal import Journal
from rlalign.training.session import Session


@dataclass(frozen=True, eq=False, kw_only=True)
class Baseline:
    """Held-out questions in other words, scored in their own way."""

    data: Prompts
    guard: RewardGuard | None
    """None: the evaluation's own."""
    max_completion_tokens: int | None


class Evaluator:
    """Scores the policy on held-out prompts and remembers the best evaluation.

    Args:
        data: None makes every method do nothing.
        guard: Scores the completions: the metrics of `eval.metrics`, or the rewards themselves.
        baselines: The same questions put to the untouched model in other words.
    """

    def __init__(
        self,
        policy: Policy,
        data: Prompts | None,
        guard: RewardGuard,
        cfg: PolicyGradientConfig,
        session: Session,
        *,
        baselines: Sequence["Baseline"] = (),
    ):
        self.policy, self.data, self.guard, self.cfg, self.session = policy, data, guard, cfg, session
        self.baselines = list(baselines)
        self.best, self.stale, self.started, self.evaluated_at = -math.inf, 0, False, -1

    @property
    def out_of_patience(self) -> bool:
        """`eval.patience` evaluations in a row brought nothing better."""
        return self.cfg.eval.patience is not None and self.stale >= self.cfg.eval.patience

    def before(self, journal: Journal) -> None:
        """Measure the untouched model, in the training prompt's words and in every baseline's."""
        if self.data is None or self.started or not self.cfg.eval.before:
            return
        alternatives, phrasings = [], len(self.baselines) + 1
        for number, asked in enumerate(self.baselines, 1):
            journal.doing(_measuring(asked.data, number, phrasings))
            metrics, rows = self.run(asked)
            alternatives.append(metrics["eval/reward_mean"])
            journal.samples(f"baseline-{number}", rows)
            journal.note(f"Untouched model, phrasing {number} of {phrasings}: {_in_words(metrics)}")
        journal.doing(_measuring(self.data, phrasings, phrasings))
        self._record(0, journal, {"eval/best_baseline_mean": max(alternatives)} if alternatives else {})
        self.started = True

    def during(self, step: int, journal: Journal) -> None:
        """Evaluate every `eval.every` steps."""
        if self.data is not None and self.cfg.eval.every and step % self.cfg.eval.every == 0:
            self._record(step, journal, {})

    def after(self, step: int, journal: Journal) -> None:
        """Evaluate the final model, unless this step was evaluated already."""
        if self.data is not None and self.evaluated_at != step:
            self._record(step, journal, {})

    def run(self, asked: Baseline | None = None) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Complete and score every held-out row; return the metrics and what the samples file gets."""
        data = self.data if asked is None else asked.data
        guard = self.guard if asked is None or asked.guard is None else asked.guard
        if data is None:
            raise ConfigError("there is no held-out data: pass `eval_dataset`, or set `data.eval` in the config.")
        accelerator = self.policy.accelerator
        # Rows of similar length share a batch; the order does not depend on the number of processes.
        tokens = [encode_prompt(row["prompt"], self.policy.tokenizer) for row in data]
        order = sorted(range(len(data)), key=lambda row: len(tokens[row]))
        mine = order[accelerator.process_index :: accelerator.num_processes]
        rows: list[dict[str, Any]] = []
        values = torch.full((len(data), len(guard.functions) + 1), math.nan, dtype=torch.float64)
        for start in range(0, len(mine), self.cfg.eval.batch_rows):
            batch = mine[start : start + self.cfg.eval.batch_rows]
            generations = self._complete(
                [tokens[row] for row in batch], batch, asked.max_completion_tokens if asked else None
            )
            scored = score_completions(guard, data, batch, generations, self.policy.tokenizer, step=-1)
            values[batch, 0] = torch.where(scored.scored, scored.outcome, math.nan)
            values[batch, 1:] = scored.table.values
            rows += _sample_rows(scored, batch, generations)
        values = _merge(gather_ragged(values, accelerator)) if accelerator.num_processes > 1 else values
        rows = [row for part in gather_json(rows, accelerator) for row in part]
        return _metrics(values, [function.name for function in guard.functions]), sorted(
            rows, key=lambda row: row["prompt_id"]
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "stale": self.stale,
            "started": self.started,
            "evaluated_at": self.evaluated_at,
            "guard": gather_json(self.guard.state_dict(), self.policy.accelerator),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.stale = state["best"], state["stale"]
        self.started, self.evaluated_at = state["started"], state["evaluated_at"]
        self.guard.load_state_dict(own_share(state["guard"], self.policy.accelerator))

    def _record(self, step: int, journal: Journal, extra: Mapping[str, float]) -> None:
        metrics, rows = self.run()
        journal.samples(f"eval-{step:06d}", [{"step": step, **row} for row in rows])
        journal.evaluation(step, {**metrics, **extra})
        self.evaluated_at = step
        if metrics["eval/reward_mean"] > self.best:
            self.best, self.stale = metrics["eval/reward_mean"], 0
            if self.cfg.eval.save_best and step > 0:
                self.policy.save(self.session.path / "best")
        else:
            self.stale += 1

    def _complete(self, prompts: list[list[int]], rows: Sequence[int], limit: int | None) -> Generations:
        cfg = self.cfg.eval
        time = limit or cfg.max_completion_tokens or self.cfg.rollout.max_completion_tokens
        # Step -1 of the training stream does not exist, so held-out sampling shares no random numbers with it.
        uniforms = row_uniforms(-1, rows, group_size=1, time=time, seed=self.cfg.seed) if cfg.temperature > 0 else None
        return self.policy.generate(
            prompts, group_size=1, max_new_tokens=time, temperature=cfg.temperature, top_p=cfg.top_p, uniforms=uniforms
        )


def _sample_rows(scored: Scored, rows: Sequence[int], generations: Generations) -> list[dict[str, Any]]:
    names, lengths, truncated = scored.table.names, generations.lengths.tolist(), generations.truncated.tolist()
    return [
        {
            "prompt_id": row,
            "prompt": scored.prompts[index],
            "completion": scored.texts[index],
            "reward": _number(scored.outcome[index].item() if scored.scored[index] else math.nan),
            "parts": dict(zip(names, map(_number, scored.table.values[index].tolist()), strict=True)),
            "tokens": lengths[index],
            "truncated": truncated[index],
        }
        for index, row in enumerate(rows)
    ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _merge(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Every row was scored by one process; the others hold NaN for it."""
    stacked = torch.stack(list(parts))
    return torch.where(stacked.isnan().all(0), math.nan, stacked.nansum(0))


def _metrics(values: torch.Tensor, names: Sequence[str]) -> dict[str, float]:
    outcome = values[:, 0][~values[:, 0].isnan()]
    count = len(outcome)
    metrics = {
        "eval/reward_mean": float(outcome.mean()) if count else math.nan,
        "eval/reward_stderr": float(outcome.std() / math.sqrt(count)) if count > 1 else math.nan,
        "eval/n": float(count),
    }
    for index, name in enumerate(names, 1):
        part = values[:, index][~values[:, index].isnan()]
        metrics[f"eval/{name}_mean"] = float(part.mean()) if len(part) else math.nan
    return metrics


def _measuring(data: Prompts, number: int, phrasings: int) -> str:
    which = f": phrasing {number} of {phrasings}" if phrasings > 1 else ""
    return f"measuring the untouched model{which} ({len(data)} held-out prompts)"


def _in_words(metrics: Mapping[str, float]) -> str:
    return f"{metrics['eval/reward_mean']:.3f} +- {metrics['eval/reward_stderr']:.3f} (n = {metrics['eval/n']:.0f})"
