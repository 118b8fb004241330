"""From where copies of a body came to lie to what is told of it: tilt, labels, a graded reward."""

import numpy as np
from numpy.typing import NDArray

from rlalign_envs.stability_solids import Array


def starts_of(perturbations: int, perturbation_deg: float, seed: int) -> Array:
    """Return the orientations a body is put down in: upright, then tilted towards evenly spaced directions, [1 + k, 4].

    Directions start at +x; a seed other than 0 turns all of them by one angle drawn from it.
    """
    turn = 0.0 if seed == 0 else np.random.default_rng(seed).uniform(0, 2 * np.pi)
    towards = turn + 2 * np.pi * np.arange(perturbations) / max(perturbations, 1)
    half = np.radians(perturbation_deg) / 2
    # Tilting towards (cos, sin, 0) turns about (-sin, cos, 0).
    axes = np.stack([-np.sin(towards), np.cos(towards), np.zeros(perturbations)], -1)
    tilted = np.concatenate([np.full((perturbations, 1), np.cos(half)), axes * np.sin(half)], -1)
    return np.concatenate([[[1.0, 0.0, 0.0, 0.0]], tilted])


def tilt_degrees(quaternions: Array) -> Array:
    """Return the angle between the body's z axis and the vertical: acos(1 - 2 (x^2 + y^2)), blind to spin about z."""
    return np.degrees(2 * np.arcsin(np.minimum(np.hypot(quaternions[..., 1], quaternions[..., 2]), 1)))


def rotation_degrees(quaternions: Array) -> Array:
    """Return the whole angle of rotation: 2 acos |w|, spin about z included."""
    return np.degrees(2 * np.arctan2(np.linalg.norm(quaternions[..., 1:], axis=-1), np.abs(quaternions[..., 0])))


def outcomes_of(quaternions: Array, *, threshold_deg: float) -> dict[str, NDArray[np.float64]]:
    """Tell what happened to bodies, each put down upright and then tilted.

        graded = mean over all copies of exp(-(tilt / threshold)^2)

    Args:
        quaternions: Final orientations [n, 1 + k, 4]; a body with a NaN anywhere has NaN outcomes.
        threshold_deg: A body stands if its tilt is below.
    """
    known = np.asarray(np.isfinite(quaternions).all((1, 2)))
    tilts = np.where(known[:, None], tilt_degrees(quaternions), np.nan)
    stands = np.where(known[:, None], (tilts < threshold_deg).astype(np.float64), np.nan)
    return {
        "tilt_deg": tilts[:, 0],
        "rotation_deg": np.where(known, rotation_degrees(quaternions[:, 0]), np.nan),
        "stable": stands[:, 0],
        "robust": np.asarray(stands.min(1)),
        "robust_share": stands.mean(1),
        "robust_tilt_deg": np.asarray(tilts.max(1)),
        "graded": np.exp(-((tilts / threshold_deg) ** 2)).mean(1),
        "valid": known.astype(np.float64),
    }
