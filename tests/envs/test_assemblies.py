"""Five-box objects: what the measures say of objects whose answers are known, and the data's own properties."""

import subprocess
import sys

import numpy as np
import pytest

from rlalign_envs.assemblies import CLASSES, base_area, components, measure, training_set, volume
from rlalign_envs.assemblies_shapes import PALETTE, export, render

UNIT = [0.0, 0.0, 0.5, np.log(0.5), np.log(0.5), np.log(0.5)]
"""A cube of edge 1 on the ground."""


def stack(x: float = 0.0) -> np.ndarray:
    """Five cubes of edge 1 on top of each other, moved along x."""
    cubes = np.tile(UNIT, (5, 1))
    cubes[:, 0] = x
    cubes[:, 2] += np.arange(5)
    return cubes


def test_volume_by_hand():
    flat = stack()
    flat[4, 3:] = np.log([1.0, 0.5, 0.25])  # 2 x 1 x 0.5 = 1 as well
    np.testing.assert_allclose(volume(np.stack([stack(), flat])), [5.0, 5.0])
    flat[4, 5] = np.log(0.5)  # 2 x 1 x 1
    np.testing.assert_allclose(volume(flat[None]), [6.0])


def test_base_area_is_the_rectangle_around_what_touches_the_ground():
    two_feet = stack()
    two_feet[1] = [3.0, 1.0, 0.5, *np.log([0.5, 0.5, 0.5])]
    # from -0.5 to 3.5 and from -0.5 to 1.5
    np.testing.assert_allclose(base_area(np.stack([stack(), two_feet])), [1.0, 8.0])
    two_feet[1, 2] += 0.2  # 5 high, so 0.25 above the ground still counts as touching
    np.testing.assert_allclose(base_area(two_feet[None]), [8.0])
    two_feet[1, 2] += 0.1
    np.testing.assert_allclose(base_area(two_feet[None]), [1.0])


def test_components_by_hand():
    apart = stack()
    apart[4, 2] += 0.5
    in_pairs = stack()
    in_pairs[:, 0] = [0, 0, 5, 5, 10]
    chain = stack()[[0, 2, 4, 1, 3]]  # neighbours only through boxes further on in the order
    near = stack()
    near[4, 2] += 0.015
    np.testing.assert_array_equal(components(np.stack([stack(), apart, in_pairs, chain, near])), [1, 2, 3, 1, 1])


def test_nearest_neighbour_and_diversity_by_hand():
    # reference: class 0 at x = 0 and 4, class 1 at x = 1. Over all boxes x has mean 5/3 and variance 26/9.
    reference = (np.stack([stack(0.0), stack(4.0), stack(1.0)]), np.array([0, 0, 1]))
    found = measure(np.stack([stack(1.0), stack(2.5), stack(3.0)]), np.array([0, 0, 1]), reference=reference)
    unit = np.sqrt(5) / np.sqrt(26 / 9)  # all five boxes move, each divided by the deviation of x
    np.testing.assert_allclose(found["distance_to_data"], np.array([1.0, 1.5, 2.0]) * unit, rtol=1e-6)
    assert found["diversity"] == pytest.approx(1.5 * unit, rel=1e-6)  # class 1 has no pair
    np.testing.assert_allclose(found["base_area_ratio"], 1.0)


def test_base_area_ratio_shows_a_base_plate():
    objects, labels = training_set(200, seed=3)
    cheat = objects.copy()
    cheat[:, 1] = [0.0, 0.0, 0.01, *np.log([1.0, 1.0, 0.01])]
    honest, bought = (measure(o, labels)["base_area_ratio"] for o in (objects, cheat))
    assert np.mean(honest) == pytest.approx(1.0, abs=0.15)
    assert np.mean(bought) > 10


def test_a_broken_object_is_unknown_and_leaves_the_others_alone():
    objects, labels = training_set(20, seed=0)
    clean = measure(objects, labels)
    broken = objects.copy()
    broken[4, 2, 1] = np.nan
    found = measure(broken, labels)
    others = np.arange(20) != 4
    for name in ("distance_to_data", "base_area_ratio", "volume", "components"):
        assert np.isnan(found[name][4])
        np.testing.assert_array_equal(found[name][others], clean[name][others])
    assert np.isfinite(found["diversity"])


