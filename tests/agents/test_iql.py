"""Implicit Q-learning: one update by hand, its order, heads of Q, and the stitched fork."""

import copy

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rlalign.agents.config_offline import IQLConfig
from rlalign.agents.iql import IQLLearner
from rlalign.agents.offline_parts import action_features
from rlalign.nn.config import HLGauss, TwoHot
from rlalign.nn.policies import Categorical, Gaussian, MultiCategorical
from tests.agents.offline_data import choice, random_batch, same_weights, small, stitched_chain, train


def learner(distribution=None, *, seed=0, lr=1e-3, **changes):
    cfg = IQLConfig(**small(lr=lr), **changes)
    return IQLLearner(cfg, 3, distribution or Categorical(2), torch.Generator().manual_seed(seed))


def test_updates_equal_the_authors():
    """V from the slow Q; the policy with the new V; Q with the new V; then the slow copy."""
    ours, theirs = learner(Gaussian(2), target_tau=0.1), learner(Gaussian(2))
    nets = {name: copy.deepcopy(vars(theirs)[name]) for name in ("value", "policy", "q", "target")}
    adam = {name: torch.optim.Adam(nets[name].parameters(), lr=1e-3) for name in ("value", "policy", "q")}

    def descend(name, loss):
        adam[name].zero_grad()
        loss.backward()
        adam[name].step()

    def value(x):
        return next(iter(nets["value"])).network(x).squeeze(-1)

    for number in range(3):
        batch = random_batch(number, actions=None)
        pair = torch.cat([batch.observations, batch.actions], -1)
        slow = torch.min(*(member.network(pair).squeeze(-1) for member in nets["target"])).detach()
        gap = slow - value(batch.observations)
        descend("value", (torch.where(gap > 0, 0.7, 0.3) * gap**2).mean())
        weight = ((slow - value(batch.observations)) * 3.0).exp().clamp(max=100.0).detach()
        log_prob = nets["policy"].distribution.log_prob(nets["policy"](batch.observations), batch.actions)
        descend("policy", -(weight * log_prob).mean())
        alive = 1 - batch.terminated.float()
        target = (batch.rewards + 0.99 * alive * value(batch.next_observations)).detach()
        one, two = (member.network(pair).squeeze(-1) for member in nets["q"])
        descend("q", ((one - target) ** 2 + (two - target) ** 2).mean() / 2)
        for old, new in zip(nets["target"].parameters(), nets["q"].parameters(), strict=True):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)
        ours.update(batch)
    for name, net in nets.items():
        for a, b in zip(vars(ours)[name].parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_a_time_limit_bootstraps_and_a_termination_does_not():
    batch = random_batch(1, terminated=False)
    cut = type(batch)(**vars(batch) | {"truncated": torch.ones_like(batch.truncated)})
    ended = type(batch)(**vars(batch) | {"terminated": torch.ones_like(batch.truncated)})
    plain, limited, over = (learner().update(b)["q/target_mean"].item() for b in (batch, cut, ended))
    assert plain == limited
    assert over == pytest.approx(batch.rewards.mean().item())
    assert plain != pytest.approx(over)


@pytest.mark.learning
@pytest.mark.parametrize(
    "head", [None, HLGauss(low=-5.0, high=15.0, num_bins=41), TwoHot(num_bins=41), HLGauss(num_bins=41)]
)
def test_pieces_of_a_path_are_joined_by_every_head_of_q(head):
    data, fork, door = stitched_chain()
    options = {"expectile": 0.9, "target_tau": 0.1} | ({} if head is None else {"value_head": head})
    ours = train(learner(lr=5e-3, **options), data, 400)
    assert choice(ours, fork) > 0.9
    assert choice(ours, door) > 0.9
    pair = torch.cat([door, torch.tensor([1.0, 0.0])])[None]
    assert ours.q.smallest(pair).item() == pytest.approx(10.0, abs=0.6)


def test_slow_and_fast_q_keep_the_same_support():
    ours = learner(value_head=HLGauss(num_bins=31))
    for number, size in enumerate((1.0, 10.0, 100.0)):
        batch = random_batch(number)
        ours.update(batch.with_rewards(size * batch.rewards))
        ends = [(float(m.head.low), float(m.head.high)) for critics in (ours.q, ours.target) for m in critics]
        assert len(set(ends)) == 1
        assert ends[0][0] < float((size * batch.rewards).min())
        assert ends[0][1] > float((size * batch.rewards).max())


def test_heads_without_meaning_are_refused_with_the_reason():
    with pytest.raises(ValidationError, match="a `c51` Q-function has no next distribution"):
        TypeAdapter(IQLConfig).validate_python({"value_head": {"type": "c51"}})


def test_actions_enter_q_as_numbers():
    assert action_features(Categorical(3), torch.tensor([2, 0])).tolist() == [[0, 0, 1], [1, 0, 0]]
    got = action_features(MultiCategorical([2, 3]), torch.tensor([[1, 0]]))
    assert got.tolist() == [[0, 1, 1, 0, 0]]
    assert action_features(Gaussian(2), torch.tensor([[0.5, -1.0]])).tolist() == [[0.5, -1.0]]


def test_a_saved_learner_continues_bit_for_bit():
    straight, resumed = (learner(seed=s, value_head=HLGauss(num_bins=21)) for s in (0, 1))
    straight.update(random_batch(0))
    resumed.load_state_dict(copy.deepcopy(straight.state_dict()))
    for one in (straight, resumed):
        one.update(random_batch(1))
    assert same_weights(straight.modules, resumed.modules)
