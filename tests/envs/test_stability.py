"""The stability simulator: what must stand stands, what must fall falls, and nothing depends on the company."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from rlalign_envs import stability_world
from rlalign_envs.assemblies import training_set
from rlalign_envs.stability import StabilitySimulator
from rlalign_envs.stability_outcomes import starts_of
from rlalign_envs.stability_solids import BoxSolid, Moments
from rlalign_envs.stability_world import Physics, lowest_point, settle

PHYSICS = Physics(timestep=0.01, seconds=2.0, step_budget=1000, integrator="implicitfast")
UPRIGHT = np.array([[1.0, 0.0, 0.0, 0.0]])


def boxes(*rows):
    sample = np.array(rows, dtype=float)
    return np.concatenate([sample[:, :3], np.log(sample[:, 3:])], 1)


def simulate(*samples, **settings):
    return StabilitySimulator(**settings).simulate(np.stack(samples))


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def turned(sample):
    """Boxes a quarter turn about the vertical."""
    out = sample.copy()
    out[..., 0], out[..., 1] = -sample[..., 1], sample[..., 0]
    out[..., 3], out[..., 4] = sample[..., 4], sample[..., 3]
    return out


def test_slab_stands_and_a_pin_falls_when_tilted():
    slab, pin = boxes((0, 0, 0.1, 0.5, 0.5, 0.1)), boxes((0, 0, 1, 0.02, 0.02, 1))
    told = simulate(slab, pin)
    assert told["stable"].tolist() == [1, 1]
    assert told["robust"].tolist() == [1, 0]
    assert told["robust_share"].tolist() == pytest.approx([1, 0.2])  # of the pin, the upright copy
    assert told["robust_tilt_deg"][0] < 0.1
    assert told["robust_tilt_deg"][1] == pytest.approx(90, abs=1)
    assert told["graded"] == pytest.approx([1, 0.2], abs=1e-3)
    assert told["tilt_deg"].max() < 1e-3
    assert told["settled"].tolist() == [1, 1]


def test_falls_where_the_centre_of_mass_is_outside_the_support():
    # A post with a block on top whose centre is `off` from the post's; the post reaches 0.1 far.
    # Masses 8 * 0.1 * 0.1 * 0.3 = 0.024 and 8 * 0.3 * 0.1 * 0.1 = 0.024: the common centre is at off / 2.
    def post(off):
        return boxes((0, 0, 0.3, 0.1, 0.1, 0.3), (off, 0, 0.7, 0.3, 0.1, 0.1))

    told = simulate(post(0.16), post(0.24), post(-0.24), perturbations=0)
    assert told["stable"].tolist() == [1, 0, 0]
    assert told["tilt_deg"][1] > 45


@pytest.mark.parametrize(("degrees", "robust"), [(5.3, 1), (6.1, 0)])
def test_a_tall_box_tips_at_the_angle_of_its_diagonal(degrees, robust):
    # Half width 0.1, half height 1: balances on its edge at atan(0.1) = 5.71 degrees. The first tilt is about an edge.
    told = simulate(boxes((0, 0, 1, 0.1, 0.1, 1)), perturbation_deg=degrees)
    assert told["robust"].tolist() == [robust]
    assert told["stable"].tolist() == [1]


def test_a_slow_fall_is_seen_to_its_end():
    # Two equal masses, 0.206 apart: their middle is 0.003 beyond the edge at 0.1, and has hardly moved after 0.4 s.
    sample = boxes((0, 0, 0.5, 0.1, 0.1, 0.5), (0.206, 0, 1 + 1 / 6, 0.3, 0.1, 1 / 6))
    patient = simulate(sample, perturbations=0)
    assert (patient["stable"], patient["settled"]) == (0, 1)
    hasty = simulate(sample, perturbations=0, seconds=0.4, step_budget=40)
    assert (hasty["stable"], hasty["settled"]) == (1, 0)


def test_bodies_are_put_down_touching_the_ground():
    # A cube of half size 1 turned by 45 degrees about x stands on an edge, sqrt(2) below its centre.
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
    eighth = np.radians(45) / 2
    about_x, about_z = np.array([[np.cos(eighth), np.sin(eighth), 0, 0], [np.cos(eighth), 0, 0, np.sin(eighth)]])
    found = lowest_point(corners, np.stack([UPRIGHT[0], about_x, about_z]))
    np.testing.assert_allclose(found, [-1, -np.sqrt(2), -1])


def test_labels_do_not_know_place_heading_or_size():
    objects, _ = training_set(24, seed=1)
    objects = objects.astype(np.float64)
    moved, bigger = objects.copy(), objects.copy()
    moved[..., :3] += [3.7, -2.2, 5.0]
    bigger[..., :3], bigger[..., 3:] = 30 * bigger[..., :3], bigger[..., 3:] + np.log(30)
    told = simulate(*objects)
    assert 0.3 < told["stable"].mean() < 0.9
    assert 0.1 < told["robust"].mean() < told["stable"].mean()
    for other in (moved, turned(objects), bigger):
        again = simulate(*other)
        np.testing.assert_array_equal(again["stable"], told["stable"])
        np.testing.assert_array_equal(again["robust"], told["robust"])


def test_outcomes_are_the_same_bits_in_any_company():
    # Sizes and masses far apart, in metres: worlds that share a solve, a warm start or a tolerance would show here.
    objects, _ = training_set(24, seed=2)
    objects = objects.astype(np.float64)
    scale = np.geomspace(0.01, 100, 24)[:, None]
    objects[..., :3] *= scale[..., None]
    objects[..., 3:] += np.log(scale)[..., None]
    settings = {"perturbations": 2, "normalize": False}
    together = simulate(*objects, bodies_per_world=1000, **settings)
    alone = [simulate(sample, bodies_per_world=1, **settings) for sample in objects]
    same(together, {name: np.concatenate([told[name] for told in alone]) for name in together})
    order = np.random.default_rng(0).permutation(24)
    shuffled = simulate(*objects[order], bodies_per_world=10, **settings)
    same({name: values[order] for name, values in together.items()}, shuffled)


def test_bad_samples_have_unknown_outcomes_and_harm_no_others(recwarn):
    objects, _ = training_set(6, seed=3)
    objects = objects.astype(np.float64)
    good = simulate(*objects)
    objects[1, 2, 0], objects[4, :, 3:] = np.nan, -np.inf
    told = simulate(*objects)
    assert told["valid"].tolist() == [1, 0, 1, 1, 0, 1]
    for name, values in told.items():
        np.testing.assert_array_equal(values[[0, 2, 3, 5]], good[name][[0, 2, 3, 5]])
        assert name == "valid" or np.isnan(values[[1, 4]]).all()
    assert not recwarn


@pytest.mark.parametrize(
    ("far", "inertia"),
    [(1e5, 1e-13), (0.0, -1.0), (100.0, 1e-6)],
    ids=["leaves the numbers", "has no model", "flies off"],
)
def test_a_body_that_breaks_costs_no_other(far, inertia, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    half = np.full((1, 3), 0.5)
    good = BoxSolid(np.zeros((1, 3)), half, moments=Moments(1.0, np.zeros(3), np.eye(3) / 6))
    # No sample has such moments: hardly any inertia and a long arm.
    bad = BoxSolid(np.array([[far, 0.0, 0.0]]), half, moments=Moments(1.0, np.zeros(3), np.eye(3) * inertia))
    starts = starts_of(2, 3.0, seed=0)
    ends, alone = settle([good, bad, good], starts, PHYSICS), settle([good], starts, PHYSICS)
    assert np.isnan(ends.quaternions[1]).any()
    np.testing.assert_array_equal(ends.quaternions[[0, 2]], alone.quaternions[[0, 0]])
    assert not list(tmp_path.iterdir())  # no MUJOCO_LOG.TXT
    assert capfd.readouterr() == ("", "")


def test_a_simulation_that_leaves_the_numbers_is_unknown(monkeypatch):
    def explode(mujoco, model, positions, velocities, steps):
        raise stability_world.Unstable

    monkeypatch.setattr(stability_world, "_run", explode)
    told = simulate(boxes((0, 0, 0.1, 0.5, 0.5, 0.1)))
    assert told["valid"].tolist() == [0]
    assert np.isnan(told["stable"]).all()


def test_a_body_that_flew_off_is_unknown(monkeypatch):
    def fly(mujoco, model, positions, velocities, steps):
        return positions + [0, 0, 100, 0, 0, 0, 0], velocities

    monkeypatch.setattr(stability_world, "_run", fly)
    assert simulate(boxes((0, 0, 0.1, 0.5, 0.5, 0.1)))["valid"].tolist() == [0]


def test_loose_parts_are_told_of_and_may_count_as_fallen():
    loose = boxes((0, 0, 0.5, 0.5, 0.5, 0.5), (0, 0, 2.5, 0.5, 0.5, 0.5))
    welded, failed = (simulate(loose, disconnected=how) for how in ("weld", "fail"))
    assert (welded["components"], welded["stable"]) == (2, 1)
    assert (failed["components"], failed["stable"], failed["tilt_deg"], failed["valid"]) == (2, 0, 180, 1)


def test_settings_are_json_and_say_what_decides_a_label():
    simulator = StabilitySimulator(perturbations=2, seed=5)
    settings = dict(simulator.settings)
    assert json.loads(json.dumps(settings)) == settings
    wanted = {"mujoco", "kind", "timestep", "seconds", "step_budget", "integrator", "threshold_deg", "perturbations"}
    assert wanted | {"perturbation_deg", "inertia", "disconnected", "normalize", "seed", "friction"} <= settings.keys()
    assert (simulator.proxy, simulator.gold) == ("stable", "robust")
    assert {simulator.proxy, simulator.gold} <= simulator.simulate(np.zeros((1, 1, 6))).keys()


@pytest.mark.parametrize("integrator", ["implicitfast", "implicit", "euler", "rk4"])
def test_integrators(integrator):
    told = simulate(boxes((0, 0, 0.1, 0.5, 0.5, 0.1)), boxes((0, 0, 1, 0.02, 0.02, 1)), integrator=integrator)
    assert told["robust"].tolist() == [1, 0]


def test_nothing_heavy_is_imported_with_the_modules():
    for path in Path(stability_world.__file__).parent.glob("stability*.py"):
        found = {name.split(".")[0] for name in imports_of(path)}
        assert found.isdisjoint({"mujoco", "torch", "rlalign", "scipy", "trimesh"}), path.name


def imports_of(path):
    """Modules imported when this one is: those at its top level."""
    for node in ast.parse(path.read_text()).body:
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                yield str(node.module)


def test_an_empty_batch_has_all_outcomes():
    full, empty = simulate(boxes((0, 0, 0.1, 0.5, 0.5, 0.1))), StabilitySimulator().simulate(np.zeros((0, 5, 6)))
    assert empty.keys() == full.keys()
    assert all(values.shape == (0,) for values in empty.values())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"kind": "balls"}, "`kind` must be one of boxes, voxels, meshes"),
        ({"integrator": "verlet"}, "`integrator`"),
        ({"timestep": 0.001, "seconds": 10.0}, "raise the budget"),
        ({"perturbations": -1}, "`perturbations`"),
        ({"perturbation_deg": 0.0}, "`perturbation_deg`"),
        ({"bodies_per_world": 0}, "`bodies_per_world`"),
        ({"job_seconds": 0.0}, "`job_seconds`"),
    ],
)
def test_wrong_settings_are_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        StabilitySimulator(**settings)


def test_a_batch_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"needs samples \[B, boxes, 6\], got shape \(5, 6\)"):
        StabilitySimulator().simulate(np.zeros((5, 6)))
    with pytest.raises(ValueError, match="needs samples"):
        StabilitySimulator("voxels").simulate(np.zeros((5, 16, 16)))


def test_missing_mujoco_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r'pip install "rlalign\[sim\]"'):
        StabilitySimulator()


def test_old_mujoco_is_refused(monkeypatch):
    monkeypatch.setattr("mujoco.__version__", "3.3.5")
    with pytest.raises(ImportError, match=r"MuJoCo >= 3\.3\.6, got 3\.3\.5"):
        StabilitySimulator()
