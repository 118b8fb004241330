"""Before the first update: does replaying a rollout give the probabilities it was drawn with?"""

from rlalign.config import ConfigError
from rlalign.diffusion.collect import Drawn
from rlalign.diffusion.config import StepObjective
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.step_objective import clips

SHARE_OF_CLIP = 0.1
"""Largest error of a log-probability, as a share of the clip, that goes unmentioned."""


def require_parity(sampler: StochasticSampler, drawn: Drawn, cfg: StepObjective) -> list[str]:
    """Replay some of the rollout; return a warning where the error is not small beside the clip.

    Raises:
        ConfigError: The error is larger than the clip: every ratio would be noise.
    """
    piece = drawn.trajectories[0]
    error = sampler.parity(piece)
    clip = min(clips(cfg, piece.dimensions))
    if error <= SHARE_OF_CLIP * clip:
        return []
    found = (
        f"replaying the first rollout changes log-probabilities by up to {error:.1e} nats per dimension, and the clip "
        f"is {clip:.1e}"
    )
    advice = (
        "Use `pipeline.dtype: float32`, the same `rollout.batch_size` and `optim.micro_batch`, and no dropout or "
        "compiled denoiser; or a wider clip."
    )
    if error > clip:
        raise ConfigError(f"{found}, so every ratio would be rounding noise. {advice}")
    return [f"Parity: {found}. {advice}"]
