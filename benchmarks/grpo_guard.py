"""What GRPO-Guard does to the ratios and gradients of denoising steps, and to over-optimisation.

    python benchmarks/grpo_guard.py                     # half an hour on one core; stop it any time, it goes on
    python benchmarks/grpo_guard.py --parts mechanism   # seconds

Writes `results/grpo_guard.json` and `.png`. The protocol stands in benchmarks/README.md.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cells

from rlalign.diffusion import FlowGRPOTrainer
from rlalign.diffusion.config_pretrain import PretrainConfig
from rlalign.diffusion.pretrain import cached_generator
from rlalign.diffusion.step_objective import step_log_ratio, step_weights, surrogate
from rlalign.functional.divergence import gaussian_kl
from rlalign.training.metrics import read
from rlalign_envs.digits import CLASSES, margin

GENERATOR = PretrainConfig(
    data="rlalign_envs.digits:training_set", count=1200, class_names=list(CLASSES), steps=3000, seed=0
)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"ratio_norm": False, "reweight": False, "clip_low": 5e-3, "clip_high": 5e-3},
    "plain_auto": {"ratio_norm": False, "reweight": False},
    "plain_kl": {"ratio_norm": False, "reweight": False, "clip_low": 5e-3, "clip_high": 5e-3, "kl_coef": 0.05},
    "guard": {"clip_low": 1e-3, "clip_high": 1e-3},
    "guard_auto": {},
}
SETTINGS: dict[str, Any] = {
    "total_steps": 45,
    "rollout": {"prompts_per_step": 10, "group_size": 16, "num_inference_steps": 10, "batch_size": 160},
    "optim": {"learning_rate": 3e-4, "update_epochs": 2, "minibatches": 2, "micro_batch": 720},
    "lora": None,
    "average": None,
    "checkpoint": {"every": 0},
    "eval": {"every": 5, "samples": 500, "watch": "rlalign_envs.digits:measure", "pictures": 0},
}
GOLD = ("frechet_distance", "diversity", "gold_accuracy", "distance_to_data")
COLOURS = {
    "plain": "#9aa5ad",
    "plain_auto": "#5c6b75",
    "plain_kl": "#d08a2e",
    "guard": "#7fb2d6",
    "guard_auto": "#1b6ca8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("mechanism", "runs"), default=["mechanism", "runs"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/grpo_guard"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    cells = Cells(args.out.with_suffix(".json"), {"arms": ARMS, **SETTINGS})
    found = json.loads(cells.path.read_text()).get("mechanism") if cells.path.exists() else None
    if "mechanism" in args.parts:
        found = mechanism()
        print(mechanism_table(found))
    keys = [{"seed": seed, "arm": arm} for seed in range(args.seeds) for arm in args.arms]
    for key in cells.missing(keys) if "runs" in args.parts else []:
        outcome = run(**key)
        cells.keep(key, outcome)
        last = outcome["curve"][-1]
        print(
            key, {name: round(last[name], 3) for name in ("proxy", *GOLD)}, f"{outcome['cpu_s']:.0f} cpu-s", flush=True
        )
    summary = matched(cells)
    cells.write({"mechanism": found, "matched": summary})
    draw(cells, found, args.out.with_suffix(".png"))
    print(matched_table(summary))


def trainer(arm: str, seed: int, run_dir: Path, **more: Any) -> FlowGRPOTrainer:
    settings = {**SETTINGS, "objective": ARMS[arm], "seed": seed, **more}
    return FlowGRPOTrainer(cached_generator(GENERATOR), list(CLASSES), margin, run_dir=run_dir, **settings)


# ----------------------------------------------------------------------------------------------------------- mechanism


def mechanism() -> dict[str, Any]:
    """Statistics of each denoising step's ratio after policies have moved, and each step's own gradient."""
    with tempfile.TemporaryDirectory() as scratch:
        made = trainer("guard", 0, Path(scratch) / "run", total_steps=1, eval={"pictures": 0, "samples": 16})
        weights = made.tuned.parameters
        start = {name: weight.detach().clone() for name, weight in weights.items()}
        list(made.steps())
        assert made.drawn is not None
        piece, advantages = made.drawn.trajectories[0], standardised(made)
        steps = piece.scored.any(0).nonzero().squeeze(1).tolist()
        learned = {name: weight.detach() - start[name] for name, weight in weights.items()}
        found: dict[str, Any] = {"moved": [], "gradients": {}}
        for direction, way in (("learned", learned), ("random", random_like(learned))):
            for factor in (0.5, 1.0, 2.0, 4.0):
                move(weights, start, way, factor)
                for form in ("plain", "guard"):  # weights of steps do not enter the ratio
                    rows = ratios(made, forms(made)[form], piece, steps)
                    found["moved"].append({"direction": direction, "factor": factor, "form": form, "steps": rows})
        move(weights, start, learned, 0.0)
        for form, objective in forms(made).items():
            found["gradients"][form] = [gradient(made, objective, piece, advantages, step) for step in steps]
    return found


def forms(made: FlowGRPOTrainer) -> dict[str, Any]:
    whole = made.config.objective
    half = replace(whole, reweight=False)
    return {"plain": replace(half, ratio_norm=False), "ratio_norm": half, "guard": whole}


def standardised(made: FlowGRPOTrainer) -> torch.Tensor:
    assert made.drawn is not None
    rewards = torch.tensor(margin(made.drawn.samples, [CLASSES[k] for k in made.drawn.indices]))
    groups = torch.tensor(made.drawn.groups)
    return torch.stack(
        [
            (r - rewards[groups == g].mean()) / (rewards[groups == g].std() + 1e-4)
            for r, g in zip(rewards, groups, strict=True)
        ]
    ).float()


def random_like(way: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A random direction; every tensor as long as in `way`."""
    source = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(part.shape, generator=source) for name, part in way.items()}
    return {name: part * (way[name].norm() / part.norm()) for name, part in drawn.items()}


