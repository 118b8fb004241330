"""Bodies from welded boxes: checks, thin boxes, parts that do not touch, and mass without double counting."""

import numpy as np
from numpy.typing import NDArray

from rlalign_envs.stability_solids import (
    EMPTY,
    Array,
    BoxSolid,
    Degenerate,
    Disconnected,
    box_moments,
    cut,
    extent_of,
    largest_part,
    parts_of,
)


def solid_from_boxes(
    sample: NDArray[np.floating], *, disconnected: Disconnected, normalize: bool, thinnest: float, gap: float
) -> BoxSolid:
    """Make the body of boxes [n, 6]: centre and log half size of each, z up.

    Args:
        sample: The boxes. They may overlap; the space they share is counted once.
        disconnected: What to do where some do not touch the others; see `StabilitySimulator`.
        normalize: Scale to a largest extent of 1.
        thinnest: Half sizes below this share of the largest extent are raised to it.
        gap: Boxes at most this share of the largest extent apart count as touching: faces that a generator makes
            never meet exactly.

    Raises:
        Degenerate: A number that is not finite, a size out of range, no volume.
    """
    centres, halves = _read(sample)
    extent = extent_of(np.concatenate([centres - halves, centres + halves]))
    if 8 * halves.prod(1).sum() < EMPTY * extent**3:
        raise Degenerate("its boxes have no volume")
    clipped = int((halves < thinnest * extent).any(1).sum())
    halves = np.maximum(halves, thinnest * extent)
    labels = parts_of(_apart(centres, halves) <= gap * extent)
    return assemble(centres, halves, labels, disconnected=disconnected, normalize=normalize, clipped=clipped)


def assemble(
    centres: Array,
    halves: Array,
    labels: NDArray[np.int64],
    *,
    disconnected: Disconnected,
    normalize: bool,
    clipped: int = 0,
    overlap: bool = True,
) -> BoxSolid:
    """Make one body of boxes whose parts are known.

    Args:
        centres: [n, 3].
        halves: Half sizes, [n, 3].
        labels: Boxes with equal labels hang together, [n].
        disconnected: What to do with more than one part.
        normalize: Scale what is kept to a largest extent of 1.
        clipped: For the record.
        overlap: False promises that no two boxes overlap, which saves the cutting.
    """
    components = len(np.unique(labels))
    if disconnected == "largest":
        keep = largest_part(labels, halves.prod(1))
        centres, halves = centres[keep], halves[keep]
    if normalize:
        scale = 1 / extent_of(np.concatenate([centres - halves, centres + halves]))
        centres, halves = centres * scale, halves * scale
    # Away from the origin first: what follows should not depend on where in space a generator put the object.
    centres = centres - (centres - halves).min(0)
    moments = box_moments(*(cut(centres, halves) if overlap else (centres, halves)))
    return BoxSolid(
        centres=centres - moments.centre,
        halves=halves,
        moments=moments,
        components=components,
        clipped=clipped,
        fallen=disconnected == "fail" and components > 1,
    )


def _read(sample: NDArray[np.floating]) -> tuple[Array, Array]:
    boxes = np.asarray(sample, dtype=np.float64)
    # exp(50) is far beyond the sizes that are simulated, and far below an overflow in what follows.
    if not np.isfinite(boxes).all() or np.abs(boxes[:, 3:]).max() > 50:
        raise Degenerate("it has numbers that are not finite, or too large")
    return boxes[:, :3], np.exp(boxes[:, 3:])


def _apart(centres: Array, halves: Array) -> Array:
    """How far boxes are apart along the axis that separates them most; negative where they overlap, [n, n]."""
    distance = np.abs(centres[:, None] - centres) - halves[:, None] - halves
    return distance.max(-1)
