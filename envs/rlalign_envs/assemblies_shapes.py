"""Five-box objects as polygons: to be drawn in a report, or written to a file that 3-D programs open."""

from pathlib import Path

import numpy as np

Shape = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Vertices [V, 3], faces [F, 4] counter-clockwise from outside, and their colours [F, 3] from 0 to 1."""

PALETTE = np.array([[0.93, 0.64, 0.50], [0.56, 0.70, 0.87], [0.95, 0.82, 0.54], [0.60, 0.79, 0.67], [0.78, 0.66, 0.85]])
"""Of the boxes, in their order."""

_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
_FACES = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
_LARGEST = 10.0
"""Log half sizes are cut here, so that a broken sample cannot overflow."""


def render(samples: np.ndarray) -> list[Shape]:
    """Turn objects [B, boxes, 6] (centre, log half size; z up) into polygons, each box in a colour of its own.

    An object with a number that is not finite becomes a shape without faces.
    """
    return [_shape(np.asarray(sample, dtype=np.float64)) for sample in samples]


def export(sample: np.ndarray, path: str | Path) -> Path:
    """Write one object [boxes, 6] as a Wavefront OBJ file, y up as its readers expect.

    Raises:
        ValueError: The object has a number that is not finite.
    """
    vertices, faces, _ = _shape(np.asarray(sample, dtype=np.float64))
    if not len(faces):
        raise ValueError("the object has a number that is not finite, so there is nothing to write.")
    lines = [f"v {x:.6g} {z:.6g} {-y:.6g}" for x, y, z in vertices]
    lines += ["f " + " ".join(str(index + 1) for index in face) for face in faces]
    path = Path(path)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _shape(sample: np.ndarray) -> Shape:
    if not np.isfinite(sample).all():
        return np.zeros((0, 3)), np.zeros((0, 4), dtype=int), np.zeros((0, 3))
    half = np.exp(np.minimum(sample[:, 3:], _LARGEST))
    vertices = sample[:, None, :3] + _CORNERS * half[:, None]
    faces = _FACES + 8 * np.arange(len(sample))[:, None, None]
    colours = np.repeat(PALETTE[np.arange(len(sample)) % len(PALETTE)], len(_FACES), 0)
    return vertices.reshape(-1, 3), faces.reshape(-1, 4), colours
