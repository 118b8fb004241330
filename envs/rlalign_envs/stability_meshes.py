"""Bodies from triangle meshes: checks, exact mass of closed ones, what to do with open ones."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from rlalign_envs.stability_solids import (
    DENSITY,
    EMPTY,
    Array,
    Degenerate,
    Disconnected,
    MeshSolid,
    Moments,
    extent_of,
    inertia_of,
    largest_part,
)

OpenMesh = Literal["hull", "fail"]
MeshInertia = Literal["exact", "hull"]


@runtime_checkable
class TriangleMesh(Protocol):
    """What trimesh and others call a mesh."""

    @property
    def vertices(self) -> Any: ...

    @property
    def faces(self) -> Any: ...


def solid_from_mesh(
    sample: Any, *, disconnected: Disconnected, normalize: bool, inertia: MeshInertia, open_mesh: OpenMesh
) -> MeshSolid:
    """Make the body of one mesh, z up.

    Args:
        sample: `(vertices [v, 3], faces [f, 3])`, or an object with these attributes.
        disconnected: What to do with surfaces that share no vertex; see `StabilitySimulator`.
        normalize: Scale to a largest extent of 1.
        inertia: Whose mass, centre and inertia: those of the enclosed volume, or of the convex hull.
        open_mesh: What to do where the surface encloses no volume.

    Raises:
        Degenerate: A number that is not finite, indices out of range, flat, no volume, open and `open_mesh="fail"`.
    """
    surface = _read(sample)
    labels = surface.parts()
    components = len(np.unique(labels))
    if disconnected == "largest" and components > 1:
        surface = surface.largest(labels)
    extent = extent_of(surface.vertices)
    surface = _Surface(surface.vertices / extent if normalize else surface.vertices, surface.faces)
    surface.check_volume(extent_of(surface.vertices))
    watertight = surface.closed()
    if not watertight and open_mesh == "fail":
        raise Degenerate("its surface is not closed, and `open_mesh` is 'fail'")
    moments = surface.moments() if watertight and inertia == "exact" else None
    origin = surface.vertices.mean(0) if moments is None else moments.centre
    return MeshSolid(
        # MuJoCo keeps vertices in float32: rounded here, so that the lowest one touches the ground exactly.
        vertices=(surface.vertices - origin).astype(np.float32),
        faces=surface.faces.astype(np.int32),
        moments=moments,
        components=components,
        fallen=disconnected == "fail" and components > 1,
        watertight=watertight,
    )


@dataclass(frozen=True, eq=False)
class _Surface:
    vertices: Array
    faces: NDArray[np.int64]

    def parts(self) -> NDArray[np.int64]:
        """Label of each face's part: its smallest vertex index."""
        labels = np.arange(len(self.vertices))
        while True:
            smallest = labels[self.faces].min(1)
            before = labels.copy()
            np.minimum.at(labels, self.faces, smallest[:, None])
            labels = labels[labels]
            if np.array_equal(before, labels):
                return labels[self.faces[:, 0]]

    def largest(self, labels: NDArray[np.int64]) -> "_Surface":
        """The part that encloses most; for open parts, seen from their own middle."""
        volumes = np.zeros(len(self.faces))
        for label in np.unique(labels):
            part = labels == label
            corners = self.vertices[self.faces[part]]
            volumes[np.flatnonzero(part)[0]] = abs(_determinants(corners - corners.mean((0, 1))).sum())
        return _compact(self.vertices, self.faces[largest_part(labels, volumes)])

    def check_volume(self, extent: float) -> None:
        """Refuse what is flat: its hull has no volume either."""
        thickness = np.linalg.svd(self.vertices - self.vertices.mean(0), compute_uv=False)[-1]
        if len(self.vertices) < 4 or thickness / np.sqrt(len(self.vertices)) < 1e-5 * extent:
            raise Degenerate("it is flat")

    def closed(self) -> bool:
        """Whether every edge is passed exactly once each way: closed, and all faces turned the same side out."""
        start, end = self.faces.ravel(), np.roll(self.faces, -1, axis=1).ravel()
        count = len(self.vertices)
        forth, back = np.sort(start * count + end), np.sort(end * count + start)
        return bool((np.diff(forth) > 0).all() and np.array_equal(forth, back))

    def moments(self) -> Moments:
        """Sum over tetrahedra from the middle to each face, signed: exact for a closed surface.

        V = sum det / 6,    integral of x x^T = sum det / 120 (a a^T + b b^T + c c^T + s s^T),  s = a + b + c
        """
        middle = self.vertices.mean(0)
        corners = self.vertices[self.faces] - middle
        determinants = _determinants(corners)
        if determinants.sum() < 0:  # inside out as a whole
            determinants = -determinants
        volume = determinants.sum() / 6
        if volume < EMPTY * np.ptp(self.vertices, axis=0).max() ** 3:
            raise Degenerate("it encloses no volume")
        sums = corners.sum(1)
        centre = determinants @ sums / 24 / volume
        square = np.einsum("f,fci,fcj->ij", determinants, corners, corners)
        square = (square + np.einsum("f,fi,fj->ij", determinants, sums, sums)) / 120
        inertia = DENSITY * inertia_of(square - volume * np.outer(centre, centre))
        _check_inertia(inertia)
        return Moments(DENSITY * volume, middle + centre, inertia)


def _read(sample: Any) -> _Surface:
    vertices, faces = (sample.vertices, sample.faces) if isinstance(sample, TriangleMesh) else sample
    vertices, faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces)
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3 or not len(faces):
        raise Degenerate(f"it needs vertices [v, 3] and faces [f, 3], got {vertices.shape} and {faces.shape}")
    if not np.isfinite(vertices).all() or faces.min() < 0 or faces.max() >= len(vertices):
        raise Degenerate("it has vertices that are not finite, or faces of vertices that do not exist")
    # Files without shared vertices (STL) repeat them exactly: joined, or no edge would ever close.
    unique, index = np.unique(vertices, axis=0, return_inverse=True)
    faces = index.reshape(-1)[faces.astype(np.int64)]
    sound = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    if not sound.any():
        raise Degenerate("all its faces are degenerate")
    return _compact(unique, faces[sound])


def _compact(vertices: Array, faces: NDArray[np.int64]) -> _Surface:
    """Drop vertices no face uses: they would enter the convex hull."""
    used, index = np.unique(faces, return_inverse=True)
    return _Surface(vertices[used], index.reshape(faces.shape).astype(np.int64))


def _determinants(corners: Array) -> Array:
    return np.einsum("fi,fi->f", corners[:, 0], np.cross(corners[:, 1], corners[:, 2]))


def _check_inertia(inertia: Array) -> None:
    """Refuse what no mass distribution has: surfaces that cut through themselves can add up to it."""
    principal = np.linalg.eigvalsh(inertia)
    if principal[0] <= 0 or principal[0] + principal[1] < principal[2] * (1 - 1e-9):
        raise Degenerate("its surface cuts through itself: the moments of inertia are impossible")
