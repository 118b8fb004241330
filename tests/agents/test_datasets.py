"""Recorded episodes in and out: `.npz` files, folders, Minari; one sentence per fault; scores."""

import json

import jaxtyping
import numpy as np
import pytest
import torch
from gymnasium import spaces

from rlalign.agents.datasets import (
    DatasetError,
    Reference,
    load_dataset,
    rlalign_score,
    save_minari,
    save_npz,
    scaled_rewards,
)

SCORES = Reference(ref_min_score=-3.0, ref_max_score=7.0)


def arrays(steps=3, first=0.0, *, end="terminated", discrete=True, **changes):
    """One episode as a file holds it; observations count up from `first`."""
    flags = {name: np.arange(steps) == steps - 1 for name in ("terminated", "truncated")}
    flags |= {name: np.zeros(steps, dtype=bool) for name in flags if name != end}
    return {
        "observations": np.stack([np.arange(first, first + steps + 1), np.ones(steps + 1)], 1),
        "actions": np.arange(steps) % 2 if discrete else np.linspace(-1, 1, steps)[:, None],
        "rewards": np.arange(first, first + steps),
        **flags,
        **changes,
    }


def write(path, content):
    np.savez(path, **content)
    return path


@pytest.fixture
def minari_here(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))


# ---------------------------------------------------------------- in


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    write(tmp_path / "b.npz", arrays(2, 10.0, end="truncated"))
    write(tmp_path / "a.npz", arrays(3, 0.0))
    got = load_dataset(tmp_path).transitions
    assert got.observations[:, 0].tolist() == [0, 1, 2, 10, 11]
    assert got.next_observations[:, 0].tolist() == [1, 2, 3, 11, 12]
    assert got.terminated.tolist() == [False, False, True, False, False]
    assert got.truncated.tolist() == [False, False, False, False, True]
    assert got.returns().tolist() == [3.0, 21.0]
    assert (got.observations.dtype, got.actions.dtype, got.rewards.dtype) == (torch.float32, torch.int64, torch.float32)


def test_one_file_may_hold_many_episodes(tmp_path):
    """Trap: `observations` has one row more per episode, so a wrong offset leaks the next episode's start."""
    parts = [arrays(3, 0.0), arrays(1, 10.0, end="truncated"), arrays(2, 20.0)]
    together = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    got = load_dataset(write(tmp_path / "all.npz", together | {"lengths": np.array([3, 1, 2])})).transitions
    assert got.observations[:, 0].tolist() == [0, 1, 2, 10, 20, 21]
    assert got.next_observations[:, 0].tolist() == [1, 2, 3, 11, 21, 22]
    assert got.episode.tolist() == [0, 0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("actions", "expected"),
    [
        (np.array([0, 1, 0], dtype=np.int32), torch.tensor([0, 1, 0])),
        (np.array([[0, 2], [1, 1], [0, 0]]), torch.tensor([[0, 2], [1, 1], [0, 0]])),
        (np.array([[True], [False], [True]]), torch.tensor([[1], [0], [1]])),
        (np.array([0.5, -0.5, 0.25]), torch.tensor([[0.5], [-0.5], [0.25]])),
        (np.ones((3, 2)), torch.ones(3, 2)),
    ],
)
def test_actions_of_every_kind(tmp_path, actions, expected):
    got = load_dataset(write(tmp_path / "e.npz", arrays(actions=actions))).transitions.actions
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


def test_pixels_and_discrete_observations_keep_their_kind(tmp_path):
    pixels = np.zeros((4, 5, 5, 1), dtype=np.uint8)
    assert (
        load_dataset(write(tmp_path / "p.npz", arrays(observations=pixels))).transitions.observations.dtype
        == torch.uint8
    )
    numbers = np.array([3, 1, 2, 0], dtype=np.int16)
    got = load_dataset(write(tmp_path / "d.npz", arrays(observations=numbers))).transitions
    assert got.next_observations.tolist() == [1, 2, 0]
    assert got.observations.dtype == torch.int64


# ---------------------------------------------------------------- out and in again


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("target", ["folder", "all.npz"])
def test_what_is_saved_is_loaded(tmp_path, target, discrete):
    for number, end in enumerate(("terminated", "truncated", "neither")):
        write(tmp_path / f"{number}.npz", arrays(2 + number, 7.0 * number, end=end, discrete=discrete))
    original = load_dataset(tmp_path).transitions
    reference = Reference(env_id="CartPole-v1", ref_min_score=9.25, ref_max_score=500.0)
    save_npz(original, tmp_path / "out" / target, reference=reference)
    back = load_dataset(tmp_path / "out" / target)
    assert back.transitions.fingerprint() == original.fingerprint()
    assert back.reference == reference
    assert len(list((tmp_path / "out").rglob("*.npz"))) == (3 if target == "folder" else 1)
    assert not list((tmp_path / "out").rglob(".*"))