@torch.no_grad()
def move(weights: Mapping[str, Any], start: dict[str, Any], way: dict[str, Any], factor: float) -> None:
    for name, weight in weights.items():
        weight.copy_(start[name] + factor * way[name])


@torch.no_grad()
def ratios(made: FlowGRPOTrainer, objective: Any, piece: Any, steps: list[int]) -> list[dict[str, float]]:
    """Each step's ratio: its lean, its spread, and what one clip for all steps would hold back."""
    rows = torch.arange(len(piece.log_prob))
    shifts, drifts = [], []
    for step in steps:
        at = torch.full_like(rows, step)
        new = made.sampler.replay(piece, rows, at)
        std = new.std.reshape(-1, *(1,) * (new.mean.ndim - 1))
        shifts.append(step_log_ratio(objective, new, piece, rows, at).double().expm1())
        drifts.append(float(gaussian_kl(new.mean, std, piece.mean_of(rows, at), std).flatten(1).mean()))
    clip = float(torch.stack(shifts).std())
    return [
        {
            "step": step,
            "mean": float(shift.mean()),
            "std": float(shift.std()),
            "theory": 0.0 if objective.ratio_norm else -drift,
            "above": float((shift > clip).double().mean()),
            "below": float((shift < -clip).double().mean()),
        }
        for step, shift, drift in zip(steps, shifts, drifts, strict=True)
    ]


def gradient(made: FlowGRPOTrainer, objective: Any, piece: Any, advantages: torch.Tensor, step: int) -> float:
    """Norm of one step's own gradient where the policy moves from: every ratio is 1, and no clip acts."""
    rows = torch.arange(len(advantages))
    steps = torch.full_like(rows, step)
    log_ratio = step_log_ratio(objective, made.sampler.replay(piece, rows, steps), piece, rows, steps)
    weights = step_weights(objective, piece)[rows, steps]
    loss = (weights * surrogate(objective, log_ratio, advantages, piece.dimensions)).mean()
    found = torch.autograd.grad(loss, list(made.tuned.parameters.values()), allow_unused=True)
    return math.sqrt(sum(float(g.pow(2).sum()) for g in found if g is not None))


