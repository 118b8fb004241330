"""Pictures of samples for the report: grids of images, and of 3-D shapes, standing still and turning."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rlalign.diffusion.rasterizer import Shape, draw_shape

TILE = 176
"""Pixels of a picture in a grid, without its frame."""
TURNING_TILE = 112
_FRAMES, _FRAME_MS = 30, 80
_TURNING = 12
"""Most shapes of a turntable: it is one small file."""
_GAP, _BORDER, _CAPTION = 8, 4, 16
_PAPER, _INK = (255, 255, 255), (88, 96, 112)
_PASSED, _FAILED, _UNKNOWN = (76, 165, 116), (214, 94, 90), (206, 211, 220)
_LONGEST_CAPTION = 26


def draw_samples(
    samples: Any,
    folder: Path,
    *,
    step: int,
    captions: Sequence[str] | None = None,
    passed: Sequence[float | int | None] | None = None,
    shapes: Callable[[Any], Sequence[Shape]] | None = None,
    name: str = "samples",
) -> list[Path]:
    """Write `folder/NAME-STEP.png`, and a turntable beside it where samples are shapes.

    Args:
        samples: Images (see `image_grid`), or whatever `shapes` takes.
        folder: Made if absent.
        step: Of the training, for the file's name.
        captions: One per sample.
        passed: One per sample: at least 0.5 gets a green frame, less a red one, NaN or None a grey one.
        shapes: Turns samples into meshes. None draws them as images.

    Returns:
        The files; none where there is no sample.
    """
    if not len(samples):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    still = folder / f"{name}-{step:09d}.png"
    if shapes is None:
        image_grid(samples, captions=captions, passed=passed).save(still, optimize=True)
        return [still]
    meshes = list(shapes(samples))
    shape_grid(meshes, captions=captions, passed=passed).save(still, optimize=True)
    turning = folder / f"{name}_turning-{step:09d}.webp"
    outcomes = None if passed is None else passed[:_TURNING]
    return [still, turntable(meshes[:_TURNING], turning, passed=outcomes)]


def image_grid(
    images: np.ndarray | Sequence[Any],
    *,
    captions: Sequence[str] | None = None,
    passed: Sequence[float | int | None] | None = None,
    columns: int | None = None,
    tile: int = TILE,
) -> Image.Image:
    """Lay images out in rows.

    Args:
        images: Pillow images, or arrays [H, W] or [H, W, 1 | 3 | 4]: uint8, or floats from 0 to 1.
        captions: One per image.
        passed: One per image; see `draw_samples`.
        columns: About square where None.
        tile: Longer side of each, in pixels. Small images are magnified without smoothing.
    """
    return _grid([_tile(_picture(image), tile) for image in images], captions, passed, columns)


def shape_grid(
    shapes: Sequence[Shape],
    *,
    captions: Sequence[str] | None = None,
    passed: Sequence[float | int | None] | None = None,
    columns: int | None = None,
    tile: int = TILE,
    azimuth_deg: float | int = 35.0,
) -> Image.Image:
    """Draw 3-D shapes in rows; see `rlalign.diffusion.rasterizer.draw_shape`."""
    return _grid([draw_shape(shape, size=tile, azimuth_deg=azimuth_deg) for shape in shapes], captions, passed, columns)


def turntable(
    shapes: Sequence[Shape],
    path: Path,
    *,
    passed: Sequence[float | int | None] | None = None,
    columns: int | None = None,
    tile: int = TURNING_TILE,
    frames: int = _FRAMES,
) -> Path:
    """Write an animation of shapes that turn once, in a loop: WebP or GIF, by the ending of `path`."""
    angles = [35.0 + 360.0 * frame / frames for frame in range(frames)]
    pictures = [
        _grid([draw_shape(s, size=tile, azimuth_deg=angle, smooth=2) for s in shapes], None, passed, columns)
        for angle in angles
    ]
    options: dict[str, Any] = {"quality": 60, "method": 2} if path.suffix.lower() == ".webp" else {"optimize": True}
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=_FRAME_MS, loop=0, **options)
    return path


def _picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"an image must be [H, W] or [H, W, 1 | 3 | 4], got {list(pixels.shape)}; name a function that turns "
            "samples into shapes in `eval.render`, or ask the pipeline for images."
        )
    if pixels.dtype != np.uint8:
        pixels = np.rint(255 * np.clip(np.nan_to_num(pixels.astype(np.float64)), 0, 1)).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).convert("RGB")


def _tile(image: Image.Image, tile: int) -> Image.Image:
    longer = max(image.size)
    if longer <= tile:
        times = tile // longer
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    size = [max(1, round(side * tile / longer)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)


def _grid(
    tiles: Sequence[Image.Image],
    captions: Sequence[str] | None,
    passed: Sequence[float | int | None] | None,
    columns: int | None,
) -> Image.Image:
    for name, values in (("captions", captions), ("passed", passed)):
        if values is not None and len(values) != len(tiles):
            raise ValueError(f"`{name}` has {len(values)} entries for {len(tiles)} samples.")
    across = columns or _columns(len(tiles))
    width = max(tile.width for tile in tiles) + 2 * _BORDER
    height = max(tile.height for tile in tiles) + 2 * _BORDER + (_CAPTION if captions else 0)
    rows = -(-len(tiles) // across)
    page = Image.new("RGB", (across * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP), _PAPER)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, across)
        left, top = _GAP + column * (width + _GAP), _GAP + row * (height + _GAP)
        frame = (left, top, left + tile.width + 2 * _BORDER - 1, top + tile.height + 2 * _BORDER - 1)
        if passed is not None:
            pen.rounded_rectangle(frame, radius=_BORDER, fill=_frame_colour(passed[number]))
        page.paste(tile, (left + _BORDER, top + _BORDER))
        if captions:
            text = _shortened(captions[number])
            pen.text((left + _BORDER, frame[3] + 2), text, fill=_INK, font=font)
    return page


def _columns(count: int) -> int:
    """As many columns as make the page a little wider than high, rows as full as they get."""
    most = min(count, max(1, math.ceil(math.sqrt(1.5 * count))))
    return -(-count // -(-count // most))


def _frame_colour(outcome: float | int | None) -> tuple[int, int, int]:
    if outcome is None or math.isnan(outcome):
        return _UNKNOWN
    return _PASSED if outcome >= 0.5 else _FAILED


def _shortened(text: str) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= _LONGEST_CAPTION else line[: _LONGEST_CAPTION - 1] + "…"
