"""How fast the stability simulator is, and whether its labels are those of DSO's long, fine simulation.

    taskset -c 1 python benchmarks/simulator_speed.py     # four minutes on one core

Writes `<out>.json`. The protocol and the targets stand in benchmarks/README.md, section `simulator_speed`.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from provenance import commit, versions

from rlalign_envs.assemblies import CLASSES, training_set
from rlalign_envs.stability import StabilitySimulator

TARGETS = {"objects_per_second": 200.0, "agreement": 0.98}
LONG = {"timestep": 0.001, "seconds": 10.0, "step_budget": 10_000, "integrator": "euler"}
THRESHOLD_DEG = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simulator_speed"))
    parser.add_argument("--objects", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    objects, classes = training_set(options.objects, options.seed)
    load = os.getloadavg()[0]
    speed = {name: measure(objects, k, options.repeats) for name, k in (("unperturbed", 0), ("four_tilts", 4))}
    agreement = compare(objects)
    fast = StabilitySimulator()
    told = fast.simulate(objects)
    report = {
        "targets": TARGETS,
        "reached": {
            "objects_per_second": speed["unperturbed"]["objects_per_cpu_second"] >= TARGETS["objects_per_second"],
            "agreement": agreement["plain_mujoco"]["agreement"] >= TARGETS["agreement"],
        },
        "speed": speed,
        "agreement": agreement,
        "stable": {name: float(told["stable"][classes == i].mean()) for i, name in enumerate(CLASSES)},
        "objects": options.objects,
        "seed": options.seed,
        "settings": dict(fast.settings),
        "commit": commit(),
        "versions": versions("mujoco", "numpy"),
        "machine": {"processor": platform.processor() or platform.machine(), "load_at_start": load},
    }
    path = options.out.with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def measure(objects: np.ndarray, perturbations: int, repeats: int) -> dict[str, Any]:
    """Time whole calls in this process: from arrays to outcomes."""
    simulator = StabilitySimulator(perturbations=perturbations)
    simulator.simulate(objects[:10])
    cpu, wall = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        simulator.simulate(objects)
        cpu.append(time.process_time() - start_cpu)
        wall.append(time.perf_counter() - start)
    return {
        "objects_per_cpu_second": len(objects) / statistics.median(cpu),
        "objects_per_second_of_wall": len(objects) / statistics.median(wall),
        "cpu_seconds": cpu,
        "wall_seconds": wall,
    }


def compare(objects: np.ndarray) -> dict[str, Any]:
    """Labels of the default settings against long, fine simulations of the same objects."""
    start = time.process_time()
    long = np.array([plain_mujoco(sample.astype(np.float64)) for sample in objects])
    seconds = time.process_time() - start
    fast, fine = (StabilitySimulator(**settings).simulate(objects) for settings in ({}, LONG))
    tilts, rotations = long.T
    return {
        "plain_mujoco": agree(fast["tilt_deg"], tilts) | {"objects_per_cpu_second": len(objects) / seconds},
        "plain_mujoco_total_rotation": agree(fast["rotation_deg"], rotations),
        "same_bodies": agree(fast["tilt_deg"], fine["tilt_deg"]),
        "same_bodies_robust": agree(fast["robust_tilt_deg"], fine["robust_tilt_deg"]),
    }


def plain_mujoco(sample: np.ndarray) -> tuple[float, float]:
    """Tilt and total rotation of one object alone: MuJoCo's defaults and its own mass of the boxes, 1 ms x 10 s."""
    centres, halves = sample[:, :3], np.exp(sample[:, 3:])
    spec = mujoco.MjSpec()
    spec.option.timestep = LONG["timestep"]
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[10, 10, 1])
    body = spec.worldbody.add_body(pos=[0, 0, -(centres - halves)[:, 2].min()])
    body.add_freejoint()
    for centre, half in zip(centres, halves, strict=True):
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=centre, size=half)
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_step(model, data, nstep=round(LONG["seconds"] / LONG["timestep"]))
    w, x, y, _ = data.qpos[3:]
    tilt, rotation = np.arccos(np.clip(1 - 2 * (x**2 + y**2), -1, 1)), 2 * np.arccos(min(abs(w), 1.0))
    return float(np.degrees(tilt)), float(np.degrees(rotation))


def agree(found: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """Share of equal labels, and the angles of the objects whose labels differ."""
    differ = (found < THRESHOLD_DEG) != (wanted < THRESHOLD_DEG)
    return {
        "agreement": float(1 - differ.mean()),
        "standing_fast": float((found < THRESHOLD_DEG).mean()),
        "standing_long": float((wanted < THRESHOLD_DEG).mean()),
        "differ": [[round(a, 2), round(b, 2)] for a, b in zip(found[differ], wanted[differ], strict=True)],
    }


def table(report: dict[str, Any]) -> str:
    lines = ["| | objects per CPU second | per second of wall time |", "|---|---|---|"]
    for name, found in report["speed"].items():
        cpu, wall = found["objects_per_cpu_second"], found["objects_per_second_of_wall"]
        lines.append(f"| {name} | {cpu:.0f} | {wall:.0f} |")
    lines += ["", "| against 1 ms x 10 s | labels that agree | standing, fast | standing, long |", "|---|---|---|---|"]
    for name, found in report["agreement"].items():
        shares = (found["agreement"], found["standing_fast"], found["standing_long"])
        lines.append(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |")
    return "\n".join([*lines, "", f"targets reached: {report['reached']}"])


if __name__ == "__main__":
    main()
