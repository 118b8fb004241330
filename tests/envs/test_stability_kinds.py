"""Voxels and meshes, simulated: what must stand stands, and bad samples harm no others."""

import numpy as np

from rlalign_envs.stability import StabilitySimulator


def prism(half, lean=(0.0, 0.0)):
    """A box whose top is pushed aside: half sizes, and by how much per height."""
    corners = np.array(half) * [[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]
    corners[:, :2] += np.array(lean) * corners[:, 2:]
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return corners, np.array([triangle for a, b, c, d in quads for triangle in ((a, b, c), (a, c, d))])


def test_leaning_prisms_fall_where_their_middle_is_past_the_edge():
    generator = np.random.default_rng(0)
    halves, leans = generator.uniform(0.1, 0.3, (20, 3)), generator.uniform(-1, 1, (20, 2))
    meshes = [prism(half, lean) for half, lean in zip(halves, leans, strict=True)]
    # The centre of mass is half way up, so |lean| times the half height off the middle of the foot.
    room = (halves[:, :2] - np.abs(leans) * halves[:, 2:]).min(1) / halves[:, 2]
    clear = np.abs(room) > 0.02
    assert clear.sum() >= 15
    assert 5 <= (room[clear] > 0).sum() <= clear.sum() - 5
    turn = np.radians(37)
    yaw = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    for variant in (meshes, [(v @ yaw.T + [5, 3, -2], f) for v, f in meshes]):
        told = StabilitySimulator("meshes", perturbations=0).simulate(variant)
        np.testing.assert_array_equal((told["tilt_deg"] < 5)[clear], room[clear] > 0)
        assert told["watertight"].all()


def test_meshes_are_the_same_bits_in_any_company_and_bad_ones_harm_no_others():
    meshes = [prism((0.5, 0.5, 1.5), (lean, 0)) for lean in (0, 0.2, 0.3, 0.5)]
    corners, faces = meshes[0]
    meshes[1:1] = [(corners, faces[2:]), "no mesh", (corners[:, :2], faces)]
    together = StabilitySimulator("meshes", bodies_per_world=100, open_mesh="fail").simulate(meshes)
    assert together["valid"].tolist() == [1, 0, 0, 0, 1, 1, 1]
    for row in (0, 4, 5, 6):
        alone = StabilitySimulator("meshes").simulate([meshes[row]])
        for name, values in together.items():
            np.testing.assert_array_equal(alone[name], values[[row]], err_msg=name)
    hull = StabilitySimulator("meshes").simulate(meshes[1:2])
    assert (hull["valid"], hull["watertight"], hull["stable"]) == (1, 0, 1)


def test_voxels_stand_and_fall():
    table, hook = np.zeros((2, 16, 16, 16))
    table[4:12, 4:12, 6] = 1
    for x, y in ((4, 4), (4, 11), (11, 4), (11, 11)):
        table[x, y, 0:6] = 1
    hook[2:4, 7:9, 0:12], hook[2:14, 7:9, 12:14] = 1, 1
    hook[15, 15, 15] = 1  # a speck: dropped
    told = StabilitySimulator("voxels", perturbations=0).simulate(np.stack([table, hook, np.zeros((16, 16, 16))]))
    np.testing.assert_array_equal(told["stable"], [1, 0, np.nan])
    np.testing.assert_array_equal(told["components"], [1, 2, np.nan])
    assert StabilitySimulator(kind="voxels").settings["disconnected"] == "largest"
