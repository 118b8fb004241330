"""The tape: the combiner read off a step's numbers, and arguments given to the samples and steps they belong to."""

import pytest
import torch

from rlalign.diffusion.combiner import Combiner, NotCombined, infer_combiner
from rlalign.diffusion.config import SDEConfig
from rlalign.diffusion.recorder import Recorder
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.tape import Rows, Scalar, Table, split_parts
from rlalign.diffusion.tiny import tiny_call, tiny_pipeline
from tests.diffusion.custom_pipelines import custom_pipeline

FLOW = SDEConfig(noise_level=0.5)


def branches(count, dtype=torch.float32):
    return list(torch.randn(count, 3, 4, 5).to(dtype).unbind(0))


def trajectory_of(pipeline, call, count):
    sampler = StochasticSampler(pipeline, FLOW)
    return sampler, sampler.sample(call, seeds=range(count))


# ---------------------------------------------------------------- the combiner


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.5, 7.5])
def test_guidance_is_recognised_in_either_order_and_repeated_to_the_bit(dtype, scale):
    u, c = branches(2, dtype)
    guided = u + scale * (c - u)
    one_call = infer_combiner([u, c], guided, candidates=[28.0, scale])
    two_calls = infer_combiner([c, u], guided, candidates=[28.0, scale])
    assert one_call == Combiner(base=0, others=(1,), weights=(scale,))
    assert two_calls == Combiner(base=1, others=(0,), weights=(scale,))
    assert torch.equal(one_call([u, c]), guided)
    assert torch.equal(two_calls([c, u]), guided)


def test_a_weight_that_is_no_argument_is_measured():
    u, c = branches(2)
    assert infer_combiner([u, c], u + 3.3 * (c - u), candidates=[7.5]).weights == pytest.approx((3.3,), rel=1e-5)


def test_a_single_output_is_the_prediction_or_its_negative():
    (v,) = branches(1)
    assert infer_combiner([v], v, candidates=[]) == Combiner()
    assert infer_combiner([v], -v, candidates=[]) == Combiner(sign=-1)


def test_skipped_layers_add_a_third_output():
    # SD3's skip-layer guidance: u + 4 (c - u) + 2.5 (c - s) = u + 6.5 (c - u) - 2.5 (s - u)
    u, c, s = branches(3)
    found = infer_combiner([u, c, s], u + 4 * (c - u) + 2.5 * (c - s), candidates=[4.0])
    assert found.weights == pytest.approx((6.5, -2.5), rel=1e-5)


def test_equal_branches_do_not_tell_the_weight():
    u = branches(1)[0]
    assert infer_combiner([u, u.clone()], u, candidates=[7.5]) is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_no_combination_is_refused(count):
    """Trap: a pipeline that renormalises after guidance would otherwise be replayed as another policy."""
    outputs = branches(count)
    combined = sum(outputs)
    renormalised = combined / combined.flatten(1).norm(dim=1)[:, None, None]
    with pytest.raises(NotCombined, match=r"guidance_rescale.*`rollout.by_pipeline: true`"):
        infer_combiner(outputs, renormalised, candidates=[])


# ---------------------------------------------------------------- arguments


def test_rows_are_those_of_the_sample_in_every_part():
    # two parts (unguided, guided) of a batch of three; the unguided rows are equal and kept once
    rows = Rows(torch.tensor([[9.0, 9.0, 9.0, 1.0, 2.0, 3.0]])[..., None]).joined([])
    assert rows.values.flatten().tolist() == [9.0, 1.0, 2.0, 3.0]
    filled = rows.filled(torch.empty(4, 1), torch.tensor([2, 0, 2, 1]), torch.zeros(4).long(), 2)
    assert filled.flatten().tolist() == [9.0, 9.0, 9.0, 9.0, 3.0, 1.0, 3.0, 2.0]
    kept = rows.select(torch.tensor([2]), 2)
    assert kept.values.flatten().tolist() == [9.0, 3.0]
    assert kept.filled(torch.empty(1, 1), torch.tensor([0]), torch.tensor([0]), 2).flatten().tolist() == [9.0, 3.0]


