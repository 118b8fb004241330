"""The language-model trainer: sample groups, score them, estimate advantages, take policy-gradient steps."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlalign.advantages import build_estimator
from rlalign.buffers import Rollout, RolloutBuffer, TrainBatch
from rlalign.functional.masked import aggregate, aggregate_denominator
from rlalign.llm.assemble import build_parts
from rlalign.llm.collect import assemble_rollout, prompt_rows, row_uniforms, score_completions
from rlalign.llm.config import BNPOConfig, PolicyGradientConfig
from rlalign.llm.data import encode_prompt
from rlalign.llm.memory import MemoryAdvice
from rlalign.llm.objectives import engine_weights, kl_penalty, penalised, policy_objective
from rlalign.llm.packing import Layout, token_count
from rlalign.llm.step_metrics import StepMetrics
from rlalign.optim.step import finite_step, load_optimizer, set_learning_rate
from rlalign.training.distributed import gather_json, gather_rollout, own_share
from rlalign.training.schedules import lr_scale
from rlalign.training.seeding import generator, rng_state, set_rng_state


class PolicyGradientTrainer:
    """Policy-gradient fine-tuning of a causal language model: any estimator x objective x aggregation.

    One step: `collect` a rollout, let `estimator` turn it into a batch, `update` on each of its minibatches. The
    random numbers of a step are a function of (seed, step), so a run killed anywhere continues bit for bit (on CPU)
    from its last checkpoint.

    Args:
        model: A Hub id, directory, `.gguf` file or `smollm2-135m`; a `ModelConfig`; or a loaded model with `tokenizer`.
        reward_funcs: TRL-style functions, or strings that name them; one or several.
        train_dataset: Rows with a `prompt` (text or messages); other columns become reward arguments.
        config: All settings. Its `model`, `data`, `rewards` and `peft` serve YAML runs; arguments win over them.
        eval_dataset: Held-out rows; evaluated before, during and after training.
        peft_config: Trains an adapter; without it all weights are trained.
        run_dir: Where files go; by default `runs/<method>`, with a number when that exists.
        callback: Called after every step with the step's number and metrics.

    Raises:
        ConfigError: Settings contradict each other, or a model, dataset or reward cannot be used; before any training.

    Example:
        ```python
        trainer = BNPOTrainer("smollm2-135m", reward, rows, BNPOConfig(total_steps=60))
        trainer.fit()
        trainer.save_model("my-model")
        ```
    """

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        train_dataset: Any,
        config: PolicyGradientConfig,
        *,
        eval_dataset: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        run_dir: str | Path | None = None,
        config_text: str | None = None,
        callback: Callable[[int, Mapping[str, float]], None] | None = None,
    ):
        self.config, self.callback = config, callback
        parts = build_parts(
            config,
            model=model,
            reward_funcs=reward_funcs,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tokenizer=tokenizer,
            peft_config=peft_config,
            run_dir=run_dir,
            config_text=config_text,
        )
        self.policy, self.accelerator, self.tokenizer = parts.policy, parts.policy.accelerator, parts.policy.tokenizer
        self.train_data, self.guard, self.session = parts.train_data, parts.guard, parts.session
        self.evaluator, self.optimizer, self.budget = parts.evaluator, parts.optimizer, parts.budget
        weights = {function.name: function.weight for function in self.guard.functions}
        self.estimator = build_estimator(config.advantage, part_weights=weights)
        self.watch, self.notes = parts.watch, parts.notes
        self.buffer, self.metrics = RolloutBuffer(), StepMetrics(self.accelerator)
        self.memory = MemoryAdvice(config, processes=self.accelerator.num_processes)
        self.step, self.updates = 0, 0

    def fit(self, *, resume: bool = False) -> "PolicyGradientTrainer":
        """Train to `total_steps`; see `steps`."""
        for _ in self.steps(resume=resume):
            pass
        return self

    def steps(self, *, resume: bool = False) -> Iterator[dict[str, float]]:
        """Train step by step, yielding each step's metrics, for code of yours that looks or acts in between.

        Args:
            resume: Continue from the newest intact checkpoint of `run_dir`; from the start when there is none yet.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the step was finished and saved.
            RewardError: A reward function failed beyond its budget.
            TrainingDiverged: Gradients stayed NaN or infinite beyond `optim.nonfinite_budget`.
        """
        self.policy.engine.prepare()
        with self.session.open(self, resume=resume) as journal:
            journal.notes(self.notes)
            self.evaluator.before(journal)
            self.session.stop_if_asked(self)
            while self.step < self.config.total_steps and not self.finished:
                self.metrics.begin()
                self.buffer.add(self.collect())
                batch = self.estimator(self.buffer.drain())
                for minibatch in self.minibatches(batch):
                    self.update(minibatch)
                self.step += 1
                yield self.record(batch)
                self.evaluator.during(self.step, journal)
                self.session.after_step(self)
            self.evaluator.after(self.step, journal)
            self.session.finish(self)

    def collect(self) -> Rollout:
        """Sample a group of completions for each prompt of the step, score them, and gather over processes."""
        cfg, seed = self.config.rollout, self.config.seed
        rows = prompt_rows(self.step, count=cfg.prompts_per_step, dataset_size=len(self.train_data), seed=seed)
        share = len(rows) // self.accelerator.num_processes
        first = share * self.accelerator.process_index
        mine = rows[first : first + share]
        prompts = [encode_prompt(self.train_data[row]["prompt"], self.tokenizer) for row in mine]
        time, places = cfg.max_completion_tokens, range(first, first + share)
        with self.metrics.clock("generate"), self.memory("generate"):
            generations = self.policy.sample(
                prompts,
                group_size=cfg.group_size,
                max_new_tokens=time,
                temperature=cfg.temperature,
                decode_rows=cfg.decode_rows,
                uniforms=row_uniforms(self.step, places, group_size=cfg.group_size, time=time, seed=seed),
            )
        with self.metrics.clock("reward"):
            per_completion = [row for row in mine for _ in range(cfg.group_size)]
            scored = score_completions(
                self.guard, self.train_data, per_completion, generations, self.tokenizer, step=self.step
            )
        self.metrics.collected(generations, scored)
        rollout = assemble_rollout(
            generations,
            scored,
            prompt_tokens=prompts,
            prompt_ids=mine,
            first_group=self.step * cfg.prompts_per_step + first,
            group_size=cfg.group_size,
            mask_truncated=cfg.mask_truncated,
        )
        with self.metrics.clock("score"):
            with self.memory("score", tokens=token_count(rollout)):
                rollout = self.policy.complete(rollout)
            if "baseline_reward" in self.estimator.needs:
                rollout = self.with_greedy_baseline(rollout, mine, prompts)
            rollout = gather_rollout(rollout, self.accelerator)
        self.metrics.rewarded(rollout, self.config.advantage)
        return penalised(rollout, self.config.kl)

    def with_greedy_baseline(self, rollout: Rollout, rows: list[int], prompts: list[list[int]]) -> Rollout:
        """Add the outcome of each prompt's most probable completion (ReMax); without one its group is not scored."""
        cfg = self.config.rollout
        time, rows_at_once = cfg.max_completion_tokens, cfg.decode_rows
        with self.memory("generate"):
            greedy = self.policy.generate(
                prompts, group_size=1, max_new_tokens=time, temperature=0.0, decode_rows=rows_at_once
            )
        scored = score_completions(self.guard, self.train_data, rows, greedy, self.tokenizer, step=self.step)
        outcome = scored.outcome.float().repeat_interleave(cfg.group_size)
        known = scored.scored.repeat_interleave(cfg.group_size)
        return replace(rollout, baseline_reward=outcome, scored=rollout.scored & known)

    def minibatches(self, batch: TrainBatch) -> Iterator[TrainBatch]:
        """Whole groups, dealt anew in every pass over the rollout."""
        cfg = self.config.optim
        for epoch in range(cfg.update_epochs):
            order = generator(self.config.seed, "minibatches", self.step, epoch)
            yield from batch.minibatches(batch.batch_size // cfg.minibatches, order, keep_groups=True)

    def update(self, batch: TrainBatch) -> None:
        """One optimizer step on a minibatch, in micro-batches of at most `optim.micro_batch_tokens`."""
        tokens = token_count(batch) // self.accelerator.num_processes
        with self.metrics.clock("train"), self.memory("train", tokens=tokens):
            learnable = self.with_signal(batch)
            self.metrics.skipped += len(batch.group.unique()) - len(learnable.group.unique())
            denominator = self.denominator(batch if self.config.denominator == "all" else learnable)
            if not learnable.mask.any() or not (self.regularised or learnable.advantages.any()):
                return  # no gradient: neither the optimizer (its momentum would) nor its schedule moves
            whole = self.config.aggregation == "group"
            shares = self.policy.shares(learnable, whole_groups=whole)
            learnable = learnable.to(self.accelerator.device)
            for index, (layout, share) in enumerate(shares):
                with self.policy.synchronising(last=index == len(shares) - 1):
                    # Without a share the pass only answers the other processes' gradients; it counts for nothing.
                    loss = self.loss(learnable, layout, denominator) if share else self.policy.forward(layout)[0].sum()
                    self.accelerator.backward(share * loss)
            self.take_step()

    def loss(self, batch: TrainBatch, layout: Layout, denominator: int) -> Float[Tensor, ""]:
        """The share of a minibatch's loss that the decisions of one micro-batch contribute."""
        shape = (batch.batch_size, batch.time)
        log_prob, entropy = (layout.scatter(values, shape) for values in self.policy.forward(layout))
        here = layout.scatter(torch.ones_like(layout.target, dtype=log_prob.dtype), shape) > 0
        objective, weights = self.objective(batch, log_prob, entropy, here)
        return aggregate(
            objective, here, weights=weights, mode=self.config.aggregation, group=batch.group, denominator=denominator
        )

    def objective(
        self,
        batch: TrainBatch,
        log_prob: Float[Tensor, "batch time"],
        entropy: Float[Tensor, "batch time"],
        here: Bool[Tensor, "batch time"],
    ) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
        """What every decision wants minimised, and its weight.

        With one update per rollout the policy is still the one that sampled, so its own detached log-probabilities
        are the old ones: the ratio is exactly 1 and no forward pass is spent on it.
        """
        cfg = self.config
        old = log_prob.detach() if self.on_policy else batch.log_prob_old
        objective = policy_objective(cfg.objective, log_prob, old, batch.advantages, here)
        if cfg.kl.coef and cfg.kl.where == "loss":
            assert batch.log_prob_ref is not None
            objective = objective + cfg.kl.coef * kl_penalty(cfg.kl, log_prob, batch.log_prob_ref)
        if cfg.entropy_coef:
            objective = objective - cfg.entropy_coef * entropy
        weights = batch.weights
        if batch.log_prob_engine is not None:
            weights = weights * engine_weights(cfg.correction, old, batch.log_prob_engine, here)
        self.metrics.scored(cfg, batch, log_prob.detach(), old, entropy.detach(), here)
        return objective, weights

    def take_step(self) -> None:
        """Clip, check and apply the gradient at the scheduled learning rate."""
        cfg = self.config.optim
        total = self.config.total_steps * cfg.updates_per_rollout
        scale = lr_scale(
            self.updates, warmup_steps=min(cfg.warmup_steps, total), total_steps=total, schedule=cfg.schedule
        )
        set_learning_rate(self.optimizer, cfg.learning_rate * scale)
        norm = finite_step(
            self.optimizer,
            self.policy.scorer.named_parameters(),
            max_grad_norm=cfg.max_grad_norm,
            budget=self.budget,
            clip=self.policy.sharded_clip,
        )
        self.metrics.stepped(norm, cfg.learning_rate * scale)
        self.updates += 1

    def with_signal(self, batch: TrainBatch) -> TrainBatch:
        """Drop rollouts whose group has no advantage other than zero, where that cannot change the gradient."""
        cfg = self.config
        if self.regularised or not (cfg.skip_without_signal or cfg.denominator == "signal"):
            return batch
        live = batch.group[(batch.advantages != 0).any(1)].unique()
        return batch.select(torch.isin(batch.group, live))

    def denominator(self, batch: TrainBatch) -> int:
        """What the loss of one optimizer step divides by, counted over all processes and all its micro-batches."""
        if self.config.aggregation == "constant":
            return batch.batch_size * self.config.rollout.max_completion_tokens
        return aggregate_denominator(batch.mask, mode=self.config.aggregation, group=batch.group)

    @property
    def regularised(self) -> bool:
        """The loss has terms beside the advantages, so rollouts without signal have a gradient too."""
        return (self.config.kl.coef > 0 and self.config.kl.where == "loss") or self.config.entropy_coef != 0

    @property
    def on_policy(self) -> bool:
        """Every rollout is used for exactly one update."""
        return self.config.optim.updates_per_rollout == 1

    @property
    def finished(self) -> bool:
        """Stopped early: `eval.patience` evaluations brought nothing better."""
        return self.evaluator.out_of_patience

    def record(self, batch: TrainBatch) -> dict[str, float]:
        """Log the finished step, and hand its metrics on."""
        metrics = self.metrics.finish(self.config, batch, self.estimator.metrics)
        journal = self.session.journal
        journal.train(self.step, metrics)
        if self.config.log.samples_every and self.step % self.config.log.samples_every == 0:
            journal.samples(f"step-{self.step:06d}", self.metrics.sample_rows(self.step, batch, self.config.log))
        journal.notes(self.policy.new_notes())
        try:
            journal.notes(self.metrics.watch(self.watch, self.step, batch))
            if self.callback is not None:
                self.callback(self.step, metrics)
        except Exception as error:  # the step is whole, so it is saved before the watch, or code of yours, ends the run
            self.session.stop_with(error)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Score the current weights on the held-out data: mean reward, standard error, count, each function's mean."""
        return self.evaluator.run()[0]

    def save_model(self, path: str | Path) -> None:
        """Write weights (or the adapter) and tokenizer so that plain `transformers` (or `peft`) loads them."""
        self.policy.save(path)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "model": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": {
                "step": self.step,
                "updates": self.updates,
                "budget": self.budget.state_dict(),
                "estimator": self.estimator.state_dict(),
                "evaluator": self.evaluator.state_dict(),
                # Each process counts the failures of its own rows.
                "guard": gather_json(self.guard.state_dict(), self.accelerator),
                "watch": self.watch.state_dict(),
            },
            "buffer": self.buffer.state_dict(),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` took."""
        trainer = state["trainer"]
        self.policy.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.step, self.updates = trainer["step"], trainer["updates"]
        for name in ("budget", "estimator", "evaluator", "watch"):
            vars(self)[name].load_state_dict(trainer[name])
        self.guard.load_state_dict(own_share(trainer["guard"], self.accelerator))
        self.buffer.load_state_dict(state["buffer"])
        set_rng_state(state["rng"])


class BNPOTrainer(PolicyGradientTrainer):
    """Beta Normalization Policy Optimization (arXiv:2506.02864): `PolicyGradientTrainer` with the paper's settings."""

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        train_dataset: Any,
        config: BNPOConfig | None = None,
        *,
        eval_dataset: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        run_dir: str | Path | None = None,
        callback: Callable[[int, Mapping[str, float]], None] | None = None,
    ):
        super().__init__(
            model,
            reward_funcs,
            train_dataset,
            config or BNPOConfig(),
            eval_dataset=eval_dataset,
            tokenizer=tokenizer,
            peft_config=peft_config,
            run_dir=run_dir,
            callback=callback,
        )
