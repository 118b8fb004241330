"""Drop-in for TRL users: `GRPOTrainer` with its advantages replaced by any rlalign estimator, BNPO by default.

    from rlalign.llm.trl_compat import BNPOTrainer as GRPOTrainer     # the only line that changes

Two methods are overridden, both with stable signatures since TRL 0.20: `_calculate_rewards` (to keep the rewards that
TRL gathers from all processes) and `_generate_and_score_completions` (to replace the advantages that it returns).
Generation, vLLM, tools, images, loss, logging and checkpoints stay TRL's.
"""

import hashlib
import inspect
import logging
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from packaging.version import Version
from torch import Tensor
from torch.nn import Module

from rlalign.advantages.config import AdvantageConfig, BetaNormalized, GroupEstimatorConfig, ReinforcePlusPlus
from rlalign.advantages.estimators import build_estimator
from rlalign.buffers.rollout import Rollout
from rlalign.llm.rewards import distinct

try:
    from huggingface_hub import constants
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError(f"rlalign.llm.trl_compat needs TRL ({error}): pip install 'rlalign[llm]'") from error

logger = logging.getLogger(__name__)

TESTED_TRL = ("1.16", "1.17")
"""First tested version and first untested one; `tests/contracts/test_trl.py` is what "tested" means."""


def check_trl(installed: str, trainer: type) -> None:
    """Refuse a TRL whose two overridden methods look different; say so when the version is merely untested."""
    expected = {
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_generate_and_score_completions": ["self", "inputs"],
    }
    fix = f"install 'trl>={TESTED_TRL[0]},<{TESTED_TRL[1]}'"
    methods = dict(inspect.getmembers(trainer, inspect.isfunction))
    for name, parameters in expected.items():
        found = list(inspect.signature(methods[name]).parameters) if name in methods else None
        if found != parameters:
            raise ImportError(f"TRL {installed} has GRPOTrainer.{name}{found}, rlalign needs {parameters}: {fix}.")
    if not Version(TESTED_TRL[0]) <= Version(installed) < Version(TESTED_TRL[1]):
        logger.warning(f"TRL {installed} is untested with rlalign's drop-in (tested: {TESTED_TRL[0]}): {fix}.")


def no_telemetry() -> None:
    """Keep TRL's trainers from reporting to the Hub when they are made, unless the user said which it shall be."""
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        # huggingface_hub read the variable when it was first imported, which may have been long ago.
        constants.HF_HUB_DISABLE_TELEMETRY = True


check_trl(version("trl"), GRPOTrainer)
no_telemetry()


class BNPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with advantages from `advantage`; every other argument, method and metric is TRL's.

    Args:
        advantage: Any object of `rlalign.advantages.config` that needs neither a value head nor a greedy rollout;
            None is `BetaNormalized()`, BNPO's adaptive rule.
            Several reward functions are summed with TRL's `reward_weights`, or estimated one by one when the
            estimator has `decompose=True`.

    Raises:
        ValueError: Two settings contradict each other, or a reward is infinite. The message names the setting.
    """

    _tag_names = ["trl", "grpo", "rlalign"]
    _name = "BNPO"
    _paper = {
        "title": "BNPO: Beta Normalization Policy Optimization",
        "id": "2506.02864",
        "citation": "@article{xiao2025bnpo,\n    title  = {{BNPO: Beta Normalization Policy Optimization}},\n"
        "    author = {Changyi Xiao and Mengdi Zhang and Yixin Cao},\n    year   = 2025,\n"
        "    eprint = {arXiv:2506.02864},\n}",
    }

    def __init__(self, *args: Any, advantage: AdvantageConfig | None = None, **kwargs: Any) -> None:
        advantage = BetaNormalized() if advantage is None else advantage
        given = inspect.signature(GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments.get("args")
        refuse_contradictions(given, advantage)
        super().__init__(*args, **kwargs)
        settings = cast(GRPOConfig, self.args)
        if not isinstance(advantage, BetaNormalized):
            self._name, self._paper = type(advantage).__name__, {}
        self._reward_names = distinct(self.reward_func_names)
        weights = dict(zip(self._reward_names, self.reward_weights.tolist(), strict=True))
        self.advantage = with_part_weights(advantage, weights, explicit=settings.reward_weights is not None)
        # Evaluation must not move the running statistics of training.
        self._estimators = {mode: build_estimator(self.advantage) for mode in ("train", "eval")}
        if self.accelerator.is_main_process:
            announce(settings, self.advantage)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if cast(Module, self.model).training else "eval"
        group_size = cast(int, self.num_generations if mode == "train" else self.num_generations_eval)
        if group_size < 2:  # only in evaluation, where TRL's advantage is exactly 0 as well
            return output
        gather = cast(Callable[[Tensor], Tensor], self.accelerator.gather)
        rollout = rollout_of(
            self._rewards_per_func.cpu(),
            gather(decision_count(output)).cpu(),
            gather(prompt_hash(inputs).to(self.accelerator.device)).cpu(),
            group_size=group_size,
            names=self._reward_names,
            weights=self.reward_weights.cpu(),
        )
        estimator = self._estimators[mode]
        advantages = per_rollout(estimator(rollout).advantages, rollout.mask)
        rows, rank = output["prompt_ids"].shape[0], self.accelerator.process_index
        output["advantages"] = advantages[rank * rows : (rank + 1) * rows].to(output["advantages"])
        replace_newest(self._logs["advantages"], advantages.tolist())
        for name, value in estimator.metrics.items():
            self._metrics[mode][name].append(value)
        return output


def refuse_contradictions(args: GRPOConfig | None, advantage: AdvantageConfig) -> None:
    """Raise before the model is loaded when TRL's settings and the estimator cannot both be honoured."""
    missing = sorted(build_estimator(advantage).needs)
    if missing:
        raise ValueError(
            f"advantage={type(advantage).__name__} needs {', '.join(missing)}, which TRL's GRPOTrainer does not "
            "produce. Use an estimator that works from rewards alone, or rlalign's own trainers."
        )
    if isinstance(advantage, ReinforcePlusPlus) and advantage.gamma < 1:
        raise ValueError(f"{advantage} gives one advantage per token, TRL takes one per completion: set gamma=1.")
    if args is not None and args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} normalises inside TRL, and its result "
            f"would be thrown away by advantage={type(advantage).__name__}. Drop it, and pass "
            f"advantage={type(advantage).__name__}(decompose=True) to estimate each reward function by itself."
        )


