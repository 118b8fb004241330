"""What every trained denoising step wants minimised: the clipped surrogate, Guard's corrections, the KL penalty."""

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.diffusion.config import StepObjective
from rlalign.diffusion.trajectory import StepScore, Trajectory
from rlalign.functional.divergence import gaussian_kl
from rlalign.functional.flow import ddim_guard_weight, guard_weight
from rlalign.functional.policy import clipped_surrogate, guarded_log_ratio, step_clip


def clips(cfg: StepObjective, dimensions: int) -> tuple[float, float]:
    """Lower and upper clip; `auto` scales with the latents' dimensions."""
    auto = step_clip(dimensions, normalized=cfg.ratio_norm)
    return (auto if cfg.clip_low == "auto" else cfg.clip_low, auto if cfg.clip_high == "auto" else cfg.clip_high)


def step_log_ratio(
    cfg: StepObjective, new: StepScore, trajectory: Trajectory, rows: Tensor, steps: Tensor
) -> Float[Tensor, " decisions"]:
    """Log-ratio of each decision, normalised where Guard asks for it; nats per dimension."""
    old = trajectory.log_prob[rows, steps].to(new.log_prob.device)
    if not cfg.ratio_norm:
        return new.log_prob - old
    mean_old = trajectory.mean_of(rows, steps).to(new.mean.device)
    if not cfg.authors_bias:
        return guarded_log_ratio(new.log_prob, old, new.mean, mean_old, new.std)
    return _with_authors_bias(new, old, mean_old, steps.to(old.device))


def _with_authors_bias(
    new: StepScore, old: Float[Tensor, " decisions"], mean_old: Float[Tensor, "decisions *dims"], steps: Tensor
) -> Float[Tensor, " decisions"]:
    """One mean drift per denoising step: a batch of theirs holds samples at one step."""
    log_ratio = torch.zeros_like(new.log_prob)
    for step in steps.unique():
        here = (steps == step).nonzero().squeeze(1)
        found = guarded_log_ratio(
            new.log_prob[here], old[here], new.mean[here], mean_old[here], new.std[here], drift_over="batch"
        )
        log_ratio = log_ratio.index_put((here,), found)
    return log_ratio


def surrogate(
    cfg: StepObjective, log_ratio: Float[Tensor, " decisions"], advantages: Float[Tensor, " decisions"], dimensions: int
) -> Float[Tensor, " decisions"]:
    """Clipped surrogate on the steps' ratios."""
    low, high = clips(cfg, dimensions)
    return clipped_surrogate(log_ratio, advantages.to(log_ratio.dtype), clip_low=low, clip_high=high)


def kl_to(new: StepScore, reference: StepScore) -> Float[Tensor, " decisions"]:
    """Exact KL(policy || reference) of each step, in nats per dimension."""
    std = new.std.reshape(-1, *(1,) * (new.mean.ndim - 1))
    return gaussian_kl(new.mean, std, reference.mean, std).flatten(1).mean(1)


def step_weights(cfg: StepObjective, trajectory: Trajectory) -> Float[Tensor, "batch time"]:
    """Guard's weight of each decision, divided by the mean over the trained steps; 1 without reweighting."""
    weights = torch.ones(trajectory.scored.shape)
    if not cfg.reweight:
        return weights
    columns = trajectory.scored.any(0).nonzero().squeeze(1).cpu()
    sde, transition = trajectory.transition.sde, trajectory.transition
    level, level_next = trajectory.level.cpu()[columns], trajectory.level_next.cpu()[columns]
    if sde.kind == "ddim":
        delta = ddim_guard_weight(level, level_next, eta=sde.noise_level)
    else:
        delta = guard_weight(
            level, level_next, noise_level=sde.noise_level, kind=sde.kind, sigma_max=transition.sigma_max
        )
    weights[:, columns] = (delta / delta.mean()).to(weights.dtype).expand(len(weights), -1)
    return weights
