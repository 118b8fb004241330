"""Recorded episodes: whose actions they are, which starts they have, and the scores beside them."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rlalign.agents import PPO
from rlalign.agents import record as recording
from rlalign.agents.datasets import Reference, load_dataset
from rlalign.agents.record import record
from rlalign.cli import app
from rlalign.config import ConfigError
from rlalign.training import session
from rlalign.training.seeding import derived_seed
from tests.agents.small_agents import small
from tests.agents.tiny_environments import ANY

SCORES = Reference(env_id="CartPole-v1", ref_min_score=10.0, ref_max_score=110.0)


@pytest.fixture(scope="module")
def agent():
    """Untrained, and always of one opinion."""
    made = small(PPO)
    with torch.no_grad():
        made.model.actor.network.last.bias.copy_(torch.tensor([0.0, 5.0]))
    return made


def recorded(source, kind, episodes=3, **more):
    return record(source, kind=kind, episodes=episodes, reference=SCORES, **more)


def test_episodes_are_what_gymnasium_plays_from_the_same_seed(agent):
    got = list(recorded(agent, "expert", seed=7).transitions.episodes())
    env = gym.make("CartPole-v1")
    for number, episode in enumerate(got):
        observation, _ = env.reset(seed=derived_seed(7, "expert", number) % 2**31)
        for step in range(len(episode.rewards)):
            assert episode.observations[step].tolist() == observation.tolist()
            observation, reward, terminated, truncated, _ = env.step(1)
            assert (episode.rewards[step], episode.terminated[step]) == (reward, terminated)
        assert terminated and not truncated
        assert episode.observations[-1].tolist() == observation.tolist()  # not that of the next episode


def test_an_episode_depends_on_its_number_alone(agent):
    few, many = (recorded(agent, "medium", count).transitions for count in (2, 13))
    for one, other in zip(few.episodes(), many.episodes(), strict=False):
        assert torch.equal(one.actions, other.actions)
        assert torch.equal(one.observations, other.observations)
    assert len(list(many.episodes())) == 13
    assert recorded(agent, "medium", 2).transitions.fingerprint() == few.fingerprint()
    assert recorded(agent, "medium", 2, seed=1).transitions.fingerprint() != few.fingerprint()


def test_who_acts(agent):
    def share(kind, **more):
        return recorded(agent, kind, 60, **more).transitions.actions.double().mean().item()

    assert share("expert") == 1.0
    assert share("medium", noise=0.0) == 1.0
    assert share("random") == pytest.approx(0.5, abs=0.06)
    assert share("medium", noise=0.4) == pytest.approx(0.8, abs=0.06)  # half of the random ones agree
    assert share("medium", noise=1.0) == pytest.approx(0.5, abs=0.06)


def test_mixed_is_random_then_medium_then_expert(agent):
    mixed = list(recorded(agent, "mixed", 8).transitions.episodes())
    parts = [
        list(recorded(agent, kind, count).transitions.episodes())
        for kind, count in (("random", 3), ("medium", 3), ("expert", 2))
    ]
    for got, expected in zip(mixed, [episode for part in parts for episode in part], strict=True):
        assert torch.equal(got.observations, expected.observations)
        assert torch.equal(got.actions, expected.actions)


def test_a_time_limit_is_a_truncation_and_keeps_its_last_observation():
    got = recorded("Pendulum-v1", "random", 2).transitions
    assert got.truncated.nonzero().flatten().tolist() == [199, 399]
    assert not got.terminated.any()
    assert (got.next_observations[199] - got.observations[200]).abs().max() > 1e-3
    assert float(got.actions.abs().max()) <= 2.0
    assert float(got.actions.std()) == pytest.approx(2 / 3**0.5, rel=0.1)


def test_reference_scores_are_of_random_actions_and_of_the_agent(agent, monkeypatch):
    monkeypatch.setattr(recording, "REFERENCE_EPISODES", 20)
    found = record(agent, kind="random", episodes=2)
    assert found.reference.env_id == "CartPole-v1"
    assert found.reference.ref_min_score == pytest.approx(22, abs=8)
    assert found.reference.ref_max_score == pytest.approx(9.4, abs=0.6)  # one action forever
    assert record("CartPole-v1", kind="random", episodes=2).reference.ref_max_score is None


def test_an_earlier_checkpoint_acts_as_medium(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "write_report", lambda path: path)
    run = tmp_path / "run"
    small(PPO, run_dir=run, total_env_steps=200, learning_rate=0.1, checkpoint={"every": 64, "keep": 9}).fit()
    first = sorted((run / "checkpoints").glob("ckpt-*"))[0]
    final, early = recorded(run, "expert", 4), recorded(run, "medium", 4, checkpoint=first)
    assert early.description.count(first.name) == 1
    assert not np.array_equal(final.transitions.actions.numpy(), early.transitions.actions.numpy())
    with pytest.raises(ConfigError, match="give the run directory"):
        recorded(PPO.load(run), "medium", checkpoint=first)


@pytest.mark.parametrize(
    ("source", "kind", "more", "message"),
    [
        ("CartPole-v1", "expert", {}, "neither a run nor a saved agent"),
        ("CartPole-v1", "random", {"episodes": 0}, "at least 1"),
        ("NoSuch-v0", "random", {}, "NoSuch"),
    ],
)
def test_mistakes_are_one_sentence(source, kind, more, message):
    with pytest.raises(ConfigError, match=message):
        recorded(source, kind, **more)


def test_a_dict_observation_is_refused():
    with pytest.raises(ConfigError, match="FlattenObservation"):
        recorded(small(PPO, ANY, kwargs={"observation": "dict", "action": "discrete"}), "random")


# ---------------------------------------------------------------- the command


def collect(*arguments):
    return CliRunner().invoke(app, ["collect", *map(str, arguments)])


def test_the_command_writes_what_it_says(tmp_path, agent, monkeypatch):
    monkeypatch.setattr(recording, "REFERENCE_EPISODES", 10)
    agent.save(tmp_path / "agent")
    done = collect(tmp_path / "agent", "--episodes", 6, "--kind", "mixed", "--out", tmp_path / "set.npz", "--seed", 3)
    assert done.exit_code == 0, done.output
    back = load_dataset(tmp_path / "set.npz")
    assert len(back.transitions.returns()) == 6
    assert f"steps {len(back.transitions)}" in " ".join(done.output.split())
    assert back.transitions.fingerprint() == recorded(agent, "mixed", 6, seed=3).transitions.fingerprint()
    assert None not in (back.reference.ref_min_score, back.reference.ref_max_score)
    assert "rlalign_score_mean" in done.output
    assert "D4RL" not in done.output


def test_the_command_writes_minari_too(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(recording, "REFERENCE_EPISODES", 5)
    done = collect("CartPole-v1", "--kind", "random", "--episodes", 2, "--minari", "pole/random-v0")
    assert done.exit_code == 0, done.output
    back = load_dataset("pole/random-v0")
    assert (len(back.transitions.returns()), back.reference.env_id) == (2, "CartPole-v1")


def test_the_command_needs_a_target_and_a_source(tmp_path):
    assert collect("CartPole-v1", "--kind", "random").exit_code == 2
    assert collect(tmp_path / "nothing", "--out", tmp_path / "x.npz").exit_code == 2
    unknown = collect("CartPole-v1", "--kind", "clever", "--out", tmp_path / "x.npz")
    assert unknown.exit_code == 2
