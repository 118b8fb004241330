"""Draw a coloured polygon mesh on a turntable without a graphics card: depth buffer, flat shading, soft shadow.

NumPy and Pillow only; a five-box object takes a few milliseconds, a mesh of some thousand triangles under a second.
"""

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Shape = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Vertices [V, 3], z up; faces [F, 3 or 4], counter-clockwise from outside; colours [F, 3] from 0 to 1."""

_LIGHT = np.array([-0.45, -0.55, 0.80]) / math.sqrt(0.45**2 + 0.55**2 + 0.80**2)
_DISTANCE = 6.0
"""Of the camera from the object's middle, in radii of the object."""
_FILL = 0.92
"""Share of the picture that the object's sphere may take."""
_SKY, _FLOOR, _DISC = (250, 251, 253), (236, 239, 244), (226, 230, 238)
_CREASE = 0.85
"""Neighbouring pixels whose normals have a smaller cosine are parted by a line."""
_STEP = 0.06
"""So are neighbours of which one lies further behind, in radii of the object."""


def draw_shape(
    shape: Shape,
    *,
    size: int = 192,
    azimuth_deg: float | int = 35.0,
    elevation_deg: float | int = 20.0,
    smooth: int = 3,
) -> Image.Image:
    """Draw one mesh, scaled to fill the picture, standing on a disc.

    Args:
        shape: The mesh. Without faces, the disc stays empty.
        size: Of the square picture, in pixels.
        azimuth_deg: How far the object is turned around the vertical.
        elevation_deg: How far above the ground the camera stands.
        smooth: Pixels are drawn this many times finer and averaged.
    """
    vertices, faces, colours = shape
    wide = size * smooth
    camera = _Camera(wide, elevation_deg)
    if not len(faces):
        return _ground(camera, None).resize((size, size), Image.Resampling.BOX)
    placed = _turned(_fitted(vertices), azimuth_deg)
    canvas = np.array(_ground(camera, placed[faces]), dtype=np.float32)
    painted = _paint(camera, placed, faces, np.asarray(colours, dtype=np.float32), canvas)
    return Image.fromarray(np.clip(painted, 0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BOX)


class _Camera:
    """Looks at the middle of the unit sphere from a distance; the picture's y points down."""

    def __init__(self, size: int, elevation_deg: float | int):
        self.size = size
        up = math.radians(elevation_deg)
        self.axes = np.array(
            [[1, 0, 0], [0, math.sin(up), math.cos(up)], [0, -math.cos(up), math.sin(up)]]  # right, up, towards us
        )
        self.scale = _FILL * size / 2 * math.sqrt(_DISTANCE**2 - 1)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [..., 2] and nearness 1 / distance [...], which is linear on the picture for points of a plane."""
        seen = points @ self.axes.T
        near = 1 / (_DISTANCE - seen[..., 2])
        flat = seen[..., :2] * (self.scale * near)[..., None] * [1, -1]
        return flat + self.size / 2, near


def _fitted(vertices: np.ndarray) -> np.ndarray:
    """Centre on the vertical axis through the middle and scale into the unit sphere, whatever the turn."""
    low, high = vertices.min(0), vertices.max(0)
    centred = vertices - (low + high) / 2
    return centred / max(float(np.linalg.norm(centred, axis=1).max()), 1e-9)


def _turned(vertices: np.ndarray, azimuth_deg: float | int) -> np.ndarray:
    angle = math.radians(azimuth_deg)
    cos, sin = math.cos(angle), math.sin(angle)
    return vertices @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]).T


def _ground(camera: _Camera, corners: np.ndarray | None) -> Image.Image:
    """Backdrop, disc, and the shadow of polygons [F, K, 3]."""
    size = camera.size
    blend = np.linspace(0, 1, size)[:, None, None]
    backdrop = np.broadcast_to((1 - blend) * _SKY + blend * _FLOOR, (size, size, 3))
    picture = Image.fromarray(backdrop.astype(np.uint8))
    floor = -1.0 if corners is None else float(corners[..., 2].min())
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    reach = 0.62 if corners is None else max(0.35, 1.12 * float(np.linalg.norm(corners[..., :2], axis=-1).max()))
    rim = np.stack([reach * np.cos(angle), reach * np.sin(angle), np.full_like(angle, floor)], -1)
    ImageDraw.Draw(picture).polygon(_outline(camera, rim), fill=_DISC)
    if corners is None:
        return picture
    fallen = corners - ((corners[..., 2] - floor) / _LIGHT[2])[..., None] * _LIGHT
    mask = Image.new("L", (size, size))
    pen = ImageDraw.Draw(mask)
    for polygon in fallen:
        pen.polygon(_outline(camera, polygon), fill=255)
    soft = mask.filter(ImageFilter.GaussianBlur(size / 45)).point(lambda value: value * 0.36)
    return Image.composite(Image.new("RGB", (size, size), (88, 96, 116)), picture, soft)


def _outline(camera: _Camera, points: np.ndarray) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in camera.project(points)[0]]


def _paint(
    camera: _Camera, vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray, canvas: np.ndarray
) -> np.ndarray:
    near, owner = _depth(camera, vertices, faces)
    normals = _normals(vertices[faces])
    shade = 0.62 + 0.34 * np.maximum(normals @ _LIGHT, 0) + 0.08 * normals[:, 2]
    lit = 255 * colours * shade[:, None]
    covered = owner >= 0
    canvas[covered] = lit[owner[covered]]
    canvas[_lines(near, owner, normals)] *= 0.55
    return canvas


def _depth(camera: _Camera, vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel the nearness of what is seen and the index of its face, -1 for the ground."""
    flat, near = camera.project(vertices)
    depth = np.zeros((camera.size, camera.size))
    owner = np.full((camera.size, camera.size), -1)
    for index, face in enumerate(faces):
        for second in range(1, len(face) - 1):  # a fan of triangles
            corners = face[[0, second, second + 1]]
            _triangle(flat[corners], near[corners], index, depth, owner)
    return depth, owner


def _triangle(points: np.ndarray, near: np.ndarray, index: int, depth: np.ndarray, owner: np.ndarray) -> None:
    (ax, ay), (bx, by), (cx, cy) = points.tolist()
    twice = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    if twice >= 0:  # seen from behind, as y points down, or a line
        return
    size = len(depth)
    x0, x1 = max(math.floor(min(ax, bx, cx)), 0), min(math.ceil(max(ax, bx, cx)) + 1, size)
    y0, y1 = max(math.floor(min(ay, by, cy)), 0), min(math.ceil(max(ay, by, cy)) + 1, size)
    if x0 >= x1 or y0 >= y1:
        return
    x, y = np.arange(x0, x1) + 0.5, (np.arange(y0, y1) + 0.5)[:, None]
    # The share of each corner is linear in x and y; all three are positive inside.
    b = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) / twice
    c = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) / twice
    found = near[0] + b * (near[1] - near[0]) + c * (near[2] - near[0])
    window = np.s_[y0:y1, x0:x1]
    seen = (b >= 0) & (c >= 0) & (b + c <= 1) & (found > depth[window])
    depth[window][seen] = found[seen]
    owner[window][seen] = index


def _normals(corners: np.ndarray) -> np.ndarray:
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, -1] - corners[:, 0])
    return across / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-12)


def _lines(near: np.ndarray, owner: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Where neighbouring pixels differ in the direction they face, or one lies well behind the other."""
    lines = np.zeros(owner.shape, dtype=bool)
    facing = np.concatenate([normals, np.zeros((1, 3))])  # the ground, -1, faces nowhere
    for down, right in ((1, 0), (0, 1)):
        rows, columns = np.nonzero(owner[down:, right:] != owner[: len(owner) - down, : len(owner) - right])
        here, there = (rows + down, columns + right), (rows, columns)
        crease = (facing[owner[here]] * facing[owner[there]]).sum(-1) < _CREASE
        step = np.abs(near[here] - near[there]) * _DISTANCE**2 > _STEP
        edge = crease | step
        for y, x in (here, there):
            lines[y[edge], x[edge]] = True
    return lines
