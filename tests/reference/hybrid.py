"""HNPG (arXiv:2311.08384) for few states and actions: its equations solved exactly in float64, sample by sample.

States and actions are numbers. A policy is a table `policy[s][a]` of probabilities, its parameters `theta[s][a]` the
logits. A critic is linear: f(s, a) = features(s, a) . weights, with `one_hot_features` for a table. "E_off" and "E_on"
are plain means over the samples of one source, so that neither source counts more for having more samples; `lam` weighs
the on-policy one. A source without samples is left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Vector = np.ndarray
Table = np.ndarray
Features = Callable[[int, int], Vector]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Transition:
    """One offline sample (s, a, r, s'); `terminated` where s' has no value."""

    state: int
    action: int
    reward: float
    next_state: int
    terminated: bool = False


@dataclass(frozen=True)
class Outcome:
    """One on-policy sample: a state, the action the policy took, and the return y that followed (no bootstrap)."""

    state: int
    action: int
    value: float


# ---------------------------------------------------------------- policies and critics


def softmax_policy(theta: Table) -> Table:
    """policy[s][a] = exp theta[s][a] / sum_b exp theta[s][b]."""
    policy = np.zeros(np.shape(theta))
    for s, logits in enumerate(np.asarray(theta, dtype=np.float64)):
        weights = [math.exp(x - max(logits)) for x in logits]
        policy[s] = [w / math.fsum(weights) for w in weights]
    return policy


def one_hot_features(states: int, actions: int) -> Features:
    """Features that make a linear function a table: entry s * actions + a is 1."""
    return lambda s, a: np.eye(states * actions)[s * actions + a]


def critic(weights: Vector, features: Features) -> Callable[[int, int], float]:
    """f(s, a) = features(s, a) . weights."""
    return lambda s, a: float(features(s, a) @ weights)


def value(f: Callable[[int, int], float], policy: Table, s: int) -> float:
    """E_{a ~ policy(s)} f(s, a), summed over all actions."""
    return math.fsum(p * f(s, a) for a, p in enumerate(policy[s]))


def exact_q(transition: np.ndarray, reward: Table, policy: Table, gamma: float) -> Table:
    """Q of a policy in a known chain: solve Q = r + gamma P V, V(s) = sum_a policy[s][a] Q[s][a].

    `transition[s][a]` are probabilities of next states; where an episode ends they sum to less than 1.
    """
    states, actions = np.shape(reward)
    system, constant = np.eye(states * actions), np.zeros(states * actions)
    for s in range(states):
        for a in range(actions):
            constant[s * actions + a] = reward[s][a]
            for t in range(states):
                for b in range(actions):
                    system[s * actions + a, t * actions + b] -= gamma * transition[s][a][t] * policy[t][b]
    return np.linalg.solve(system, constant).reshape(states, actions)


# ---------------------------------------------------------------- policy evaluation


def monte_carlo_returns(rewards: Sequence[float], gamma: float, beyond: float = 0.0) -> list[float]:
    """y_t = sum_k gamma^(k-t) r_k of one episode; `beyond` is the value of where it was cut by a time limit, else 0."""
    ahead = len(rewards)
    return [
        math.fsum([gamma ** (k - t) * rewards[k] for k in range(t, ahead)] + [gamma ** (ahead - t) * beyond])
        for t in range(ahead)
    ]


def regress(
    offline: Sequence[tuple[Pair, float]], online: Sequence[tuple[Pair, float]], features: Features, lam: float
) -> Vector:
    """argmin_w E_off[(features(s, a) . w - target)²] + lam E_on[(features(s, a) . w - target)²].

    Each source is a list of ((s, a), target). Of several solutions the shortest.
    """
    size = len(features(*(offline or online)[0][0]))
    matrix, vector = np.zeros((size, size)), np.zeros(size)
    for source, weight in ((offline, 1.0), (online, lam)):
        for (s, a), target in source:
            phi = features(s, a)
            matrix += weight * np.outer(phi, phi) / len(source)
            vector += weight * phi * target / len(source)
    return np.linalg.lstsq(matrix, vector, rcond=None)[0]


def fitted_policy_evaluation(
    offline: Sequence[Transition],
    online: Sequence[Outcome],
    policy: Table,
    features: Features,
    *,
    gamma: float,
    lam: float,
    iterations: int,
    averaged: int = 1,
) -> Vector:
    """Eq. 1 and algorithm 2 (HPE): weights of the critic after `iterations` regressions from f_0 = 0.

        f_k = argmin_f E_off[(f(s,a) - r - gamma E_{a'~pi} f_{k-1}(s',a'))²] + lam E_on[(f(s,a) - y)²]

    The result is the mean of the last `averaged` of them (K2 - K1 in the paper; 1 in its published code). Each
    iteration sees the same samples here, where the paper draws fresh ones.
    """
    seen = [((sample.state, sample.action), sample.value) for sample in online]
    size = len(features(0, 0))
    history = [np.zeros(size)]
    for _ in range(iterations):
        previous = critic(history[-1], features)
        targets = []
        for sample in offline:
            future = 0.0 if sample.terminated else gamma * value(previous, policy, sample.next_state)
            targets.append(((sample.state, sample.action), sample.reward + future))
        history.append(regress(targets, seen, features, lam))
    return np.mean(history[-averaged:], axis=0)


def finite_horizon_evaluation(
    offline: Sequence[Sequence[Transition]],
    online: Sequence[Sequence[Outcome]],
    policies: Sequence[Table],
    features: Features,
    *,
    lam: float,
) -> list[Vector]:
    """Algorithm 5: one critic per step h, fitted backwards from f_H = 0, one regression each, without discount.

        f_h = argmin_f E_off,h[(f(s,a) - r - E_{a'~pi_{h+1}} f_{h+1}(s',a'))²] + lam E_on,h[(f(s,a) - y)²]

    `offline[h]`, `online[h]` and `policies[h]` belong to step h. Returns the weights of f_0, ..., f_{H-1}.
    """
    horizon = len(policies)
    weights: list[Vector] = [np.zeros(0)] * horizon
    for h in reversed(range(horizon)):
        targets = []
        for sample in offline[h]:
            last = h == horizon - 1 or sample.terminated
            future = 0.0 if last else value(critic(weights[h + 1], features), policies[h + 1], sample.next_state)
            targets.append(((sample.state, sample.action), sample.reward + future))
        seen = [((sample.state, sample.action), sample.value) for sample in online[h]]
        weights[h] = regress(targets, seen, features, lam)
    return weights


# ---------------------------------------------------------------- policy improvement


def score(policy: Table, s: int, a: int) -> Vector:
    """grad_theta log pi(a|s), flat: for logits b of state s it is 1[b = a] - pi(b|s), for other states 0."""
    gradient = np.zeros(np.shape(policy))
    gradient[s] = -policy[s]
    gradient[s, a] += 1.0
    return gradient.reshape(-1)


def advantage(f: Callable[[int, int], float], policy: Table, s: int, a: int) -> float:
    """fbar(s, a) = f(s, a) - E_{b ~ pi(s)} f(s, b)."""
    return f(s, a) - value(f, policy, s)


def union_fisher(offline: Sequence[Pair], online: Sequence[Pair], policy: Table, lam: float) -> np.ndarray:
    """E_off[score score'] + lam E_on[score score'] over the given state-action pairs (eq. 48)."""
    size = np.size(policy)
    total = np.zeros((size, size))
    for source, weight in ((offline, 1.0), (online, lam)):
        for s, a in source:
            total += weight * np.outer(score(policy, s, a), score(policy, s, a)) / len(source)
    return total


def union_gradient(
    offline: Sequence[Pair], online: Sequence[Pair], policy: Table, f: Callable[[int, int], float], lam: float
) -> Vector:
    """E_off[score fbar] + lam E_on[score fbar] over the given state-action pairs (eq. 48)."""
    total = np.zeros(np.size(policy))
    for source, weight in ((offline, 1.0), (online, lam)):
        for s, a in source:
            total += weight * score(policy, s, a) * advantage(f, policy, s, a) / len(source)
    return total


def union_natural_gradient(
    offline: Sequence[Pair],
    online: Sequence[Pair],
    policy: Table,
    f: Callable[[int, int], float],
    *,
    lam: float,
    damping: float = 0.0,
) -> Vector:
    """Eq. 2 and 48: w = argmin E_off[(w . score - fbar)²] + lam E_on[(w . score - fbar)²], flat; the shortest if many.

    That is (F_off + lam F_on + damping I)⁻¹ (g_off + lam g_on): a natural gradient with both expectations on the union.
    The paper has the dataset's actions in the offline source; its published code draws them from the policy.
    """
    matrix = union_fisher(offline, online, policy, lam) + damping * np.eye(np.size(policy))
    return np.linalg.lstsq(matrix, union_gradient(offline, online, policy, f, lam), rcond=None)[0]


def every_action(states: Sequence[int], policy: Table, resolution: int) -> list[Pair]:
    """Each state with each action, repeated `resolution` * pi(a|s) times: sampled actions without sampling noise.

    Probabilities must be multiples of 1 / resolution.
    """
    pairs = []
    for s in states:
        for a, p in enumerate(policy[s]):
            count = round(p * resolution)
            if not math.isclose(count, p * resolution, abs_tol=1e-9):
                raise ValueError(f"probability {p} is no multiple of 1/{resolution}")
            pairs += [(s, a)] * count
    return pairs


def trust_region_step(direction: Vector, matrix: np.ndarray, max_kl: float) -> Vector:
    """sqrt(2 max_kl / x'Fx) x: as far along x as the quadratic model of the KL allows (eq. 50 without a search)."""
    return math.sqrt(2 * max_kl / float(direction @ matrix @ direction)) * direction


def actor_critic_update(policy: Table, f: Callable[[int, int], float], eta: float) -> Table:
    """Algorithm 1 (HAC): pi_{t+1}(a|s) proportional to pi_t(a|s) exp(eta f(s, a))."""
    updated = np.zeros(np.shape(policy))
    for s in range(len(policy)):
        row = [p * math.exp(eta * f(s, a)) for a, p in enumerate(policy[s])]
        updated[s] = [x / math.fsum(row) for x in row]
    return updated
