"""Bodies of the stability simulator: mass by hand and by MuJoCo, thin, overlapping and loose parts, meshes."""

from types import SimpleNamespace

import mujoco
import numpy as np
import pytest

from rlalign_envs.stability_boxes import solid_from_boxes
from rlalign_envs.stability_meshes import solid_from_mesh
from rlalign_envs.stability_solids import Degenerate, box_moments, cut, largest_part, parts_of
from rlalign_envs.stability_voxels import merge, solid_from_voxels

BOXES = {"disconnected": "weld", "normalize": False, "thinnest": 0.004, "gap": 0.02}
MESHES = {"disconnected": "weld", "normalize": False, "inertia": "exact", "open_mesh": "fail"}


def boxes(*rows):
    """Centre and half sizes, as samples have them."""
    sample = np.array(rows, dtype=float)
    return np.concatenate([sample[:, :3], np.log(sample[:, 3:])], 1)


def cube(at=(0.0, 0.0, 0.0), size=1.0):
    """Twelve triangles, outward."""
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = [triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))]
    return corners * size + at, np.array(faces)


def l_prism():
    """An L of arms 0.2 wide in the unit square, 0.3 high: area 0.36, of its hull 0.68."""
    outline = np.array([[0, 0], [1, 0], [1, 0.2], [0.2, 0.2], [0.2, 1], [0, 1]])
    bottom, top = (np.column_stack([outline, np.full(6, z)]) for z in (0.0, 0.3))
    cap = [(0, 1, 2), (0, 2, 3), (0, 3, 4), (0, 4, 5)]
    sides = [tri for i in range(6) for j in [(i + 1) % 6] for tri in ((i, j, j + 6), (i, j + 6, i + 6))]
    faces = [(c, b, a) for a, b, c in cap] + [(a + 6, b + 6, c + 6) for a, b, c in cap] + sides
    return np.concatenate([bottom, top]), np.array(faces)


def by_mujoco(add):
    """Mass, centre of mass and inertia in world axes that MuJoCo finds for one body."""
    spec = mujoco.MjSpec()
    body = spec.worldbody.add_body()
    body.add_freejoint()
    add(spec, body)
    model = spec.compile()
    turn = np.empty(9)
    mujoco.mju_quat2Mat(turn, model.body_iquat[1])
    turn = turn.reshape(3, 3)
    return model.body_mass[1], model.body_ipos[1], turn @ np.diag(model.body_inertia[1]) @ turn.T


def mesh_by_mujoco(vertices, faces, inertia):
    def add(spec, body):
        mesh = spec.add_mesh(name="m", inertia=inertia)
        mesh.uservert, mesh.userface = vertices.ravel(), faces.ravel()
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="m")

    return by_mujoco(add)


def test_two_cubes_have_the_moments_of_hand_arithmetic():
    # 1000 kg each, centres 2 apart in x. Own inertia m/12 (1 + 1) = 1000/6; about y and z plus m d^2 with d = 1.
    solid = solid_from_boxes(boxes((0, 0, 0.5, 0.5, 0.5, 0.5), (2, 0, 0.5, 0.5, 0.5, 0.5)), **BOXES)
    assert solid.moments.mass == pytest.approx(2000)
    np.testing.assert_allclose(solid.moments.inertia, np.diag([1000 / 3, 7000 / 3, 7000 / 3]), atol=1e-9)
    np.testing.assert_allclose(solid.centres, [[-1, 0, 0], [1, 0, 0]], atol=1e-12)  # the centre of mass is the origin


def test_box_moments_are_those_of_mujoco():
    generator = np.random.default_rng(0)
    centres, halves = generator.normal(size=(5, 3)), generator.uniform(0.1, 0.5, (5, 3))

    def add(spec, body):
        for centre, half in zip(centres, halves, strict=True):
            body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=centre, size=half)

    ours, (mass, centre, inertia) = box_moments(centres, halves), by_mujoco(add)
    assert ours.mass == pytest.approx(mass, rel=1e-12)
    np.testing.assert_allclose(ours.centre, centre, atol=1e-12)
    np.testing.assert_allclose(ours.inertia, inertia, atol=1e-9 * mass)


def test_space_shared_by_boxes_has_its_mass_once():
    # Two unit cubes that share half of each make one block of 1.5 x 1 x 1; a copy inside adds nothing.
    overlapping = boxes((0, 0, 0.5, 0.5, 0.5, 0.5), (0.5, 0, 0.5, 0.5, 0.5, 0.5), (0.2, 0, 0.5, 0.1, 0.1, 0.1))
    ours = solid_from_boxes(overlapping, **BOXES).moments
    block = solid_from_boxes(boxes((0.25, 0, 0.5, 0.75, 0.5, 0.5)), **BOXES).moments
    assert ours.mass == pytest.approx(1500)
    np.testing.assert_allclose(ours.inertia, block.inertia, rtol=1e-12, atol=1e-9)


