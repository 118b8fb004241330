"""Deterministic samples from fixed noise, judged by every outcome, watched for over-optimisation, and drawn."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from rlalign.config import ConfigError
from rlalign.diffusion.collect import joined
from rlalign.diffusion.config import DiffusionConfig, SampleEvalConfig
from rlalign.diffusion.pipeline_call import quiet
from rlalign.diffusion.policy import TunedPipeline
from rlalign.diffusion.prompts import Prompts
from rlalign.diffusion.rewards import Judge, load_object
from rlalign.training.distributed import gather_json
from rlalign.training.intervals import standard_error
from rlalign.training.journal import Journal
from rlalign.training.seeding import derived_seed
from rlalign.training.session import Session

Watch = Callable[..., Mapping[str, Any]]
"""(samples, prompts) -> name -> a number, or one per sample."""


@dataclass(frozen=True)
class Limit:
    """What ended the run early."""

    name: str
    value: float
    bound: float

    def __str__(self) -> str:
        return f"`{self.name}` has reached {self.value:.3g}, beyond its limit of {self.bound:g}."


class SampleEvaluator:
    """Generates the same samples again and again, from noise that depends on nothing but the seed.

    The gold outcome is logged as the reward: it is what training is judged by, whatever it optimises.

    Args:
        watch: Numbers that show over-optimisation; None logs the outcomes alone.
    """

    def __init__(
        self,
        tuned: TunedPipeline,
        prompts: Prompts,
        judge: Judge,
        cfg: DiffusionConfig,
        session: Session,
        accelerator: Accelerator,
    ):
        self.tuned, self.prompts, self.judge, self.cfg = tuned, prompts, judge, cfg
        self.session, self.accelerator = session, accelerator
        self.watch: Watch | None = load_object(cfg.eval.watch, "eval.watch") if cfg.eval.watch else None
        self.shapes: Callable[..., Any] | None = (
            load_object(cfg.eval.render, "eval.render") if cfg.eval.render else None
        )
        self.best, self.started, self.evaluated_at = -math.inf, False, -1
        self.limit: Limit | None = None

    def before(self, journal: Journal) -> None:
        """Measure the untouched generator."""
        if not self.started:
            self._record(0, journal)
            self.started = True

    def during(self, step: int, journal: Journal) -> None:
        """Evaluate every `eval.every` steps."""
        if self.cfg.eval.every and step % self.cfg.eval.every == 0:
            self._record(step, journal)

    def after(self, step: int, journal: Journal) -> None:
        """Evaluate the final generator, unless this step was evaluated already."""
        if self.evaluated_at != step:
            self._record(step, journal)

    def generate(self) -> tuple[Any, list[Any]]:
        """All evaluation samples, in order, and their prompts; without noise in the steps, with averaged weights."""
        cfg, count = self.cfg, self.cfg.eval.samples
        mine = range(self.accelerator.process_index, count, self.accelerator.num_processes)
        indices = [k % len(self.prompts) for k in mine]
        outputs = []
        size = cfg.batch_size
        with torch.no_grad(), self.tuned.averaged(), quiet(self.tuned.pipeline):
            for first in range(0, len(indices), size):
                part = slice(first, first + size)
                seeds = [derived_seed(cfg.seed, "held out", k) for k in mine[part]]
                outputs.append(
                    self.tuned.pipeline(  # type: ignore[operator]
                        **self.prompts.call(indices[part]),
                        **cfg.pipeline.call,
                        num_inference_steps=cfg.eval.num_inference_steps,
                        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    )
                )
        return joined(outputs), indices

    def run(self) -> tuple[dict[str, float], Any, list[Any], Mapping[str, Sequence[float]]]:
        """Generate and judge; metrics, this process's samples and prompts, and the outcomes of all processes."""
        samples, indices = self.generate()
        texts = self.prompts.texts(indices)
        judged = self.judge(samples, texts, self.prompts.columns(indices))
        found: dict[str, Any] = {name: values.tolist() for name, values in judged.parts.items()}
        if self.watch is not None:
            found |= {f"watch/{name}": _plain(value) for name, value in self._watched(samples, texts).items()}
        outcomes = _merged(gather_json(found, self.accelerator))
        return self._metrics(outcomes), samples, indices, outcomes

    def state_dict(self) -> dict[str, Any]:
        limit = None if self.limit is None else asdict(self.limit)
        return {"best": self.best, "started": self.started, "evaluated_at": self.evaluated_at, "limit": limit}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.started, self.evaluated_at = state["best"], state["started"], state["evaluated_at"]
        self.limit = None if state["limit"] is None else Limit(**state["limit"])

    def _record(self, step: int, journal: Journal) -> None:
        journal.doing(f"evaluating {self.cfg.eval.samples} samples")
        metrics, samples, indices, outcomes = self.run()
        journal.samples(f"eval-{step:06d}", self._rows(step, outcomes))
        journal.evaluation(step, metrics)
        self.evaluated_at = step
        self.limit = _passed(metrics | {"gold": metrics["eval/reward_mean"]}, self.cfg.eval)
        if self.accelerator.is_main_process and self.cfg.eval.pictures:
            self._draw(step, samples, indices, outcomes)
        if metrics["eval/reward_mean"] > self.best and self.limit is None:
            self.best = metrics["eval/reward_mean"]
            if step > 0 and self.accelerator.is_main_process:
                self.tuned.save(self.session.path / "best")

    def _rows(self, step: int, outcomes: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
        """One per sample, in the order of their noise, so that two evaluations are compared sample by sample."""
        names = dict.fromkeys((self.judge.gold, self.judge.target))
        return [
            {
                "step": step,
                "prompt_id": k,
                "reward": _known(outcomes[self.judge.gold][k]),
                "parts": {name: _known(outcomes[name][k]) for name in names},
            }
            for k in range(self.cfg.eval.samples)
        ]

    def _watched(self, samples: Any, texts: Sequence[Any]) -> Mapping[str, Any]:
        assert self.watch is not None
        return self.watch(samples, texts, **self.cfg.eval.watch_args)

    def _metrics(self, outcomes: Mapping[str, Any]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name, values in outcomes.items():
            known = [v for v in values if not math.isnan(v)]
            key = f"eval/{name.removeprefix('watch/')}"
            metrics[f"{key}_mean"] = float(np.mean(known)) if known else math.nan
            if len(known) > 1 and not name.startswith("watch/"):
                metrics[f"{key}_stderr"] = standard_error(known)
        gold = f"eval/{self.judge.gold}"
        spread = {"eval/reward_stderr": metrics[f"{gold}_stderr"]} if f"{gold}_stderr" in metrics else {}
        return {
            "eval/reward_mean": metrics[f"{gold}_mean"],
            **spread,
            "eval/n": float(self.cfg.eval.samples),
            **metrics,
        }

    def _draw(self, step: int, samples: Any, indices: Sequence[int], outcomes: Mapping[str, Sequence[float]]) -> None:
        from rlalign.diffusion.media import draw_samples

        shown = self.cfg.eval.pictures
        mine = outcomes[self.judge.gold][self.accelerator.process_index :: self.accelerator.num_processes]
        draw_samples(
            samples[:shown],
            self.session.path / "media",
            step=step,
            captions=[str(text) for text in self.prompts.texts(indices[:shown])],
            passed=list(mine[:shown]),
            shapes=self.shapes,
        )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plain(value: Any) -> list[float]:
    return np.asarray(value, dtype=np.float64).reshape(-1).tolist()


def _merged(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    """Outcomes in the order of the samples, which were dealt to the processes in turn."""
    merged: dict[str, list[float]] = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        longest = max(map(len, columns))
        merged[name] = [column[k] for k in range(longest) for column in columns if k < len(column)]
    return merged


def _passed(metrics: Mapping[str, float], cfg: SampleEvalConfig) -> Limit | None:
    for setting, bounds, sign in (("stop_below", cfg.stop_below, -1), ("stop_above", cfg.stop_above, 1)):
        for name, bound in bounds.items():
            key = next((key for key in (name, f"eval/{name}", f"eval/{name}_mean") if key in metrics), None)
            if key is None:
                means = [key for key in metrics if key.endswith("_mean")]
                known = ["gold", *(mean.removeprefix("eval/").removesuffix("_mean") for mean in means)]
                raise ConfigError(f"`eval.{setting}` names {name!r}, which is none of {', '.join(sorted(known))}.")
            if sign * (metrics[key] - bound) > 0:
                return Limit(name, metrics[key], bound)
    return None
