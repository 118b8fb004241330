"""Train a small generator from scratch by conditional flow matching, and keep it for the next run."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from rlalign.config import ConfigError
from rlalign.diffusion.config_pretrain import PretrainConfig
from rlalign.diffusion.generator import ConditionalFlowPipeline, FlowTransformer
from rlalign.diffusion.pretrain_progress import Progress, shown
from rlalign.training.ema import EMA
from rlalign.training.files import (
    cache_directory,
    file_sha256,
    share_as_umask_says,
    sync_directory,
    sync_file,
    write_durable,
)
from rlalign.training.reward_function import import_object
from rlalign.training.schedules import lr_scale
from rlalign.training.seeding import derived_seed, generator

FORMAT = 1
"""Part of the cache key: raised when the code below trains another model from the same configuration."""
_SUMS = "sha256.json"
_LOOK = 50
"""Steps between two looks at the loss: each one waits for the device."""


def pretrain(
    data: np.ndarray,
    labels: np.ndarray,
    config: PretrainConfig,
    *,
    class_names: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> ConditionalFlowPipeline:
    """Train a generator on labelled token sets.

        minimise E |v(x_σ, σ, c) - (ε - x)|²,   x_σ = (1 - σ) x + σ ε,   σ ~ U(0, 1),   c hidden with `label_drop`

    The noise levels of a batch are stratified: one in each of B equal parts of (0, 1), which takes most of their
    variance out of the gradient.

    Args:
        data: Samples, [N, tokens, channels]. Each channel is standardised; the pipeline undoes it.
        labels: Their classes, integers [N] from 0.
        config: Of model and training; `data`, `data_args` and `count` are not read.
        class_names: In the order of the labels; None takes the configuration's.
        device: Where to train. The result is the same bit for bit for equal seeds, on one machine and device.
        progress: Called as (step, steps, loss); None shows a bar on a terminal and a few lines elsewhere.

    Returns:
        The pipeline on that device, with the moving average of the weights.

    Raises:
        ValueError: Shapes, labels or names do not fit, a sample is not finite, or the loss stopped being so.

    Reference:
        Lipman et al. 2023 (arXiv:2210.02747); Liu et al. 2023 (arXiv:2209.03003), eq. 1. The null class is that of
        Ho and Salimans 2022 (arXiv:2207.12598).
    """
    names = list(config.class_names if class_names is None else class_names)
    _check(data, labels, names)
    with _fixed(config):
        pipeline = _untrained(data, names, config)
        pipeline.to(device)
        target = torch.from_numpy(np.asarray(labels, dtype=np.int64)).to(device)
        with shown(progress) as report:
            _train(pipeline.transformer, pipeline.encode(data).to(device), target, config, report)
    pipeline.transformer.eval()
    return pipeline


def cached_generator(
    config: PretrainConfig,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    note: Callable[[str], None] = print,
) -> ConditionalFlowPipeline:
    """Return the generator a configuration describes, trained on the first call and read from disk on later ones.

    It is kept under `$RLALIGN_CACHE`, else `~/.cache/rlalign`, in a folder named by the configuration and the data.
    The folder appears in one rename; one that was damaged since is trained anew, and `note` is told.

    Raises:
        ConfigError: The data cannot be had, does not fit the configuration, or the cache cannot be written.
    """
    data, labels = _load(config)
    root = cache_directory() / "generators"
    target = root / _key(config, data, labels)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            damage = _damage(target) if target.is_dir() else None
            if damage is not None:
                note(f"rlalign: the generator in {target} is damaged ({damage}); it is trained again.")
                shutil.rmtree(target)
            if not target.is_dir():
                note(f"rlalign: training a generator on {config.data}, once; it is kept in {target}.")
                _write(_trained(data, labels, config, device, progress), target)
            return _read(target).to(device)
    except OSError as error:
        raise ConfigError(
            f"cannot keep the generator in {root}: {error}. Free some space, or set RLALIGN_CACHE to another folder."
        ) from error


def _check(data: np.ndarray, labels: np.ndarray, names: list[str]) -> None:
    if data.ndim != 3 or labels.shape != data.shape[:1] or len(data) == 0:
        raise ValueError(
            f"expected data [N, tokens, channels] and labels [N], N >= 1, got {data.shape} and {labels.shape}."
        )
    if not np.isfinite(data).all():
        raise ValueError(f"{int((~np.isfinite(data).all((1, 2))).sum())} of {len(data)} samples are not finite.")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(
            f"labels must be integers from 0 to {len(names) - 1} for the {len(names)} `class_names`, got "
            f"{labels.dtype} from {labels.min()} to {labels.max()}."
        )


def _untrained(data: np.ndarray, names: list[str], config: PretrainConfig) -> ConditionalFlowPipeline:
    _, tokens, channels = data.shape
    transformer = FlowTransformer(
        tokens=tokens,
        channels=channels,
        classes=len(names),
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        positions=config.positions,
    )
    mean, std = data.mean((0, 1), dtype=np.float64), data.std((0, 1), dtype=np.float64)
    statistics = {"class_names": names, "mean": mean.tolist(), "std": np.maximum(std, 1e-6).tolist()}
    return ConditionalFlowPipeline(transformer, FlowMatchEulerDiscreteScheduler(), data=statistics)


def _train(model: FlowTransformer, data: Tensor, labels: Tensor, config: PretrainConfig, report: Progress) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)
    average = EMA(model.parameters(), config.average_decay, warmup=True)
    random = generator(config.seed, "pretrain", device=data.device)
    warmup = min(config.warmup_steps, config.steps // 2)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * lr_scale(
            step, warmup_steps=warmup, total_steps=config.steps, schedule="cosine"
        )
        loss = _error(model, data, labels, config, random)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        if (step + 1) % _LOOK == 0 or step + 1 == config.steps:
            value = float(loss.detach())
            if not np.isfinite(value):
                raise ValueError(f"the loss is {value} after {step + 1} steps; lower `pretrain.learning_rate`.")
            report(step + 1, config.steps, value)
    with average.swap():
        averaged = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(averaged)


def _error(
    model: FlowTransformer, data: Tensor, labels: Tensor, config: PretrainConfig, random: torch.Generator
) -> Tensor:
    size, device = config.batch_size, data.device
    rows = torch.randint(len(data), (size,), generator=random, device=device)
    sigma = (torch.arange(size, device=device) + torch.rand(size, generator=random, device=device)) / size
    hidden = torch.rand(size, generator=random, device=device) < config.label_drop
    classes = labels[rows].masked_fill(hidden, model.config["classes"])
    clean = data[rows]
    noise = torch.randn(clean.shape, generator=random, device=device)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    velocity = model(hidden_states=noisy, timestep=1000 * sigma, labels=classes, return_dict=False)[0]
    return F.mse_loss(velocity, noise - clean)


@contextmanager
def _fixed(config: PretrainConfig) -> Iterator[None]:
    """Seed the initial weights and fix the threads for a block; both are given back as they were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(config.seed, "pretrain", "weights"))
            yield
    finally:
        torch.set_num_threads(threads)


