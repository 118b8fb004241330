"""Bodies from voxels: occupied cells merged into few boxes, parts found by shared faces."""

import numpy as np
from numpy.typing import NDArray

from rlalign_envs.stability_boxes import assemble
from rlalign_envs.stability_solids import BoxSolid, Degenerate, Disconnected, parts_of


def solid_from_voxels(sample: NDArray[np.floating], *, disconnected: Disconnected, normalize: bool) -> BoxSolid:
    """Make the body of an occupancy grid [x, y, z], z up: cells above 0.5 are solid.

    Args:
        sample: The grid; its longest axis has length 1 where `normalize` is off.
        disconnected: What to do where occupied cells do not hang together by faces; see `StabilitySimulator`.
        normalize: Scale to a largest extent of 1.

    Raises:
        Degenerate: A number that is not finite, no occupied cell.
    """
    grid = np.asarray(sample)
    if not np.isfinite(grid).all():
        raise Degenerate("it has numbers that are not finite")
    low, high = merge(grid > 0.5)
    if not len(low):
        raise Degenerate("no voxel is occupied")
    cell = 1 / max(grid.shape)
    return assemble(
        (low + high) * (cell / 2),
        (high - low) * (cell / 2),
        parts_of(_share_a_face(low, high)),
        disconnected=disconnected,
        normalize=normalize,
        overlap=False,
    )


def merge(occupied: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cover occupied cells with boxes that do not overlap, greedily: first corner, then as long as it goes in x, y, z.

    Returns:
        First cell and one past the last cell of each box, [n, 3] each.
    """
    left = occupied.copy()
    boxes = []
    while True:
        start = np.unravel_index(int(left.argmax()), left.shape)
        if not left[start]:
            break
        low = [int(index) for index in start]
        high = [index + 1 for index in low]
        for axis in range(3):
            while high[axis] < left.shape[axis] and left[_next_slab(low, high, axis)].all():
                high[axis] += 1
        left[tuple(slice(*span) for span in zip(low, high, strict=True))] = False
        boxes.append((low, high))
    corners = np.array(boxes, dtype=np.int64).reshape(-1, 2, 3)
    return corners[:, 0], corners[:, 1]


def _next_slab(low: list[int], high: list[int], axis: int) -> tuple[slice, ...]:
    spans = [slice(*span) for span in zip(low, high, strict=True)]
    spans[axis] = slice(high[axis], high[axis] + 1)
    return tuple(spans)


def _share_a_face(low: NDArray[np.int64], high: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether boxes touch along one axis and overlap along the other two; meeting at an edge holds nothing together."""
    overlap = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)
    return (overlap >= 0).all(-1) & ((overlap > 0).sum(-1) >= 2)
