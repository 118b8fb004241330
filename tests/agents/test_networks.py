"""Actor and critic over any observation."""

import pytest
import torch
from gymnasium import spaces

from rlalign.agents.config import NetworkConfig, NormalizeAndProject
from rlalign.agents.networks import Actor, Critic, normalized, prepare
from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.nn.config import MSE, HLGauss
from rlalign.nn.value_heads import ValueHead
from tests.agents.tiny_environments import ACTIONS, OBSERVATIONS

CFG = NetworkConfig(hidden=[8, 6])


def prepared(space, rows=5):
    parts = ObservationParts(space)
    samples = [space.sample() for _ in range(rows)]
    if isinstance(space, spaces.Dict):
        batch = {name: torch.stack([torch.as_tensor(s[name]) for s in samples]).numpy() for name in space.spaces}
    else:
        batch = torch.stack([torch.as_tensor(s) for s in samples]).numpy()
    return parts, prepare(parts, parts.tensors(batch))


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_every_observation_has_features_and_each_counts(name):
    parts, seen = prepared(OBSERVATIONS[name])
    actor = Actor(parts, ActionInterface(ACTIONS["discrete"]), CFG)
    inputs = {key: value.float().requires_grad_() for key, value in seen.items()}
    out = actor(inputs)
    assert out.shape == (5, 3)
    out.square().sum().backward()
    assert set(inputs) == set(seen)
    for key, value in inputs.items():
        assert value.grad.abs().sum() > 0, key


def test_pixels_may_have_their_channels_first_or_last():
    # Equal weights give equal features.
    first, last = spaces.Box(0, 255, (3, 36, 40), "uint8"), spaces.Box(0, 255, (36, 40, 3), "uint8")
    (parts, seen), (other_parts, _) = prepared(first), prepared(last)
    actors = []
    for part in (parts, other_parts):
        torch.manual_seed(0)
        actors.append(Actor(part, ActionInterface(ACTIONS["discrete"]), CFG))
    turned = {"observation": seen["observation"].movedim(1, -1)}
    torch.testing.assert_close(actors[0](seen), actors[1](turned))


def test_an_untrained_policy_is_nearly_uniform():
    parts, seen = prepared(OBSERVATIONS["box"])
    actor = Actor(parts, ActionInterface(ACTIONS["discrete"]), CFG)
    torch.testing.assert_close(actor(seen).softmax(-1), torch.full((5, 3), 1 / 3), atol=0.02, rtol=0)


def test_masks_make_actions_impossible():
    parts, seen = prepared(OBSERVATIONS["box"])
    actor = Actor(parts, ActionInterface(ACTIONS["discrete"]), CFG)
    allowed = torch.tensor([[True, False, True]] * 5)
    assert actor(seen, allowed).softmax(-1)[:, 1].tolist() == [0.0] * 5


@pytest.mark.parametrize("head", [MSE(), HLGauss(low=-1.0, high=3.0)])
def test_critics_decode_values(head):
    parts, seen = prepared(OBSERVATIONS["box"])
    critic = Critic(parts, ValueHead(head), CFG)
    assert critic.values(seen).shape == (5,)
    if isinstance(head, HLGauss):  # begins at 0, not at the middle of its range
        torch.testing.assert_close(critic.values(seen), torch.zeros(5), atol=1e-2, rtol=0)


def test_projection_leaves_outputs_and_log_std_alone():
    parts, seen = prepared(OBSERVATIONS["box"])
    actor = normalized(Actor(parts, ActionInterface(ACTIONS["box"]), CFG), NormalizeAndProject())
    before = actor(seen)
    with torch.no_grad():
        actor.network[0].weight.mul_(7)  # a norm follows: no part of the function
    torch.testing.assert_close(actor(seen), before, atol=1e-5, rtol=1e-4)
    assert normalized(actor, None) is actor


def test_equal_seeds_make_equal_networks():
    def weights(seed):
        torch.manual_seed(seed)
        parts, _ = prepared(OBSERVATIONS["box"])
        return torch.cat([p.flatten() for p in Actor(parts, ActionInterface(ACTIONS["box"]), CFG).parameters()])

    assert weights(0).equal(weights(0))
    assert not weights(0).equal(weights(1))
