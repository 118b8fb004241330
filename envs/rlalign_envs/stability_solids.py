"""What is simulated: one rigid body of welded boxes or of a mesh, and its mass; a sample may also be no body at all."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Disconnected = Literal["weld", "largest", "fail"]

DENSITY = 1000.0
"""Kilograms per cubic unit. It decides no label: a body's motion on a plane does not depend on its density."""
SIZES = (1e-6, 1e6)
"""Largest extents that are simulated."""
EMPTY = 1e-9
"""Less volume than this, as a share of the cube around the body, is no volume."""


class Degenerate(ValueError):
    """A sample that is no rigid body; its outcome is unknown."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Mass, centre of mass [3] and inertia about it [3, 3]."""

    mass: float
    centre: Array
    inertia: Array


@dataclass(frozen=True, eq=False)
class BoxSolid:
    """Boxes welded together, in coordinates whose origin is the centre of mass."""

    centres: Array
    halves: Array
    moments: Moments
    components: int = 1
    clipped: int = 0
    """Boxes that were made thicker."""
    fallen: bool = False
    """Not to be simulated: counted as lying upside down."""
    watertight: bool = True

    def points(self) -> Array:
        """All corners, [8 n, 3]."""
        signs = np.stack(np.meshgrid(*[(-1.0, 1.0)] * 3, indexing="ij"), -1).reshape(8, 1, 3)
        return (self.centres + signs * self.halves).reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class MeshSolid:
    """Triangles; contact is with their convex hull, which for one body on a plane is exact."""

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    moments: Moments | None
    """About the origin of the vertices; None: those of the convex hull, which MuJoCo computes."""
    components: int = 1
    clipped: int = 0
    fallen: bool = False
    watertight: bool = True

    def points(self) -> Array:
        return self.vertices.astype(np.float64)


Solid = BoxSolid | MeshSolid


def extent_of(points: Array) -> float:
    """Longest edge of the axis-aligned box around points [n, 3].

    Raises:
        Degenerate: Outside `SIZES`, or not a number.
    """
    extent = float(np.ptp(points, axis=0).max())
    if not SIZES[0] <= extent <= SIZES[1]:  # False for NaN too
        raise Degenerate(f"its largest extent is {extent}, outside of {SIZES}")
    return extent


def box_moments(centres: Array, halves: Array) -> Moments:
    """Return mass, centre and inertia of boxes [n, 3] that do not overlap.

        m_i = 8 density h_x h_y h_z,    I = sum_i m_i / 3 (|h|^2 1 - diag(h^2)) + m_i (|r|^2 1 - r r^T)

    with r from the common centre of mass to the box.
    """
    masses = 8 * DENSITY * halves.prod(1)
    centre = masses @ centres / masses.sum()
    second = (masses[:, None] * halves**2).sum(0) / 3  # integral of x^2 dm about each box's own centre
    arms = centres - centre
    spread = np.diag(second) + np.einsum("n,ni,nj->ij", masses, arms, arms)
    return Moments(float(masses.sum()), centre, inertia_of(spread))


def inertia_of(spread: Array) -> Array:
    """Integral of x x^T dm -> inertia: trace(S) 1 - S."""
    return np.trace(spread) * np.eye(3) - spread


def cut(centres: Array, halves: Array) -> tuple[Array, Array]:
    """Cut boxes that may overlap into cells that do not and fill the same space: every box's planes cut all others."""
    low, high = centres - halves, centres + halves
    edges = [np.unique(np.concatenate([low[:, axis], high[:, axis]])) for axis in range(3)]
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    inside = [(low[:, [axis]] < middles[axis]) & (middles[axis] < high[:, [axis]]) for axis in range(3)]
    filled = (inside[0][:, :, None, None] & inside[1][:, None, :, None] & inside[2][:, None, None, :]).any(0)
    cells = np.nonzero(filled)
    centres = np.stack([middles[axis][cells[axis]] for axis in range(3)], -1)
    halves = np.stack([np.diff(edges[axis])[cells[axis]] / 2 for axis in range(3)], -1)
    return centres, halves


def parts_of(touching: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Label what hangs together, given who touches whom, [n, n]: the smallest index in each part, [n]."""
    count = len(touching)
    linked = touching | np.eye(count, dtype=bool)
    labels = np.arange(count)
    while True:
        smallest = np.where(linked, labels, count).min(1)
        if np.array_equal(smallest, labels):
            return labels
        labels = smallest


def largest_part(labels: NDArray[np.int64], volumes: Array) -> NDArray[np.bool_]:
    """Mark the members of the part with the most volume; the first one of equals."""
    totals = np.bincount(labels, weights=volumes)
    return labels == totals.argmax()
