"""Replay where it is easily wrong: half precision, guidance that acts in some steps only."""

import pytest
import torch

from rlalign.diffusion.config import SDEConfig
from rlalign.diffusion.sampling import StochasticSampler
from tests.diffusion.custom_pipelines import custom_pipeline
from tests.diffusion.test_sampling import EVERY_PAIR, call_of, sampler_of


@pytest.mark.parametrize(("kind", "sde"), EVERY_PAIR)
def test_in_bfloat16_a_replay_of_the_same_rows_leaves_nothing(kind, sde):
    sampler = sampler_of(kind, sde)
    for part in sampler.pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    call = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in call_of(kind, 4).items()}
    trajectory = sampler.sample(call, seeds=[3, 1, 4, 2])
    for step in range(3):
        with torch.no_grad():
            score = sampler.replay(trajectory, torch.arange(4), torch.full((4,), step))
        assert score.mean.dtype == torch.float32
        assert torch.equal(score.mean, trajectory.means[:, step])
        assert torch.equal(score.log_prob, trajectory.log_prob[:, step])


def test_replay_by_the_pipeline_does_not_hide_that_it_misjudges_a_guidance_interval():
    # Each replayed step is the pipeline's first, so guidance that depends on the step's number is another one.
    by_tape, by_pipeline = (
        StochasticSampler(custom_pipeline("interval"), SDEConfig(), by_pipeline=way) for way in (False, True)
    )
    call = {"labels": [1, 2]}
    assert by_tape.parity(by_tape.sample(call, seeds=[1, 2])) <= 1e-6
    assert by_pipeline.parity(by_pipeline.sample(call, seeds=[1, 2])) > 1e-3


def test_skip_layer_guidance_in_a_window_is_replayed_by_the_tape():
    sampler = sampler_of("sd3")
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.5}
    trajectory = sampler.sample(call_of("sd3", 3, **skipping), seeds=[1, 2, 3])
    assert len(trajectory.tape.layouts) == 2
    assert sampler.parity(trajectory) <= 1e-6
