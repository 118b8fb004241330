"""What judges samples: a function of them, or a simulator with several outcomes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlalign.config import ConfigError
from rlalign.diffusion.config import SampleRewardConfig
from rlalign.training.guard import RewardGuard, Wording
from rlalign.training.reward_call import RewardError, as_list
from rlalign.training.reward_function import RewardFunction, declared_arguments, import_object

_OF_LANGUAGE_MODELS = ("completion_ids", "trainer_state", "log_metric", "log_extra")


@runtime_checkable
class Simulator(Protocol):
    """Judges samples by simulating them."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decides a label, as JSON: it is stored beside the labels."""
        ...

    @property
    def proxy(self) -> str:
        """The outcome that training optimises."""
        ...

    @property
    def gold(self) -> str:
        """The outcome that training is judged by."""
        ...

    def simulate(self, samples: Any) -> dict[str, np.ndarray]:
        """Outcome -> one number per sample, NaN where it is unknown. One bad sample never raises.

        `samples` is an array, or a list where the pipeline returns one, as of images or meshes.
        """
        ...

    def close(self) -> None:
        """End worker processes."""
        ...


@dataclass(frozen=True)
class Judged:
    """What a reward says of a batch of samples."""

    outcome: Float[Tensor, " batch"]
    """The reward; 0 where there is none."""
    scored: Bool[Tensor, " batch"]
    parts: dict[str, Float[Tensor, " batch"]] = field(default_factory=dict)
    """Every outcome by its name; NaN where unknown."""


class Judge:
    """Asks a reward about samples, whatever kind of reward it is.

    Args:
        reward: `f(samples, prompts, **columns) -> numbers` (None where it cannot judge), a `Simulator`, or a
            `SampleRewardConfig`.
        cfg: How failures are treated, which outcome counts.
        errors_dir: Gets the first failing call of each kind.

    Raises:
        ConfigError: It is neither, or a simulator has no such outcome.
    """

    def __init__(self, reward: Any, cfg: SampleRewardConfig | None = None, *, errors_dir: Path | None = None):
        if isinstance(reward, SampleRewardConfig):
            reward, cfg = _loaded(reward), reward
        if isinstance(reward, type):  # its class would pass for a simulator
            raise ConfigError(f"`reward` is the class {reward.__name__}; pass one of its objects: {reward.__name__}().")
        self.cfg = cfg or SampleRewardConfig(function="given from Python")
        self.simulator: Simulator | None = reward if isinstance(reward, Simulator) else None
        self.guard: RewardGuard | None = None
        if self.simulator is None:
            self.guard = self._guarded(reward, errors_dir)
        self.target = self.cfg.outcome or ("reward" if self.simulator is None else self.simulator.proxy)
        self.empty_batches = 0

    @property
    def gold(self) -> str:
        """The outcome that training is judged by; of a function, its only one."""
        return "reward" if self.simulator is None else self.simulator.gold

    def __call__(
        self, samples: Any, prompts: Sequence[Any], columns: Mapping[str, Sequence[Any]] | None = None
    ) -> Judged:
        """Judge a batch.

        Raises:
            RewardError: The reward failed beyond its budget, or judged nothing of a batch.
        """
        parts = self._simulated(samples, len(prompts)) if self.simulator is not None else {}
        if self.guard is not None:
            table = self.guard.score(prompts=list(prompts), completions=list(samples), columns=columns)
            outcome, scored = self.guard.total(table)
            parts = {"reward": torch.where(scored, outcome, torch.nan)}
        for key, name in (("outcome", self.target), ("graded", self.cfg.graded or self.target)):
            if name not in parts:
                raise ConfigError(f"`reward.{key}`={name!r} is none of {', '.join(sorted(parts))}.")
        values = parts[self.target]
        scored = ~values.isnan()
        if not scored.any():
            raise RewardError(
                f"the reward judged none of {len(values)} samples (`{self.target}` is NaN for all); look at the "
                "samples and at the simulator's settings."
            )
        return Judged(torch.where(scored, values, 0.0).float(), scored, {n: v.float() for n, v in parts.items()})

    def turn_to(self, outcome: str) -> None:
        """Let another outcome of the simulator be the reward from now on."""
        self.target = outcome

    def close(self) -> None:
        if self.simulator is not None:
            self.simulator.close()
        if self.guard is not None:
            self.guard.close()

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target, "guard": None if self.guard is None else self.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.target = state["target"]
        if self.guard is not None:
            self.guard.load_state_dict(state["guard"])

    def _simulated(self, samples: Any, count: int) -> dict[str, Tensor]:
        assert self.simulator is not None
        samples = samples.detach().float().cpu().numpy() if isinstance(samples, Tensor) else samples
        found = self.simulator.simulate(samples if isinstance(samples, list) else np.asarray(samples))
        parts = {name: torch.from_numpy(np.array(value, dtype=np.float64)) for name, value in found.items()}
        for name, values in parts.items():
            if values.shape != (count,):
                raise RewardError(
                    f"the simulator returned `{name}` of shape {list(values.shape)} for {count} samples; return one "
                    "number per sample, NaN where it is unknown."
                )
            values[~values.isfinite()] = torch.nan
        if self.simulator.gold not in parts:
            raise RewardError(f"the simulator's `gold`={self.simulator.gold!r} is none of {', '.join(sorted(parts))}.")
        return parts

    def _guarded(self, reward: Any, errors_dir: Path | None) -> RewardGuard:
        if not callable(reward):
            raise ConfigError(
                f"`reward` must be a function of (samples, prompts) or a Simulator, got {type(reward).__name__}."
            )
        return RewardGuard(
            [RewardFunction(name="reward", call=_of_samples(reward))],
            isolation="thread",  # samples are images and arrays, which a reward process would have to be sent
            timeout_s=self.cfg.timeout_s,
            on_error=self.cfg.on_error,
            penalty=self.cfg.penalty,
            error_budget=self.cfg.error_budget,
            errors_dir=errors_dir,
            wording=Wording(section="reward", probe="", silent="Return a number for the samples it can judge."),
        )


def _of_samples(reward: Callable[..., Any]) -> Callable[..., Any]:
    """The reward as the guard calls it, which speaks of completions."""
    taken = declared_arguments(reward)

    def judged(completions: list[Any], prompts: list[Any], **columns: Any) -> Any:
        offered = {name: values for name, values in columns.items() if name not in _OF_LANGUAGE_MODELS}
        known = {name: values for name, values in offered.items() if taken is None or name in taken}
        return as_list(reward(completions, prompts, **known), len(completions), row="sample")

    return judged


def _loaded(cfg: SampleRewardConfig) -> Any:
    try:
        target = import_object(cfg.function)
        if isinstance(target, type):
            return target(**cfg.args)
        return functools.partial(target, **cfg.args) if cfg.args else target
    except (ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"`reward.function`={cfg.function}: {error}") from error


def load_object(path: str, key: str) -> Any:
    """Import what a setting names as `module:function` or `path/file.py:function`.

    Raises:
        ConfigError: It is not there.
    """
    try:
        return import_object(path)
    except ImportError as error:
        raise ConfigError(f"`{key}`={path}: {error}") from error
