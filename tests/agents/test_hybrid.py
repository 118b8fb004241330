"""Hybrid policy evaluation and the step on the union: hand arithmetic, and the paper's equations solved exactly."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlalign.agents.config import AgentOptimConfig, NetworkConfig, NormalizeAndProject
from rlalign.agents.config_hybrid import HNPGConfig
from rlalign.agents.hybrid import PolicyEvaluation
from rlalign.agents.hybrid_networks import StepActors, encoded, make_critic
from rlalign.agents.hybrid_sources import (
    OfflineSource,
    OnlineSource,
    Source,
    offline_targets,
    source_weights,
    state_values,
)
from rlalign.agents.hybrid_step import improve, union
from rlalign.agents.networks import VECTOR, Actor
from rlalign.agents.spaces import ActionInterface, ObservationParts
from rlalign.nn.config import HLGauss
from rlalign.nn.policies import Bernoulli, Categorical, Gaussian, MultiCategorical
from rlalign.nn.value_heads import ValueHead
from rlalign.optim.step import TrainingDiverged
from tests.reference import hybrid as reference

STATES, ACTIONS = 3, 2
PARTS = ObservationParts(gym.spaces.Discrete(STATES))
LINEAR = NetworkConfig(hidden=[])
PRECISE = AgentOptimConfig(learning_rate=0.05, eps=1e-8, max_grad_norm=None)


def actions_of() -> ActionInterface:
    return ActionInterface(gym.spaces.Discrete(ACTIONS))


def evaluation(cfg: HNPGConfig) -> PolicyEvaluation:
    heads = cfg.horizon or 1

    def make():
        return make_critic(
            PARTS,
            actions_of(),
            [ValueHead(cfg.value_head) for _ in range(heads)],
            cfg.critic_hidden,
            cfg.network,
            initialization=cfg.initialization,
            nap=cfg.normalize_and_project,
        )

    return PolicyEvaluation(make, cfg)


def config(**changes) -> HNPGConfig:
    settings = {"network": LINEAR, "critic_hidden": [], "optim": PRECISE, "critic_steps": 400}
    return HNPGConfig(**settings | changes)


def seen(states) -> dict[str, torch.Tensor]:
    return {VECTOR: torch.nn.functional.one_hot(torch.tensor(states), STATES).float()}


def features(s: int, a: int) -> np.ndarray:
    """What a critic without hidden layers sees: the state, the action and a constant."""
    return np.concatenate([np.eye(STATES)[s], np.eye(ACTIONS)[a], [1.0]])


def certain(choices: list[int]) -> torch.Tensor:
    """Weights [actions, states] of a linear policy that takes `choices[s]` in state s for sure."""
    return 200.0 * torch.nn.functional.one_hot(torch.tensor(choices), ACTIONS).float().t() - 100.0


# ---------------------------------------------------------------------------------------------------- hand arithmetic


def test_offline_targets_bootstrap_unless_the_episode_ended():
    got = offline_targets(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 7.0]), torch.tensor([False, True]), gamma=0.5)
    assert got.tolist() == [6.0, 2.0]


def test_sources_share_their_weight_among_real_decisions():
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [False] * 4])
    assert source_weights(mask, 2.0).tolist() == [[1.0, 1.0, 0.0, 0.0], [0.5] * 4, [0.0] * 4]


def test_value_of_a_discrete_policy_is_the_exact_sum():
    params = torch.tensor([[[0.75, 0.25]]]).log()
    got = state_values(
        lambda around, actions: actions @ torch.tensor([4.0, 8.0]),
        Categorical(2),
        params,
        seen([[0]]),
        samples=1,
        random=torch.Generator(),
    )
    assert got.item() == pytest.approx(0.75 * 4 + 0.25 * 8)


def test_value_of_a_continuous_policy_is_the_mean_over_samples_in_pieces_too(monkeypatch):
    distribution = Gaussian(1)
    params = torch.tensor([[[1.0, -20.0], [5.0, -20.0], [2.0, -20.0]]])  # hardly any deviation
    about = {"samples": 10, "random": torch.Generator()}

    def q(around, actions):
        return actions.squeeze(-1) ** 2 + around["vector"].argmax(-1)

    whole = state_values(q, distribution, params, seen([[0, 1, 2]]), **about)
    torch.testing.assert_close(whole, torch.tensor([[1.0, 26.0, 6.0]]))
    monkeypatch.setattr("rlalign.agents.hybrid_sources.ROWS_AT_ONCE", 10)
    torch.testing.assert_close(state_values(q, distribution, params, seen([[0, 1, 2]]), **about), whole)


def test_actions_are_encoded_by_their_kind():
    assert encoded(Categorical(3), torch.tensor([2])).tolist() == [[0, 0, 1]]
    assert encoded(MultiCategorical([2, 3]), torch.tensor([[1, 0]])).tolist() == [[0, 1, 1, 0, 0]]
    assert encoded(Bernoulli(2), torch.tensor([[1, 0]])).tolist() == [[1, 0]]
    assert encoded(Gaussian(2), torch.tensor([[0.5, -2.0]])).tolist() == [[0.5, -2.0]]


def test_a_source_does_not_count_more_for_having_more_samples():
    # the same state and action three times with 1 on-policy (weight 3), once with 0 offline: (3 · 1 + 0) / (3 + 1)
    fitted = evaluation(config())
    weights = torch.cat([source_weights(torch.ones(1, 3).bool(), 3.0), source_weights(torch.ones(1, 1).bool(), 1.0)], 1)
    around, action = seen([0, 0, 0, 0]), torch.tensor([[0.0, 1.0]] * 4)
    fitted.fit(0, around, action, torch.tensor([1.0, 1.0, 1.0, 0.0]), weights[0])
    torch.testing.assert_close(fitted.critic.rows[0].values(around, action)[0].item(), 0.75, atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------- against solved equations

OFFLINE = [
    (0, 0, 0.0, 1, False),
    (0, 1, 0.5, 2, False),
    (1, 0, 1.0, 2, True),
    (1, 1, 0.0, 0, False),
    (2, 1, 0.3, 1, False),
]
ONLINE = [(0, 1, 0.9), (1, 0, 1.2), (2, 1, 0.4), (2, 0, -0.2)]


def offline_source(rows: int = 1) -> OfflineSource:
    states, actions, rewards, following, over = (list(column) for column in zip(*OFFLINE, strict=True))
    count = len(OFFLINE)
    return OfflineSource(
        seen=seen([states] * rows),
        actions=torch.tensor([actions] * rows),
        weights=source_weights(torch.ones(rows, count).bool(), 1.0),
        rewards=torch.tensor([rewards] * rows),
        next_seen=seen([following] * rows),
        terminated=torch.tensor([over] * rows),
    )


def online_source(rows: int = 1, lam: float = 2.0) -> OnlineSource:
    states, actions, returns = (list(column) for column in zip(*ONLINE, strict=True))
    return OnlineSource(
        seen=seen([states] * rows),
        actions=torch.tensor([actions] * rows),
        weights=source_weights(torch.ones(rows, len(ONLINE)).bool(), lam),
        returns=torch.tensor([returns] * rows),
    )


def reference_data() -> tuple[list[reference.Transition], list[reference.Outcome]]:
    return [reference.Transition(*row) for row in OFFLINE], [reference.Outcome(*row) for row in ONLINE]


def every_pair() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    states, actions = zip(*((s, a) for s in range(STATES) for a in range(ACTIONS)), strict=True)
    return seen([list(states)]), torch.nn.functional.one_hot(torch.tensor([list(actions)]), ACTIONS).float()


@pytest.mark.parametrize(("sweeps", "averaged"), [(1, 1), (3, 1), (3, 2)])
def test_evaluation_with_one_critic_is_algorithm_2(sweeps, averaged):
    cfg = config(critic_sweeps=sweeps, critic_averaging=averaged, advantage=replace(config().advantage, gamma=0.9))
    fitted, choices = evaluation(cfg), [1, 0, 1]
    for member in [fitted.critic, *fitted.averaged]:
        for p in member.parameters():
            torch.nn.init.zeros_(p)  # f_0 = 0
    policy = Actor(PARTS, actions_of(), LINEAR)
    policy.network.last.weight.data = certain(choices)
    fitted.run(policy, online_source(), lambda sweep: offline_source(), random=torch.Generator(), progress=0.0)
    weights = reference.fitted_policy_evaluation(
        *reference_data(),
        np.eye(ACTIONS)[choices],
        features,
        gamma=0.9,
        lam=2.0,
        iterations=sweeps,
        averaged=averaged,
    )
    expected = [features(s, a) @ weights for s in range(STATES) for a in range(ACTIONS)]
    assert fitted.q(*every_pair())[0].tolist() == pytest.approx(expected, abs=5e-3)


def test_evaluation_with_a_critic_per_step_is_algorithm_5():
    cfg = config(horizon=3, advantage=replace(config().advantage, gamma=1.0))
    fitted, choices = evaluation(cfg), [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    policy = StepActors(PARTS, actions_of(), LINEAR, horizon=3)
    for row, choice in zip(policy.network.rows, choices, strict=True):
        row.last.weight.data.copy_(certain(choice))
    fitted.run(policy, online_source(3), lambda sweep: offline_source(3), random=torch.Generator(), progress=0.0)
    offline, online = reference_data()
    weights = reference.finite_horizon_evaluation(
        [offline] * 3, [online] * 3, [np.eye(ACTIONS)[choice] for choice in choices], features, lam=2.0
    )
    around, actions = every_pair()
    got = fitted.q({VECTOR: around[VECTOR].repeat(3, 1, 1)}, actions.repeat(3, 1, 1))
    for row, weight in zip(got.tolist(), weights, strict=True):
        expected = [features(s, a) @ weight for s in range(STATES) for a in range(ACTIONS)]
        assert row == pytest.approx(expected, abs=5e-3)


def test_the_step_is_the_natural_gradient_on_the_union():
    lam, damping, max_kl = 3.0, 0.1, 1e-6
    policy = Actor(PARTS, actions_of(), LINEAR)
    table = np.array([[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]])
    policy.network.last.weight.data = torch.tensor(np.log(table).T, dtype=torch.float32)
    policy.network.last.bias.requires_grad_(False)
    q = np.array([[0.0, 1.0], [0.5, -0.5], [2.0, 0.3]])
    offline = reference.every_action([0, 2], table, 4)
    online = reference.every_action([1, 1, 2], table, 4)
    sources = []
    for pairs, weight in ((online, lam), (offline, 1.0)):
        states, actions = (list(column) for column in zip(*pairs, strict=True))
        source = Source(
            seen=seen([states]),
            actions=torch.tensor([actions]),
            weights=source_weights(torch.ones(1, len(pairs)).bool(), weight),
        )
        advantages = [reference.advantage(lambda s, a: q[s, a], table, s, a) for s, a in pairs]
        sources.append((source, torch.tensor([advantages], dtype=torch.float32)))
    before = policy.network.last.weight.detach().clone()
    judged = union(sources, normalize=False, count_online=len(online))
    result = improve(policy, judged, config(max_kl=max_kl, damping=damping))
    # with weights that sum to 1, Fisher and gradient are those of the paper over 1 + λ
    direction = reference.union_natural_gradient(
        offline, online, table, lambda s, a: q[s, a], lam=lam, damping=damping * (1 + lam)
    )
    matrix = reference.union_fisher(offline, online, table, lam) / (1 + lam) + damping * np.eye(6)
    expected = reference.trust_region_step(direction, matrix, max_kl).reshape(STATES, ACTIONS)
    assert bool(result.accepted)
    moved = (policy.network.last.weight.detach() - before).t()
    np.testing.assert_allclose(moved.numpy(), expected, rtol=2e-2, atol=2e-6)


# ------------------------------------------------------------------------------------------------------------ switches


def fit_once(**changes) -> list[torch.Tensor]:
    torch.manual_seed(0)
    fitted = evaluation(config(critic_hidden=[4], critic_steps=1, **changes))
    weights = torch.full((2,), 0.5)
    fitted.fit(0, seen([0, 1]), torch.eye(2), torch.tensor([1.0, 2.0]), weights)
    return [p.detach() for p in fitted.critic.rows[0].parameters()]


def test_l2_on_the_last_tensor_leaves_the_others_alone():
    torch.manual_seed(0)
    plain, all_, last = fit_once(), fit_once(l2=100.0), fit_once(l2=100.0, l2_on="last")
    assert [torch.equal(a, b) for a, b in zip(plain[:-1], last[:-1], strict=True)] == [True, True, True]
    assert not torch.equal(plain[0], all_[0])


def test_every_fit_begins_with_a_fresh_optimizer():
    fitted = evaluation(config(critic_hidden=[4], critic_steps=5))
    row, about = fitted.critic.rows[0], (seen([0, 1]), torch.eye(2), torch.tensor([1.0, 2.0]), torch.ones(2))
    start = [p.detach().clone() for p in row.parameters()]
    fitted.fit(0, *about)
    first = [p.detach().clone() for p in row.parameters()]
    with torch.no_grad():
        for p, value in zip(row.parameters(), start, strict=True):
            p.copy_(value)
    fitted.fit(0, *about)
    assert all(torch.equal(a, b) for a, b in zip(row.parameters(), first, strict=True))


def test_a_distribution_head_finds_its_support_and_the_targets():
    cfg = config(value_head=HLGauss(num_bins=21), critic_hidden=[16], critic_steps=400)
    fitted = evaluation(cfg)
    around, actions, targets = seen([0, 1, 2]), torch.tensor([[1.0, 0.0]] * 3), torch.tensor([-4.0, 0.0, 6.0])
    assert fitted.critic.rows[0].values(around, actions).tolist() == [0.0, 0.0, 0.0]
    fitted.fit(0, around, actions, targets, torch.full((3,), 1 / 3))
    torch.testing.assert_close(fitted.critic.rows[0].values(around, actions), targets, atol=0.2, rtol=0)


@pytest.mark.parametrize("horizon", [None, 2])
def test_normalize_and_project_holds_the_norms_of_every_critic(horizon):
    cfg = config(horizon=horizon, critic_hidden=[8], critic_steps=20, normalize_and_project=NormalizeAndProject())
    fitted = evaluation(cfg)
    before = [[p.detach().norm().item() for p in row.parameters()] for row in fitted.critic.rows]
    for index in range(len(before)):
        fitted.fit(index, seen([0, 1]), torch.eye(2), torch.tensor([1.0, 2.0]), torch.ones(2))
    after = [[p.detach().norm().item() for p in row.parameters()] for row in fitted.critic.rows]
    assert [norms[0] for norms in after] == pytest.approx([norms[0] for norms in before])  # the hidden layer
    assert all(a[1] != b[1] for a, b in zip(after, before, strict=True))  # the output layer is free
    assert fitted.metrics()["nap/norm_growth"] == pytest.approx(1.0)


def test_a_fit_that_diverges_is_undone_and_then_stops_the_run():
    fitted = evaluation(config(critic_hidden=[4], critic_steps=2, optim=replace(PRECISE, nonfinite_budget=1)))
    row = fitted.critic.rows[0]
    before = [p.detach().clone() for p in row.parameters()]
    about = (seen([0, 1]), torch.eye(2), torch.tensor([1.0, float("inf")]), torch.ones(2))
    fitted.fit(0, *about)
    assert all(torch.equal(a, b) for a, b in zip(row.parameters(), before, strict=True))
    with pytest.raises(TrainingDiverged, match="2 times in a row"):
        fitted.fit(0, *about)


@pytest.mark.parametrize("recheck", [True, False])
def test_recheck_kl_holds_the_trust_region_where_the_quadratic_model_does_not(recheck):
    parts = ObservationParts(gym.spaces.Box(-1.0, 1.0, (1,), dtype=np.float32))
    torch.manual_seed(0)
    policy = Actor(parts, ActionInterface(gym.spaces.Box(-9.0, 9.0, (1,), dtype=np.float32)), LINEAR)
    source = Source(
        seen={VECTOR: torch.ones(1, 64, 1)}, actions=torch.randn(1, 64, 1), weights=torch.full((1, 64), 1.0)
    )
    # Rewarding small actions shrinks the deviation, where the true KL grows faster than its quadratic model.
    judged = union([(source, -(source.actions.squeeze(-1) ** 2))], normalize=True, count_online=64)
    result = improve(policy, judged, config(max_kl=0.5, damping=0.0, recheck_kl=recheck))
    assert bool(result.accepted)
    assert (float(result.kl) <= 0.5 * 1.001) == recheck


def test_normalized_advantages_have_weighted_mean_zero_and_deviation_one():
    source = Source(seen=seen([[0, 1]]), actions=torch.zeros(1, 2), weights=torch.tensor([[3.0, 1.0]]))
    judged = union([(source, torch.tensor([[0.0, 4.0]]))], normalize=True, count_online=2)
    # weights 3/4 and 1/4: mean 1, variance 3/4 · 1 + 1/4 · 9 = 3
    torch.testing.assert_close(judged.advantages, torch.tensor([[-1.0, 3.0]]) / 3**0.5)
    assert judged.weights.tolist() == [[0.75, 0.25]]