def _load(config: PretrainConfig) -> tuple[np.ndarray, np.ndarray]:
    try:
        data, labels = import_object(config.data)(config.count, config.seed, **config.data_args)
    except Exception as error:  # whatever a user's function does
        raise ConfigError(
            f"`pretrain.data`={config.data!r} must name a function of (count, seed, **data_args) that returns samples "
            f"and labels; it failed: {type(error).__name__}: {error}"
        ) from error
    return np.ascontiguousarray(data), np.ascontiguousarray(labels)


def _trained(
    data: np.ndarray,
    labels: np.ndarray,
    config: PretrainConfig,
    device: str | torch.device,
    progress: Progress | None,
) -> ConditionalFlowPipeline:
    try:
        return pretrain(data, labels, config, device=device, progress=progress)
    except ValueError as error:
        raise ConfigError(f"`pretrain`: {error}") from error


def _key(config: PretrainConfig, data: np.ndarray, labels: np.ndarray) -> str:
    described = {"format": FORMAT, "config": asdict(config), "shape": data.shape, "dtype": str(data.dtype)}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update(data.tobytes())
    digest.update(labels.astype(np.int64).tobytes())
    return digest.hexdigest()[:20]


def _write(pipeline: ConditionalFlowPipeline, target: Path) -> None:
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed; we hold the lock
    try:
        pipeline.save_pretrained(temporary)
        share_as_umask_says(temporary / "transformer")
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        for path in files:
            sync_file(path)
        sums = {path.relative_to(temporary).as_posix(): file_sha256(path) for path in files}
        write_durable(temporary / _SUMS, json.dumps(sums, indent=1))
        temporary.replace(target)
        sync_directory(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _damage(folder: Path) -> str | None:
    """Say what is wrong with a kept generator, or None."""
    try:
        sums: dict[str, Any] = json.loads((folder / _SUMS).read_text(encoding="utf-8"))
        wrong = [name for name, known in sums.items() if file_sha256(folder / name) != known]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{wrong[0]} has changed" if wrong else None


def _read(folder: Path) -> ConditionalFlowPipeline:
    bar = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()  # of three small files
    try:
        # Mapped into memory, the weights would change with the file.
        return ConditionalFlowPipeline.from_pretrained(folder, disable_mmap=True)
    finally:
        if bar:
            diffusers_logging.enable_progress_bar()
