"""What keeps a policy near its data while it improves: exponential weights, and a Q term scaled against imitation."""

import torch
from jaxtyping import Float
from torch import Tensor


def exponential_weights(
    advantages: Float[Tensor, "*shape"], *, temperature: float | int, max_weight: float | int = 100.0
) -> Float[Tensor, "*shape"]:
    """Weigh recorded decisions by how much better than average they were, for `weighted_bc`.

        w = min(exp(β Â), cap)

    Args:
        advantages: Â, for example Q(s, a) - V(s).
        temperature: β, an inverse temperature; 0 weighs all decisions the same.
        max_weight: The cap.

    Returns:
        Weights > 0, detached.

    Example:
        >>> exponential_weights(torch.tensor([0.0, 50.0]), temperature=3.0)
        tensor([  1., 100.])

    Reference:
        Peng et al. 2019 (arXiv:1910.00177), eq. 9; Kostrikov et al. 2022 (arXiv:2110.06169), eq. 7, with the cap of
        implicit_q_learning/actor.py.
    """
    return torch.exp(temperature * advantages.detach()).clamp(max=max_weight)


def td3_bc_objective(
    q_values: Float[Tensor, " batch"],
    policy_actions: Float[Tensor, "batch dims"],
    data_actions: Float[Tensor, "batch dims"],
    *,
    alpha: float | int,
) -> Float[Tensor, " batch"]:
    """Raise Q of the policy's action while staying near the recorded one: TD3+BC.

        L_i = -λ Q(s_i, π(s_i)) + mean_d (π(s_i) - a_i)²,   λ = α / mean_j |Q(s_j, π(s_j))|

    Args:
        q_values: Q of the policy's actions; carries the gradient. Its size, averaged over the batch, is held fixed.
        policy_actions: π(s), in [-1, 1].
        data_actions: a, on the same scale.
        alpha: 0 is behaviour cloning of deterministic actions.

    Returns:
        Objective per transition. Scaling all Q-values leaves it as it is.

    Example:
        >>> actions = torch.zeros(2, 1)
        >>> td3_bc_objective(torch.tensor([1.0, 3.0]), actions, actions + 1, alpha=2.0)  # λ = 1
        tensor([ 0., -2.])

    Reference:
        Fujimoto & Gu 2021 (arXiv:2106.06860), eqs. 3 to 5; same numbers as TD3_BC/TD3_BC.py.
    """
    scale = alpha / q_values.detach().abs().mean().clamp(min=1e-8)
    return (policy_actions - data_actions).square().mean(-1) - scale * q_values