def test_cells_fill_the_union_and_do_not_overlap():
    generator = np.random.default_rng(1)
    centres, halves = generator.uniform(-0.5, 0.5, (5, 3)), generator.uniform(0.1, 0.6, (5, 3))
    cells, cell_halves = cut(centres, halves)
    points = generator.uniform(-1.2, 1.2, (4000, 1, 3))
    inside = (np.abs(points - centres) < halves).all(-1).any(1)
    np.testing.assert_array_equal((np.abs(points - cells) < cell_halves).all(-1).sum(1), inside)


def test_thin_boxes_are_made_thicker_and_counted():
    # Largest extent 2, so half sizes below 0.004 * 2 = 0.008 are raised to it.
    solid = solid_from_boxes(boxes((0, 0, 0, 1, 1, 1e-4), (0, 0, 0.5, 0.1, 0.1, 0.5)), **BOXES)
    assert solid.clipped == 1
    np.testing.assert_allclose(solid.halves, [[1, 1, 0.008], [0.1, 0.1, 0.5]])


@pytest.mark.parametrize(("gap", "components"), [(0.019, 1), (0.021, 2)])
def test_boxes_a_small_gap_apart_count_as_connected(gap, components):
    # Extent 1 exactly; `gap` is a share of it.
    half = (1 - gap) / 4
    sample = boxes((0, 0, half, 0.1, 0.1, half), (0, 0, 1 - half, 0.1, 0.1, half))
    assert solid_from_boxes(sample, **BOXES).components == components


def test_what_is_done_about_loose_parts():
    loose = boxes((0, 0, 0.5, 0.5, 0.5, 0.5), (3, 0, 0.5, 0.6, 0.5, 0.5), (3, 0, 1.5, 0.1, 0.1, 0.5))
    welded, largest, failed = (
        solid_from_boxes(loose, **BOXES | {"disconnected": how}) for how in ("weld", "largest", "fail")
    )
    assert [solid.components for solid in (welded, largest, failed)] == [2, 2, 2]
    assert [len(solid.halves) for solid in (welded, largest, failed)] == [3, 2, 3]
    assert [solid.fallen for solid in (welded, largest, failed)] == [False, False, True]
    assert largest.moments.mass == pytest.approx(1200 + 40)


def test_parts_are_found_through_chains_in_any_order():
    touching = np.zeros((6, 6), dtype=bool)
    for a, b in ((5, 1), (1, 3), (3, 0), (2, 4)):
        touching[a, b] = touching[b, a] = True
    assert parts_of(touching).tolist() == [0, 0, 2, 0, 2, 0]
    assert largest_part(np.array([0, 0, 2, 0, 2, 0]), np.array([1.0, 1, 3, 1, 2, 1])).tolist() == [0, 0, 1, 0, 1, 0]


def test_normalizing_makes_size_and_place_irrelevant():
    sample = boxes((0, 0, 0.5, 0.5, 0.4, 0.5), (0.3, 0.1, 1.2, 0.2, 0.2, 0.3))
    moved = sample.copy()
    moved[:, :3] = (moved[:, :3] + [4, -2, 8]) * 8
    moved[:, 3:] += np.log(8)
    here, there = (solid_from_boxes(s, **BOXES | {"normalize": True}) for s in (sample, moved))
    np.testing.assert_allclose(there.centres, here.centres, atol=1e-12)
    np.testing.assert_allclose(there.moments.inertia, here.moments.inertia, rtol=1e-9)
    assert np.ptp(here.points(), axis=0).max() == pytest.approx(1)


@pytest.mark.parametrize(
    "row",
    [
        (np.nan, 0, 0, -1, -1, -1),
        (0, 0, 0, np.inf, 0, 0),
        (0, 0, 0, -np.inf, -1, -1),  # no volume
        (0, 0, 0, 800, 0, 0),  # exp overflows
        (0, 0, 0, -30, -30, 0),  # a line
        (0, 0, 0, -30, -30, -30),  # a point
    ],
)
def test_degenerate_boxes_are_refused(row):
    with pytest.raises(Degenerate):
        solid_from_boxes(np.array([row], dtype=float), **BOXES | {"normalize": True})


def test_voxels_merge_into_few_boxes_that_cover_them_once():
    grid = np.random.default_rng(0).random((6, 7, 5)) < 0.5
    low, high = merge(grid)
    again = np.zeros(grid.shape, dtype=int)
    for (a, b, c), (d, e, f) in zip(low, high, strict=True):
        again[a:d, b:e, c:f] += 1
    np.testing.assert_array_equal(again, grid)
    assert len(merge(np.ones((4, 4, 4), dtype=bool))[0]) == 1


