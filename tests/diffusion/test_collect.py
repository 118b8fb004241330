"""A rollout is the same however it is cut, and stands in the shared form of rollouts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from rlalign.config import ConfigError
from rlalign.diffusion.collect import assemble, draw, draw_window, joined, sampler_of
from rlalign.diffusion.config import SamplingConfig, SDEConfig
from rlalign.diffusion.prompts import Prompts
from rlalign.diffusion.rewards import Judged
from tests.diffusion.small_runs import points_pipeline

CFG = SamplingConfig(prompts_per_step=3, group_size=2, num_inference_steps=5, sde=SDEConfig(noise_level=0.5))


class Share:
    """What `draw` asks of an accelerator."""

    def __init__(self, index, count):
        self.process_index, self.num_processes = index, count


def drawn(cfg, *, step=0, seed=0, accelerator=None):
    pipeline = points_pipeline()
    sampler, prompts = sampler_of(pipeline, cfg), Prompts.of([0, 1, 1, 0], pipeline)
    accelerator = accelerator or Accelerator(cpu=True)
    unchecked = draw.__wrapped__ if accelerator.__class__ is Share else draw
    return unchecked(sampler, prompts, cfg, {}, step=step, seed=seed, accelerator=accelerator)


def judged(count, **more):
    return Judged(torch.arange(float(count)), torch.ones(count, dtype=torch.bool), **more)


def test_a_rollout_does_not_depend_on_how_it_is_cut():
    whole, pieces = drawn(CFG), drawn(replace(CFG, batch_size=4))
    assert [len(piece.log_prob) for piece in pieces.trajectories] == [4, 2]
    assert pieces.indices == whole.indices and pieces.groups == whole.groups == [0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(pieces.samples, whole.samples, rtol=0, atol=1e-5)
    one, other = (assemble(d, judged(6), process=0) for d in (whole, pieces))
    torch.testing.assert_close(one.log_prob_old, other.log_prob_old, rtol=0, atol=1e-5)
    assert torch.equal(one.mask, other.mask)


def test_processes_draw_their_share_of_the_same_rollout():
    cfg = replace(CFG, prompts_per_step=4)
    whole = drawn(cfg)
    first, second = (drawn(cfg, accelerator=Share(k, 2)) for k in range(2))
    assert first.groups + second.groups == whole.groups
    assert first.indices + second.indices == whole.indices
    np.testing.assert_allclose(np.concatenate([first.samples, second.samples]), whole.samples, rtol=0, atol=1e-5)


def test_noise_is_fresh_in_a_group_or_shared_at_the_start():
    starts = [drawn(replace(CFG, same_noise=same)).trajectories[0].latents[:, 0] for same in (False, True)]
    assert len(starts[0].flatten(1).unique(dim=0)) == 6
    assert len(starts[1].flatten(1).unique(dim=0)) == 3
    ends = drawn(replace(CFG, same_noise=True)).trajectories[0].latents[:, -1]
    assert len(ends.flatten(1).unique(dim=0)) == 6  # the noise of the steps is each sample's own


def test_steps_and_seeds_draw_other_samples():
    found = [drawn(CFG, step=step, seed=seed).samples for step, seed in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert np.array_equal(found[0], found[3])
    assert not np.allclose(found[0], found[1]) and not np.allclose(found[0], found[2])


def test_the_last_step_is_not_trained_and_outcomes_stand_on_the_last_decision():
    rollout = assemble(drawn(CFG), judged(6, parts={"stable": torch.ones(6)}), process=3)
    assert rollout.mask.tolist() == [[True] * 4 + [False]] * 6
    assert rollout.rewards[:, 3].tolist() == [0, 1, 2, 3, 4, 5] and rollout.outcome.tolist() == [0, 1, 2, 3, 4, 5]
    assert rollout.terminated.nonzero().tolist() == [[row, 3] for row in range(6)]
    assert rollout.inputs["process"].value.tolist() == [3] * 6
    assert rollout.reward_parts["stable"].tolist() == [1] * 6


def test_windows_lie_where_they_can_be_trained_and_move():
    cfg = replace(CFG, window=2, num_inference_steps=10)
    found = {draw_window(cfg, step=step, seed=0) for step in range(300)}
    assert found == {(first, first + 2) for first in range(8)}  # step 9 adds no noise
    assert {draw_window(replace(cfg, window_range=(2, 5)), step=s, seed=0) for s in range(50)} == {(2, 4), (3, 5)}
    assert draw_window(CFG, step=0, seed=0) is None
    assert draw_window(cfg, step=4, seed=0) == draw_window(cfg, step=4, seed=0)


def test_offloaded_weights_are_not_trained_through_the_pipelines_own_call(monkeypatch):
    pipeline = points_pipeline()
    monkeypatch.setattr(type(pipeline), "_execution_device", torch.device("meta"))  # as offloading does, from a CPU
    with pytest.raises(ConfigError, match=r"`rollout.by_pipeline` .* `enable_model_cpu_offload"):
        sampler_of(pipeline, replace(CFG, by_pipeline=True))
    sampler_of(pipeline, CFG)


def test_only_a_windows_steps_are_decisions():
    found = drawn(replace(CFG, window=2, window_range=(1, 3)))
    rollout = assemble(found, judged(6), process=0)
    assert rollout.mask[0].tolist() == [False, True, True, False, False]
    assert rollout.rewards[:, 2].tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_are_found_in_their_piece():
    found = drawn(replace(CFG, batch_size=4))
    located = [
        (len(piece.log_prob), rows.tolist(), here.tolist())
        for piece, rows, here in found.locate(torch.tensor([5, 0, 3]))
    ]
    assert located == [(4, [0, 3], [1, 2]), (2, [1], [0])]
    assert found.nbytes == sum(piece.nbytes for piece in found.trajectories) > 6 * (6 * 2 + 5 * 2) * 4


def test_outputs_of_any_kind_are_joined():
    assert joined([(["a"], None), (["b", "c"], None)]) == ["a", "b", "c"]
    assert joined([{"images": np.zeros((1, 2))}, {"images": np.ones((2, 2))}]).tolist() == [[0, 0], [1, 1], [1, 1]]
    assert joined([(torch.zeros(1),), (torch.ones(1),)]).tolist() == [0, 1]


def test_a_scheduler_that_does_not_fit_the_noise_is_named():
    with pytest.raises(ValueError, match=r"`rollout.sde`: `sde.kind: ddim` needs a scheduler with a schedule of betas"):
        sampler_of(points_pipeline(), replace(CFG, sde=SDEConfig(kind="ddim")))
