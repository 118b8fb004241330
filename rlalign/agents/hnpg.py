"""Hybrid natural policy gradient: policy and critic learn from recorded transitions and on-policy episodes together."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlalign.advantages import build_estimator
from rlalign.agents.agent import Metrics
from rlalign.agents.collect import Experience
from rlalign.agents.config_hybrid import HNPGConfig
from rlalign.agents.hybrid import PolicyEvaluation
from rlalign.agents.hybrid_acting import HybridActing
from rlalign.agents.hybrid_forms import make_actions, make_form
from rlalign.agents.hybrid_networks import Critic, encoded, make_critic
from rlalign.agents.hybrid_sources import OfflineSource, OnlineSource, Seen, Source, source_weights, state_values
from rlalign.agents.hybrid_step import Judged, improve, step_metrics, union
from rlalign.agents.normalize import ObservationNormalizer
from rlalign.agents.offline_decisions import OfflineDecisions, transitions_of
from rlalign.agents.spaces import PLAIN, ObservationParts
from rlalign.buffers import Rollout, RolloutBuffer, TrainBatch
from rlalign.functional.temporal import discounted_returns
from rlalign.nn.value_heads import ValueHead
from rlalign.optim.natural_gradient import BatchedNaturalGradientResult


class HNPG(HybridActing):
    """A natural-gradient step per iteration on recorded and on-policy states (Zhou et al. 2023, arXiv:2311.08384).

    Args:
        dataset: A `.npz` file, a folder of them, a Minari id, or `Transitions`.

    Example:
        ```python
        agent = HNPG("rlalign_envs:CombinationLock-v0", dataset="data/comblock_h5.npz", horizon=5, num_envs=200)
        agent.fit(total_env_steps=100_000)
        ```
    """

    config_class = HNPGConfig
    config: HNPGConfig

    def build(self) -> None:
        cfg = self.config
        assert self.environments is not None
        self.device = torch.device(cfg.device)
        self.parts = ObservationParts(self.environments.observation_space)
        self.actions = make_actions(self.environments.action_space, cfg)
        self.form = make_form(self.environments, self.parts, self.actions, cfg)
        self.policy, self.collector = self.form.policy, self.form.collector
        self.evaluation = PolicyEvaluation(self._critic, cfg)
        self.observations = ObservationNormalizer(self.parts, cfg.normalize)
        self.estimator, self.buffer = build_estimator(cfg.advantage), RolloutBuffer()
        self.offline: OfflineDecisions | None = None
        self.begin_episode()

    def steps(
        self, *, total_env_steps: int | None = None, total_updates: int | None = None, resume: bool = False
    ) -> Iterator[Metrics]:
        self.prepare_offline()
        yield from super().steps(total_env_steps=total_env_steps, total_updates=total_updates, resume=resume)

    def prepare_offline(self) -> None:
        """Load the dataset, which only training needs.

        Raises:
            ConfigError: There is none and `offline_weight` is not 0, or it does not fit the environment.
        """
        if self.offline is not None or not self.config.offline_weight:
            return
        transitions = transitions_of(self.dataset, self.config.dataset)
        self.offline = OfflineDecisions(transitions, self.parts, self.actions, horizon=self.config.horizon)

    # ----------------------------------------------------------------------------------------------------- training

    def iterate(self) -> Metrics:
        found = self.collect()
        with self.clock_watch("train"):
            online = self.online(found)
            draw = None if self.offline is None else self.draw
            offline, fits = self.evaluation.run(
                self.policy,
                online if self.config.online_weight else None,
                draw,
                random=self.random("next_actions"),
                progress=self.step / self.total,
            )
            self.buffer.add(self.rollout(found, online))
            batch = self.estimator(self.buffer.drain())
            judged = self.judged(batch, online, offline)
            result = improve(self.policy, judged, self.config)
        self.observations.update(found.before(), found.mask)
        return fits | self.metrics(found, online, judged, result)

    def collect(self) -> Experience:
        """Play with the current policy."""
        with self.clock_watch("collect"):
            found = self.form.collect(self.observations, iteration=self.iteration)
        self.step = self.collector.env_steps
        self.returns = found.rewards.sum(1)
        return found

    @torch.no_grad()
    def online(self, found: Experience) -> OnlineSource:
        """On-policy decisions with their Monte-Carlo returns: nothing is bootstrapped but what was cut."""
        form, mask = self.form, found.mask.to(self.device)
        returns = discounted_returns(
            found.rewards.to(self.device),
            found.terminated.to(self.device),
            found.truncated.to(self.device),
            gamma=self.config.advantage.gamma,
            bootstrap=form.cut_values(found, self.prepared, self.value_of("cut")),
            mask=mask,
        )
        return OnlineSource(
            seen={name: form.gather(value, mask) for name, value in self.prepared(found.before()).items()},
            actions=form.gather(found.actions.to(self.device), mask),
            weights=source_weights(form.gather(mask, mask), self.config.online_weight),
            allowed=None if found.allowed is None else form.gather(found.allowed.to(self.device), mask),
            returns=form.gather(returns, mask),
        )

    def draw(self, sweep: int) -> OfflineSource:
        """Recorded transitions for one fit of the critic."""
        assert self.offline is not None
        drawn = self.offline.draw(self.config.offline_decisions, self.random("offline", sweep))
        drawn = {name: value.to(self.device) for name, value in drawn.items()}
        real = torch.ones_like(drawn["terminated"])
        return OfflineSource(
            seen=self.prepared({PLAIN: drawn["observations"]}),
            actions=drawn["actions"],
            weights=source_weights(real, self.config.offline_weight),
            rewards=drawn["rewards"],
            next_seen=self.prepared({PLAIN: drawn["next_observations"]}),
            terminated=drawn["terminated"],
        )

    @torch.no_grad()
    def rollout(self, found: Experience, online: OnlineSource) -> Rollout:
        """Facts for the shared estimator: rewards, and the values that the fitted critic gives."""
        mask, batch = found.mask.to(self.device), len(found.mask)
        values, next_values = self.form.values(found, self.prepared, self.value_of("values"))
        params = self.policy(online.seen, online.allowed)
        return Rollout(
            log_prob_old=self.form.scatter(self.policy.distribution.log_prob(params, online.actions), mask),
            rewards=found.rewards.to(self.device),
            mask=mask,
            terminated=found.terminated.to(self.device),
            truncated=found.truncated.to(self.device),
            group=torch.arange(batch, device=self.device) + self.iteration * batch,
            prompt_id=torch.arange(batch, device=self.device),
            scored=torch.ones(batch, dtype=torch.bool, device=self.device),
            values=values,
            next_values=next_values,
        )

    @torch.no_grad()
    def judged(self, batch: TrainBatch, online: OnlineSource, offline: OfflineSource | None) -> Judged:
        """Decisions of both sources with their advantages."""
        sources: list[tuple[Source, Tensor]] = []
        if self.config.online_weight:
            sources.append((online, self.form.gather(batch.advantages, batch.mask)))
        if offline is not None:
            sources.append(self.judged_offline(offline))
        normalize = self.config.normalize_advantages == "batch"
        return union(sources, normalize=normalize, count_online=online.size if self.config.online_weight else 0)

    def judged_offline(self, offline: OfflineSource) -> tuple[Source, Float[Tensor, "stack rows"]]:
        """Q(s, a) - V(s) at recorded states, for actions of the policy or for the recorded ones."""
        distribution = self.policy.distribution
        params = self.policy(offline.seen)
        if self.config.offline_actions == "policy":
            noise = distribution.noise(params.shape[:2], self.random("offline_actions")).to(self.device)
            offline = replace(offline, actions=distribution.sample(params, noise))
        q = self.evaluation.q(offline.seen, encoded(distribution, offline.actions))
        return offline, q - self.value_of("offline_values")(offline.seen, None)

    def metrics(
        self, found: Experience, online: OnlineSource, judged: Judged, result: BatchedNaturalGradientResult
    ) -> Metrics:
        """What the iteration did; means over steps where each has a policy of its own."""
        head = self.evaluation.critic.rows[0].head.metrics(online.returns[0])
        return {
            **self._episodes(found),
            **self.estimator.metrics,
            **self.evaluation.metrics(),
            **head,
            **judged.metrics(),
            **step_metrics(result),
            "value/return_mean": float(online.returns.sum() / found.mask.sum().clamp(min=1)),
        }

    def _episodes(self, found: Experience) -> Metrics:
        if self.config.horizon is None:
            return self.collector.episodes.metrics()
        return {
            "episode/return_mean": float(self.returns.mean()),
            "episode/return_max": float(self.returns.max()),
            "episode/length_mean": float(found.mask.sum(1).float().mean()),
            "episode/count": float(self.collector.episodes),
        }

    # ------------------------------------------------------------------------------------------------------- pieces

    def value_of(self, purpose: str) -> Any:
        """V under the policy and the critic as they are."""
        random = self.random(purpose)

        def value(seen: Seen, allowed: Tensor | None) -> Tensor:
            with torch.no_grad():
                params = self.policy(seen, None if allowed is None else allowed.to(self.device))
            return state_values(
                self.evaluation.q,
                self.policy.distribution,
                params,
                seen,
                samples=self.config.value_samples,
                random=random,
            )

        return value

    def _critic(self) -> Critic:
        cfg = self.config
        return make_critic(
            self.parts,
            self.actions,
            [ValueHead(cfg.value_head) for _ in range(self.form.rows)],
            cfg.critic_hidden,
            cfg.network,
            initialization=cfg.initialization,
            nap=cfg.normalize_and_project,
            device=self.device,
        )

    def learned(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            **self.evaluation.networks(),
            "observations": self.observations.state_dict(),
        }

    def load_learned(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.evaluation.load_networks(state)
        self.observations.load_state_dict(state["observations"])

    def optimizers(self) -> dict[str, Any]:
        return {"critic": self.evaluation}

    def progress(self) -> dict[str, Any]:
        return {"collector": self.collector, "buffer": self.buffer, "estimator": self.estimator}