def test_a_folder_with_episodes_is_not_added_to(tmp_path):
    write(tmp_path / "a.npz", arrays())
    with pytest.raises(DatasetError, match="holds .npz files already"):
        save_npz(load_dataset(tmp_path).transitions, tmp_path)


@pytest.mark.usefixtures("minari_here")
@pytest.mark.parametrize("discrete", [True, False])
def test_minari_out_and_in(tmp_path, discrete):
    pytest.importorskip("minari")
    for number, end in enumerate(("terminated", "truncated")):
        write(tmp_path / f"{number}.npz", arrays(2 + number, 7.0 * number, end=end, discrete=discrete))
    original = load_dataset(tmp_path).transitions
    space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,))
    save_minari(
        original,
        "toy/mixed-v0",
        observation_space=spaces.Box(-np.inf, np.inf, (2,)),
        action_space=space,
        reference=SCORES,
        description="Counts up.",
    )
    back = load_dataset("toy/mixed-v0")
    assert back.transitions.fingerprint() == original.fingerprint()
    assert back.reference == SCORES
    with pytest.raises(DatasetError, match="toy/mixed-v0: .*already exists"):
        save_minari(original, "toy/mixed-v0", observation_space=spaces.Box(-1, 1, (2,)), action_space=space)


@pytest.mark.usefixtures("minari_here")
def test_minari_remembers_the_environment_and_agrees_about_the_score(tmp_path):
    minari = pytest.importorskip("minari")
    observations = np.zeros((4, 4), dtype=np.float32)
    original = load_dataset(write(tmp_path / "e.npz", arrays(observations=observations))).transitions
    reference = Reference(env_id="CartPole-v1", ref_min_score=20.0, ref_max_score=500.0)
    box = spaces.Box(-np.inf, np.inf, (4,))
    save_minari(original, "cart/pole-v0", observation_space=box, action_space=spaces.Discrete(2), reference=reference)
    assert load_dataset("cart/pole-v0").reference == reference
    theirs = minari.get_normalized_score(minari.load_dataset("cart/pole-v0"), np.array([20.0, 260.0, 500.0]))
    ours = rlalign_score(torch.tensor([20.0, 260.0, 500.0]), reference)
    assert ours.tolist() == pytest.approx((100 * theirs).tolist()) == [0.0, 50.0, 100.0]


@pytest.mark.usefixtures("minari_here")
def test_an_id_without_a_version_leaves_nothing_behind(tmp_path):
    pytest.importorskip("minari")
    loaded = load_dataset(write(tmp_path / "e.npz", arrays())).transitions
    box = spaces.Box(-1, 1, (2,))
    with pytest.raises(DatasetError, match="cart/pole: a Minari id .* ends in a version"):
        save_minari(loaded, "cart/pole", observation_space=box, action_space=spaces.Discrete(2))
    assert not (tmp_path / "minari").exists()


@pytest.mark.usefixtures("minari_here")
def test_images_do_not_become_jpegs(tmp_path):
    pytest.importorskip("minari")
    pixels = load_dataset(write(tmp_path / "p.npz", arrays(observations=np.zeros((4, 8, 8, 3), dtype=np.uint8))))
    with pytest.raises(DatasetError, match="lossy JPEG; save them to a `.npz` path"):
        save_minari(
            pixels.transitions,
            "pixels-v0",
            observation_space=spaces.Box(0, 255, (8, 8, 3), np.uint8),
            action_space=spaces.Discrete(2),
        )


@pytest.mark.usefixtures("minari_here")
def test_a_name_that_is_neither_path_nor_dataset(tmp_path):
    pytest.importorskip("minari")
    with pytest.raises(DatasetError, match=r"nowhere/to-be-v0: no such file, folder, or Minari .*minari download"):
        load_dataset("nowhere/to-be-v0")
    with pytest.raises(DatasetError, match=r"gone\.npz: no such file"):
        load_dataset(tmp_path / "gone.npz")


# ---------------------------------------------------------------- faults


