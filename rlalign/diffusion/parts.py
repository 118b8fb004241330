"""Build a trainer's parts from its settings and arguments, and refuse what cannot work before anything is sampled."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from rlalign.config import ConfigError, dump
from rlalign.config_keywords import Forms, config_from_keywords
from rlalign.diffusion.config import DiffusionConfig, PipelineConfig
from rlalign.diffusion.evaluation import SampleEvaluator
from rlalign.diffusion.policy import TunedPipeline
from rlalign.diffusion.prompts import Prompts, read_prompts
from rlalign.diffusion.rewards import Judge, load_object
from rlalign.training.distributed import leave_at_exit, sum_over_processes
from rlalign.training.seeding import seed_everything
from rlalign.training.session import Session

FORMS = Forms(
    words={"advantage": "type", "sde": "kind"}, switches=("lora", "average"), first=("rollout", "data", "optim")
)
"""What callers of a trainer may write short."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a trainer is made of."""

    tuned: TunedPipeline
    prompts: Prompts
    judge: Judge
    evaluator: SampleEvaluator
    session: Session
    accelerator: Accelerator


@contextmanager
def parts_of(
    cfg: DiffusionConfig,
    *,
    pipeline: Any,
    prompts: Sequence[Any] | None,
    reward: Any,
    total: int,
    run_dir: str | Path | None,
    config_text: str | None,
) -> Iterator[Parts]:
    """Build them for the block that makes a trainer of them; if it fails, the pipeline is left as it came.

    Judge first (cheap to refuse), then the generator, then what is generated from.
    """
    seed_everything(cfg.seed)
    session = _session(cfg, run_dir, config_text, total=total, scripted=pipeline is not None)
    reward = reward if reward is not None else cfg.reward
    if reward is None:
        raise ConfigError("there is no reward: pass `reward`, or set `reward.function` in the config.")
    judge = Judge(reward, cfg.reward, errors_dir=session.path / "errors")
    if not isinstance(pipeline, DiffusionPipeline):
        pipeline = _loaded(pipeline, cfg)
    works_on = pipeline._execution_device  # with CPU offload, not where its weights are at the moment
    accelerator = Accelerator(cpu=works_on.type == "cpu", **cfg.accelerate)
    leave_at_exit(accelerator)
    if accelerator.num_processes > 1 and works_on == pipeline.device:
        pipeline.to(accelerator.device)
    rows = Prompts.of(prompts if prompts is not None else read_prompts(cfg.prompts), pipeline)
    rows.require_fit(pipeline, cfg.pipeline.call)
    session.join(
        main=accelerator.is_main_process,
        anywhere=lambda flag: sum_over_processes({"flag": float(flag)}, accelerator)["flag"] > 0,
    )
    with ExitStack() as failed:
        tuned = TunedPipeline(pipeline, cfg)
        failed.callback(tuned.release)
        yield Parts(
            tuned=tuned,
            prompts=rows,
            judge=judge,
            evaluator=SampleEvaluator(tuned, rows, judge, cfg, session, accelerator),
            session=session,
            accelerator=accelerator,
        )
        failed.pop_all()


def config_of(cls: type, config: Any, settings: dict[str, Any]) -> Any:
    """The config that a caller described: an object, or keyword arguments in short form.

    Raises:
        ConfigError: Both were given, or a keyword is unknown.
    """
    if config is not None and settings:
        raise ConfigError(f"give `config` or single settings, not both: {', '.join(settings)}.")
    return config if config is not None else config_from_keywords(cls, settings, FORMS)


def load_pipeline(source: str | None, cfg: PipelineConfig, *, full: bool = False) -> DiffusionPipeline:
    """Load a pipeline from the Hub or a directory, call the function that builds it, or pretrain it.

    Weights come from safetensors files only.

    Args:
        full: All weights will be trained, so `auto` is float32.

    Raises:
        ConfigError: Nothing names a pipeline, or what names one does not lead to one.
    """
    source = source or cfg.source
    device = _device(cfg.device)
    if cfg.pretrain is not None and source is None:
        from rlalign.diffusion.pretrain import cached_generator

        return cached_generator(cfg.pretrain, device=device).to(device)
    if source is None:
        raise ConfigError("there is no generator: pass a pipeline, or set `pipeline.source` or `pipeline.pretrain`.")
    if not Path(source).expanduser().exists() and ":" in source:
        built = load_object(source, "pipeline.source")()
        if not isinstance(built, DiffusionPipeline):
            raise ConfigError(f"`pipeline.source`={source} returned {type(built).__name__}, not a DiffusionPipeline.")
        return built.to(device)
    dtype = torch.float32 if full and cfg.dtype == "auto" else _dtype(cfg.dtype, device)
    try:
        loaded = DiffusionPipeline.from_pretrained(source, revision=cfg.revision, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"`pipeline.source`={source}: {error}") from error
    return loaded.to(device)


def _loaded(source: Any, cfg: DiffusionConfig) -> DiffusionPipeline:
    if source is not None and not isinstance(source, str | Path):
        raise ConfigError(
            f"`pipeline` must be a diffusers pipeline, a Hub id, a directory or `module:function`, got "
            f"{type(source).__name__}."
        )
    return load_pipeline(None if source is None else str(source), cfg.pipeline, full=cfg.lora is None)


def _device(name: str) -> str:
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(name: str, device: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    half = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if half else torch.float32


def _session(
    cfg: DiffusionConfig, run_dir: str | Path | None, config_text: str | None, *, total: int, scripted: bool
) -> Session:
    resolved = dump(cfg)
    session = Session(
        run_dir,
        name=cfg.method,
        config_text=config_text or f"# Started from Python.\n{json.dumps(resolved, indent=2)}\n",
        resolved=resolved,
        total_steps=total,
        save_every=cfg.checkpoint.every,
        keep=cfg.checkpoint.keep,
        trackers=tuple(cfg.log.trackers),
        project=cfg.log.project,
    )
    if scripted:
        session.resume_with = f"the same script with run_dir={str(session.path)!r} and fit(resume=True)"
    return session
