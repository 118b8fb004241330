"""Pictures for the report: what is nearer hides what is behind, frames tell outcomes, files are found by the report."""

from functools import partial

import numpy as np
import pytest
from PIL import Image

from rlalign.diffusion import media
from rlalign.diffusion.media import draw_samples, image_grid, shape_grid, turntable
from rlalign.diffusion.rasterizer import Shape, draw_shape
from rlalign.training.report_media import read_media

RED, BLUE = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
GREEN_FRAME, RED_FRAME, GREY_FRAME = (76, 165, 116), (214, 94, 90), (206, 211, 220)


def box(centre=(0.0, 0.0, 0.0), half=(1.0, 1.0, 1.0), colour=RED) -> Shape:
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    faces = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    return np.array(centre) + corners * half, faces, np.tile(colour, (6, 1))


def both(a: Shape, b: Shape) -> Shape:
    return np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1] + len(a[0])]), np.concatenate([a[2], b[2]])


def middle(picture: Image.Image) -> np.ndarray:
    pixel = picture.getpixel((picture.width // 2, picture.height // 2))
    return np.array(pixel, dtype=float)


@pytest.mark.parametrize("swap", [False, True])
def test_the_nearer_box_hides_the_other_whatever_the_order(swap):
    # the camera stands at negative y; half a turn puts the other box in front
    near, far = box((0, -2, 0), colour=RED), box((0, 2, 0), colour=BLUE)
    shape = both(far, near) if swap else both(near, far)
    front, back = (draw_shape(shape, size=64, azimuth_deg=a, elevation_deg=5) for a in (0, 180))
    assert middle(front)[0] > 100 > 20 > middle(front)[2]
    assert middle(back)[2] > 100 > 20 > middle(back)[0]


def test_triangles_and_quads_are_the_same_picture():
    vertices, faces, colours = box()
    split = np.concatenate([faces[:, [0, 1, 2]], faces[:, [0, 2, 3]]])
    triangles = (vertices, split, np.concatenate([colours, colours]))
    np.testing.assert_array_equal(draw_shape(box(), size=48), draw_shape(triangles, size=48))


def test_an_object_fills_the_picture_and_never_leaves_it():
    for half in ((1, 1, 1), (50, 0.1, 3), (0.2, 0.2, 4)):
        for azimuth in (0, 45, 130):
            pixels = np.asarray(draw_shape(box((9, 9, 9), half), size=96, azimuth_deg=azimuth), dtype=float)
            red = pixels[..., 0] - pixels[..., 2] > 60
            assert not red[[0, -1]].any() and not red[:, [0, -1]].any()
            rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
            assert max(np.ptp(rows), np.ptp(columns)) > 48


def test_the_lit_side_is_brighter_and_the_ground_has_a_shadow():
    pixels = np.asarray(draw_shape(box(), size=128, azimuth_deg=45, elevation_deg=30, smooth=1), dtype=float)
    left, right = pixels[75, 45, 0], pixels[75, 83, 0]
    top = pixels[30, 64, 0]
    assert top > left > right  # the light comes from above, the left and the camera's side
    floor = pixels[np.abs(pixels - pixels.mean(-1, keepdims=True)).max(-1) < 15].mean(-1)
    assert floor.max() > 235 and floor.min() < 200


def test_turning_by_a_quarter_turns_a_square_box_into_itself():
    quarter = [np.asarray(draw_shape(box(), size=64, azimuth_deg=a), dtype=int) for a in (20, 110, 65)]
    assert np.abs(quarter[0] - quarter[1]).max() <= 2 < np.abs(quarter[0] - quarter[2]).max()


def test_a_shape_without_faces_is_an_empty_disc():
    empty = (np.zeros((0, 3)), np.zeros((0, 4), dtype=int), np.zeros((0, 3)))
    pixels = np.asarray(draw_shape(empty, size=64), dtype=int)
    assert np.ptp(pixels, axis=-1).max() < 20 and pixels.min() > 200


def test_frames_tell_what_passed():
    page = shape_grid([box()] * 5, passed=[1.0, 0.0, None, float("nan"), True], columns=5, tile=40)
    step = 40 + 2 * 4 + 8  # tile, frame, gap
    frames = [page.getpixel((8 + k * step + 20, 9)) for k in range(5)]
    assert frames == [GREEN_FRAME, RED_FRAME, GREY_FRAME, GREY_FRAME, GREEN_FRAME]


def test_sizes_by_hand():
    tiles = [np.zeros((8, 8), dtype=np.uint8)] * 5
    # 3 columns, 2 rows; a tile of 8 x 5 = 40 pixels, its frame 2 x 4, gaps of 8 around; captions add 16
    assert image_grid(tiles, columns=3, tile=40).size == (3 * 48 + 4 * 8, 2 * 48 + 3 * 8)
    assert image_grid(tiles, columns=3, tile=40, captions=["x"] * 5).size == (3 * 48 + 4 * 8, 2 * 64 + 3 * 8)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 2), (5, 3), (12, 4), (16, 4)])
