"""The public surface that all agents share: train, predict, evaluate, save, load, resume."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv

from rlalign.agents.config import AgentConfig
from rlalign.agents.consistency import check_settings
from rlalign.agents.contract import Contract, Metrics
from rlalign.agents.envs import Environments, make_environments
from rlalign.agents.evaluate import Evaluator, summary
from rlalign.agents.keywords import FORMS
from rlalign.agents.saved import Saved
from rlalign.agents.spaces import MASK, Observation, batched, is_single, require_shape
from rlalign.agents.surroundings import (
    check_device,
    check_given,
    play_config,
    session_of,
    training_environments,
    with_total,
)
from rlalign.agents.timing import IterationTimer
from rlalign.config import ConfigError
from rlalign.config_keywords import config_from_keywords
from rlalign.config_schema import hints_of
from rlalign.training.journal import Journal
from rlalign.training.seeding import derived_seed, generator, rng_state, seed_everything, set_rng_state
from rlalign.training.session import Session

AnyAgent = TypeVar("AnyAgent", bound="Agent")


class Agent(Contract):
    """A policy that learns from environments, from data, or from both.

    A subclass says how an iteration goes and what it consists of (`Contract`); everything around that is here.

    Args:
        env: A Gymnasium id (`CartPole-v1`, `module:Id-v0`), or a vector environment. Some agents need none.
        dataset: Offline transitions, for the agents that learn from them.
        seed: Decides weights, episodes and samples.
        run_dir: Where the run's files go; by default `runs/<method>`, with a number when that exists.
        callback: Called after every iteration with the clock and the metrics.
        config: Settings; see `rlalign.agents.config`. `learning_rate=1e-4` finds `optim.learning_rate`.

    Raises:
        ConfigError: A setting is unknown, of the wrong kind, or contradicts another.
    """

    def __init__(
        self,
        env: str | VectorEnv | None = None,
        *,
        dataset: Any = None,
        seed: int = 0,
        run_dir: str | Path | None = None,
        callback: Callable[[int, Metrics], None] | None = None,
        **config: Any,
    ):
        check_given(type(self).__name__, env, dataset, config)
        named = {"env": env, "dataset": dataset}
        given = {name: str(value) for name, value in named.items() if isinstance(value, str | Path)}
        settings = config_from_keywords(self.config_class, {**config, **given, "seed": seed}, FORMS)
        self.description: Mapping[str, Any] = {}
        self._begin(settings, env if isinstance(env, VectorEnv) else None, dataset, run_dir, callback, None)

    @classmethod
    def from_config(
        cls: type[AnyAgent],
        config: AgentConfig,
        *,
        env: VectorEnv | None = None,
        run_dir: str | Path | None = None,
        config_text: str | None = None,
        description: Mapping[str, Any] | None = None,
    ) -> AnyAgent:
        """Build an agent from a validated config, as `rlalign train` does; `description` is what `described` gave."""
        agent = cls.__new__(cls)
        agent.description = description or {}
        agent._begin(config, env, None, run_dir, None, config_text)
        return agent

    def _begin(
        self,
        config: Any,
        vector: VectorEnv | None,
        dataset: Any,
        run_dir: str | Path | None,
        callback: Callable[[int, Metrics], None] | None,
        config_text: str | None,
    ) -> None:
        if vector is not None:
            config = replace(config, env=replace(config.env, num_envs=vector.num_envs))
        self.config, self.callback, self.run_dir, self.config_text = config, callback, run_dir, config_text
        self.dataset, self.foreign = dataset, vector is not None
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        check_settings(config)
        check_device(config.device)
        seed_everything(config.seed)
        self.environments = training_environments(config, vector)
        if self.environments is None and self.needs_env:
            raise ConfigError(f"{type(self).__name__} needs an environment: set `env.id`, or pass `env=`.")
        self.play_config = play_config(config, self.environments)
        self.timer = IterationTimer("env_steps" if "total_env_steps" in hints_of(type(config)) else "updates")
        self.clock_watch = self.timer.phases
        self.acting = generator(config.seed, "acting")
        self.step, self.iteration = 0, 0
        self.build()
        self.evaluator = Evaluator(
            self._evaluation_environments(), self.decide, config.eval, seed=derived_seed(config.seed, "evaluation")
        )

    # ---------------------------------------------------------------------------------------------------- training

    def fit(
        self: AnyAgent,
        *,
        total_env_steps: int | None = None,
        total_updates: int | None = None,
        resume: bool = False,
    ) -> AnyAgent:
        """Train; see `steps`."""
        for _ in self.steps(total_env_steps=total_env_steps, total_updates=total_updates, resume=resume):
            pass
        return self

    def steps(
        self, *, total_env_steps: int | None = None, total_updates: int | None = None, resume: bool = False
    ) -> Iterator[Metrics]:
        """Train iteration by iteration, yielding metrics, for code of yours that looks or acts in between.

        Args:
            total_env_steps: Train until this many decisions were made (agents that use an environment).
            total_updates: Train until this many updates were made (agents that learn from data alone).
            resume: Continue from the newest intact checkpoint of `run_dir`.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the iteration was finished and saved.
            TrainingDiverged: Gradients stayed NaN or infinite beyond `optim.nonfinite_budget`.
            EnvironmentFault: The environment broke its contract.
        """
        self.config = with_total(self.config, total_env_steps, total_updates, name=type(self).__name__)
        session = session_of(self)
        with session.open(self, resume=resume) as journal:
            if self.config.eval.before and self.step == 0:
                self.evaluator.record(0, journal)
            while self.step < self.total and not self.evaluator.out_of_patience:
                before = self.step
                self.clock_watch.restart()
                metrics = self.iterate()
                self.iteration += 1
                metrics |= self.timer.lap(self.step - before)
                if self.iteration % self.config.log.every == 0 or self.step >= self.total:
                    journal.train(self.step, metrics | self.timer.record())
                self._call_back(session, metrics)
                yield metrics
                if self.evaluator.due(before, self.step):
                    self.evaluator.record(self.step, journal)
                session.after_step(self)
            self._finish(journal, session)

    def _call_back(self, session: Session, metrics: Metrics) -> None:
        try:
            if self.callback is not None:
                self.callback(self.step, metrics)
        except Exception as error:  # the iteration is whole: it is saved before the user's error ends the run
            session.stop_with(error)

    def _finish(self, journal: Journal, session: Session) -> None:
        self.evaluator.record(self.step, journal)
        if self.config.eval.video and self.environments is not None and not self.foreign:
            from rlalign.agents.video import film

            journal.notes(film(self, session.path / "media"))
        session.finish(self)

    # ------------------------------------------------------------------------------------------ acting and measuring

    def predict(
        self, observation: Observation, *, deterministic: bool = True, info: Mapping[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Act on one observation, or on a batch of them.

        Args:
            info: What the environment told beside it; its `action_mask`, if any, says which actions are allowed.

        Returns:
            The action as the environment takes it (a batch of them for a batch), and a dict with `log_prob` and, for
            agents with a critic, `value`.

        Raises:
            ValueError: The observation is not of the environment's shape.
        """
        space = self.observation_space
        single = is_single(space, observation)
        batch = batched(observation) if single else observation
        require_shape(space, batch)
        told = {MASK: info[MASK]} if info is not None and MASK in info else {}
        told = batched(told) if single else told
        actions, about = self.decide(batch, told, random=None if deterministic else self.acting)
        if not single:
            return actions, about
        return actions[0], {name: value[0] for name, value in about.items()}

    def evaluate(self, episodes: int | None = None) -> Metrics:
        """Play whole episodes with frozen statistics: mean return, standard error, 95 % bootstrap interval.

        Raises:
            ConfigError: There is no environment to play in.
            ValueError: `episodes` is less than 1.
        """
        if self.evaluator.environments is None:
            raise ConfigError("there is no environment to evaluate in: name one by its id (`env.id`).")
        if episodes is not None and episodes < 1:
            raise ValueError(f"`episodes` must be at least 1, got {episodes}.")
        return summary(*self.evaluator.play(episodes or self.config.eval.episodes))

    # ----------------------------------------------------------------------------------------- keeping and coming back

    def save(self, path: str | Path) -> None:
        """Write config, weights and statistics as JSON and safetensors; `load` reads them."""
        Saved(self.config, self.step, self.described(), self.learned()).write(path)

    save_model = save
    """What a session calls at the end of a run."""

    @classmethod
    def load(cls: type[AnyAgent], path: str | Path, *, env: VectorEnv | None = None) -> AnyAgent:
        """Bring a saved agent back, ready to predict, evaluate or train on; `fit` then counts from 0 again.

        Args:
            path: What `save` wrote, or a run directory.
            env: For an agent that was made with a vector environment of yours.

        Raises:
            ConfigError: There is no agent, or it is one of another class.
        """
        saved = Saved.read(path)
        if not isinstance(saved.config, cls.config_class):
            raise ConfigError(f"{path} holds an agent of method {saved.config.method!r}, not {cls.__name__}.")
        agent = cls.from_config(saved.config, env=env, description=saved.description)
        agent.load_learned(saved.learned)
        return agent

    def state_dict(self) -> dict[str, Any]:
        """Everything the next iteration depends on."""
        return {
            "model": self.learned(),
            "optimizer": {name: part.state_dict() for name, part in self.optimizers().items()},
            "trainer": {
                "step": self.step,
                "iteration": self.iteration,
                "evaluator": self.evaluator.state_dict(),
                **{name: part.state_dict() for name, part in self.progress().items()},
            },
            "rng": rng_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` took."""
        self.load_learned(state["model"])
        for name, part in self.optimizers().items():
            part.load_state_dict(state["optimizer"][name])
        trainer = state["trainer"]
        self.step, self.iteration = trainer["step"], trainer["iteration"]
        self.evaluator.load_state_dict(trainer["evaluator"])
        for name, part in self.progress().items():
            part.load_state_dict(trainer[name])
        set_rng_state(state["rng"])

    # --------------------------------------------------------------------------------------------------------- pieces

    @property
    def observation_space(self) -> gym.Space:
        assert self.environments is not None
        return self.environments.observation_space

    @property
    def action_space(self) -> gym.Space:
        assert self.environments is not None
        return self.environments.action_space

    def random(self, *keys: int | str) -> torch.Generator:
        """Random numbers that are a function of (seed, keys, iteration)."""
        return generator(self.config.seed, *keys, self.iteration)

    def _evaluation_environments(self) -> Environments | None:
        if not self.config.env.id:
            return None
        count = self.config.eval.num_envs
        return make_environments(self.play_config, seed=self.config.seed, num_envs=count, role="evaluation")