def test_voxel_body_has_the_mass_of_its_cells_and_z_is_the_last_axis():
    grid = np.zeros((4, 4, 4))
    grid[0:2, 0, 0], grid[0, 0, 1:4] = 0.51, 1.0  # five cells of edge 1/4: a foot along x and a pole along z
    grid[3, 3, 3] = 0.5  # not solid
    solid = solid_from_voxels(grid, disconnected="largest", normalize=False)
    assert solid.moments.mass == pytest.approx(1000 * 5 / 64)
    np.testing.assert_allclose(np.ptp(solid.points(), axis=0), [0.5, 0.25, 1.0])


def test_voxels_that_meet_at_an_edge_are_two_parts():
    grid = np.zeros((3, 3, 3))
    grid[0, 0, 0:2], grid[1, 1, 0] = 1, 1
    solid = solid_from_voxels(grid, disconnected="largest", normalize=False)
    assert solid.components == 2
    assert solid.moments.mass == pytest.approx(1000 * 2 / 27)


@pytest.mark.parametrize("grid", [np.zeros((4, 4, 4)), np.full((4, 4, 4), np.nan)])
def test_degenerate_voxels_are_refused(grid):
    with pytest.raises(Degenerate):
        solid_from_voxels(grid, disconnected="largest", normalize=True)


def test_concave_mesh_has_exact_mass_where_legacy_inertia_has_not():
    # Area 0.2 * 1 + 0.8 * 0.2 = 0.36, height 0.3: 108 kg. Centre x: (0.2 * 0.1 + 0.16 * 0.6) / 0.36 = 0.3222.
    vertices, faces = l_prism()
    ours = solid_from_mesh((vertices, faces), **MESHES).moments
    assert ours.mass == pytest.approx(108.0)
    np.testing.assert_allclose(ours.centre, [0.116 / 0.36, 0.116 / 0.36, 0.15])
    mass, centre, inertia = mesh_by_mujoco(vertices, faces, mujoco.mjtMeshInertia.mjMESH_INERTIA_EXACT)
    assert ours.mass == pytest.approx(mass, rel=1e-6)
    np.testing.assert_allclose(ours.centre, centre, atol=1e-6)
    np.testing.assert_allclose(ours.inertia, inertia, atol=1e-5)
    legacy, _, _ = mesh_by_mujoco(vertices, faces, mujoco.mjtMeshInertia.mjMESH_INERTIA_LEGACY)
    assert legacy == pytest.approx(152.6, abs=0.1)


def test_meshes_come_as_pairs_or_objects_inside_out_or_with_repeated_vertices():
    vertices, faces = l_prism()
    soup = vertices[faces].reshape(-1, 3), np.arange(3 * len(faces)).reshape(-1, 3)
    stray = np.concatenate([vertices, [[9.0, 9, 9]]]), faces  # a vertex no face uses
    for sample in (SimpleNamespace(vertices=vertices, faces=faces), (vertices, faces[:, ::-1]), soup, stray):
        solid = solid_from_mesh(sample, **MESHES)
        assert solid.watertight
        assert solid.moments.mass == pytest.approx(108.0)
        assert len(solid.vertices) == 12


def test_open_mesh_takes_its_hull_or_is_refused():
    vertices, faces = cube()
    lidless = vertices, faces[2:]
    with pytest.raises(Degenerate, match="not closed"):
        solid_from_mesh(lidless, **MESHES)
    solid = solid_from_mesh(lidless, **MESHES | {"open_mesh": "hull"})
    assert not solid.watertight
    assert solid.moments is None
    flipped = vertices, np.concatenate([faces[:1, ::-1], faces[1:]])
    with pytest.raises(Degenerate, match="not closed"):
        solid_from_mesh(flipped, **MESHES)


def test_mesh_parts_are_surfaces_that_share_no_vertex():
    (a, triangles), (b, _) = cube(), cube(at=(3, 0, 0), size=2.0)
    both = np.concatenate([a, b]), np.concatenate([triangles, triangles + 8])
    assert solid_from_mesh(both, **MESHES).components == 2
    assert solid_from_mesh(both, **MESHES).moments.mass == pytest.approx(9000)
    largest = solid_from_mesh(both, **MESHES | {"disconnected": "largest"})
    assert (largest.components, len(largest.vertices)) == (2, 8)
    assert largest.moments.mass == pytest.approx(8000)
    assert solid_from_mesh(both, **MESHES | {"disconnected": "fail"}).fallen


@pytest.mark.parametrize(
    "sample",
    [
        (np.full((4, 3), np.nan), [[0, 1, 2], [0, 1, 3]]),
        (np.eye(3), [[0, 1, 2], [0, 2, 1]]),  # flat
        (np.eye(3), [[0, 1, 7]]),
        (np.eye(3), [[0, 0, 1]]),
        (np.eye(3), np.zeros((0, 3), dtype=int)),
        (np.zeros((4, 2)), [[0, 1, 2]]),
    ],
)
def test_degenerate_meshes_are_refused(sample):
    with pytest.raises(Degenerate):
        solid_from_mesh(sample, **MESHES | {"open_mesh": "hull"})
