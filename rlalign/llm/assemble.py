"""Build a trainer's parts from its settings and arguments, and refuse what cannot work before anything is sampled."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from rlalign.config import dump
from rlalign.llm.config import BaselineConfig, GuardConfig, OptimConfig, PolicyGradientConfig
from rlalign.llm.consistency import check_consistency
from rlalign.llm.data import Prompts, load_prompts
from rlalign.llm.data_lint import check_prompts
from rlalign.llm.evaluation import Baseline, Evaluator
from rlalign.llm.policy import Policy
from rlalign.llm.rewards import resolve_rewards
from rlalign.llm.scoring import base_model
from rlalign.optim.step import SkipBudget, adamw
from rlalign.training.distributed import sum_over_processes
from rlalign.training.guard import RewardGuard
from rlalign.training.no_signal import SignalWatch
from rlalign.training.seeding import seed_everything
from rlalign.training.session import Session


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a trainer is made of."""

    policy: Policy
    train_data: Prompts
    guard: RewardGuard
    evaluator: Evaluator
    optimizer: torch.optim.Optimizer
    session: Session
    budget: SkipBudget
    watch: SignalWatch
    notes: list[str]
    """Said once, when training begins."""


def build_parts(
    cfg: PolicyGradientConfig,
    *,
    model: Any,
    reward_funcs: Any,
    train_dataset: Any,
    eval_dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    run_dir: str | Path | None,
    config_text: str | None,
) -> Parts:
    """Datasets first (cheap to refuse), then the reward workers (they start while the model loads), then the model."""
    adapter = peft_config is not None
    check_consistency(cfg, adapter=adapter)
    seed_everything(cfg.seed)
    train = _prompts(train_dataset, cfg, "train_dataset")
    held_out = None if eval_dataset is None else _prompts(eval_dataset, cfg, "eval_dataset")
    session = _session(cfg, run_dir, config_text)
    errors = session.path / "errors"
    guard = _guard(reward_funcs, cfg.guard, errors)
    metrics = _guard(cfg.eval.metrics, cfg.guard, errors) if cfg.eval.metrics else guard
    policy = Policy.build(model, tokenizer, cfg, peft_config)
    weights = [function.weight for function in guard.functions]
    notes = check_consistency(cfg, processes=policy.accelerator.num_processes, weights=weights, adapter=adapter)
    notes += [*policy.new_notes(), *_data_notes(cfg, policy, train, held_out), *_context_notes(cfg, policy)]
    guard.prepare(train.reward_columns)
    if held_out is not None:
        metrics.prepare(held_out.reward_columns)
    session.join(
        main=policy.accelerator.is_main_process,
        anywhere=lambda flag: sum_over_processes({"flag": float(flag)}, policy.accelerator)["flag"] > 0,
    )
    optimizer = _optimizer(policy, cfg.optim)
    baselines = [_baseline(asked, number, cfg, errors) for number, asked in enumerate(cfg.eval.baselines)]
    return Parts(
        policy=policy,
        train_data=train,
        guard=guard,
        evaluator=Evaluator(policy, held_out, metrics, cfg, session, baselines=baselines),
        optimizer=optimizer,
        session=session,
        budget=SkipBudget(limit=cfg.optim.nonfinite_budget),
        watch=SignalWatch(patience=5, stop_after=cfg.stop_without_signal),
        notes=notes,
    )


def _data_notes(cfg: PolicyGradientConfig, policy: Policy, train: Prompts, held_out: Prompts | None) -> list[str]:
    limit = cfg.rollout.max_prompt_tokens
    notes = check_prompts(train, held_out=held_out, tokenizer=policy.tokenizer, max_prompt_tokens=limit)
    if held_out is not None:
        notes += check_prompts(held_out, tokenizer=policy.tokenizer, max_prompt_tokens=limit)
    return notes


def _context_notes(cfg: PolicyGradientConfig, policy: Policy) -> list[str]:
    model = base_model(policy.model).config.get_text_config().to_dict()
    window, longest = model.get("max_position_embeddings"), cfg.rollout.max_completion_tokens
    if window is None or longest < window:
        return []
    return [
        f"`rollout.max_completion_tokens`={longest} leaves no room for a prompt in the model's context of {window} "
        "tokens: long completions will leave what it was trained on"
    ]


def _optimizer(policy: Policy, cfg: OptimConfig) -> torch.optim.Optimizer:
    return adamw(
        policy.scorer.named_parameters(),
        learning_rate=cfg.learning_rate,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
    )


def _prompts(source: Any, cfg: PolicyGradientConfig, name: str) -> Prompts:
    template = cfg.data.template if cfg.data else None
    system_prompt = cfg.data.system_prompt if cfg.data else None
    return load_prompts(source, name=name, template=template, system_prompt=system_prompt)


def _baseline(asked: BaselineConfig, number: int, cfg: PolicyGradientConfig, errors_dir: Path) -> Baseline:
    return Baseline(
        data=load_prompts(asked.data, name=f"eval.baselines.{number}.data"),
        guard=_guard(asked.metrics, cfg.guard, errors_dir) if asked.metrics else None,
        max_completion_tokens=asked.max_completion_tokens,
    )


def _guard(reward_funcs: Any, cfg: GuardConfig, errors_dir: Path) -> RewardGuard:
    return RewardGuard(
        resolve_rewards(reward_funcs),
        isolation=cfg.isolation,
        timeout_s=cfg.timeout_s,
        row_timeout_s=cfg.row_timeout_s,
        start_timeout_s=cfg.start_timeout_s,
        memory_limit_gb=cfg.memory_limit_gb,
        on_error=cfg.on_error,
        penalty=cfg.penalty,
        error_budget=cfg.error_budget,
        errors_dir=errors_dir,
    )


def _session(cfg: PolicyGradientConfig, run_dir: str | Path | None, config_text: str | None) -> Session:
    resolved: Mapping[str, Any] = dump(cfg)
    session = Session(
        run_dir,
        name=cfg.method,
        # A run started from Python has no file; JSON is YAML, and says where its model and data came from.
        config_text=config_text or f"# Started from Python.\n{json.dumps(resolved, indent=2)}\n",
        resolved=resolved,
        total_steps=cfg.total_steps,
        save_every=cfg.checkpoint.every,
        keep=cfg.checkpoint.keep,
        trackers=tuple(cfg.log.trackers),
        project=cfg.log.project,
    )
    if not (cfg.model and cfg.data and cfg.rewards):
        session.resume_with = f"the same script with run_dir={str(session.path)!r} and fit(resume=True)"
    return session
