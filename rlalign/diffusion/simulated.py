"""A generator's own samples with a simulator's judgement: drawn, judged, kept in a folder, and read again."""

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from jaxtyping import Float, Int
from torch import Tensor

from rlalign.config import ConfigError, dump
from rlalign.diffusion.collect import samples_of
from rlalign.diffusion.config_dso import DSOConfig
from rlalign.diffusion.pipeline_call import quiet
from rlalign.diffusion.policy import TunedPipeline
from rlalign.diffusion.prompts import Prompts
from rlalign.diffusion.rewards import Judge
from rlalign.training.distributed import gather_ragged
from rlalign.training.files import file_sha256, share_as_umask_says, sync_directory, sync_file, write_durable
from rlalign.training.seeding import derived_seed

FORMAT = 1
MEMBERS = 4
"""Samples of a prompt at least, where there are many prompts: the authors' number. With fewer, few prompts get both a
winner and a loser."""
_TABLE, _SETTINGS = "samples.safetensors", "settings.json"
_OUTCOME = "outcome/"


@dataclass(frozen=True, eq=False, kw_only=True)
class SimulatedSet:
    """Samples of one round. Those that could not be judged have NaN outcomes and stay: rows keep their place."""

    latents: Float[Tensor, "samples *dims"]
    """Clean latents as the denoiser sees them, on the CPU."""
    prompts: Int[Tensor, " samples"]
    """Row of each sample's prompt."""
    outcomes: Mapping[str, Float[Tensor, " samples"]]
    settings: Mapping[str, Any]
    """What decided all of this, as JSON."""
    sha256: str = ""
    """Of the stored table; empty before it is stored."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What drawing and judging took; not stored."""

    def __len__(self) -> int:
        return len(self.prompts)


def simulate(
    tuned: TunedPipeline,
    prompts: Prompts,
    judge: Judge,
    cfg: DSOConfig,
    *,
    round_number: int,
    accelerator: Accelerator,
    doing: Callable[[str], None] = lambda _: None,
) -> SimulatedSet:
    """Draw `data.samples` from the current generator (averaged weights, its own sampler) and judge them all.

    Every sample's noise is a function of (seed, round, its number), whatever process or batch draws it.

    Args:
        doing: Told what is going on.

    Raises:
        RewardError: A whole batch could not be judged.
    """
    count, chosen = cfg.data.samples, chosen_prompts(prompts, cfg, round_number)
    mine = range(accelerator.process_index, count, accelerator.num_processes)
    seconds = {"sample": 0.0, "simulate": 0.0}
    latents, rows, outcomes = [], [], []
    for first in range(0, len(mine), cfg.data.batch_size):
        numbers = mine[first : first + cfg.data.batch_size]
        doing(f"simulating samples {numbers[0]:,} to {numbers[-1]:,} of {count:,}")
        began = time.perf_counter()
        indices = [chosen[number % len(chosen)] for number in numbers]
        seeds = [derived_seed(cfg.seed, "simulated", round_number, number) for number in numbers]
        with tuned.averaged():
            clean, samples = draw_clean(
                tuned.pipeline,
                {
                    **prompts.call(indices),
                    **cfg.pipeline.call,
                    "num_inference_steps": cfg.data.num_inference_steps,
                },
                seeds=seeds,
            )
        drawn = time.perf_counter()
        judged = judge(samples, prompts.texts(indices), prompts.columns(indices))
        seconds["sample"] += drawn - began
        seconds["simulate"] += time.perf_counter() - drawn
        latents.append(clean.cpu())
        rows += indices
        outcomes.append(judged.parts)
    columns = {name: torch.cat([part[name] for part in outcomes]) for name in outcomes[0]}
    whole = {"latents": torch.cat(latents), "prompts": torch.tensor(rows)}
    whole |= {f"{_OUTCOME}{name}": values for name, values in columns.items()}
    whole = {name: _dealt_back(values, accelerator) for name, values in whole.items()}
    settings = settings_of(cfg, tuned.pipeline, prompts, judge, round_number=round_number)
    return _as_set(whole, settings, seconds=seconds)


