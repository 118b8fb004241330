"""Before the first update: does replaying a rollout give the probabilities it was drawn with?"""

import torch

from rlalign.config import ConfigError
from rlalign.diffusion.collect import Drawn
from rlalign.diffusion.combiner import NotCombined
from rlalign.diffusion.config import StepObjective
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.step_objective import clips, step_log_ratio

SHARE_OF_CLIP = 0.1
"""Largest log-ratio, as a share of the clip, that goes unmentioned: all should be 0."""
SAMPLES = 4
"""How many are replayed."""


def require_parity(sampler: StochasticSampler, drawn: Drawn, cfg: StepObjective) -> list[str]:
    """Replay some of the rollout; return a warning where its log-ratios are not small beside the clip.

    They are those of the loss: normalised ones, where Guard asks for it.

    Raises:
        ConfigError: One is larger than the clip, so that every ratio would be noise; or there is no telling what the
            pipeline makes of its denoiser's outputs.
    """
    piece = drawn.trajectories[0]
    rows, steps = (index[piece.decisions()[0] < SAMPLES] for index in piece.decisions())
    try:
        with torch.no_grad():
            log_ratio = step_log_ratio(cfg, sampler.replay(piece, rows, steps), piece, rows, steps)
    except NotCombined as error:
        raise ConfigError(f"the rollout cannot be replayed: {error}") from error
    error, clip = float(log_ratio.abs().max()), min(clips(cfg, piece.dimensions))
    if error <= SHARE_OF_CLIP * clip:
        return []
    found = (
        f"replaying the first rollout, before any update, gives log-ratios of up to {error:.1e}, and the clip is "
        f"{clip:.1e}"
    )
    advice = (
        "Use `pipeline.dtype: float32`, the same `rollout.batch_size` and `optim.micro_batch`, and no dropout or "
        "compiled denoiser; or a wider clip."
    )
    if error > clip:
        raise ConfigError(f"{found}, so every ratio would be rounding noise. {advice}")
    return [f"Parity: {found}. {advice}"]