def test_pages_are_a_little_wider_than_high(count, columns):
    page = image_grid([np.zeros((4, 4), dtype=np.uint8)] * count, tile=4)
    assert page.width == columns * 12 + (columns + 1) * 8


def test_small_images_are_magnified_without_smoothing():
    image = np.array([[0.0, 1.0], [0.5, 0.25]])
    pixels = np.asarray(image_grid([image], tile=40))[12:52, 12:52, 0]
    assert sorted(np.unique(pixels)) == [0, 64, 128, 255]
    assert pixels[10, 10] == 0 and pixels[10, 30] == 255 and pixels[30, 10] == 128


def test_images_of_every_kind():
    shapes = [(4, 4), (4, 4, 1), (4, 4, 3), (4, 4, 4)]
    arrays = [np.ones(shape) for shape in shapes] + [np.full((4, 4), np.nan), Image.new("L", (300, 100), 255)]
    assert image_grid(arrays, tile=50).getbbox() is not None
    with pytest.raises(ValueError, match=r"got \[5, 6, 7\]; name a function .* `eval.render`"):
        image_grid([np.zeros((5, 6, 7))])
    with pytest.raises(ValueError, match="`captions` has 1 entries for 2 samples"):
        image_grid([np.ones((2, 2))] * 2, captions=["one"])


@pytest.mark.parametrize("ending", ["webp", "gif"])
def test_a_turntable_is_a_small_loop(tmp_path, ending):
    path = turntable([box(), box(half=(0.3, 0.3, 2))], tmp_path / f"t.{ending}", frames=8, tile=48, passed=[1, 0])
    with Image.open(path) as film:
        assert film.n_frames == 8 and film.info["loop"] == 0
        shown = []
        for frame in (0, 1):
            film.seek(frame)
            shown.append(np.asarray(film.convert("RGB"), dtype=int))
    assert np.abs(shown[0] - shown[1]).max() > 30 and path.stat().st_size < 60_000


def test_the_report_finds_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(media, "turntable", partial(turntable, frames=3, tile=32))
    samples = [0.5, 1.0, 2.0]

    def shapes(sizes):
        return [box(half=(s, 1, 1)) for s in sizes]

    for step in (0, 40):
        drawn = draw_samples(
            samples, tmp_path / "media", step=step, captions=["a", "b", "c" * 99], passed=[1, 0, None], shapes=shapes
        )
        assert [path.suffix for path in drawn] == [".png", ".webp"]
    series = read_media(tmp_path)
    assert [(s.title, [m.caption for m in s.ends]) for s in series] == [
        ("samples", ["step 0", "step 40"]),
        ("samples turning", ["step 0", "step 40"]),
    ]
    assert all(medium.kind == "image" for s in series for medium in s.ends)


def test_images_make_one_file_and_nothing_makes_none(tmp_path):
    images = np.random.default_rng(0).random((3, 8, 8, 3))
    assert [p.name for p in draw_samples(images, tmp_path, step=7)] == ["samples-000000007.png"]
    assert draw_samples(images[:0], tmp_path, step=8) == []