def mechanism_table(found: dict[str, Any]) -> str:
    lines = []
    for one in found["moved"]:
        rows = one["steps"]
        lean = [row["mean"] / row["std"] for row in rows]
        spread = [row["std"] for row in rows]
        above, below = (float(np.mean([row[side] for row in rows])) for side in ("above", "below"))
        lines.append(
            f"{one['direction']:<8} x{one['factor']:<4g}{one['form']:<11} mean/std {min(lean):+.3f} to {max(lean):+.3f}"
            f"  std last/first step {spread[-1] / spread[0]:5.2f}"
            f"  beyond the clip: above {above:.3f} below {below:.3f}"
        )
    for form, norms in found["gradients"].items():
        lines.append(f"gradient {form:<11} largest / smallest step {max(norms) / min(norms):.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- runs


def run(*, arm: str, seed: int) -> dict[str, Any]:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        trainer(arm, seed, Path(scratch) / "run").fit()
        records = read(Path(scratch) / "run" / "metrics.jsonl")
    curve = [
        {"step": r["step"], "proxy": r["eval/reward_mean"], **{name: r[f"eval/{name}_mean"] for name in GOLD}}
        for r in records
        if r["kind"] == "eval"
    ]
    clip = {
        name: [r[name] for r in records if r["kind"] == "train" and name in r]
        for name in (f"denoising/clip_{side}_frac_{step:02d}" for side in ("low", "high") for step in (0, 4, 8))
    }
    return {
        "curve": curve,
        "clips": {name: float(np.mean(v)) for name, v in clip.items() if v},
        "cpu_s": time.process_time() - started,
    }


def matched(cells: Cells) -> dict[str, Any]:
    """Gold metrics of each arm at proxies that all of its seeds and all arms reach."""
    if not cells.runs:
        return {}
    top = min(max(point["proxy"] for point in run["curve"]) for run in cells.runs)
    bottom = max(run["curve"][0]["proxy"] for run in cells.runs)
    levels = [bottom + share * (top - bottom) for share in (0.5, 0.75, 1.0)]
    table: dict[str, Any] = {"levels": levels}
    for arm in dict.fromkeys(run["key"]["arm"] for run in cells.runs):
        rows = [at_levels(run["curve"], levels) for run in cells.where(arm=arm)]
        table[arm] = {
            name: [
                [float(np.mean(v)), float(np.min(v)), float(np.max(v))]
                for v in np.transpose([row[name] for row in rows])
            ]
            for name in GOLD
        }
    return table


def at_levels(
    curve: list[dict[str, float]], levels: list[float], names: Sequence[str] = GOLD
) -> dict[str, list[float]]:
    """Where a run first reaches each proxy, its gold metrics, linear between evaluations."""
    proxies = np.maximum.accumulate([point["proxy"] for point in curve])
    return {
        name: [float(np.interp(level, proxies, [point[name] for point in curve])) for level in levels] for name in names
    }


def matched_table(summary: dict[str, Any]) -> str:
    if not summary:
        return "no runs yet"
    lines = ["gold at matched proxy " + ", ".join(f"{level:.2f}" for level in summary["levels"])]
    for arm, gold in summary.items():
        if arm != "levels":
            told = "  ".join(
                f"{name} " + " ".join(f"{m:.3g} [{a:.3g}, {b:.3g}]" for m, a, b in gold[name]) for name in GOLD
            )
            lines.append(f"{arm:<11} {told}")
    return "\n".join(lines)


def draw(cells: Cells, found: dict[str, Any] | None, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(17, 3.8), layout="constrained")
    if found:
        moved = {
            one["form"]: one["steps"] for one in found["moved"] if (one["direction"], one["factor"]) == ("learned", 4)
        }
        for name, colour in (("plain", COLOURS["plain"]), ("guard", COLOURS["guard_auto"])):
            steps = [row["step"] for row in moved[name]]
            axes[0].plot(steps, [row["mean"] / row["std"] for row in moved[name]], "o-", color=colour, label=name)
            scales = found["gradients"][name]
            axes[1].semilogy(steps, [s / scales[0] for s in scales], "o-", color=colour, label=name)
        axes[0].set(xlabel="denoising step", ylabel="(mean ratio - 1) / std", title="Lean of the ratio")
        axes[1].set(xlabel="denoising step", ylabel="norm, first step = 1", title="Gradient of each step")
        axes[0].legend(frameon=False)
    for axis, name in zip(axes[2:], ("frechet_distance", "diversity"), strict=True):
        for run in cells.runs:
            arm = run["key"]["arm"]
            points = [(p["proxy"], p[name]) for p in run["curve"]]
            label = arm if run["key"]["seed"] == 0 else None
            axis.plot(*zip(*points, strict=True), color=COLOURS[arm], alpha=0.8, label=label)
        axis.set(xlabel="proxy (margin of the weak judge)", title=name.replace("_", " "))
    if cells.runs:
        axes[3].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
