"""`rlalign check Id-v0`: each thing that would trouble training is one sentence."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from rlalign.agents import check_env as module
from rlalign.agents.check_env import EnvironmentReport, probe_environment
from rlalign.config import ConfigError
from tests.agents.tiny_environments import ANY

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Steady(gym.Env):
    """Well-behaved: a walk on [0, 1] that ends after ten steps."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None, fault: str = "", ends: int = 10):
        self.render_mode, self.fault, self.ends = render_mode, fault, ends
        self.observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
        self.action_space = gym.spaces.Discrete(2)
        if fault == "space":
            self.action_space = gym.spaces.Text(3)
        self.steps, self.place = 0, 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps, self.place = 0, float(self.np_random.random())
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.place = (self.place + float(self.np_random.random())) % 1.0
        if self.fault == "memory" and self.steps > 3:
            self.place = float(np.random.default_rng().random())
        if self.fault == "raises":
            raise IndexError("no such cell")
        reward = float("nan") if self.fault == "nan" and self.steps == 4 else 1.0
        return self._seen(), reward, self.steps >= self.ends, False, {}

    def _seen(self) -> Any:
        return np.array([2.0 if self.fault == "outside" else self.place], dtype=np.float32)

    def render(self) -> Any:
        return np.zeros((4, 4, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "STEPS", 60)
    gym.register("Steady-v0", entry_point=lambda **kwargs: Steady(**kwargs), max_episode_steps=50)
    gym.register("Endless-v0", entry_point=lambda **kwargs: Steady(**kwargs), kwargs={"ends": 10**9})
    gym.register("Open-v0", entry_point=lambda **kwargs: Steady(**kwargs))
    yield
    for name in ("Steady-v0", "Endless-v0", "Open-v0"):
        del gym.registry[name]


def details(report: EnvironmentReport, status: str) -> dict[str, str]:
    return {finding.name: finding.detail for finding in report.findings if finding.status == status}


def test_a_sound_environment_passes_and_is_told_what_it_suits():
    report = probe_environment("Steady-v0")
    assert report.ok
    passed = details(report, "pass")
    assert passed["episodes"] == "6 random episodes ended, after 10 steps; time limit 50"
    assert passed["values"] == "finite over 60 random steps; rewards 1 to 1"
    assert passed["replay"] == "the same seed and 10 actions bring the same episode"
    assert passed["agents"].startswith("ppo, trpo, policy_gradient_agent; with recorded discrete actions: hnpg, bc")
    assert "steps per second" in passed["speed"]
    assert str(report).endswith("ready to train with")


def test_continuous_actions_suit_td3_bc_too():
    assert "td3_bc" in details(probe_environment("Pendulum-v1"), "pass")["agents"]


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ("nan", "values", "the reward of random step 4 is nan"),
        ("raises", "values", "IndexError: no such cell"),
        ("memory", "replay", "different episodes, from step 4: resuming would not be exact"),
        ("outside", "contract", "not within the observation space"),
        ("space", "actions", "action space Text"),
    ],
)
def test_what_is_wrong_is_one_sentence(fault: str, name: str, words: str):
    report = probe_environment("Steady-v0", fault=fault)
    assert not report.ok
    assert words in details(report, "FAIL")[name]
    assert "\n" not in details(report, "FAIL")[name]
    assert "problem" in str(report).splitlines()[-1]


def test_episodes_that_never_end_need_a_limit():
    assert "no episode ended within 60 random steps" in details(probe_environment("Endless-v0"), "FAIL")["episodes"]
    report = probe_environment("Open-v0")
    assert report.ok
    assert "no time limit is registered" in details(report, "note")["episodes"]


def test_an_unknown_id_names_the_nearest():
    with pytest.raises(ConfigError, match="CartPol-v1.*Did you mean: `CartPole`"):
        probe_environment("CartPol-v1")
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        probe_environment("no_such_module:Thing-v0")


def test_images_suit_only_those_that_see_them():
    suits = details(probe_environment(ANY, observation="pixels"), "pass")["agents"]
    assert suits.startswith("ppo, trpo, policy_gradient_agent; those that learn from recorded data take neither")
