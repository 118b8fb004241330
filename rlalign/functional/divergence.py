"""Divergences between distributions: sampled estimates from log-probabilities, and closed forms."""

import torch
from jaxtyping import Float
from torch import Tensor

LOG_DIFFERENCE_LIMIT = 20.0
"""exp of more than this overflows half precision and swamps every other term of a batch."""


def kl_k1(log_prob: Float[Tensor, "*#shape"], log_prob_ref: Float[Tensor, "*#shape"]) -> Float[Tensor, "*#shape"]:
    """Estimate KL(policy || reference) by the log-ratio itself.

        k1 = d,   d = log π(a) - log π_ref(a),   a ~ π

    Unbiased, of high variance and of either sign. As a penalty inside the reward it has the right gradient; as a loss
    its expected gradient is zero.

    Args:
        log_prob: Log-probability under the policy, in nats.
        log_prob_ref: Log-probability under the reference, in nats.

    Returns:
        One estimate per decision, in nats.

    Example:
        >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.5000])

    Reference:
        Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    return log_prob - log_prob_ref


def kl_k2(log_prob: Float[Tensor, "*#shape"], log_prob_ref: Float[Tensor, "*#shape"]) -> Float[Tensor, "*#shape"]:
    """Estimate KL(policy || reference) by half the squared log-ratio.

        k2 = d² / 2,   d = log π(a) - log π_ref(a),   a ~ π

    Biased, of low variance, never negative. As a loss on fresh samples its expected gradient is that of the KL.

    Args:
        log_prob: Log-probability under the policy, in nats.
        log_prob_ref: Log-probability under the reference, in nats.

    Returns:
        One estimate per decision, in nats.

    Example:
        >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.1250])

    Reference:
        Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    return 0.5 * (log_prob - log_prob_ref) ** 2


def kl_k3(log_prob: Float[Tensor, "*#shape"], log_prob_ref: Float[Tensor, "*#shape"]) -> Float[Tensor, "*#shape"]:
    """Estimate KL(policy || reference) without bias, with low variance and never below zero.

        k3 = exp(-d) - 1 + d,   d = max(log π(a) - log π_ref(a), -20),   a ~ π

    As a loss it has the right value, but on fresh samples its expected gradient is that of KL(reference || policy),
    which agrees with the one wanted only close to the reference.

    Args:
        log_prob: Log-probability under the policy, in nats.
        log_prob_ref: Log-probability under the reference, in nats.

    Returns:
        One estimate per decision, in nats. Below a log difference of -20 it is constant and has no gradient, so that
        one decision the policy has all but given up cannot overflow.

    Example:
        >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.5]))  # exp(-1/2) - 1 + 1/2
        tensor([0.1065])

    Reference:
        Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html); Shao et al. 2024
        (arXiv:2402.03300), eq. 4. Differs from verl/trainer/ppo/core_algos.py: that clamps large positive
        differences too, which takes the gradient away where the policy is far too sure.
    """
    difference = (log_prob - log_prob_ref).clamp(min=-LOG_DIFFERENCE_LIMIT)
    return torch.expm1(-difference) + difference


def gaussian_kl(
    mean_p: Float[Tensor, "*#shape"],
    std_p: Float[Tensor, "*#shape"],
    mean_q: Float[Tensor, "*#shape"],
    std_q: Float[Tensor, "*#shape"],
) -> Float[Tensor, "*#shape"]:
    """Take KL(p || q) of one-dimensional Gaussians in closed form.

        KL = log(σ_q / σ_p) + (σ_p² + (μ_p - μ_q)²) / (2 σ_q²) - 1/2

    Args:
        mean_p: Mean of the distribution the expectation is over.
        std_p: Its standard deviation, > 0.
        mean_q: Mean of the other distribution.
        std_q: Its standard deviation, > 0.

    Returns:
        One value per dimension, in nats; sum over the dimensions of a decision for its KL.

    Example:
        >>> one = torch.tensor(1.0)
        >>> gaussian_kl(torch.tensor(0.0), one, torch.tensor(2.0), one)
        tensor(2.)

    Reference:
        Kullback & Leibler 1951; with equal deviations it is the penalty of Liu et al. 2025 (arXiv:2505.05470).
    """
    variance_ratio = (std_p / std_q) ** 2
    return 0.5 * (variance_ratio + ((mean_p - mean_q) / std_q) ** 2 - 1 - variance_ratio.log())