@pytest.fixture
def own_checks():
    """Switch jaxtyping off, as it is outside tests, so that the library's own sentences are what fails."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


def without(name):
    return {key: value for key, value in arrays().items() if key != name}


def with_nan(name, *index):
    content = arrays(discrete=False)
    content[name] = content[name].astype(float)
    content[name][index] = np.nan
    return content


@pytest.mark.usefixtures("own_checks")
@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (without("rewards"), r"`rewards` is missing; it has actions, observations, terminated, truncated\."),
        (arrays(observations=np.zeros((3, 2))), r"`observations` has 3 rows for 3 rewards; it must have one more"),
        (arrays(actions=np.zeros(2, int)), r"`actions` has 2 rows for 3 rewards"),
        (with_nan("observations", 3, 1), r"`observations` is nan at step 3, entry \[1\]"),
        (with_nan("rewards", 1), r"`rewards` is nan at step 1;"),
        (with_nan("actions", 2, 0), r"`actions` is nan at step 2, entry \[0\]"),
        (arrays(rewards=np.zeros((3, 1))), r"`rewards` must be one number per step, got shape \(3, 1\)"),
        (arrays(terminated=np.array([0, 2, 0])), r"`terminated` must be true or false, got 2"),
        (arrays(truncated=np.array([True, False, False])), r"`truncated` is true at step 0 of 3, inside the episode"),
        (arrays(actions=np.array(["l", "r", "l"])), r"`actions` must be an array of numbers, got <U1"),
        (arrays(lengths=np.array([2, 2])), r"`observations` has shape \(4, 2\), but `lengths` asks for 6 rows"),
        (arrays(lengths=np.array([0, 3])), r"`lengths` must be a row of positive integers"),
        (arrays(ref_min_score=np.zeros(2)), r"`ref_min_score` must be one value"),
        (arrays(env_id=np.array(3)), r"`env_id` must be one value, got int64"),
    ],
)
def test_every_fault_is_one_sentence_with_file_and_field(tmp_path, content, sentence):
    file = write(tmp_path / "bad.npz", content)
    with pytest.raises(DatasetError, match=sentence) as caught:
        load_dataset(tmp_path)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_the_faulty_episode_of_many_is_named(tmp_path):
    parts = [arrays(2), with_nan("rewards", 0), arrays(2)]
    together = {name: np.concatenate([part[name].reshape(len(part[name]), -1) for part in parts]) for name in parts[0]}
    together |= {name: together[name][:, 0] for name in ("rewards", "terminated", "truncated")}
    file = write(tmp_path / "all.npz", together | {"lengths": np.array([2, 3, 2])})
    with pytest.raises(DatasetError, match="all.npz, episode 1: `rewards` is nan at step 0"):
        load_dataset(file)


def test_pickles_are_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return json.loads, ("this is not JSON",)

    np.savez(tmp_path / "bomb.npz", **arrays() | {"rewards": np.array([Bomb()], dtype=object)})
    with pytest.raises(DatasetError, match=r"bomb\.npz: cannot be read as .npz without pickle"):
        load_dataset(tmp_path)


def test_files_that_are_no_archives(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DatasetError, match=r"text\.npz: cannot be read"):
        load_dataset(tmp_path)
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DatasetError, match="is a single array"):
        load_dataset(tmp_path / "one.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="the folder holds no .npz file"):
        load_dataset(tmp_path / "empty")


def test_files_must_be_alike_and_agree(tmp_path):
    write(tmp_path / "a.npz", arrays())
    write(tmp_path / "b.npz", arrays(discrete=False))
    with pytest.raises(DatasetError, match="episode 1 has `actions` of torch.float32"):
        load_dataset(tmp_path)
    write(tmp_path / "b.npz", arrays(ref_max_score=np.array(3.0)))
    with pytest.raises(DatasetError, match=r"a\.npz and .*b\.npz disagree about `env_id`, `ref_min_score`"):
        load_dataset(tmp_path)


# ---------------------------------------------------------------- rewards and scores


def test_rewards_as_a_config_asks_for_them(tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.npz", arrays(2, 2.0 * number))
    loaded = load_dataset(tmp_path).transitions  # returns 1 and 5
    assert scaled_rewards(loaded, "raw").rewards.tolist() == [0, 1, 2, 3]
    assert scaled_rewards(loaded, "return_range").rewards.tolist() == [0, 250, 500, 750]
    assert scaled_rewards(loaded, "none").rewards.tolist() == [0, 0, 0, 0]


def test_scores_lie_between_the_references():
    assert rlalign_score(torch.tensor([-3.0, 2.0, 7.0, 12.0]), SCORES).tolist() == [0.0, 50.0, 100.0, 150.0]
    with pytest.raises(DatasetError, match="stores no `ref_min_score`"):
        rlalign_score(torch.zeros(1), Reference(ref_max_score=1.0))
    with pytest.raises(DatasetError, match="are both 1, so returns have no score"):
        rlalign_score(torch.zeros(1), Reference(ref_min_score=1.0, ref_max_score=1.0))
