"""`rlalign check CartPole-v1`: what training would stumble over in an environment, told before it starts."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.utils.env_checker import check_env, data_equivalence

from rlalign.agents.consistency import unregistered
from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.config import ConfigError
from rlalign.training.metric_names import format_duration

Status = Literal["pass", "note", "FAIL"]
STEPS = 2_000
"""Random steps that are tried, or as many as fit into `SECONDS`."""
SECONDS = 3.0
_SEED = 7
_USUAL = ("symmetric and normalized", "infinity. This is probably", "not within the recommended")
"""Warnings of Gymnasium's checker about what is common and harmless here."""


@dataclass(frozen=True)
class Finding:
    name: str
    status: Status
    detail: str
    fix: str = ""


@dataclass
class EnvironmentReport:
    """What was looked at and what came of it; `str()` of it is what `rlalign check` prints."""

    title: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(finding.status != "FAIL" for finding in self.findings)

    def add(self, name: str, status: Status, detail: str, fix: str = "") -> None:
        self.findings.append(Finding(name, status, detail, fix))

    def __str__(self) -> str:
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"environment {self.title}"]
        for finding in self.findings:
            lines.append(f"  {finding.status}  {finding.name:<{width}}  {finding.detail}")
            lines += [f"        {'':<{width}}fix: {finding.fix}"] if finding.fix else []
        failed = sum(finding.status == "FAIL" for finding in self.findings)
        problems = "1 problem" if failed == 1 else f"{failed} problems"
        return "\n".join([*lines, "ready to train with" if self.ok else problems])


def probe_environment(env_id: str, **kwargs: Any) -> EnvironmentReport:
    """Make the environment, hold it to Gymnasium's contract, play random episodes and replay one.

    Raises:
        ConfigError: There is no such environment, or it cannot be made.
    """
    report = EnvironmentReport(env_id)
    env = _made(env_id, kwargs)
    try:
        if not _spaces(env, report):
            return report
        _contract(env_id, kwargs, report)
        played = _Play(env, report)
        if played.run():
            _replay(env_id, kwargs, report)
            played.tell()
            _suits(env, report)
    finally:
        env.close()
    return report


def _made(env_id: str, kwargs: Mapping[str, Any]) -> gym.Env:
    try:
        return gym.make(env_id, disable_env_checker=True, **kwargs)
    except Exception as error:  # whatever an environment's own code raises when it is made
        raise ConfigError(f"{env_id}: {type(error).__name__}: {_sentence(error)}{unregistered(error)}") from error


def _spaces(env: gym.Env, report: EnvironmentReport) -> bool:
    for name, space, read in (
        ("observations", env.observation_space, ObservationParts),
        ("actions", env.action_space, ActionInterface),
    ):
        try:
            read(space)
        except ConfigError as error:
            report.add(name, "FAIL", str(error))
        else:
            report.add(name, "pass", f"{space}"[:160])
    return report.ok


def _contract(env_id: str, kwargs: Mapping[str, Any], report: EnvironmentReport) -> None:
    """Gymnasium's own checker, on an environment of its own, which it leaves in any state."""
    env = _made(env_id, kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env.unwrapped, skip_render_check=True, skip_close_check=True)
        except Exception as error:  # assertions, and whatever the environment's own code raises
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            report.add(
                "contract", "FAIL", f"{kind}{_sentence(error)}", "see gymnasium.Env for what `reset` and `step` return"
            )
        else:
            report.add("contract", "pass", "gymnasium's check_env")
        finally:
            env.close()
    said = dict.fromkeys(_sentence(warning.message) for warning in caught)
    for text in [text for text in said if not any(words in text for words in _USUAL)][:4]:
        report.add("contract", "note", text)


