"""What all agents share: keywords, acting, keeping and coming back."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlalign.agents import PPO, TRPO, PolicyGradientAgent
from rlalign.agents.agent import Agent
from rlalign.agents.config import PPOConfig
from rlalign.agents.keywords import FORMS
from rlalign.agents.run import load_agent
from rlalign.agents.surroundings import check_given
from rlalign.agents.timing import IterationTimer
from rlalign.config import ConfigError
from rlalign.config_keywords import config_from_keywords
from rlalign.nn.config import HLGauss
from rlalign.training import session, stopwatch
from rlalign.training.checkpoint import Checkpoints
from tests.agents.small_agents import in_spaces, iterated, small
from tests.agents.tiny_environments import scripted


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(session, "write_report", lambda path: path)


# ---------------------------------------------------------------- keywords


def config(**keywords):
    return config_from_keywords(PPOConfig, keywords, FORMS)


def test_short_names_find_their_section():
    found = config(learning_rate=1e-3, gamma=0.9, hidden=[5], id="CartPole-v1", num_envs=3, seed=7)
    assert found.optim.learning_rate == 1e-3
    assert found.advantage.gamma == 0.9
    assert found.network.hidden == [5]
    assert (found.env.id, found.env.num_envs, found.seed) == ("CartPole-v1", 3, 7)


def test_one_word_stands_for_a_section():
    found = config(value_head="hl_gauss", normalize_and_project=True, env="CartPole-v1")
    assert isinstance(found.value_head, HLGauss)
    assert found.normalize_and_project.every == 1
    assert found.env.id == "CartPole-v1"
    assert config(normalize_and_project=False).normalize_and_project is None


@pytest.mark.parametrize("swap", [False, True])
def test_a_short_name_and_its_section_go_together_in_any_order(swap):
    keywords = {"learning_rate": 1e-3, "optim": {"eps": 1e-7}}
    found = config(**dict(reversed(keywords.items())) if swap else keywords)
    assert (found.optim.learning_rate, found.optim.eps) == (1e-3, 1e-7)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"learning_rat": 1}, "unknown setting `learning_rat`. Did you mean `learning_rate`"),
        ({"every": 3}, "`every` is ambiguous: .*eval.every.*give the section"),
        ({"clip_low": 3.0}, "clip_low"),
        ({"learning_rate": "fast"}, "learning_rate"),
    ],
)
def test_wrong_keywords_are_explained(keywords, message):
    with pytest.raises(ConfigError, match=message):
        config(**keywords)


# ---------------------------------------------------------------- acting


@pytest.mark.parametrize("observation", ["box", "number", "discrete", "multi_discrete", "pixels", "dict"])
def test_one_observation_and_a_batch_of_them(observation):
    agent = in_spaces(PPO, observation=observation, action="box", network={"hidden": [8]})
    agent.observation_space.seed(0)
    samples = [agent.observation_space.sample() for _ in range(3)]
    if observation == "dict":
        batch = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    else:
        batch = np.stack(samples)
    actions, info = agent.predict(batch)
    assert actions.shape == (3, 2, 3)
    assert info["value"].shape == info["log_prob"].shape == (3,)
    for index, sample in enumerate(samples):
        action, alone = agent.predict(sample)
        np.testing.assert_allclose(action, actions[index], rtol=1e-4, atol=1e-7)
        assert float(alone["value"]) == pytest.approx(float(info["value"][index]), abs=1e-5)


def test_deterministic_actions_are_the_most_probable():
    agent = small(PPO)
    torch.nn.init.constant_(agent.model.actor.network.last.bias[:1], 2.0)
    observation = np.zeros(4, dtype=np.float32)
    assert {int(agent.predict(observation)[0]) for _ in range(20)} == {0}
    drawn = [int(agent.predict(observation, deterministic=False)[0]) for _ in range(300)]
    assert 1 - np.mean(drawn) == pytest.approx(1 / (1 + np.exp(-2)), abs=0.06)


def test_masks_from_the_info_of_a_batch():
    agent = in_spaces(PPO, mask="info")
    only = np.eye(3, dtype=bool)
    actions, _ = agent.predict(np.zeros((3, 3), np.float32), info={"action_mask": only})
    assert actions.tolist() == [0, 1, 2]
    assert agent.predict(np.zeros(3, np.float32), info={"action_mask": only[2]})[0] == 2


# ---------------------------------------------------------------- keeping


@pytest.mark.parametrize("cls", [PPO, TRPO, PolicyGradientAgent])
def test_a_saved_agent_acts_the_same(cls, tmp_path):
    more = (
        {"group_size": 4, "advantage": "group_relative"} if cls is PolicyGradientAgent else {"value_head": "hl_gauss"}
    )
    agent = small(cls, **more, normalize={"observations": True}, normalize_and_project=True, seed=3)
    iterated(agent)
    agent.save(tmp_path / "kept")
    seen = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    for again in (cls.load(tmp_path / "kept"), load_agent(tmp_path / "kept")):
        assert isinstance(again, cls)
        assert again.config == agent.config
        for got, expected in zip(again.predict(seen)[1].values(), agent.predict(seen)[1].values(), strict=True):
            np.testing.assert_array_equal(got, expected)
        assert again.evaluate(2) == agent.evaluate(2)


def test_a_loaded_agent_trains_on_and_counts_anew(tmp_path):
    agent = small(PPO, run_dir=tmp_path / "run", total_env_steps=64).fit()
    again = PPO.load(tmp_path / "run")
    assert again.step == 0
    again.run_dir = tmp_path / "more"
    again.fit(total_env_steps=128)
    assert again.step >= 128
    assert not again.model.actor.network.last.weight.equal(agent.model.actor.network.last.weight)


def test_what_is_no_agent_or_another_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no agent: there is no agent.json"):
        PPO.load(tmp_path)
    small(TRPO).save(tmp_path)
    with pytest.raises(ConfigError, match="holds an agent of method 'trpo', not PPO"):
        PPO.load(tmp_path)


# ---------------------------------------------------------------- training


def test_fit_stops_at_its_total_and_tells_the_callback(tmp_path):
    told = []
    agent = small(PPO, run_dir=tmp_path / "run", callback=lambda step, metrics: told.append((step, metrics)))
    assert agent.fit(total_env_steps=150) is agent
    assert [step >= 150 for step, _ in told] == [False] * (len(told) - 1) + [True]
    assert told[-1][0] == agent.step < 150 + 64
    assert "policy/kl" in told[0][1] and "throughput/env_steps_per_s" in told[0][1]
    assert (tmp_path / "run/model/agent.safetensors").is_file()


def test_a_clock_that_the_agent_does_not_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="PPO counts `total_env_steps`, not `total_updates`"):
        small(PPO, run_dir=tmp_path / "run").fit(total_updates=3)


def test_a_vector_environment_of_yours(tmp_path):
    # Forty copies: what fits in a rollout is worked out from them, not from `env.num_envs`.
    agent = PPO(
        scripted(gym.vector.AutoresetMode.SAME_STEP, 40), rollout_steps=8, minibatch_size=300, run_dir=tmp_path / "r"
    )
    agent.fit(total_env_steps=320)
    assert agent.config.env.num_envs == 40
    with pytest.raises(ConfigError, match="no environment to evaluate in: name one by its id"):
        agent.evaluate()
    with pytest.raises(ConfigError, match=r"`minibatch_size`=400 is more than a rollout has: .* = 320"):
        PPO(scripted(gym.vector.AutoresetMode.SAME_STEP, 40), rollout_steps=8, minibatch_size=400)


def test_an_agent_that_leaves_something_open_cannot_be_made():
    class Half(Agent):
        config_class = PPOConfig

        def build(self) -> None: ...

    names = "', '".join(["decide", "iterate", "learned", "load_learned", "optimizers"])
    with pytest.raises(TypeError) as told:
        Half("CartPole-v1")
    # Python 3.12 puts the names in quotation marks.
    assert f"abstract methods {names}".replace("'", "") in str(told.value).replace("'", "")


def test_an_error_of_the_callback_ends_the_run_after_the_iteration_is_saved(tmp_path):
    def broken(step, metrics):
        raise KeyError("mine")

    agent = small(PPO, run_dir=tmp_path / "run", callback=broken)
    with pytest.raises(KeyError, match="mine"):
        agent.fit(total_env_steps=1000)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [64]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: check_given("PPO", gym.make("CartPole-v1"), None, {}),
            "`env` must be an id .*got TimeLimit",
        ),
        (lambda: check_given("PPO", PPOConfig(), None, {}), r"a config object goes to PPO.from_config\(config\)"),
        (lambda: PPO("CartPole-v1", config=PPOConfig()), r"a config object goes to PPO.from_config\(config\)"),
        (lambda: PPO("CartPole-v1", dataset={"rewards": [1]}), "`dataset` must be a path, .*got dict"),
        (lambda: PPO("CartPole-v1", device="gpu"), "`device`=gpu: .*Set it to cpu"),
        (lambda: PPO("CartPole-v1", step_timeout_s=1.0), "`env.step_timeout_s` needs copies in processes"),
        (lambda: small(PPO).fit(total_env_steps=0), "`total_env_steps` must be at least 1, got 0"),
    ],
)
def test_what_would_be_passed_over_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_observations_of_another_shape_are_refused():
    agent = small(PPO)
    with pytest.raises(ValueError, match=r"an observation must have shape \[4\], got \[2\]"):
        agent.predict([0.0, 0.0])
    parts = in_spaces(PPO, observation="dict").environments.observation_space.sample()
    with pytest.raises(ValueError, match=r"an observation `position` must have shape \[2\], got \[3\]"):
        in_spaces(PPO, observation="dict").predict({**parts, "position": [0.0] * 3}, deterministic=True)


def test_no_episodes_are_no_evaluation():
    with pytest.raises(ValueError, match="`episodes` must be at least 1, got 0"):
        small(PPO).evaluate(0)


def test_a_record_accounts_for_the_iterations_that_were_not_recorded(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopwatch, "perf_counter", lambda: now[0])
    timer = IterationTimer("env_steps")
    for seconds in (1.0, 3.0):
        timer.phases.restart()
        with timer.phases("collect"):
            now[0] += seconds
        told = timer.lap(10)
        now[0] += 100.0  # an evaluation
    assert told == {"time/collect_s": 3.0, "time/step_s": 3.0, "throughput/env_steps_per_s": 10 / 3}
    assert timer.record() == {"time/collect_s": 4.0, "time/step_s": 4.0, "throughput/env_steps_per_s": 5.0}
    timer.phases.restart()
    now[0] += 2.0
    timer.lap(1)
    assert timer.record() == {"time/step_s": 2.0, "throughput/env_steps_per_s": 0.5}


def test_records_of_a_run_add_up_to_all_its_iterations(tmp_path):
    spent = []
    agent = small(PPO, log={"every": 3}, run_dir=tmp_path / "run", callback=lambda _, m: spent.append(m["time/step_s"]))
    agent.fit(total_env_steps=7 * 64)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [row["time/step_s"] for row in rows if row["kind"] == "train"]
    assert (len(spent), len(logged)) == (7, 3)
    assert sum(logged) == pytest.approx(sum(spent), rel=1e-3)