def test_labels_may_be_names():
    objects, labels = training_set(25, seed=1)
    by_name = measure(objects, [CLASSES[k] for k in labels])
    np.testing.assert_array_equal(by_name["distance_to_data"], measure(objects, labels)["distance_to_data"])
    with pytest.raises(ValueError, match="'sofa'; the classes are table, chair"):
        measure(objects[:1], ["sofa"])


def test_training_set_is_a_function_of_its_seed_and_balanced():
    objects, labels = training_set(1000, seed=5)
    again, _ = training_set(1000, seed=5)
    assert objects.dtype == np.float32 and labels.dtype == np.int64
    np.testing.assert_array_equal(objects, again)
    np.testing.assert_array_equal(np.bincount(labels), [200] * 5)
    assert not np.array_equal(objects, training_set(1000, seed=6)[0])


def test_the_data_is_sound():
    objects, labels = training_set(1000, seed=5)
    found = measure(objects, labels)
    np.testing.assert_array_equal(found["components"], 1)
    low = objects[..., 2] - np.exp(objects[..., 5])
    np.testing.assert_allclose(low.min(1), 0, atol=1e-6)
    # what has no likeness to its class is far from its data, what is drawn from it is near
    wrong = measure(objects, (labels + 1) % 5)["distance_to_data"]
    assert np.mean(found["distance_to_data"]) < 1.3 < 3 < np.mean(wrong)


def test_about_half_of_the_data_stands():
    pytest.importorskip("mujoco")
    from rlalign_envs.stability import StabilitySimulator

    simulator = StabilitySimulator(perturbations=0)
    objects, labels = training_set(300, seed=0)
    stable = simulator.simulate(objects)["stable"]
    simulator.close()
    assert 0.48 < stable.mean() < 0.66
    assert all(0.35 < stable[labels == k].mean() < 0.75 for k in range(5))


def test_shapes_are_outward_boxes():
    vertices, faces, colours = render(training_set(1, seed=0)[0])[0]
    assert vertices.shape == (40, 3) and faces.shape == (30, 4) and colours.shape == (30, 3)
    np.testing.assert_array_equal(colours[::6], PALETTE)
    corners = vertices[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0])
    middle = np.repeat(vertices.reshape(5, 8, 3).mean(1), 6, 0)
    assert ((corners.mean(1) - middle) * normal).sum(1).min() > 0
    broken = np.full((1, 5, 6), np.nan)
    assert len(render(broken)[0][1]) == 0


def test_export_writes_y_up(tmp_path):
    sample = stack(2.0)
    lines = export(sample, tmp_path / "stack.obj").read_text().splitlines()
    points = np.array([line.split()[1:] for line in lines if line.startswith("v ")], dtype=float)
    np.testing.assert_allclose([points.min(0), points.max(0)], [[1.5, 0.0, -0.5], [2.5, 5.0, 0.5]])
    assert sum(line.startswith("f ") for line in lines) == 30
    with pytest.raises(ValueError, match="not finite"):
        export(np.full((5, 6), np.inf), tmp_path / "none.obj")


def test_assemblies_need_numpy_alone():
    code = (
        "import sys, rlalign_envs.assemblies, rlalign_envs.assemblies_shapes\n"
        "print([name for name in ('torch', 'rlalign', 'mujoco', 'scipy', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": "envs"}
    )
    assert done.stdout.strip() == "[]"


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"expected objects \[B, 5, 6\].*got \(2, 4, 6\)"):
        measure(np.zeros((2, 4, 6)), [0, 1])
    with pytest.raises(ValueError, match="`count` must be >= 1"):
        training_set(0, seed=0)
    objects, labels = training_set(10, seed=0)
    with pytest.raises(ValueError, match=r"holds no object of class \[1, 2, 3, 4\]"):
        measure(objects, labels, reference=(objects[labels == 0], labels[labels == 0]))
