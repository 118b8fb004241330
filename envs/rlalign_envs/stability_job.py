"""One job of the stability simulator: samples in, where each came to lie out. Runs here or in a worker process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rlalign_envs.stability_boxes import solid_from_boxes
from rlalign_envs.stability_meshes import MeshInertia, OpenMesh, solid_from_mesh
from rlalign_envs.stability_outcomes import starts_of
from rlalign_envs.stability_solids import Array, Degenerate, Disconnected, Solid
from rlalign_envs.stability_voxels import solid_from_voxels
from rlalign_envs.stability_world import Integrator, Physics, settle

Kind = Literal["boxes", "voxels", "meshes"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a label, but MuJoCo's version; what each means stands at `StabilitySimulator`."""

    kind: Kind
    timestep: float
    seconds: float
    step_budget: int
    integrator: Integrator
    threshold_deg: float
    perturbations: int
    perturbation_deg: float
    disconnected: Disconnected
    normalize: bool
    thinnest: float
    gap: float
    inertia: MeshInertia
    open_mesh: OpenMesh
    seed: int

    def __post_init__(self) -> None:
        for name, kinds in (
            ("kind", Kind),
            ("integrator", Integrator),
            ("disconnected", Disconnected),
            ("inertia", MeshInertia),
            ("open_mesh", OpenMesh),
        ):
            value = self.__dict__[name]
            if value not in get_args(kinds):
                raise ValueError(f"`{name}` must be one of {', '.join(get_args(kinds))}, got {value!r}.")
        for name in ("timestep", "seconds", "threshold_deg"):
            if not self.__dict__[name] > 0:
                raise ValueError(f"`{name}` must be > 0, got {self.__dict__[name]}.")
        for name in ("perturbations", "thinnest", "gap", "seed"):
            if self.__dict__[name] < 0:
                raise ValueError(f"`{name}` must be >= 0, got {self.__dict__[name]}.")
        if not 0 < self.perturbation_deg < 90:
            raise ValueError(f"`perturbation_deg` must be between 0 and 90, got {self.perturbation_deg}.")
        if self.step_budget < (steps := round(self.seconds / self.timestep)):
            raise ValueError(
                f"`seconds`={self.seconds} at `timestep`={self.timestep} are {steps} steps, more than "
                f"`step_budget`={self.step_budget}: raise the budget."
            )

    def solid(self, sample: Any) -> Solid:
        """Make the body a sample stands for; raises `Degenerate` where it is none."""
        match self.kind:
            case "boxes":
                return solid_from_boxes(
                    sample,
                    disconnected=self.disconnected,
                    normalize=self.normalize,
                    thinnest=self.thinnest,
                    gap=self.gap,
                )
            case "voxels":
                return solid_from_voxels(sample, disconnected=self.disconnected, normalize=self.normalize)
            case "meshes":
                return solid_from_mesh(
                    sample,
                    disconnected=self.disconnected,
                    normalize=self.normalize,
                    inertia=self.inertia,
                    open_mesh=self.open_mesh,
                )

    def starts(self) -> Array:
        return starts_of(self.perturbations, self.perturbation_deg, self.seed)


@dataclass(frozen=True, eq=False)
class Found:
    """What a job found out about its n samples."""

    quaternions: Array
    """How each copy lies in the end, [n, 1 + k, 4]; NaN where unknown."""
    facts: dict[str, NDArray[np.float64]]
    """More outcomes, [n]."""


def unknown(count: int, copies: int) -> Found:
    """What is known of samples nobody could look at."""
    facts = {name: np.full(count, np.nan) for name in ("settled", "components", "clipped", "watertight")}
    return Found(np.full((count, copies, 4), np.nan), facts)


def find_out(recipe: Recipe, samples: Sequence[Any]) -> Found:
    """Make bodies of samples, simulate them together and look how they lie."""
    starts = recipe.starts()
    found = unknown(len(samples), len(starts))
    solids: dict[int, Solid] = {}
    for row, sample in enumerate(samples):
        try:
            solids[row] = solid = recipe.solid(sample)
        except (Degenerate, ValueError, TypeError):  # ragged or no numbers at all: numpy's own complaints
            continue
        for name, value in (
            ("components", solid.components),
            ("clipped", solid.clipped),
            ("watertight", solid.watertight),
        ):
            found.facts[name][row] = value
        if solid.fallen:
            found.quaternions[row] = [0.0, 1.0, 0.0, 0.0]
            found.facts["settled"][row] = 1.0
    rows = [row for row, solid in solids.items() if not solid.fallen]
    if rows:
        physics = Physics(recipe.timestep, recipe.seconds, recipe.step_budget, recipe.integrator)
        ends = settle([solids[row] for row in rows], starts, physics)
        found.quaternions[rows] = ends.quaternions
        found.facts["settled"][rows] = np.where(np.isfinite(ends.quaternions).all((1, 2)), ends.resting.all(1), np.nan)
    return found
