"""Bodies are put on a plane and left to themselves, many in one MuJoCo world, none of which can feel another."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlalign_envs.stability_solids import Array, BoxSolid, MeshSolid, Solid, extent_of

Integrator = Literal["implicitfast", "implicit", "euler", "rk4"]

FIXED = {"gravity": 9.81, "friction": 1.0, "cone": "elliptic", "solver": "newton", "contact": "mujoco's defaults"}
"""What decides an outcome and is no option."""
AT_REST = 1e-3
"""Speed in sizes and radians per second. Bodies at rest in MuJoCo are many orders below, tipping ones above."""
OLDEST = (3, 3, 6)
"""MuJoCo solves independent bodies independently (islands) from here on."""


class Unbuildable(RuntimeError):
    """MuJoCo makes no model of these bodies."""


class Unstable(RuntimeError):
    """The simulation of a world has left the numbers."""


@dataclass(frozen=True)
class Physics:
    """How time passes; see `StabilitySimulator`."""

    timestep: float
    seconds: float
    step_budget: int
    integrator: Integrator

    @property
    def steps(self) -> int:
        """After these, bodies at rest are done and the others go on."""
        return max(1, round(self.seconds / self.timestep))


@dataclass(frozen=True, eq=False)
class Ends:
    """Where bodies came to be: quaternions [n, s, 4], NaN where unknown, and whether they rested by then [n, s]."""

    quaternions: Array
    resting: NDArray[np.bool_]


def load_mujoco() -> ModuleType:
    """Import MuJoCo, or say how to get it."""
    try:
        import mujoco
    except ImportError as error:
        raise ImportError('the stability simulator needs MuJoCo: `pip install "rlalign[sim]"`.') from error
    if tuple(int(number) for number in mujoco.__version__.split(".")[:3]) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise ImportError(f"the stability simulator needs MuJoCo >= {needed}, got {mujoco.__version__}: upgrade it.")
    return mujoco


def settle(solids: Sequence[Solid], starts: Array, physics: Physics) -> Ends:
    """Put each body down in each orientation, touching the ground, and simulate until it rests.

    What comes out for a body does not depend, to the last bit, on what else is simulated with it; see `_compile`.

    Args:
        solids: n bodies.
        starts: Orientations as unit quaternions, real part first, [s, 4].
        physics: Time step, time, integrator.
    """
    mujoco = load_mujoco()
    try:
        with _quiet(mujoco):
            return _settle(mujoco, solids, starts, physics)
    except (Unbuildable, Unstable, mujoco.FatalError, mujoco.UnexpectedError):
        if len(solids) == 1:
            return Ends(np.full((1, len(starts), 4), np.nan), np.zeros((1, len(starts)), dtype=bool))
        # One bad body breaks its world: each gets its own, which changes nothing for the good ones.
        alone = [settle([solid], starts, physics) for solid in solids]
        return Ends(np.concatenate([e.quaternions for e in alone]), np.concatenate([e.resting for e in alone]))


def lowest_point(points: Array, quaternions: Array) -> Array:
    """Return the height of the lowest of points [p, 3] after each of the rotations [s, 4] about their origin, [s]."""
    w, x, y, z = quaternions.T
    third_row = np.stack([2 * (x * z - w * y), 2 * (y * z + w * x), w**2 - x**2 - y**2 + z**2], -1)
    return (third_row @ points.T).min(1)


def _settle(mujoco: ModuleType, solids: Sequence[Solid], starts: Array, physics: Physics) -> Ends:
    owner = np.repeat(np.arange(len(solids)), len(starts))
    sizes = np.array([extent_of(solid.points()) for solid in solids])[owner]
    positions, velocities = _put_down(solids, starts), np.zeros((len(owner), 6))
    open_, used = np.arange(len(owner)), 0
    while len(open_) and used < physics.step_budget:
        steps = min(physics.steps, physics.step_budget - used)
        model = _compile(mujoco, solids, owner[open_], physics)
        positions[open_], velocities[open_] = _run(mujoco, model, positions[open_], velocities[open_], steps)
        used += steps
        open_ = open_[_speed(velocities[open_], sizes[open_]) > AT_REST]
    resting = _speed(velocities, sizes) <= AT_REST
    # No body sinks into the ground or leaves it for good: where one has, its numbers mean nothing.
    lost = (positions[:, 2] < -0.1 * sizes) | (positions[:, 2] > 2 * sizes)
    quaternions = np.where(lost[:, None], np.nan, positions[:, 3:])
    shape = (len(solids), len(starts))
    return Ends(quaternions.reshape(*shape, 4), resting.reshape(shape))


def _put_down(solids: Sequence[Solid], starts: Array) -> Array:
    """Positions and orientations [n s, 7], above the origin, the lowest point at z = 0."""
    positions = np.zeros((len(solids), len(starts), 7))
    positions[..., 3:] = starts
    for index, solid in enumerate(solids):
        positions[index, :, 2] = -lowest_point(solid.points(), starts)
    return positions.reshape(-1, 7)


def _run(mujoco: ModuleType, model: Any, positions: Array, velocities: Array, steps: int) -> tuple[Array, Array]:
    data = mujoco.MjData(model)
    data.qpos[:], data.qvel[:] = positions.ravel(), velocities.ravel()
    mujoco.mj_step(model, data, nstep=steps)
    if not (np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all()):
        raise Unstable
    return data.qpos.reshape(-1, 7).copy(), data.qvel.reshape(-1, 6).copy()


def _speed(velocities: Array, sizes: Array) -> Array:
    return np.maximum(np.abs(velocities[:, :3]).max(1) / sizes, np.abs(velocities[:, 3:]).max(1))


def _compile(mujoco: ModuleType, solids: Sequence[Solid], owner: NDArray[np.int64], physics: Physics) -> Any:
    """Build a world of one free body per entry of `owner`, all above the origin; they touch the plane only.

    MuJoCo couples bodies that never touch, in ways that are off here: rounding of where they stand (all stand at the
    origin), one constraint solve for all (islands, its default), the choice of the solver's warm start, and the layout
    of its matrices, which is chosen by the size of the world.
    """
    spec = mujoco.MjSpec()
    spec.option.timestep = physics.timestep
    spec.option.integrator = {
        "implicitfast": mujoco.mjtIntegrator.mjINT_IMPLICITFAST,
        "implicit": mujoco.mjtIntegrator.mjINT_IMPLICIT,
        "euler": mujoco.mjtIntegrator.mjINT_EULER,
        "rk4": mujoco.mjtIntegrator.mjINT_RK4,
    }[physics.integrator]
    spec.option.gravity = [0, 0, -FIXED["gravity"]]
    spec.option.cone = mujoco.mjtCone.mjCONE_ELLIPTIC
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_SPARSE
    # A reset would start a body that broke anew, and the whole world with it.
    off = (mujoco.mjtDisableBit.mjDSBL_WARMSTART, mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    spec.option.disableflags = sum(int(flag) for flag in off)
    plane = mujoco.mjtGeom.mjGEOM_PLANE
    spec.worldbody.add_geom(type=plane, size=[1, 1, 1], friction=_friction(), contype=1, conaffinity=0)
    for index in owner:
        _add(mujoco, spec, int(index), solids[index])
    try:
        model = spec.compile()
    except ValueError as error:  # a body MuJoCo refuses
        raise Unbuildable(str(error)) from error
    # Documented as a factor of the solver's tolerance, and a mean over the world.
    model.stat.meaninertia = 1.0
    return model


def _add(mujoco: ModuleType, spec: Any, index: int, solid: Solid) -> None:
    body = spec.worldbody.add_body()
    body.add_freejoint()
    if solid.moments is not None:
        # Of mass 1: its scale moves nothing, and the solver's tolerance is an absolute one.
        inertia = solid.moments.inertia / solid.moments.mass
        body.mass, body.ipos, body.explicitinertial = 1.0, np.zeros(3), True
        body.fullinertia = [*np.diag(inertia), inertia[0, 1], inertia[0, 2], inertia[1, 2]]
    contact = {"contype": 0, "conaffinity": 1, "friction": _friction()}
    match solid:
        case BoxSolid():
            for centre, half in zip(solid.centres, solid.halves, strict=True):
                body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=centre, size=half, **contact)
        case MeshSolid():
            body.add_geom(
                type=mujoco.mjtGeom.mjGEOM_MESH, meshname=_mesh(mujoco, spec, index, solid), mass=1.0, **contact
            )


def _mesh(mujoco: ModuleType, spec: Any, index: int, solid: MeshSolid) -> str:
    """Name of the body's mesh, which its copies share."""
    name = f"mesh{index}"
    if all(mesh.name != name for mesh in spec.meshes):
        mesh = spec.add_mesh(name=name)
        mesh.uservert, mesh.userface = solid.vertices.ravel(), solid.faces.ravel()
        mesh.inertia = mujoco.mjtMeshInertia.mjMESH_INERTIA_CONVEX
    return name


def _friction() -> list[float]:
    return [float(FIXED["friction"]), 0.005, 0.0001]  # sliding; MuJoCo's torsional and rolling ones have no effect here


@contextmanager
def _quiet(mujoco: ModuleType) -> Iterator[None]:
    """Keep MuJoCo from printing and from writing MUJOCO_LOG.TXT: what it warns of ends as an unknown outcome."""
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)
