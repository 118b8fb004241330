"""Statistics that outlive a rollout, by persistent prompt id: running baselines, and the history of pass rates."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlalign.advantages.config import PerPromptRunning
from rlalign.advantages.metrics import advantage_metrics
from rlalign.advantages.requirements import constant, require_one_episode_per_row
from rlalign.buffers.rollout import Rollout, TrainBatch
from rlalign.functional.masked import spread


class PerPromptEstimator:
    """Centre each outcome on the last outcomes of its prompt, whichever rollout they came from."""

    needs: frozenset[str] = frozenset()

    def __init__(self, cfg: PerPromptRunning) -> None:
        self.cfg = cfg
        self.metrics: dict[str, float] = {}
        self._history: dict[int, list[float]] = {}

    def __call__(self, rollout: Rollout) -> TrainBatch:
        require_one_episode_per_row(rollout)
        outcome = _finite_outcomes(rollout)
        self._remember(rollout.prompt_id[rollout.scored], outcome)
        whole = torch.zeros_like(rollout.outcome)
        whole[rollout.scored] = self._standardised(rollout.prompt_id[rollout.scored], outcome).to(whole)
        advantages = spread(whole, rollout.mask)
        self.metrics = advantage_metrics(advantages, rollout, whole)
        self.metrics["advantage/prompts_remembered"] = float(len(self._history))
        return TrainBatch.from_rollout(rollout, advantages)

    def state_dict(self) -> dict[str, Any]:
        prompts = sorted(self._history)
        flat = [value for prompt in prompts for value in self._history[prompt]]
        return {
            "prompt_id": torch.tensor(prompts, dtype=torch.int64),
            "count": torch.tensor([len(self._history[prompt]) for prompt in prompts], dtype=torch.int64),
            "outcomes": torch.tensor(flat, dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        chunks = state["outcomes"].split(state["count"].tolist())
        self._history = {
            prompt: chunk.tolist() for prompt, chunk in zip(state["prompt_id"].tolist(), chunks, strict=True)
        }

    def _remember(self, prompts: Int[Tensor, " scored"], outcome: Float[Tensor, " scored"]) -> None:
        for prompt, value in zip(prompts.tolist(), outcome.tolist(), strict=True):
            self._history[prompt] = [*self._history.get(prompt, []), value][-self.cfg.window :]

    def _standardised(
        self, prompts: Int[Tensor, " scored"], outcome: Float[Tensor, " scored"]
    ) -> Float[Tensor, " scored"]:
        result = torch.zeros_like(outcome)
        for prompt in prompts.unique().tolist():
            rows = prompts == prompt
            past = outcome.new_tensor(self._history[prompt])
            past = past if len(past) >= self.cfg.min_count else outcome
            divisor = outcome if self.cfg.scale == "batch" else past
            if not constant(past) and not constant(divisor):
                result[rows] = (outcome[rows] - past.mean()) / (divisor.std(correction=0) + self.cfg.eps)
        return result


class PassRateHistory:
    """No-Positive-Resampling: a prompt solved once, at `threshold` or better, is not sampled again.

    Reference:
        Khatri et al. 2025 (arXiv:2510.13786), §3.2: pass rate 0.9.
    """

    def __init__(self, *, threshold: float = 0.9, reward_range: tuple[float, float] = (0.0, 1.0)) -> None:
        self.threshold = threshold
        self.reward_range = reward_range
        self._best: dict[int, float] = {}

    def update(self, rollout: Rollout) -> None:
        """Note the pass rate of every group, over its scored rollouts, for the prompt it belongs to."""
        low, high = self.reward_range
        passed = (_finite_outcomes(rollout) - low) / (high - low)
        group, prompts = rollout.group[rollout.scored], rollout.prompt_id[rollout.scored]
        for one in group.unique().tolist():
            rows = group == one
            prompt, rate = int(prompts[rows][0]), float(passed[rows].mean())
            self._best[prompt] = max(rate, self._best.get(prompt, 0.0))

    def keep(self, prompts: Iterable[int]) -> Bool[Tensor, " prompts"]:
        """Tell for each prompt whether it may still be sampled."""
        # 18 of 20 outcomes average to 0.9 only up to rounding, and are meant to count as 0.9.
        solved = self.threshold - 1e-6
        return torch.tensor([self._best.get(int(prompt), 0.0) < solved for prompt in prompts], dtype=torch.bool)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "prompt_id": torch.tensor(list(self._best), dtype=torch.int64),
            "pass_rate": torch.tensor(list(self._best.values()), dtype=torch.float64),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._best = dict(zip(state["prompt_id"].tolist(), state["pass_rate"].tolist(), strict=True))


def _finite_outcomes(rollout: Rollout) -> Float[Tensor, " scored"]:
    outcome = rollout.outcome[rollout.scored].double()
    if not bool(outcome.isfinite().all()):
        raise ValueError("a scored rollout has a reward that is not finite; mark it `scored=False` or fix the reward.")
    return outcome
