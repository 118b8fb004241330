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
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        made = trainer("guard", 0, Path(scratch) / "run", total_steps=1, eval={"pictures": 0, "samples": 16})
        list(made.steps())
        assert made.drawn is not None
        piece = made.drawn.trajectories[0]
        rewards = torch.tensor(margin(made.drawn.samples, [CLASSES[k] for k in made.drawn.indices]))
        groups = torch.tensor(made.drawn.groups)
        advantages = torch.stack(
            [
                (r - rewards[groups == g].mean()) / (rewards[groups == g].std() + 1e-4)
                for r, g in zip(rewards, groups, strict=True)
            ]
        )
        steps = piece.scored.any(0).nonzero().squeeze(1).tolist()
        for name, normalized in (("plain", False), ("guard", True)):
            cfg = replace(made.config.objective, ratio_norm=normalized, reweight=normalized)
            found[name] = [one_step(made, cfg, piece, advantages.float(), step) for step in steps]
    for name in found:
        scales = [row["gradient"] for row in found[name]]
        print(name, "gradient spread (largest / smallest step)", round(max(scales) / min(scales), 2))
    return found


def one_step(made: FlowGRPOTrainer, cfg: Any, piece: Any, advantages: torch.Tensor, step: int) -> dict[str, float]:
    rows = torch.arange(len(advantages))
    steps = torch.full_like(rows, step)
    new = made.sampler.replay(piece, rows, steps)
    log_ratio = step_log_ratio(cfg, new, piece, rows, steps)
    drift = gaussian_kl(new.mean, std_of(new), piece.means[rows, steps], std_of(new)).flatten(1).mean(1)
    weights = step_weights(cfg, piece)[rows, steps]
    # Where the policy moves from, every ratio is 1 and the gradient is that of the surrogate without its clip.
    loss = (weights * surrogate(cfg, log_ratio - log_ratio.detach(), advantages, piece.dimensions)).mean()
    gradients = torch.autograd.grad(loss, list(made.tuned.parameters.values()), allow_unused=True)
    norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradients if g is not None))
    ratio = log_ratio.detach().double().exp()
    clip = 3 * float(ratio.std())
    return {
        "step": step,
        "shift": float(ratio.mean() - 1),
        "std": float(ratio.std()),
        "shift_in_std": float((ratio.mean() - 1) / ratio.std()),
        "theory": -float(drift.mean()) if not cfg.ratio_norm else 0.0,
        "above": float((ratio > 1 + clip / 3).double().mean()),
        "below": float((ratio < 1 - clip / 3).double().mean()),
        "gradient": norm,
    }


def std_of(score: Any) -> torch.Tensor:
    return score.std.reshape(-1, *(1,) * (score.mean.ndim - 1))


def mechanism_table(found: dict[str, Any]) -> str:
    lines = ["step   plain: shift/std  theory      grad    | guard: shift/std   grad"]
    for plain, guard in zip(found["plain"], found["guard"], strict=True):
        lines.append(
            f"{plain['step']:4d}   {plain['shift_in_std']:10.3f}  {plain['theory']:10.2e}  {plain['gradient']:8.4f}  |"
            f" {guard['shift_in_std']:10.3f}  {guard['gradient']:8.4f}"
        )
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


def at_levels(curve: list[dict[str, float]], levels: list[float]) -> dict[str, list[float]]:
    """Where a run first reaches each proxy, its gold metrics, linear between evaluations."""
    proxies = np.maximum.accumulate([point["proxy"] for point in curve])
    return {
        name: [float(np.interp(level, proxies, [point[name] for point in curve])) for level in levels] for name in GOLD
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
        for name, colour in (("plain", COLOURS["plain"]), ("guard", COLOURS["guard_auto"])):
            steps = [row["step"] for row in found[name]]
            axes[0].plot(steps, [row["shift_in_std"] for row in found[name]], "o-", color=colour, label=name)
            scales = [row["gradient"] for row in found[name]]
            axes[1].semilogy(steps, [s / scales[0] for s in scales], "o-", color=colour, label=name)
        axes[0].set(xlabel="denoising step", ylabel="(mean ratio - 1) / std", title="Shift of the ratio")
        axes[1].set(xlabel="denoising step", ylabel="norm, first step = 1", title="Gradient of each step")
        axes[0].legend(frameon=False)
    for axis, name in zip(axes[2:], ("frechet_distance", "diversity"), strict=True):
        for run in cells.runs:
            arm = run["key"]["arm"]
            points = [(p["proxy"], p[name]) for p in run["curve"]]
            label = arm if run["key"]["seed"] == 0 else None
            axis.plot(*zip(*points, strict=True), color=COLOURS[arm], alpha=0.8, label=label)
        axis.set(xlabel="proxy (margin of the weak judge)", title=name.replace("_", " "))
    axes[3].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