class _Play:
    """Random steps: are the numbers finite, do episodes end, how fast is it?"""

    def __init__(self, env: gym.Env, report: EnvironmentReport):
        self.env, self.report = env, report
        self.rewards: list[float] = []
        self.lengths: list[int] = []
        self.outside = False
        self.seconds = 0.0

    def run(self) -> bool:
        """Play; False when an episode could not be played on."""
        try:
            self._episodes()
        except Exception as error:  # whatever the environment's own code raises
            self.report.add(
                "values", "FAIL", f"{type(error).__name__}: {_sentence(error)}", "it must accept any action"
            )
            return False
        return self.report.ok or bool(self.rewards)

    def _episodes(self) -> None:
        self.env.action_space.seed(_SEED)
        observation, _ = self.env.reset(seed=_SEED)
        length, started = 0, perf_counter()
        self._look(observation, 0.0, 0)
        while len(self.rewards) < STEPS and perf_counter() - started < SECONDS:
            observation, reward, terminated, truncated, _ = self.env.step(self.env.action_space.sample())
            length += 1
            self.rewards.append(float(reward))
            if not self._look(observation, float(reward), len(self.rewards)):
                break
            if terminated or truncated:
                self.lengths.append(length)
                length = 0
                observation, _ = self.env.reset()
        self.seconds = perf_counter() - started

    def _look(self, observation: Any, reward: float, step: int) -> bool:
        if not np.isfinite(reward):
            self.report.add("values", "FAIL", f"the reward of random step {step} is {reward}", "return finite rewards")
            return False
        parts = observation.values() if isinstance(observation, Mapping) else [observation]
        if any(np.asarray(p).dtype.kind == "f" and not np.isfinite(np.asarray(p)).all() for p in parts):
            self.report.add(
                "values",
                "FAIL",
                f"the observation after random step {step} is not finite",
                "return finite observations",
            )
            return False
        self.outside |= observation not in self.env.observation_space
        return True

    def tell(self) -> None:
        report, steps = self.report, len(self.rewards)
        if report.ok:
            low, high = min(self.rewards, default=0.0), max(self.rewards, default=0.0)
            report.add("values", "pass", f"finite over {steps:,} random steps; rewards {low:g} to {high:g}")
        if self.outside:
            report.add("values", "note", "some observations lie outside the declared space", "widen its bounds")
        self._tell_ends(steps)
        if self.seconds > 0:
            speed = steps / self.seconds
            whole = format_duration(1e6 / speed)
            report.add("speed", "pass", f"{speed:,.0f} steps per second in one copy; a million take {whole}")
        if "rgb_array" not in self.env.metadata.get("render_modes", ()):
            report.add("film", "note", "no `rgb_array` among its render modes, so there will be no film of it")

    def _tell_ends(self, steps: int) -> None:
        limit = None if self.env.spec is None else self.env.spec.max_episode_steps
        ended = f"{len(self.lengths)} random episodes ended"
        if self.lengths:
            shortest, longest = min(self.lengths), max(self.lengths)
            ended += f", after {shortest}{'' if shortest == longest else f' to {longest}'} steps"
        if limit is not None:
            self.report.add("episodes", "pass", f"{ended}; time limit {limit}")
        elif self.lengths:
            fix = "set `env.max_episode_steps`, should a better policy live for ever"
            self.report.add("episodes", "note", f"{ended}; no time limit is registered", fix)
        else:
            detail = f"no time limit is registered, and no episode ended within {steps:,} random steps"
            self.report.add("episodes", "FAIL", detail, "set `env.max_episode_steps`: evaluation plays whole episodes")


def _replay(env_id: str, kwargs: Mapping[str, Any], report: EnvironmentReport) -> None:
    """The same seed and actions in two copies must bring the same: exact resume and paired evaluation rest on it."""
    first, second = _made(env_id, kwargs), _made(env_id, kwargs)
    try:
        first.action_space.seed(_SEED)
        second.reset(seed=_SEED + 1)  # a copy with a past
        seen = [copy.reset(seed=_SEED)[0] for copy in (first, second)]
        same, step, over = data_equivalence(*seen), 0, False
        while same and step < 200 and not over:
            action = first.action_space.sample()
            ours, theirs = first.step(action), second.step(action)
            same, over, step = data_equivalence(ours[:4], theirs[:4]), bool(ours[2] or ours[3]), step + 1
    finally:
        first.close()
        second.close()
    if same:
        report.add("replay", "pass", f"the same seed and {step} actions bring the same episode")
    else:
        where = "already at `reset`" if step == 0 else f"from step {step}"
        report.add(
            "replay",
            "FAIL",
            f"the same seed and actions bring different episodes, {where}: resuming would not be exact",
            "draw all randomness from `self.np_random`, and set all state in `reset`",
        )


def _suits(env: gym.Env, report: EnvironmentReport) -> None:
    continuous = isinstance(env.action_space, gym.spaces.Box)
    bounded = isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded()
    online, parts = "ppo, trpo, policy_gradient_agent", ObservationParts(env.observation_space)
    if parts.images or parts.composed:
        detail = f"{online}; those that learn from recorded data take neither images nor a Dict"
    else:
        offline = ["hnpg", "bc", "iql", "odice", *(["td3_bc"] if bounded else [])]
        actions = "continuous" if continuous else "discrete"
        detail = f"{online}; with recorded {actions} actions: {', '.join(offline)}"
    report.add("agents", "pass", detail)


def _sentence(error: object) -> str:
    """A message on one line, without the colours Gymnasium puts around it."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).removeprefix("WARN: ").strip()
    return " ".join(plain.split())[:400] or type(error).__name__