def announce(args: GRPOConfig, advantage: AdvantageConfig) -> None:
    """Say once what TRL's settings do not mean here."""
    logger.warning(f"Advantages come from {advantage}; scale_rewards={args.scale_rewards!r} is ignored.")
    if args.loss_type == "bnpo":
        logger.warning(
            "loss_type='bnpo' is TRL's name for a token mean over the local micro-batch; it is not the BNPO paper "
            "(arXiv:2506.02864), whose Beta normalisation is in the advantages. The paper sums each completion's "
            "tokens: loss_type='luspo' with importance_sampling_level='token'."
        )


def with_part_weights(advantage: AdvantageConfig, weights: Mapping[str, float], *, explicit: bool) -> AdvantageConfig:
    """Hand TRL's `reward_weights` to an estimator that combines reward functions itself."""
    if not isinstance(advantage, GroupEstimatorConfig) or not advantage.decompose:
        return advantage
    if not advantage.part_weights:
        return replace(advantage, part_weights=dict(weights))
    if explicit and dict(advantage.part_weights) != dict(weights):
        raise ValueError(
            f"reward_weights={dict(weights)} and advantage.part_weights={dict(advantage.part_weights)} disagree. "
            "Set one of them."
        )
    return advantage


def decision_count(output: Mapping[str, Any]) -> Int[Tensor, " rows"]:
    """Count the tokens each completion is trained on; a truncated completion that TRL masks counts its full width."""
    mask = output["completion_mask"]
    if "tool_mask" in output:
        mask = mask * output["tool_mask"]
    count = mask.sum(dim=1)
    return torch.where(count > 0, count, mask.shape[1]).long()


def prompt_hash(inputs: Sequence[Mapping[str, Any]]) -> Int[Tensor, " rows"]:
    """Name each prompt by its content, the same on every process and in every run."""
    digests = [hashlib.sha256(repr(row.get("prompt")).encode()).digest() for row in inputs]
    return torch.tensor([int.from_bytes(digest[:7], "big") for digest in digests])


def rollout_of(
    rewards_per_func: Float[Tensor, "rows functions"],
    lengths: Int[Tensor, " rows"],
    prompt_id: Int[Tensor, " rows"],
    *,
    group_size: int,
    names: Sequence[str],
    weights: Float[Tensor, " functions"],
) -> Rollout:
    """State TRL's gathered rewards as a `Rollout`: neighbours form groups, the outcome stands on the last token.

    NaN means that a function returned None: it is left out of the sum, and a row without any reward is unscored.
    """
    for name, column in zip(names, rewards_per_func.T, strict=True):
        if column.isinf().any():
            row = int(column.isinf().nonzero()[0])
            raise ValueError(f"reward function {name} returned {column[row].item()} for completion {row}: not finite.")
    rows, time = rewards_per_func.shape[0], int(lengths.max())
    last = torch.arange(time) == (lengths - 1)[:, None]
    outcome = (rewards_per_func * weights).nansum(dim=1)
    return Rollout(
        log_prob_old=torch.zeros(rows, time),
        rewards=torch.where(last, outcome[:, None], 0.0),
        mask=torch.arange(time) < lengths[:, None],
        terminated=last,
        truncated=torch.zeros_like(last),
        group=torch.arange(rows) // group_size,
        prompt_id=prompt_id,
        scored=~rewards_per_func.isnan().all(dim=1),
        reward_parts=dict(zip(names, rewards_per_func.unbind(dim=1), strict=True)),
    )


def per_rollout(advantages: Float[Tensor, "rows time"], mask: Bool[Tensor, "rows time"]) -> Float[Tensor, " rows"]:
    """Take the one advantage of each completion, the shape TRL's tables and losses expect."""
    first = advantages[:, 0]
    spread = torch.where(mask, advantages - first[:, None], 0.0).abs().max().item()
    if spread > 1e-6 * max(1.0, first.abs().max().item()) or math.isnan(spread):
        raise ValueError("`advantage` gives one value per token, but the drop-in hands TRL one per completion.")
    return first


def replace_newest(log: deque, values: Sequence[float]) -> None:
    """Overwrite the values TRL has just appended to its completions table."""
    for _ in range(min(len(values), len(log))):
        log.pop()
    log.extend(values)
