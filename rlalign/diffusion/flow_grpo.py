"""Flow-GRPO, GRPO-Guard and DDPO: policy gradients on the denoising steps of a generator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.advantages import build_estimator
from rlalign.buffers import Rollout, RolloutBuffer, TrainBatch
from rlalign.diffusion.collect import Drawn, assemble, draw, require_weights, sampler_of
from rlalign.diffusion.config import FlowGRPOConfig
from rlalign.diffusion.consistency import check_flow_grpo
from rlalign.diffusion.parity import require_parity
from rlalign.diffusion.parts import config_of, parts_of
from rlalign.diffusion.policy import COMPARE_EVERY
from rlalign.diffusion.saturation import Saturation
from rlalign.diffusion.step_metrics import StepMetrics
from rlalign.diffusion.step_objective import clips, kl_to, step_log_ratio, step_weights, surrogate
from rlalign.diffusion.trajectory import StepScore, Trajectory
from rlalign.diffusion.tuning import Tuning
from rlalign.functional.masked import aggregate
from rlalign.training.distributed import gather_rollout
from rlalign.training.seeding import generator, rng_state, set_rng_state


class FlowGRPOTrainer:
    """Fine-tune any diffusers pipeline with a reward on its samples, by the probabilities of its denoising steps.

    One step: `collect` a rollout, let `estimator` turn it into a batch, `update` on each of its minibatches. The random
    numbers of a step are a function of (seed, step), so a run killed anywhere continues bit for bit (on CPU).

    Args:
        pipeline: A loaded diffusers pipeline, used as it is; or a Hub id, a directory, `module:function`.
        prompts: Texts, class labels, or mappings of call arguments and columns for the reward.
        reward: `f(samples, prompts, **columns)`, a number per sample (None where it cannot judge), or a `Simulator`.
        config: All settings; or single ones by name, such as `group_size=16`, `advantage="beta_normalized"`, or `call`
            for arguments of every call of the pipeline.
        guard: True turns on both of GRPO-Guard's corrections, False turns both off; None leaves them to the settings.
        run_dir: Where files go; by default `runs/flow_grpo`, with a number when that exists.
        callback: Called after every step with the step's number and metrics.

    Raises:
        ConfigError: Settings contradict each other or do not fit the pipeline; before anything is sampled.

    Example:
        ```python
        trainer = FlowGRPOTrainer(pipeline, ["a red cube on a table"], reward, guard=True)
        trainer.fit()
        trainer.save_lora("lora/")
        ```
    """

    def __init__(
        self,
        pipeline: Any = None,
        prompts: Sequence[Any] | None = None,
        reward: Any = None,
        config: FlowGRPOConfig | None = None,
        *,
        guard: bool | None = None,
        run_dir: str | Path | None = None,
        config_text: str | None = None,
        callback: Callable[[int, Mapping[str, float]], None] | None = None,
        **settings: Any,
    ):
        cfg = config_of(FlowGRPOConfig, config, settings)
        if guard is not None:
            cfg = replace(cfg, objective=replace(cfg.objective, ratio_norm=guard, reweight=guard))
        check_flow_grpo(cfg)  # before a large model is loaded
        self.config, self.callback = cfg, callback
        with parts_of(
            cfg,
            pipeline=pipeline,
            prompts=prompts,
            reward=reward,
            total=cfg.total_steps,
            run_dir=run_dir,
            config_text=config_text,
        ) as parts:
            self.tuned, self.prompts, self.judge = parts.tuned, parts.prompts, parts.judge
            self.evaluator, self.session, self.accelerator = parts.evaluator, parts.session, parts.accelerator
            check_flow_grpo(cfg, processes=self.accelerator.num_processes, simulator=self.judge.simulator is not None)
            self.sampler = sampler_of(self.tuned.pipeline, cfg.rollout)
            updates = cfg.total_steps * cfg.optim.update_epochs * cfg.optim.minibatches
            self.estimator, self.buffer = build_estimator(cfg.advantage), RolloutBuffer()
            self.tuning = Tuning(self.tuned, cfg.optim, total=updates, accelerator=self.accelerator)
            self.saturation = Saturation(self.judge, cfg.stop_without_signal, graded=self.graded)
        self.metrics = StepMetrics(self.accelerator)
        self.drawn: Drawn | None = None
        self.step = 0

    def fit(self, *, resume: bool = False) -> "FlowGRPOTrainer":
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
            RewardError: The reward failed beyond its budget.
            TrainingDiverged: Gradients stayed NaN or infinite beyond `optim.nonfinite_budget`.
        """
        with self.session.open(self, resume=resume) as journal:
            self.evaluator.before(journal)
            while self.step < self.config.total_steps and not self.finished:
                self.metrics.begin()
                self.buffer.add(self.collect())
                batch = self.weighted(self.estimator(self.buffer.drain()))
                for minibatch in self.minibatches(batch):
                    self.update(minibatch)
                self.step += 1
                yield self.record(batch)
                self.evaluator.during(self.step, journal)
                self.session.after_step(self)
            self.evaluator.after(self.step, journal)
            journal.notes([str(reason) for reason in (self.saturation.ended, self.evaluator.limit) if reason])
            self.session.finish(self)

    def collect(self) -> Rollout:
        """Sample a group for each prompt of the step, judge the samples, and gather the facts over processes."""
        cfg = self.config
        with self.metrics.clock("sample"), self.tuned.folded():
            self.drawn = draw(
                self.sampler,
                self.prompts,
                cfg.rollout,
                cfg.pipeline.call,
                step=self.step,
                seed=cfg.seed,
                accelerator=self.accelerator,
            )
        if self.step == 0:
            self.session.journal.notes(require_parity(self.sampler, self.drawn, cfg.objective))
        with self.metrics.clock("reward"):
            indices = self.drawn.indices
            judged = self.judge(self.drawn.samples, self.prompts.texts(indices), self.prompts.columns(indices))
        require_weights(cfg.advantage, judged.parts)
        rollout = assemble(self.drawn, judged, process=self.accelerator.process_index)
        rollout = gather_rollout(rollout, self.accelerator)
        self.metrics.collected(self.drawn, rollout)
        return rollout

    def weighted(self, batch: TrainBatch) -> TrainBatch:
        """Bound the advantages, and give each denoising step Guard's weight."""
        cfg = self.config.objective
        advantages = batch.advantages
        if cfg.advantage_clip is not None:
            advantages = advantages.clamp(-cfg.advantage_clip, cfg.advantage_clip)
        assert self.drawn is not None
        weights = step_weights(cfg, self.drawn.trajectories[0])[:1].expand(batch.batch_size, -1)
        return replace(batch, advantages=advantages, weights=batch.weights * weights.to(batch.weights.dtype))

    def minibatches(self, batch: TrainBatch) -> Iterator[TrainBatch]:
        """Whole groups, dealt anew in every pass over the rollout."""
        cfg = self.config.optim
        for epoch in range(cfg.update_epochs):
            order = generator(self.config.seed, "minibatches", self.step, epoch)
            yield from batch.minibatches(batch.batch_size // cfg.minibatches, order, keep_groups=True)

    def update(self, batch: TrainBatch) -> None:
        """One optimizer step on a minibatch, in micro-batches of at most `optim.micro_batch` decisions."""
        with self.metrics.clock("train"):
            learnable = self.with_signal(batch)
            if not learnable.mask.any():
                return  # no gradient: neither the optimizer (its momentum would) nor its schedule moves
            denominator = int(batch.mask.sum())
            for piece, rows, steps, at in self.micro_batches(learnable):
                self.loss(learnable, piece, rows, steps, at, denominator).backward()
            norm, rate = self.tuning.take_step()
            self.metrics.stepped(norm, rate)

    def loss(
        self, batch: TrainBatch, piece: Trajectory, rows: Tensor, steps: Tensor, at: Tensor, denominator: int
    ) -> Float[Tensor, ""]:
        """The share of a minibatch's loss that some of its decisions contribute.

        Args:
            piece: What recorded them.
            rows: Their samples, as rows of `piece`.
            steps: Their denoising steps.
            at: Their samples, as rows of `batch`.
        """
        cfg = self.config.objective
        reference = self.reference(piece, rows, steps)  # first: a copied one swaps weights that a graph would hold
        with self.tuned.folded():
            new = self.sampler.replay(piece, rows, steps)
        log_ratio, device = step_log_ratio(cfg, new, piece, rows, steps), new.log_prob.device
        advantages, weights = (values[at, steps].to(log_ratio) for values in (batch.advantages, batch.weights))
        objective = weights * surrogate(cfg, log_ratio, advantages, piece.dimensions)
        if reference is not None:
            kl = kl_to(new, reference)
            self.metrics.penalised(kl)
            objective = objective + cfg.kl_coef * kl
        self.metrics.scored(log_ratio, advantages, steps, clips(cfg, piece.dimensions))
        real = torch.ones(len(objective), 1, dtype=torch.bool, device=device)
        return aggregate(objective[:, None], real, mode="token", denominator=denominator)

    def reference(self, piece: Trajectory, rows: Tensor, steps: Tensor) -> StepScore | None:
        """The same decisions under the generator as it came, where the loss has a KL penalty."""
        if not self.config.objective.kl_coef:
            return None
        with torch.no_grad(), self.tuned.reference():
            return self.sampler.replay(piece, rows, steps)

    def micro_batches(self, batch: TrainBatch) -> Iterator[tuple[Trajectory, Tensor, Tensor, Tensor]]:
        """This process's real decisions, in pieces: trajectory, rows in it, denoising steps, rows in `batch`."""
        assert self.drawn is not None
        mine = (batch.inputs["process"].value == self.accelerator.process_index).nonzero().squeeze(1)
        places = batch.inputs["place"].value[mine]
        for piece, rows, here in self.drawn.locate(places):
            at = mine[here]
            which, steps = batch.mask[at].nonzero(as_tuple=True)
            size = self.config.optim.micro_batch
            for part in torch.arange(len(which)).split(size):
                yield piece, rows[which[part]], steps[part], at[which[part]]

    def with_signal(self, batch: TrainBatch) -> TrainBatch:
        """Drop groups in which no advantage differs from zero, where that cannot change the gradient."""
        if self.config.objective.kl_coef:
            return batch
        live = batch.group[(batch.advantages != 0).any(1)].unique()
        return batch.select(torch.isin(batch.group, live))

    @property
    def graded(self) -> str | None:
        return None if self.config.reward is None else self.config.reward.graded

    @property
    def finished(self) -> bool:
        """Stopped early: the reward is saturated, or a metric has passed its limit."""
        return bool(self.saturation.ended) or self.evaluator.limit is not None

    def norm_ratio(self) -> float:
        """`TunedPipeline.norm_ratio` on decisions of the last rollout, spread over its samples and steps."""
        assert self.drawn is not None
        piece = self.drawn.trajectories[0]
        rows, steps = piece.scored.nonzero(as_tuple=True)
        some = torch.arange(0, len(rows), -(-len(rows) // self.config.optim.micro_batch))
        return self.tuned.norm_ratio(lambda: self.sampler.replay(piece, rows[some], steps[some]).prediction)

    def record(self, batch: TrainBatch) -> dict[str, float]:
        """Log the finished step, and hand its metrics on."""
        metrics = self.metrics.finish(batch, self.estimator.metrics)
        metrics["policy/weight_distance"] = self.tuned.distance()
        if self.step % COMPARE_EVERY == 1:
            metrics["policy/norm_ratio"] = self.norm_ratio()
        journal = self.session.journal
        journal.train(self.step, metrics)
        journal.notes(self.saturation.update(self.step, metrics))
        try:
            if self.callback is not None:
                self.callback(self.step, metrics)
        except Exception as error:  # the step is whole, so it is saved before code of yours ends the run
            self.session.stop_with(error)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Generate held-out samples without noise in the steps, and judge them by every outcome."""
        return self.evaluator.run()[0]

    def save_lora(self, path: str | Path) -> None:
        """Write the adapter as plain diffusers loads it; without one, the whole pipeline. The first process writes."""
        if self.accelerator.is_main_process:
            self.tuned.save(path)

    save_model = save_lora
    """What a session calls at the end of a run."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on."""
        return {
            "model": self.tuned.state_dict(),
            "optimizer": self.tuning.state_dict(),
            "trainer": {
                "step": self.step,
                "estimator": self.estimator.state_dict(),
                "evaluator": self.evaluator.state_dict(),
                "judge": self.judge.state_dict(),
                "saturation": self.saturation.state_dict(),
            },
            "buffer": self.buffer.state_dict(),
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` took."""
        trainer = state["trainer"]
        self.tuned.load_state_dict(state["model"])
        self.tuning.load_state_dict(state["optimizer"])
        self.step = trainer["step"]
        for name in ("estimator", "evaluator", "judge", "saturation"):
            vars(self)[name].load_state_dict(trainer[name])
        self.buffer.load_state_dict(state["buffer"])
        set_rng_state(state["rng"])
