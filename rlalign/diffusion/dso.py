"""DSO: fine-tune a generator on its own samples, judged by a simulator; by DPO, DRO, their safe forms, or SFT."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlalign.config import ConfigError
from rlalign.diffusion.conditions import Conditions
from rlalign.diffusion.config_dso import DSOConfig
from rlalign.diffusion.consistency import check_dso
from rlalign.diffusion.dso_metrics import DSOMetrics
from rlalign.diffusion.flow_error import Corruption, DenoisingError, draw_corruption
from rlalign.diffusion.pair_objective import WITH_REFERENCE, PairErrors, pair_objective
from rlalign.diffusion.pairs import Pairs, labels_of, told
from rlalign.diffusion.parts import config_of, parts_of
from rlalign.diffusion.policy import COMPARE_EVERY
from rlalign.diffusion.simulated import SimulatedSet, read_set, settings_of, simulate, write_set
from rlalign.diffusion.tuning import Tuning
from rlalign.training.seeding import derived_seed, rng_state, set_rng_state

Piece = tuple[Int[Tensor, "n two=2"], Corruption]
Reference = tuple[Float[Tensor, " n"], Float[Tensor, " n"]]
Side = Literal["win", "lose"]
SIDES: tuple[Side, ...] = ("win", "lose")
"""Columns of pairs."""


class DSOTrainer:
    """Fine-tune any diffusers pipeline so that its samples pass a simulation, without differentiating through it.

    A round draws samples from the current generator and has them judged; each of its updates takes pairs of a winner
    and a loser of the same prompt, puts noise on both, and compares the denoiser's errors. The reference is the
    generator as it came, in all rounds. The random numbers of an update are a function of (seed, update), so a run
    killed anywhere continues bit for bit (on CPU).

    Args:
        pipeline: A loaded diffusers pipeline, used as it is; or a Hub id, a directory, `module:function`.
        prompts: Texts, class labels, or mappings of call arguments and columns for the reward.
        simulator_or_reward: A `Simulator`, or `f(samples, prompts, **columns)` with a number per sample.
        config: All settings; or single ones by name, such as `kind="anchored_dro"`, or `call` for arguments of every
            call of the pipeline.
        run_dir: Where files go; by default `runs/dso`, with a number when that exists.
        callback: Called after every update with its number and metrics.

    Raises:
        ConfigError: Settings contradict each other or do not fit the pipeline; before anything is sampled.

    Example:
        ```python
        trainer = DSOTrainer(pipeline, ["table", "chair"], StabilitySimulator(), kind="anchored_dro")
        trainer.fit()
        trainer.save_lora("lora/")
        ```
    """

    def __init__(
        self,
        pipeline: Any = None,
        prompts: Sequence[Any] | None = None,
        simulator_or_reward: Any = None,
        config: DSOConfig | None = None,
        *,
        run_dir: str | Path | None = None,
        config_text: str | None = None,
        callback: Callable[[int, Mapping[str, float]], None] | None = None,
        **settings: Any,
    ):
        cfg = config_of(DSOConfig, config, settings)
        check_dso(cfg)  # before a large model is loaded
        self.config, self.callback = cfg, callback
        with parts_of(
            cfg,
            pipeline=pipeline,
            prompts=prompts,
            reward=simulator_or_reward,
            total=cfg.total_updates,
            run_dir=run_dir,
            config_text=config_text,
        ) as parts:
            self.tuned, self.prompts, self.judge = parts.tuned, parts.prompts, parts.judge
            self.evaluator, self.session, self.accelerator = parts.evaluator, parts.session, parts.accelerator
            check_dso(cfg, processes=self.accelerator.num_processes)
            self.tuning = Tuning(self.tuned, cfg.optim, total=cfg.total_updates, accelerator=self.accelerator)
            self.conditions = Conditions(
                self.tuned.pipeline, self.prompts, cfg.pipeline.call, batch_size=cfg.data.batch_size
            )
        self.error = DenoisingError(self.conditions)
        self.metrics = DSOMetrics(self.accelerator)
        self.data: SimulatedSet | None = None
        self.pairs: Pairs | None = None
        self.round, self.data_sha256, self.ended = -1, "", ""
        self.step = 0

    def fit(self, *, resume: bool = False) -> "DSOTrainer":
        """Train to `total_updates`; see `steps`."""
        for _ in self.steps(resume=resume):
            pass
        return self

    def steps(self, *, resume: bool = False) -> Iterator[dict[str, float]]:
        """Train update by update, yielding each one's metrics, for code of yours that looks or acts in between.

        Args:
            resume: Continue from the newest intact checkpoint of `run_dir`; from the start when there is none yet.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the update was finished and saved.
            RewardError: The simulator failed beyond its budget, or judged nothing of a batch.
            TrainingDiverged: Gradients stayed NaN or infinite beyond `optim.nonfinite_budget`.
            ConfigError: No prompt has both a winner and a loser in the first round.
        """
        with self.session.open(self, resume=resume) as journal:
            self.evaluator.before(journal)
            while self.step < self.config.total_updates and not self.finished:
                self.metrics.begin()
                pairs = self.collect()
                if not len(pairs):
                    break
                self.update(pairs.draw(self.step, self.config.optim.pairs_per_step))
                self.step += 1
                yield self.record()
                self.evaluator.during(self.step, journal)
                self.session.after_step(self)
            self.evaluator.after(self.step, journal)
            journal.notes([str(reason) for reason in (self.ended, self.evaluator.limit) if reason])
            self.session.finish(self)

    def collect(self) -> Pairs:
        """The pairs of the current round; at its beginning samples are drawn, judged, stored and labelled."""
        due = self.step // (self.config.total_updates // self.config.data.rounds)
        if self.pairs is None or due != self.round:
            again = due == self.round  # a resumed run finds its round's samples in its folder
            self.data = self._read(self._folder(due), self.data_sha256) if again else self._new_data(due)
            self.round, self.data_sha256 = due, self.data.sha256
            self.pairs = self._paired(self.data)
        return self.pairs

    def update(self, pairs: Int[Tensor, "pairs two=2"]) -> None:
        """One optimizer step on pairs, in micro-batches of at most `optim.micro_batch` samples."""
        with self.metrics.clock("train"):
            pieces = list(self.micro_batches(pairs))
            for (rows, corruption), reference in zip(pieces, self.references(pieces), strict=True):
                self.loss(rows, corruption, reference, denominator=len(pairs)).backward()
            self.metrics.stepped(*self.tuning.take_step())
            if pieces and self.step % COMPARE_EVERY == 0:
                self.metrics.norm_ratio = self.norm_ratio(*pieces[0])

    def micro_batches(self, pairs: Int[Tensor, "pairs two=2"]) -> Iterator[Piece]:
        """This process's share of the pairs in pieces, with their noise."""
        assert self.data is not None
        cfg = self.config
        shape = self.data.latents.shape[1:]
        noise = draw_corruption(cfg.objective, shape, count=len(pairs), step=self.step, seed=cfg.seed)
        mine = torch.arange(self.accelerator.process_index, len(pairs), self.accelerator.num_processes)
        for part in mine.split(max(1, cfg.optim.micro_batch // 2)):
            if len(part):
                yield pairs[part], noise.select(part)

    def references(self, pieces: Sequence[Piece]) -> list[Reference | None]:
        """The errors of the generator as it came, on the same noise; None where neither loss nor metrics need them."""
        if self.config.objective.kind not in WITH_REFERENCE and self.step % COMPARE_EVERY:
            return [None] * len(pieces)
        # All before the first graph: without an adapter, the reference takes the trained weights' place in memory.
        with torch.no_grad(), self.tuned.reference():
            # Both sides in one call, as the policy's where the loss has both: ties then are ties to the last bit.
            both = [self.errors(*piece, "win", "lose") for piece in pieces]
            return [(errors[: len(errors) // 2], errors[len(errors) // 2 :]) for errors in both]

    def loss(
        self, pairs: Int[Tensor, "n two=2"], corruption: Corruption, reference: Reference | None, *, denominator: int
    ) -> Float[Tensor, ""]:
        """The share of an update's loss that some of its pairs contribute."""
        cfg = self.config.objective
        lose = None
        if cfg.kind != "sft":
            win, lose = self.errors(pairs, corruption, "win", "lose").chunk(2)
        else:
            win = self.errors(pairs, corruption, "win")
            if reference is not None:
                with torch.no_grad():
                    lose = self.errors(pairs, corruption, "lose")
        win_ref, lose_ref = reference or (None, None)
        errors = PairErrors(win=win, lose=lose, win_ref=win_ref, lose_ref=lose_ref)
        objective = pair_objective(cfg, errors)
        self.metrics.scored(cfg, errors, objective)
        return objective.sum() / denominator

    def errors(self, pairs: Int[Tensor, "n two=2"], corruption: Corruption, *sides: Side) -> Float[Tensor, " samples"]:
        """Denoising errors of winners, losers, or one after the other, in one call of the denoiser."""
        assert self.data is not None
        columns, device = [SIDES.index(side) for side in sides], self.tuned.device
        rows = pairs[:, columns].T.flatten()
        return self.error(
            self.data.latents[rows].to(device),
            corruption.noise[:, columns].transpose(0, 1).flatten(0, 1).to(device),
            corruption.level[:, columns].T.flatten().to(device),
            self.data.prompts[rows],
        )

    def norm_ratio(self, pairs: Int[Tensor, "n two=2"], corruption: Corruption) -> float:
        """`TunedPipeline.norm_ratio` on the winners, noised."""
        assert self.data is not None
        winners, device = pairs[:, 0], self.tuned.device
        clean, prompts = self.data.latents[winners].to(device), self.data.prompts[winners]
        x, told, _ = self.error.corrupted(clean, corruption.noise[:, 0].to(device), corruption.level[:, 0].to(device))
        return self.tuned.norm_ratio(lambda: self.conditions.predict(x, told, prompts))

    @property
    def finished(self) -> bool:
        """Stopped early: a metric has passed its limit, or there is nothing left to tell apart."""
        return bool(self.ended) or self.evaluator.limit is not None

    def record(self) -> dict[str, float]:
        """Log the finished update, and hand its metrics on."""
        metrics = self.metrics.finish()
        metrics |= {"policy/weight_distance": self.tuned.distance(), "data/round": float(self.round)}
        self.session.journal.train(self.step, metrics)
        try:
            if self.callback is not None:
                self.callback(self.step, metrics)
        except Exception as error:  # the update is whole, so it is saved before code of yours ends the run
            self.session.stop_with(error)
        return metrics

    def evaluate(self) -> dict[str, float]:
        """Generate held-out samples, and judge them by every outcome."""
        return self.evaluator.run()[0]

    def save_lora(self, path: str | Path) -> None:
        """Write the adapter as plain diffusers loads it; without one, the whole pipeline. The first process writes."""
        if self.accelerator.is_main_process:
            self.tuned.save(path)

    save_model = save_lora
    """What a session calls at the end of a run."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next update depends on; a round's samples stand in the run's folder, named by their hash."""
        return {
            "model": self.tuned.state_dict(),
            "optimizer": self.tuning.state_dict(),
            "trainer": {
                "step": self.step,
                "round": self.round,
                "data_sha256": self.data_sha256,
                "ended": self.ended,
                "evaluator": self.evaluator.state_dict(),
                "judge": self.judge.state_dict(),
            },
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` took; the round's samples are read when they are needed."""
        trainer = state["trainer"]
        self.tuned.load_state_dict(state["model"])
        self.tuning.load_state_dict(state["optimizer"])
        self.step, self.round, self.ended = trainer["step"], trainer["round"], trainer["ended"]
        self.data_sha256, self.data, self.pairs = trainer["data_sha256"], None, None
        self.evaluator.load_state_dict(trainer["evaluator"])
        self.judge.load_state_dict(trainer["judge"])
        set_rng_state(state["rng"])

    def _folder(self, round_number: int) -> Path:
        if self.config.data.path is not None:
            return Path(self.config.data.path).expanduser()
        return self.session.path / "data" / f"round-{round_number}"

    def _new_data(self, round_number: int) -> SimulatedSet:
        """Read `data.path`, or draw and judge samples of the current generator and store them with the run."""
        if self.config.data.path is not None:
            return self._read(self._folder(round_number), "")
        found = simulate(
            self.tuned,
            self.prompts,
            self.judge,
            self.config,
            round_number=round_number,
            accelerator=self.accelerator,
            doing=self.session.journal.doing,
        )
        if self.accelerator.is_main_process:
            found = write_set(found, self._folder(round_number))
        self.accelerator.wait_for_everyone()
        return found

    def _read(self, folder: Path, sha256: str) -> SimulatedSet:
        here = settings_of(self.config, self.tuned.pipeline, self.prompts, self.judge, round_number=0)
        found = read_set(folder, here)
        if sha256 and found.sha256 != sha256:
            raise ConfigError(f"{folder} is not the set that the checkpoint was trained on; put that one back.")
        return found

    def _paired(self, data: SimulatedSet) -> Pairs:
        """Label a round's samples, and record what the denoiser is told about their prompts."""
        cfg = self.config.data
        target = cfg.label or self.judge.target
        if target not in data.outcomes:
            raise ConfigError(f"`data.label`={target!r} is none of {', '.join(sorted(data.outcomes))}.")
        outcome = data.outcomes[target]
        labels = labels_of(outcome, threshold=cfg.threshold, band=cfg.band)
        pairs = Pairs(labels, data.prompts, seed=derived_seed(self.config.seed, "round", self.round))
        self.conditions.record([group.number for group in pairs.groups])
        self.metrics.collected(data, labels, pairs, outcome, self.conditions.nbytes)
        self._tell(f"round {self.round}: {told(labels, pairs)}", pairs)
        return pairs

    def _tell(self, words: str, pairs: Pairs) -> None:
        if len(pairs):
            self.session.journal.note(f"{words}.")
        elif self.round == 0:
            raise ConfigError(f"{words}. Change `data.threshold` or `data.label`, or raise `data.samples`.")
        else:
            self.ended = f"Stopped after update {self.step}: {words}."
