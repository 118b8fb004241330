"""A training step of rlalign against TRL's GRPOTrainer: same checkpoint, prompts, rewards, lengths and loss.

    python benchmarks/llm_vs_trl.py                    # a quarter of an hour on 2 idle cores
    python benchmarks/llm_vs_trl.py --model tiny       # seconds, on a random model: tries the harness, not the speed

Writes `<out>.json` (every step of every process, settings, versions, verdicts) and `<out>.png`. The protocol and the
thresholds stand in benchmarks/README.md, section `llm_vs_trl`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import commit, versions

ARMS = Path(__file__).with_name("llm_vs_trl_arms.py")
ROWS_PER_STEP = 16
THRESHOLDS = {"88/16": 3.0, "16/48": 1.25}
TRL_MICRO_BATCHES = (4, 8, 16)
BUSY = 0.1
PARITY = {"loss_difference": 1e-5, "relative_gradient_difference": 1e-3}
HEADLINE = ("trl", "rlalign")
EXTRA = ("trl_half", "rlalign_half", "trl_bf16", "trl_defaults")
TRL_SETTINGS = ("trl", "trl_bf16", "trl_defaults")
"""TRL on the same work; that of `trl_half` is less."""
LABELS = {
    "trl": "TRL tuned: float32, no checkpointing",
    "rlalign": "rlalign",
    "trl_half": "TRL tuned, 1 of 2 groups without variance",
    "rlalign_half": "rlalign, 1 of 2 groups without variance",
    "trl_bf16": "TRL: bfloat16 autocast, no checkpointing",
    "trl_defaults": "TRL defaults: bfloat16, checkpointing",
}


def main() -> None:
    options = parse_options()
    with tempfile.TemporaryDirectory() as scratch:
        options.model = checkpoint(options.model, Path(scratch))
        results = {regime: measure(options, regime, Path(scratch)) for regime in options.regimes}
    report = summarise(options, results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, options.out.with_suffix(".png"))
    print(table(report))


def measure(options: argparse.Namespace, regime: str, scratch: Path) -> dict[str, Any]:
    """Tune TRL, then A B A B, so that a slow minute of the machine hits both; then each extra arm once; then parity."""
    tuning = {}
    if options.trl_micro_batch is None:
        for rows in TRL_MICRO_BATCHES:
            run = launch(options, "trl", regime, scratch, steps=1, micro_batch=rows)
            tuning[rows] = run["steps"][0]["wall_s"]
    rows = options.trl_micro_batch or min(tuning, key=tuning.__getitem__)
    arms = list(HEADLINE) * options.repeats + ([] if options.no_extra else list(EXTRA))
    runs = [launch(options, arm, regime, scratch, steps=options.steps, micro_batch=rows) for arm in arms]
    parity = launch(options, "parity", regime, scratch, steps=1, micro_batch=rows)
    return {"trl_micro_batch": rows, "trl_wall_s_by_micro_batch": tuning, "runs": runs, "parity": parity}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="name, checkpoint directory, or `tiny`")
    parser.add_argument(
        "--regimes", nargs="+", default=list(THRESHOLDS), metavar="P/C", help="prompt/completion tokens"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process, after one warm-up step")
    parser.add_argument("--repeats", type=int, default=2, help="processes per headline arm and regime, alternating")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--trl-micro-batch",
        type=int,
        help="TRL's per_device_train_batch_size; the fastest of 4, 8 and 16 when left out",
    )
    parser.add_argument("--no-extra", action="store_true", help="headline arms and parity only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/llm_vs_trl"))
    return parser.parse_args()


def checkpoint(name: str, scratch: Path) -> str:
    """Give both sides the same plain checkpoint directory; `tiny` makes one, a name is converted once and cached."""
    if name == "tiny":
        return make_tiny_checkpoint(scratch / "tiny")
    from rlalign.llm.config import ModelConfig
    from rlalign.llm.models import resolve_source

    return resolve_source(ModelConfig(name=name))


def make_tiny_checkpoint(path: Path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "+", "=", *map(str, range(200))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, initializer_range=0.2, **sizes, **special)
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def launch(
    options: argparse.Namespace, arm: str, regime: str, scratch: Path, *, steps: int, micro_batch: int
) -> dict[str, Any]:
    """Run one arm in a process of its own, so that memory, caches and thread pools are its own as well."""
    prompt, completion = (int(part) for part in regime.split("/"))
    spec = {
        "arm": arm,
        "model": options.model,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "steps": steps,
        "threads": options.threads,
        "trl_micro_batch": micro_batch,
    }
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(options.threads)}
    result, busy = scratch / "result.json", busy_share()
    print(f"{regime:>7}  {arm:<13} {micro_batch if arm.startswith('trl') else '':>3} ", end="", flush=True)
    command = [sys.executable, str(ARMS), json.dumps(spec), str(result)]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    outcome = json.loads(result.read_text()) | {"busy_before": busy}
    print(" ".join(f"{step['wall_s']:.2f}" for step in outcome["steps"]) + " s" if "steps" in outcome else "done")
    return outcome


def busy_share(seconds: float = 1.0) -> float | None:
    """Share of the machine that others use right now; None where /proc/stat does not say."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None

    def ticks() -> tuple[int, int]:
        fields = [int(part) for part in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    before = ticks()
    time.sleep(seconds)
    total, idle = (after - old for after, old in zip(ticks(), before, strict=True))
    return 1 - idle / max(total, 1)


def summarise(options: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    for regime, result in results.items():
        result["arms"] = {
            arm: statistics_of([run for run in result["runs"] if run["arm"] == arm]) | {"label": LABELS[arm]}
            for arm in dict.fromkeys(run["arm"] for run in result["runs"])
        }
        result["verdict"] = verdict(regime, result)
    return {
        "benchmark": "llm_vs_trl",
        "protocol": "benchmarks/README.md, section llm_vs_trl",
        "settings": {
            "model": Path(options.model).name,
            "steps": options.steps,
            "repeats": options.repeats,
            "threads": options.threads,
        },
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "commit": commit(),
        "versions": versions("torch", "transformers", "trl"),
        "regimes": results,
    }


def statistics_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    steps = [step for run in runs for step in run["steps"]]
    wall, cpu = (statistics.median(step[key] for step in steps) for key in ("wall_s", "cpu_s"))
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "completion_tokens_per_s": runs[0]["completion_tokens_per_step"] / wall,
        "peak_rss_mib": max(run["peak_rss_mib"] for run in runs),
        "steps_timed": len(steps),
    }


def verdict(regime: str, result: dict[str, Any]) -> dict[str, Any]:
    theirs, ours = (result["arms"][arm] for arm in HEADLINE)
    speedups = {f"speedup_{key}": theirs[f"{key}_s"] / ours[f"{key}_s"] for key in ("wall", "cpu")}
    fastest = min((arm for arm in TRL_SETTINGS if arm in result["arms"]), key=lambda arm: result["arms"][arm]["wall_s"])
    best = result["arms"][fastest]
    needed = THRESHOLDS.get(regime)
    return {
        **speedups,
        "fastest_trl": fastest,
        **{f"speedup_{key}_vs_fastest": best[f"{key}_s"] / ours[f"{key}_s"] for key in ("wall", "cpu")},
        "needed": needed,
        "fast_enough": None if needed is None else min(speedups.values()) >= needed,
        "same_gradient": all(result["parity"][name] < limit for name, limit in PARITY.items()),
        "machine_was_quiet": all((run["busy_before"] or 0.0) < BUSY for run in result["runs"]),
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def table(report: dict[str, Any]) -> str:
    lines = []
    for regime, result in report["regimes"].items():
        said = result["verdict"]
        lines.append(
            f"\nP/C = {regime}: {said['speedup_wall']:.2f}x wall, {said['speedup_cpu']:.2f}x CPU "
            f"(needed {said['needed']}); against TRL's fastest setting tried ({said['fastest_trl']}) "
            f"{said['speedup_wall_vs_fastest']:.2f}x wall, {said['speedup_cpu_vs_fastest']:.2f}x CPU; "
            f"same gradient: {said['same_gradient']}"
            + ("" if said["machine_was_quiet"] else "  - other work was running: do not trust these times")
        )
        for arm in result["arms"].values():
            lines.append(
                f"  {arm['label']:<45} {arm['wall_s']:7.2f} s wall {arm['cpu_s']:7.2f} s CPU "
                f"{arm['completion_tokens_per_s']:7.1f} tokens/s {arm['peak_rss_mib']:7.0f} MiB"
            )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    regimes = report["regimes"]
    size = (3.6 + 3.4 * len(regimes), 3.4)
    figure, axes = plt.subplots(1, len(regimes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (regime, result) in zip(axes[0], regimes.items(), strict=True):
        arms = list(result["arms"].items())[::-1]
        times = [arm["wall_s"] for _, arm in arms]
        colours = ["#1b6ca8" if name.startswith("rlalign") else "#9aa5ad" for name, _ in arms]
        bars = axis.barh([arm["label"] for _, arm in arms], times, color=colours)
        axis.bar_label(bars, [f"{seconds:.1f} s" for seconds in times], padding=3)
        axis.set_xlim(0, 1.2 * max(times))
        prompt, completion = regime.split("/")
        axis.set_title(f"{prompt} prompt + {completion} completion tokens", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"seconds per step of {ROWS_PER_STEP} completions (median)", fontsize="medium")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