def chosen_prompts(prompts: Prompts, cfg: DSOConfig, round_number: int) -> list[int]:
    """The prompts of a round: all, or where there are many as many as get `MEMBERS` samples each."""
    count = max(1, min(len(prompts), cfg.data.samples // MEMBERS))
    return prompts.draw(round_number, count=count, seed=cfg.seed)


def draw_clean(pipeline: DiffusionPipeline, call: Mapping[str, Any], *, seeds: Sequence[int]) -> tuple[Tensor, Any]:
    """Run an untouched pipeline, and catch the latents after its last step beside the samples.

    Args:
        call: Arguments of the pipeline, without `generator`.
        seeds: One per sample.

    Returns:
        Clean latents as the denoiser sees them (scaled, packed), and the samples.

    Raises:
        ValueError: The call does not make one sample per seed.
    """
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    with torch.no_grad(), quiet(pipeline), _listening(pipeline.scheduler) as heard:
        output = pipeline(**call, generator=noise)  # type: ignore[operator]
    if not heard or len(heard[0]) != len(seeds):
        got = len(heard[0]) if heard else 0
        raise ValueError(f"the pipeline made latents of {got} samples for {len(seeds)} seeds; one prompt, one sample.")
    return heard[0], samples_of(output)


def write_set(found: SimulatedSet, folder: Path) -> SimulatedSet:
    """Write a set in one rename, in place of an older one; return it with its hash.

    The folder holds `samples.safetensors` (`latents`, `prompts`, `outcome/NAME`) and `settings.json`.
    """
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        table = {"latents": found.latents.contiguous(), "prompts": found.prompts}
        table |= {f"{_OUTCOME}{name}": values.contiguous() for name, values in found.outcomes.items()}
        safetensors.torch.save_file(table, temporary / _TABLE)
        sync_file(temporary / _TABLE)
        digest = file_sha256(temporary / _TABLE)
        settings = {"format": FORMAT, "sha256": digest, **found.settings}
        write_durable(temporary / _SETTINGS, json.dumps(settings, indent=2) + "\n")
        share_as_umask_says(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        sync_directory(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return SimulatedSet(**{**vars(found), "sha256": digest})


def read_set(folder: Path, expected: Mapping[str, Any]) -> SimulatedSet:
    """Read a set that `write_set` wrote.

    Args:
        expected: Settings of the run that wants to use it (`settings_of`). Simulator, prompts and kind of pipeline must
            be the same; seed, sampling arguments and round need not.

    Raises:
        ConfigError: It is no such folder, is damaged, or was judged by another simulator.
    """
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        if settings["format"] != FORMAT:
            raise ConfigError(f"{folder}: format {settings['format']} is not {FORMAT}; simulate the set again.")
        digest = file_sha256(folder / _TABLE)
        if digest != settings["sha256"]:
            raise ConfigError(f"{folder}: {_TABLE} is damaged (its SHA-256 differs); simulate the set again.")
        table = safetensors.torch.load_file(folder / _TABLE)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{folder} holds no simulated samples ({error}).") from error
    _require_same(folder, settings, expected)
    kept = {name: value for name, value in settings.items() if name not in ("format", "sha256")}
    return _as_set(table, kept, sha256=digest)


def settings_of(
    cfg: DSOConfig, pipeline: DiffusionPipeline, prompts: Prompts, judge: Judge, *, round_number: int
) -> dict[str, Any]:
    """Everything that decides a set, as JSON."""
    if judge.simulator is not None:
        simulator: dict[str, Any] = dict(judge.simulator.settings)
    else:
        simulator = {"function": judge.cfg.function, "args": judge.cfg.args}
    source = dump(cfg)["pipeline"]
    found = {
        "simulator": simulator,
        "seed": cfg.seed,
        "round": round_number,
        "pipeline": {"class": type(pipeline).__name__, "source": source["source"], "pretrain": source["pretrain"]},
        "call": {**cfg.pipeline.call, "num_inference_steps": cfg.data.num_inference_steps},
        "samples": cfg.data.samples,
        "prompts": {"count": len(prompts), "sha256": _digest(prompts.rows)},
    }
    return json.loads(json.dumps(found, default=_described))


@contextmanager
def _listening(scheduler: Any) -> Iterator[list[Tensor]]:
    """Keep what the last call of `scheduler.step` returned; the scheduler is as it was afterwards."""
    own = {"step": vars(scheduler)["step"]} if "step" in vars(scheduler) else {}
    stock, heard = scheduler.step, []

    @functools.wraps(stock)  # pipelines read its signature
    def step(*args: Any, **options: Any) -> Any:
        moved = stock(*args, **options)
        heard[:] = [moved[0]]
        return moved

    scheduler.step = step
    try:
        yield heard
    finally:
        del scheduler.step
        vars(scheduler).update(own)


def _dealt_back(values: Tensor, accelerator: Accelerator) -> Tensor:
    """All processes' samples in the order of their numbers, which were dealt in turn."""
    if accelerator.num_processes == 1:
        return values
    parts = gather_ragged(values, accelerator)
    joined = torch.empty(sum(map(len, parts)), *values.shape[1:], dtype=values.dtype)
    for process, part in enumerate(parts):
        joined[process :: len(parts)] = part
    return joined


def _as_set(table: Mapping[str, Tensor], settings: Mapping[str, Any], **more: Any) -> SimulatedSet:
    return SimulatedSet(
        latents=table["latents"],
        prompts=table["prompts"],
        outcomes={n.removeprefix(_OUTCOME): v for n, v in table.items() if n.startswith(_OUTCOME)},
        settings=settings,
        **more,
    )


def _require_same(folder: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    theirs, ours = stored["simulator"], expected["simulator"]
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if names:
        shown = ", ".join(f"`{n}` {theirs.get(n)!r} there, {ours.get(n)!r} here" for n in names[:3])
        raise ConfigError(
            f"{folder} was judged by another simulator ({shown}), so its labels are not this run's; use those "
            "settings, or leave out `data.path`."
        )
    if stored["prompts"] != expected["prompts"]:
        raise ConfigError(f"{folder} was drawn for other prompts; use those, or leave out `data.path`.")
    if stored["pipeline"]["class"] != expected["pipeline"]["class"]:
        raise ConfigError(
            f"{folder} holds latents of a {stored['pipeline']['class']}, not of a {expected['pipeline']['class']}."
        )


def _digest(rows: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(list(rows), default=_described, sort_keys=True).encode()).hexdigest()


def _described(value: Any) -> Any:
    """Tensors and other objects among prompts and arguments, as something JSON can hold."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": hashlib.sha256(raw).hexdigest()}
    return {"class": type(value).__name__}
