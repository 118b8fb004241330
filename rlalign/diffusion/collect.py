"""Draw a rollout: prompts, samples of each with the probability of every step, and what the reward says of them."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import Tensor

from rlalign.advantages.config import AdvantageConfig, GroupEstimatorConfig
from rlalign.buffers import Input, Rollout
from rlalign.config import ConfigError
from rlalign.diffusion.config import SamplingConfig
from rlalign.diffusion.consistency import window_bounds
from rlalign.diffusion.guidance import AdaptiveProjection
from rlalign.diffusion.prompts import Prompts
from rlalign.diffusion.rewards import Judged
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.trajectory import Trajectory
from rlalign.training.seeding import derived_seed, generator


@dataclass(frozen=True)
class Drawn:
    """The samples that this process drew in one rollout."""

    trajectories: list[Trajectory]
    """Pieces of at most `rollout.batch_size` samples."""
    samples: Any
    """What the pipeline returned, of all pieces."""
    indices: list[int]
    """Row of each sample's prompt."""
    groups: list[int]

    @property
    def nbytes(self) -> int:
        """Memory that the recorded latents and means take."""
        return sum(piece.nbytes for piece in self.trajectories)

    def locate(self, places: Tensor) -> Iterator[tuple[Trajectory, Tensor, Tensor]]:
        """For samples of any pieces: the piece, rows in it, and which of `places` they are."""
        first = 0
        for piece in self.trajectories:
            count = len(piece.log_prob)
            here = ((places >= first) & (places < first + count)).nonzero().squeeze(1)
            if len(here):
                yield piece, places[here] - first, here
            first += count


def sampler_of(pipeline: DiffusionPipeline, cfg: SamplingConfig) -> StochasticSampler:
    """What draws the rollouts.

    Raises:
        ConfigError: The pipeline's scheduler does not fit the noise, or its offloading the way of replay.
    """
    if cfg.by_pipeline and pipeline._execution_device != pipeline.device:
        raise ConfigError(
            "`rollout.by_pipeline` trains through the pipeline's own call, which under `enable_model_cpu_offload()` "
            "moves the weights away before the backward pass; use one without the other."
        )
    storage = "cpu" if cfg.offload else None
    guidance = None if cfg.guidance is None else AdaptiveProjection(**vars(cfg.guidance))
    try:
        return StochasticSampler(
            pipeline,
            cfg.sde,
            trained_fraction=cfg.trained_fraction,
            storage=storage,
            by_pipeline=cfg.by_pipeline,
            guidance=guidance,
        )
    except ValueError as error:
        raise ConfigError(f"`rollout.sde`: {error}") from error


def draw(
    sampler: StochasticSampler,
    prompts: Prompts,
    cfg: SamplingConfig,
    arguments: Mapping[str, Any],
    *,
    step: int,
    seed: int,
    accelerator: Accelerator,
) -> Drawn:
    """Sample a group for each prompt of the step; this process takes its share of the groups.

    Every sample's noise is a function of (seed, step, its number), whatever process or piece draws it.

    Args:
        arguments: Of every call of the pipeline, beside the prompts.
    """
    chosen = prompts.draw(step, count=cfg.prompts_per_step, seed=seed)
    share = cfg.prompts_per_step // accelerator.num_processes
    mine = range(share * accelerator.process_index, share * (accelerator.process_index + 1))
    numbers = [group * cfg.group_size + member for group in mine for member in range(cfg.group_size)]
    groups = [number // cfg.group_size for number in numbers]
    seeds = [derived_seed(seed, "sample", step, number) for number in numbers]
    starts = [derived_seed(seed, "start", step, group) for group in groups] if cfg.same_noise else None
    window = draw_window(cfg, step=step, seed=seed)
    trajectories = []
    for first in range(0, len(numbers), cfg.batch_size):
        part = slice(first, first + cfg.batch_size)
        trajectories.append(
            sampler.sample(
                {
                    **prompts.call([chosen[group] for group in groups[part]]),
                    **arguments,
                    "num_inference_steps": cfg.num_inference_steps,
                },
                seeds=seeds[part],
                window=window,
                same_noise=None if starts is None else starts[part],
            )
        )
    samples = joined([piece.output for piece in trajectories])
    base = step * cfg.prompts_per_step
    return Drawn(trajectories, samples, [chosen[g] for g in groups], [base + group for group in groups])


def draw_window(cfg: SamplingConfig, *, step: int, seed: int) -> tuple[int, int] | None:
    """Where noise goes in this rollout: [first, one past the last] of the denoising steps."""
    if cfg.window is None:
        return None
    low, high = window_bounds(cfg)
    first = int(torch.randint(low, high - cfg.window + 1, (), generator=generator(seed, "window", step)))
    return first, first + cfg.window


def assemble(drawn: Drawn, judged: Judged, *, process: int) -> Rollout:
    """The rollout that the shared estimators and losses know: one row per sample, one column per denoising step."""
    log_prob = torch.cat([piece.log_prob for piece in drawn.trajectories]).cpu()
    mask = torch.cat([piece.scored for piece in drawn.trajectories]).cpu()
    batch, time = log_prob.shape
    last = int(mask.any(0).nonzero().max()) if bool(mask.any()) else time - 1  # no return is lost on a masked step
    rewards = torch.zeros(batch, time)
    rewards[:, last] = judged.outcome
    ended = torch.zeros(batch, time, dtype=torch.bool)
    ended[:, last] = True
    return Rollout(
        log_prob_old=log_prob.float(),
        rewards=rewards,
        mask=mask,
        terminated=ended,
        truncated=torch.zeros_like(ended),
        group=torch.tensor(drawn.groups),
        prompt_id=torch.tensor(drawn.indices),
        scored=judged.scored,
        reward_parts=judged.parts,
        inputs={
            "place": Input(value=torch.arange(batch), axis="per_rollout"),
            "process": Input(value=torch.full((batch,), process), axis="per_rollout"),
        },
    )


def require_weights(advantage: AdvantageConfig, outcomes: Collection[str]) -> None:
    """Refuse to learn from outcomes of a simulator that nobody asked for: the one that judges is among them.

    Raises:
        ConfigError: `advantage.decompose` is on, and some outcome has no weight.
    """
    if not isinstance(advantage, GroupEstimatorConfig) or not advantage.decompose or len(outcomes) < 2:
        return
    missing = sorted(set(outcomes) - set(advantage.part_weights))
    if missing:
        raise ConfigError(
            "`advantage.decompose` learns from every outcome of the simulator, the one that training is judged by "
            f"included. Give each a weight in `advantage.part_weights`, 0 for those not to learn from: "
            f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} none."
        )


def joined(outputs: Sequence[Any]) -> Any:
    """The samples of several calls of a pipeline, from whatever each returned."""
    parts = [samples_of(output) for output in outputs]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [sample for part in parts for sample in part]


def samples_of(output: Any) -> Any:
    """The samples inside a pipeline's output, which is a tuple or a mapping whose first entry they are."""
    if isinstance(output, tuple | dict):
        return output[0] if isinstance(output, tuple) else next(iter(output.values()))
    return output
