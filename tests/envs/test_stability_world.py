"""The simulated world itself: whose mass a body has, and where it is put down."""

import numpy as np
import pytest

from rlalign_envs import stability_world
from rlalign_envs.stability import StabilitySimulator
from tests.envs.test_stability import boxes, simulate


def gallows():
    """A post 0.2 wide and 1 high with a thin arm of 0.5 at its top, 0.4 deep.

    Centre of mass at x = (0.2 x 0.1 + 0.025 x 0.45) / 0.225 = 0.139, above the foot [0, 0.2]; of its hull at 0.256.
    """
    outline = [(0, 0), (0.2, 0), (0.2, 0.95), (0.7, 0.95), (0.7, 1), (0, 1)]
    n = len(outline)
    vertices = np.array([[x, y, z] for y in (0.0, 0.4) for x, z in outline])
    cap = [(0, 1, 2), (0, 2, 5), (2, 3, 4), (2, 4, 5)]
    back = [(c + n, b + n, a + n) for a, b, c in cap]
    sides = [face for i in range(n) for j in [(i + 1) % n] for face in ((j, i, j + n), (j + n, i, i + n))]
    return vertices, np.array(cap + back + sides)


def test_a_concave_mesh_stands_by_its_own_mass_and_not_its_hulls():
    exact, hull = (
        StabilitySimulator("meshes", perturbations=0, inertia=how).simulate([gallows()]) for how in ("exact", "hull")
    )
    assert exact["watertight"].tolist() == [1]
    assert (exact["stable"], hull["stable"]) == (1, 0)


def test_the_simulation_begins_touching_the_ground(monkeypatch):
    heard = []

    def stay(mujoco, model, positions, velocities, steps):
        heard.append(positions.copy())
        return positions, velocities

    monkeypatch.setattr(stability_world, "_run", stay)
    simulate(boxes((3, -2, 7, 0.5, 0.5, 0.1)), perturbations=1, perturbation_deg=30.0, normalize=False)
    upright, tilted = heard[0][:, 2]
    assert upright == pytest.approx(0.1)
    assert tilted == pytest.approx(0.1 * np.cos(np.radians(30)) + 0.5 * np.sin(np.radians(30)))
