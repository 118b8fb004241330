"""Observations become tensors, decisions become actions: every space, by hand."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space

from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.config import ConfigError
from tests.agents.tiny_environments import ACTIONS, OBSERVATIONS


def vector(space, observation):
    parts = ObservationParts(space)
    return parts.vector(parts.tensors(observation))


def test_numbers_enter_as_they_are_and_grids_flattened():
    assert vector(OBSERVATIONS["box"], np.array([[1.0, -2.0, 0.5]], np.float32)).tolist() == [[1.0, -2.0, 0.5]]
    grid = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    assert vector(OBSERVATIONS["grid"], grid).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert vector(OBSERVATIONS["number"], np.array([0.5, -1.0], np.float32)).tolist() == [[0.5], [-1.0]]
    assert vector(OBSERVATIONS["multi_binary"], np.array([[[1, 0], [0, 1]]], np.int8)).tolist() == [[1, 0, 0, 1]]


def test_doubles_become_floats_once():
    parts = ObservationParts(OBSERVATIONS["box_float64"])
    assert parts.tensors(np.array([[0.1, 2.0]]))["observation"].dtype == torch.float32


def test_discrete_observations_become_one_hot_counted_from_their_start():
    assert vector(OBSERVATIONS["discrete"], np.array([2, 5])).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    assert vector(OBSERVATIONS["multi_discrete"], np.array([[1, 5], [0, 7]])).tolist() == [
        [0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1],
    ]


def test_parts_of_a_dict_stand_side_by_side_and_images_apart():
    parts = ObservationParts(OBSERVATIONS["dict"])
    observation = {
        "position": np.array([[0.5, -0.5]], np.float32),
        "inventory": np.array([2]),
        "camera": np.zeros((1, 8, 8, 2), np.uint8),
    }
    seen = parts.tensors(observation)
    order = {"inventory": [0.0, 0.0, 1.0], "position": [0.5, -0.5]}  # Gymnasium sorts the names
    assert parts.vector(seen).tolist() == [order["inventory"] + order["position"]]
    assert parts.images == {"camera"}
    assert seen["camera"].dtype == torch.uint8
    assert parts.vector_size == 5


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_width_and_leading_dimensions_of_every_space(name):
    parts = ObservationParts(OBSERVATIONS[name])
    batch = batch_space(
        OBSERVATIONS[name],
        6,
    )
    batch.seed(3)
    seen = parts.tensors(batch.sample())
    if parts.vector_size:
        flat = parts.vector(seen)
        assert flat.shape == (6, parts.vector_size)
        folded = parts.vector({key: value.unflatten(0, (2, 3)) for key, value in seen.items()})
        assert folded.equal(flat.unflatten(0, (2, 3)))


def test_tensors_do_not_share_memory_with_the_environment():
    # Vector environments may write the next observation into the same buffer.
    buffer = np.zeros((1, 3), np.float32)
    seen = ObservationParts(OBSERVATIONS["box"]).tensors(buffer)["observation"]
    buffer[:] = 7
    assert seen.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Tuple([spaces.Discrete(2)]), spaces.Dict({})])
def test_other_observation_spaces_are_refused_with_a_way_out(space):
    with pytest.raises(ConfigError, match="not supported; wrap the environment with gymnasium.wrappers.Flatten"):
        ObservationParts(space)


def test_the_part_of_a_dict_that_is_refused_is_named():
    with pytest.raises(ConfigError, match=r"\(`words`\) is not supported"):
        ObservationParts(spaces.Dict({"place": OBSERVATIONS["box"], "words": spaces.Text(3)}))


# ---------------------------------------------------------------- masks


def test_a_mask_may_be_a_part_of_the_observation():
    space = spaces.Dict({"observation": OBSERVATIONS["box"], "action_mask": spaces.MultiBinary(3)})
    parts = ObservationParts(space)
    observation = {"observation": np.zeros((1, 3), np.float32), "action_mask": np.array([[1, 0, 1]], np.int8)}
    assert parts.allowed(observation, {}).tolist() == [[True, False, True]]
    assert list(parts.tensors(observation)) == ["observation"]  # the networks never see it
    assert parts.vector_size == 3


def test_a_mask_may_be_in_the_info_of_some_copies_only():
    parts = ObservationParts(OBSERVATIONS["box"])
    info = {"action_mask": np.array([[True, False], [False, False]]), "_action_mask": np.array([True, False])}
    assert parts.allowed(np.zeros((2, 3)), info).tolist() == [[True, False], [True, True]]
    assert parts.allowed(np.zeros((2, 3)), {}) is None


# ---------------------------------------------------------------- actions


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("squash", [False, True])
def test_every_sample_is_an_action_of_the_space(name, squash):
    interface = ActionInterface(ACTIONS[name], squash=squash and name == "box")
    outputs = 3 * torch.randn(50, interface.distribution.size)
    params = interface.distribution(outputs).detach()
    noise = interface.distribution.noise((50,), torch.Generator().manual_seed(0))
    actions = interface.to_env(interface.distribution.sample(params, noise))
    for action in actions:
        assert ACTIONS[name].contains(action), action
    assert len(np.unique(actions.reshape(50, -1), axis=0)) > 1


def test_actions_by_hand():
    assert ActionInterface(ACTIONS["discrete_from_2"]).to_env(torch.tensor([0, 2])).tolist() == [2, 4]
    grid = ActionInterface(ACTIONS["multi_discrete"]).to_env(torch.tensor([[1, 2, 3, 0]]))
    assert grid.tolist() == [[[1, 2], [3, 0]]]
    started = ActionInterface(spaces.MultiDiscrete([2, 2], start=[5, -1])).to_env(torch.tensor([[1, 0]]))
    assert started.tolist() == [[6, -1]]
    switches = ActionInterface(ACTIONS["multi_binary"]).to_env(torch.tensor([[1, 0, 0, 1]]))
    assert (switches.tolist(), switches.dtype) == ([[[1, 0], [0, 1]]], np.int8)


def test_scaled_decisions_of_1_stand_for_the_bounds():
    torque = ActionInterface(spaces.Box(np.float32([-2, 0]), np.float32([2, 10])), scale=True)
    assert torque.to_env(torch.tensor([[-1.0, 0.5], [0.25, 3.0]])).tolist() == [[-2, 7.5], [0.5, 10]]
    assert torque.from_env(np.float32([[-2, 7.5], [0.5, 10]])).tolist() == [[-1, 0.5], [0.25, 1]]
    endless = ActionInterface(spaces.Box(-np.inf, np.inf, (1,)), scale=True)
    assert endless.from_env(np.float32([[7]])).tolist() == [[7]], "without bounds there is nothing to scale by"


def test_continuous_actions_are_clipped_for_the_environment_alone():
    decisions = torch.tensor([[-3.0, 0.25, 9.0, 0.0, 1.0, 3.0]])
    actions = ActionInterface(ACTIONS["box"]).to_env(decisions)
    assert actions.tolist() == [[[-1.0, 0.25, 5.0], [0.0, 0.5, 3.0]]]
    assert decisions[0, 0] == -3.0  # what the log-probability is of


def test_squashed_actions_are_scaled_to_the_bounds_once():
    # -1 is the low end, 1 the high end, 0 the middle: (-1, 1), (0, 0.5), (2, 5)
    decisions = torch.tensor([[-1.0, 1.0, 0.0, 1.0, 0.0, -1.0]])
    actions = ActionInterface(ACTIONS["box"], squash=True).to_env(decisions)
    np.testing.assert_allclose(actions, [[[-1.0, 0.5, 3.5], [1.0, 0.25, 2.0]]])


@pytest.mark.parametrize("name", ACTIONS)
def test_recorded_actions_come_back_as_decisions(name):
    batch = batch_space(ACTIONS[name], 5)
    batch.seed(1)
    actions = batch.sample()
    for squash in {False, name == "box"}:
        interface = ActionInterface(ACTIONS[name], squash=squash)
        np.testing.assert_allclose(interface.to_env(interface.from_env(actions)), actions, rtol=1e-6)


def test_what_cannot_be_acted_in_is_refused():
    with pytest.raises(ConfigError, match="action space Text.* is not supported"):
        ActionInterface(spaces.Text(3))
    with pytest.raises(ConfigError, match="is not supported"):
        ActionInterface(spaces.Box(0, 9, (2,), dtype=np.int64))
    endless = gym.spaces.Box(-np.inf, np.inf, (1,))
    with pytest.raises(ConfigError, match=r"`network.squash` needs an action space with bounds"):
        ActionInterface(endless, squash=True)
    assert ActionInterface(endless).to_env(torch.tensor([[7.5]])).tolist() == [[7.5]]
