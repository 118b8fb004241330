"""Does it stand? A simulator that puts 3-D objects on the ground, lets go and tells by how much they tipped."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlalign_envs.stability_job import Found, Kind, Recipe, find_out, unknown
from rlalign_envs.stability_meshes import MeshInertia, OpenMesh
from rlalign_envs.stability_outcomes import outcomes_of
from rlalign_envs.stability_solids import Disconnected
from rlalign_envs.stability_workers import Workers
from rlalign_envs.stability_world import FIXED, Integrator, load_mujoco

SHAPES = {"boxes": "[B, boxes, 6]", "voxels": "[B, x, y, z]"}


class StabilitySimulator:
    """Stability of rigid objects on a plane under gravity, by MuJoCo, after DSO (arXiv 2503.22677).

    Objects are put down upright with their lowest point touching the ground, and k more times tilted a little. `stable`
    is DSO's label for the upright copy with tilt in place of total rotation; `robust` asks it of all copies, and tells
    objects that balance on a knife's edge from those that stand.

    The same settings and samples give the same outcomes to the last bit, however samples are batched and on any number
    of workers.

    Args:
        kind: What a sample is, z up. `boxes`: [n, 6], centre and log half size of boxes welded into one body; the mass
            is that of their union, space shared by boxes counts once. `voxels`: an occupancy grid [x, y, z], solid
            above 0.5. `meshes`: `(vertices, faces)` or an object with these attributes, as trimesh's.
        timestep: Seconds per step.
        seconds: Simulated before the first look. Bodies at rest by then are done; the others go on for as long again,
            until they rest or have used `step_budget`. A slow fall is seen to its end so, and a quick one costs little.
        step_budget: Most steps for one body. An object still moving after them is judged as it is (`settled` is 0).
        integrator: One of MuJoCo's: `implicitfast`, `implicit`, `euler`, `rk4`.
        threshold_deg: An object stands if it ends tilted by less. DSO's 20.
        perturbations: Tilted copies per object, k; 0 makes `robust` the same as `stable`.
        perturbation_deg: By how much they start tilted.
        disconnected: Objects in several parts. `weld`: one rigid body all the same; `largest`: only the part with the
            most volume; `fail`: counted as fallen, tilt 180. None is `largest` for voxels, where rasterizing alone
            breaks things apart, and `weld` for others.
        normalize: Scale every object to a largest extent of 1 first, as DSO's evaluation does. Off, a size in metres is
            taken at its word: big objects fall slowly, tiny ones are below what MuJoCo's contacts can tell.
        thinnest: Boxes with a half size below this share of the largest extent are made that thick, counted in
            `clipped`.
        gap: Boxes at most this share of the largest extent apart are connected, which decides `components`.
        inertia: Mass of meshes: `exact` (the enclosed volume; surfaces that overlap count twice), or `hull`. DSO uses
            what MuJoCo now calls `legacy`, which misplaces the centre of mass of concave meshes.
        open_mesh: A mesh with open edges, or with faces not turned to one side: `hull` gives it the mass of its convex
            hull, `fail` leaves its outcome unknown.
        bodies_per_world: Copies simulated in one world; decides speed only.
        workers: Processes; 0 simulates in this one. Scripts need their code under `if __name__ == "__main__":`.
        job_seconds: Wall-clock limit of a worker's job, the objects of one world. A job that takes longer, or whose
            worker dies, is lost: its outcomes are NaN, and one warning tells so.
        seed: Turns the directions of the tilts by an angle drawn from it; 0 begins with +x.

    Example:
        >>> slab = [[0.0, 0.0, 0.1, -0.7, -0.7, -2.3]]
        >>> pin_on_its_tip = [[0.0, 0.0, 1.0, -3.5, -3.5, 0.0]]
        >>> with_tilts = StabilitySimulator(perturbations=4).simulate(np.array([slab, pin_on_its_tip]))
        >>> with_tilts["stable"].tolist(), with_tilts["robust"].tolist()
        ([1.0, 1.0], [1.0, 0.0])

    Reference:
        Li et al. 2025 (arXiv 2503.22677); RuiningLi/dso data_preprocessing/simulation_utils.py (1 ms x 10 s, total
        rotation, threshold 20).
    """

    proxy = "stable"
    """What training optimizes."""
    gold = "robust"
    """What it is judged by."""

    def __init__(
        self,
        kind: Kind = "boxes",
        *,
        timestep: float = 0.01,
        seconds: float = 2.0,
        step_budget: int = 1000,
        integrator: Integrator = "implicitfast",
        threshold_deg: float = 20.0,
        perturbations: int = 4,
        perturbation_deg: float = 3.0,
        disconnected: Disconnected | None = None,
        normalize: bool = True,
        thinnest: float = 0.004,
        gap: float = 0.02,
        inertia: MeshInertia = "exact",
        open_mesh: OpenMesh = "hull",
        bodies_per_world: int = 16,
        workers: int = 0,
        job_seconds: float = 60.0,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("bodies_per_world", bodies_per_world, 1), ("workers", workers, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be >= {least}, got {value}.")
        if not job_seconds > 0:
            raise ValueError(f"`job_seconds` must be > 0, got {job_seconds}.")
        self.recipe = Recipe(
            kind=kind,
            timestep=timestep,
            seconds=seconds,
            step_budget=step_budget,
            integrator=integrator,
            threshold_deg=threshold_deg,
            perturbations=perturbations,
            perturbation_deg=perturbation_deg,
            disconnected=disconnected or ("largest" if kind == "voxels" else "weld"),
            normalize=normalize,
            thinnest=thinnest,
            gap=gap,
            inertia=inertia,
            open_mesh=open_mesh,
            seed=seed,
        )
        self._version = load_mujoco().__version__
        self._per_job = max(1, bodies_per_world // (1 + perturbations))
        work = partial(find_out, self.recipe)
        self._workers = Workers(work, count=workers, job_seconds=job_seconds) if workers else None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that decides a label, for the record: JSON."""
        return {"simulator": "rlalign_envs.stability", "mujoco": self._version, **FIXED, **asdict(self.recipe)}

    def simulate(self, samples: NDArray[Any] | Sequence[Any]) -> dict[str, NDArray[np.float64]]:
        """Simulate a batch.

        Args:
            samples: Boxes [B, n, 6] or voxels [B, x, y, z] as an array, meshes as a list.

        Returns:
            Arrays [B]. All are NaN for a sample that is no body or whose simulation broke, but `valid`, which is 0.

            tilt_deg: Angle between the object's z axis and the vertical at the end, upright start.
            rotation_deg: Angle of its whole rotation, spin about the vertical included, as the DSO paper reports.
            stable: 1 where `tilt_deg` is below the threshold.
            robust: 1 where all copies end with a tilt below the threshold, the upright one included.
            robust_share: The share of copies that do.
            robust_tilt_deg: Largest tilt over all copies.
            graded: Mean over all copies of exp(-(tilt / threshold)^2), in [0, 1]: tells objects apart where `stable` is
                1 for all, and is 1 only where nothing tips at all.
            settled: 1 where all copies came to rest within the step budget.
            components: Connected parts before anything is done about them.
            clipped: Boxes that were made thicker.
            watertight: Meshes: 1 where the surface encloses a volume. 1 for other kinds.
            valid: 1 where the outcomes are known.

        Raises:
            ValueError: The batch as a whole has the wrong shape.
        """
        self._check(samples)
        jobs = [list(samples[at : at + self._per_job]) for at in range(0, len(samples), self._per_job)]
        found = self._in_workers(jobs) if self._workers else [find_out(self.recipe, job) for job in jobs]
        found.append(unknown(0, 1 + self.recipe.perturbations))  # so that an empty batch has all outcomes
        outcomes = outcomes_of(np.concatenate([f.quaternions for f in found]), threshold_deg=self.recipe.threshold_deg)
        facts = {name: np.concatenate([f.facts[name] for f in found]) for name in found[0].facts}
        return outcomes | {name: np.where(outcomes["valid"] == 1, fact, np.nan) for name, fact in facts.items()}

    def close(self) -> None:
        """End the worker processes."""
        if self._workers:
            self._workers.close()

    def _in_workers(self, jobs: list[list[Any]]) -> list[Found]:
        assert self._workers is not None
        found, lost = self._workers.run(jobs)
        if lost:
            count = sum(len(jobs[index]) for index in lost)
            reasons = "; ".join(sorted(set(lost.values())))
            warnings.warn(
                f"{count} of {sum(map(len, jobs))} samples were lost in {len(lost)} jobs ({reasons}); "
                "their outcomes are NaN. Raise `job_seconds` if the machine is merely slow.",
                RuntimeWarning,
                stacklevel=3,
            )
        copies = 1 + self.recipe.perturbations
        return [unknown(len(job), copies) if f is None else f for f, job in zip(found, jobs, strict=True)]

    def _check(self, samples: NDArray[Any] | Sequence[Any]) -> None:
        if self.recipe.kind == "meshes":
            return
        shape = np.shape(samples)
        if len(shape) != (3 if self.recipe.kind == "boxes" else 4) or (self.recipe.kind == "boxes" and shape[2] != 6):
            raise ValueError(
                f"`kind`={self.recipe.kind!r} needs samples {SHAPES[self.recipe.kind]}, got shape {shape}; "
                "pass the pipeline's `np` output, or change `kind`."
            )
