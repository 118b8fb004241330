"""From quaternions to tilts and labels, by hand."""

import numpy as np
import pytest

from rlalign_envs.stability_outcomes import outcomes_of, rotation_degrees, starts_of, tilt_degrees


def spun(angle_deg, axis=(0.0, 0.0, 1.0)):
    half = np.radians(angle_deg) / 2
    return np.array([np.cos(half), *(np.sin(half) * np.array(axis))])


def test_tilt_is_blind_to_spin_and_rotation_is_not():
    spin, lean = spun(70), spun(30, (1.0, 0.0, 0.0))
    assert tilt_degrees(np.stack([spin, lean])) == pytest.approx([0, 30], abs=1e-9)
    assert rotation_degrees(np.stack([spin, lean, -spin])) == pytest.approx([70, 30, 70])
    told = outcomes_of(spin[None, None], threshold_deg=20.0)
    assert (told["stable"], told["rotation_deg"]) == (1, pytest.approx(70))


def test_tilt_is_the_angle_of_the_body_axis():
    generator = np.random.default_rng(0)
    quaternions = generator.normal(size=(50, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    w, x, y, z = quaternions.T
    np.testing.assert_allclose(tilt_degrees(quaternions), np.degrees(np.arccos(w**2 - x**2 - y**2 + z**2)), rtol=1e-9)


def test_outcomes_by_hand():
    # Tilts 0, 10, 20 and 40 against a threshold of 20: below are two of four.
    quaternions = np.stack([spun(angle, (0.0, 1.0, 0.0)) for angle in (0, 10, 20.0001, 40)])[None]
    told = outcomes_of(quaternions, threshold_deg=20.0)
    assert (told["stable"], told["robust"], told["robust_share"]) == (1, 0, 0.5)
    assert told["robust_tilt_deg"] == pytest.approx(40)
    graded = (1 + np.exp(-0.25) + np.exp(-1) + np.exp(-4)) / 4
    assert told["graded"] == pytest.approx(graded, abs=1e-5)


def test_starts_are_upright_and_evenly_tilted():
    starts = starts_of(4, 3.0, seed=0)
    assert tilt_degrees(starts) == pytest.approx([0, 3, 3, 3, 3])
    w, x, y, z = starts.T
    axis = np.stack([2 * (x * z + w * y), 2 * (y * z - w * x)], -1)  # where the body's z axis points
    np.testing.assert_allclose(
        axis[1:], np.sin(np.radians(3)) * np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]), atol=1e-12
    )
    assert not np.allclose(starts_of(4, 3.0, seed=1)[1:], starts[1:])
    np.testing.assert_array_equal(starts_of(4, 3.0, seed=1), starts_of(4, 3.0, seed=1))
    assert starts_of(0, 3.0, seed=0).shape == (1, 4)