def test_rows_that_change_with_the_step_are_those_of_the_step():
    first, second = Rows(torch.tensor([[1.0, 2.0]])), Rows(torch.tensor([[10.0, 20.0]]))
    both = first.joined([second])
    assert both.filled(torch.empty(3, 1), torch.tensor([1, 1, 0]), torch.tensor([0, 1, 1]), 1).tolist() == [2, 20, 10]
    assert both.select(torch.tensor([1]), 1).values.tolist() == [[2.0], [20.0]]


def test_a_timestep_is_a_number_for_one_step_and_a_vector_for_several():
    times = Scalar((torch.tensor(751),)).joined([Scalar((torch.tensor(501),))])
    x = torch.empty(3, 1)
    assert times.filled(x, torch.arange(3), torch.tensor([1, 1, 1]), 2).item() == 501
    mixed = times.filled(x, torch.arange(3), torch.tensor([1, 0, 1]), 2)
    assert (mixed.dtype, mixed.tolist()) == (torch.int64, [501, 751, 501, 501, 751, 501])


def test_a_constant_number_stays_one():
    """Trap: an attention scale is no timestep."""
    assert Scalar((0.5,)).joined([Scalar((0.5,))]).filled(torch.empty(2, 1), torch.arange(2), torch.arange(2), 1) == 0.5


def test_a_learned_variance_is_left_out():
    output = torch.arange(2 * 4.0).reshape(2, 4, 1, 1)
    parts = split_parts(output, 2, torch.Size([1, 2, 1, 1]))
    assert [part.flatten().tolist() for part in parts] == [[0.0, 1.0], [4.0, 5.0]]


def test_flux_position_ids_as_long_as_the_batch_are_no_rows():
    """Trap: 16 image tokens and 16 samples."""
    sampler, trajectory = trajectory_of(tiny_pipeline("flux"), tiny_call("flux", 16), 16)
    tables = [slot.value for slot in trajectory.tape.layouts[0].calls[0].slots if isinstance(slot, Table)]
    assert (16, 3) in [tuple(value.shape) for value in tables if isinstance(value, torch.Tensor)]
    assert sampler.parity(trajectory) <= 1e-6


def test_embeddings_are_kept_once_whatever_the_number_of_steps():
    pipeline = tiny_pipeline("sd3")
    sizes = [
        trajectory_of(pipeline, tiny_call("sd3", 2) | {"num_inference_steps": steps}, 2)[1].tape.nbytes
        for steps in (4, 8)
    ]
    embeddings = 4 * 4 * (7 * 32 + 64)  # two parts of two samples, float32
    assert embeddings <= sizes[0] < embeddings + 1000
    assert sizes[1] - sizes[0] == 4 * 4 * 4  # only the timesteps of four more steps: float32, two parts, two samples


def test_samples_of_one_prompt_share_its_embedding():
    pipeline = tiny_pipeline("sd15")
    call = tiny_call("sd15", 1)
    one = trajectory_with(pipeline, call, 1).tape.nbytes
    many = trajectory_with(pipeline, call | {"num_images_per_prompt": 8}, 8).tape.nbytes
    assert many == one


def trajectory_with(pipeline, call, count):
    return StochasticSampler(pipeline, SDEConfig(kind="ddim")).sample(call, seeds=range(count))


# ---------------------------------------------------------------- other ways to ask


@pytest.mark.parametrize("form", ["plain", "listed", "scalar_time", "negated", "interval"])
def test_a_pipeline_without_adapter_is_replayed(form):
    sampler, trajectory = trajectory_of(custom_pipeline(form), {"labels": [1, 2, 3]}, 3)
    rows, steps = trajectory.decisions()
    order = torch.randperm(len(rows))
    replayed = sampler.replay(trajectory, rows[order], steps[order])
    assert (replayed.log_prob - trajectory.log_prob[rows[order], steps[order]]).abs().max() <= 1e-6
    assert len(trajectory.tape.layouts) == (2 if form == "interval" else 1)


def test_the_number_of_rows_must_fit_the_seeds():
    network = custom_pipeline().network
    with Recorder(network, 2, []) as recorder:
        network(torch.zeros(3, 6), torch.tensor(1.0), torch.zeros(3).long())
    with pytest.raises(ValueError, match="answered with 3 rows for 2 seeds"):
        recorder._parts(recorder._answers[0])
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
