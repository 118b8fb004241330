"""What a denoising step wants minimised: published vectors, Guard's weights, the whole loss against slow loops."""

import copy
import math

import pytest
import torch

from rlalign.diffusion.config import SDEConfig, StepObjective
from rlalign.diffusion.flow_grpo import FlowGRPOTrainer
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.step_objective import clips, kl_to, step_log_ratio, step_weights, surrogate
from rlalign.diffusion.tiny import tiny_pipeline
from rlalign.diffusion.trajectory import StepScore
from rlalign.functional.flow import gaussian_log_prob
from tests.diffusion.small_runs import brightness, points_pipeline, points_trainer, tiny_prompts
from tests.reference import flow_grpo as slow

GUARD = StepObjective()
PLAIN = StepObjective(ratio_norm=False, reweight=False)


def score(mean, std, x_next):
    log_prob = gaussian_log_prob(x_next, mean, std)
    return StepScore(mean=mean, std=std, log_prob=log_prob, prediction=torch.zeros_like(mean))


class Recorded:
    """What `step_log_ratio` reads of a trajectory of one step."""

    def __init__(self, mean, std, x_next):
        self.means, self.log_prob = mean[:, None], gaussian_log_prob(x_next, mean, std)[:, None]

    def mean_of(self, rows, steps):
        return self.means[rows, steps]


def both_ratios(mean_old, mean, x_next, s, **bias):
    std = torch.full((len(mean),), s, dtype=torch.float64)
    rows, steps = torch.arange(len(mean)), torch.zeros(len(mean), dtype=torch.long)
    new, old = score(mean, std, x_next), Recorded(mean_old, std, x_next)
    return [step_log_ratio.__wrapped__(cfg, new, old, rows, steps) for cfg in (PLAIN, StepObjective(**bias))]


def doubles(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_first_published_vector():
    # sigma_t = .5 and dt = .04, so s = .1; the drift is (.02² + .01² + .03² + .04²) / 4 = 7.5e-4
    mean_old, mean, x = (
        doubles([0.10, -0.20, 0.30, 0]),
        doubles([0.12, -0.21, 0.27, 0.04]),
        doubles([0.15, -0.30, 0.35, -0.05]),
    )
    plain, guarded = both_ratios(mean_old, mean, x, 0.1)
    torch.testing.assert_close(plain, doubles(-0.075)[0:1], rtol=0, atol=1e-12)
    torch.testing.assert_close(guarded, doubles(-0.00375)[0:1], rtol=0, atol=1e-12)
    cfg = StepObjective(clip_low=1e-3, clip_high=1e-3)
    for advantage, loss, weighted in ((1.0, -0.996257022, -24.906426), (-1.0, 0.999, 24.975)):
        found = surrogate(cfg, guarded, torch.tensor([advantage], dtype=torch.float64), 4)
        assert found.item() == pytest.approx(loss, abs=5e-10)
        assert found.item() / 0.04 == pytest.approx(weighted, abs=5e-7)


def test_the_second_published_vector_tells_the_authors_slip_from_the_paper():
    mean_old, mean = torch.zeros(2, 4, dtype=torch.float64), doubles([0.1, 0, 0, 0], [0.3, -0.3, 0.3, -0.3])
    x = doubles([0.2, -0.1, 0, 0.1], [-0.1, 0.2, -0.2, 0.1])
    plain, guarded = both_ratios(mean_old, mean, x, 0.2)
    assert plain.tolist() == pytest.approx([0.09375, -2.25], abs=1e-12)
    assert guarded.tolist() == pytest.approx([0.025, -0.225], abs=1e-12)
    assert both_ratios(mean_old, mean, x, 0.2, authors_bias=True)[1].tolist() == pytest.approx([0.134375, -0.334375])


def test_the_authors_average_stays_within_a_step():
    mean_old, mean = torch.zeros(2, 4, dtype=torch.float64), doubles([0.1, 0, 0, 0], [0.3, -0.3, 0.3, -0.3])
    x, std = doubles([0.2, -0.1, 0, 0.1], [-0.1, 0.2, -0.2, 0.1]), torch.full((2,), 0.2, dtype=torch.float64)
    old = Recorded(mean_old, std, x)
    old.means, old.log_prob = old.means.expand(-1, 2, -1), old.log_prob.expand(-1, 2)
    steps = torch.tensor([0, 1])  # two samples at two steps: each average is over one sample
    found = step_log_ratio.__wrapped__(
        StepObjective(authors_bias=True), score(mean, std, x), old, torch.arange(2), steps
    )
    assert found.tolist() == pytest.approx([0.025, -0.225], abs=1e-12)


def test_clips_scale_with_the_latents_and_a_number_stands():
    assert clips(GUARD, 65536) == pytest.approx((2e-6, 2e-6), rel=0.01)
    assert clips(PLAIN, 65536) == pytest.approx((1e-4, 1e-4), rel=0.02)
    assert clips(StepObjective(clip_low=0.1), 30) == pytest.approx((0.1, 9.3e-5), rel=0.01)


def test_kl_of_two_steps_is_that_of_gaussians():
    # means .2 apart at s = .1 in one of two dimensions: (.04 / .02) / 2
    std = torch.tensor([0.1])
    one, other = (score(torch.tensor([[m, 0.5]]), std, torch.zeros(1, 2)) for m in (0.0, 0.2))
    torch.testing.assert_close(kl_to(one, other), torch.tensor([1.0]))


def drawn(kind, pipeline, call, *, noise_level=0.5, **more):
    sampler = StochasticSampler(pipeline, SDEConfig(kind=kind, noise_level=noise_level), **more)
    return sampler, sampler.sample(call, seeds=[1, 2])


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_guards_weights_have_mean_1_over_the_trained_steps_and_the_published_shape(kind):
    _, trajectory = drawn(kind, tiny_pipeline("sd3"), tiny_call_of("sd3"))
    weights, levels = step_weights(GUARD, trajectory), [*trajectory.level.tolist(), 0.0]
    trained = trajectory.scored[0]
    assert trained.tolist() == [True, True, True, False]
    assert weights[:, trained].mean().item() == pytest.approx(1, abs=1e-6)
    expected = torch.tensor([slow.weight(kind, levels, t, 0.5) for t in range(3)])
    torch.testing.assert_close(weights[0, :3], (expected / expected.mean()), rtol=1e-5, atol=0)
    if kind == "flow_sde":  # proportional to 1 / dt: weight x dt is one number
        products = weights[0, :3] * (trajectory.level - trajectory.level_next)[:3]
        torch.testing.assert_close(products, products[:1].expand(3), rtol=1e-5, atol=0)


def test_without_reweighting_and_with_a_window_weights_are_what_they_say():
    sampler, trajectory = drawn("flow_sde", tiny_pipeline("sd3"), tiny_call_of("sd3"), window=(1, 3))
    assert torch.equal(step_weights(PLAIN, trajectory), torch.ones(2, 4))
    weights = step_weights(GUARD, trajectory)
    assert weights[0, 1:3].mean().item() == pytest.approx(1, abs=1e-6)
    assert weights[0, [0, 3]].tolist() == [1, 1]


def tiny_call_of(kind):
    rows, rest = tiny_prompts(kind)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | rest | {"num_inference_steps": 4}


SETTINGS = {
    "plain": {"ratio_norm": False, "reweight": False},
    "guard": {"ratio_norm": True, "reweight": True},
    "only_normalised": {"ratio_norm": True, "reweight": False},
    "only_reweighted": {"ratio_norm": False, "reweight": True},
    "authors": {"ratio_norm": True, "reweight": True, "authors_bias": True},
    "kl": {"ratio_norm": True, "reweight": True, "kl_coef": 0.3},
}
NOISE = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8, "ddim": 1.0}


def shaken(trainer, size=0.3):
    """Move the adapter, so that ratios differ from 1 and some are clipped."""
    source = torch.Generator().manual_seed(5)
    for parameter in trainer.tuned.parameters.values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=source))


def step_of(trainer):
    """A rollout as a batch, and the whole loss and its gradient after the policy has moved."""
    trainer.step = 1  # the parity check of step 0 needs an open run
    batch = trainer.weighted(trainer.estimator(trainer.collect()))
    shaken(trainer)
    return batch, *gradient_of(trainer, batch)


def gradient_of(trainer, batch):
    total, denominator = 0.0, int(batch.mask.sum())
    for piece, rows, steps, at in trainer.micro_batches(trainer.with_signal(batch)):
        part = trainer.loss(trainer.with_signal(batch), piece, rows, steps, at, denominator)
        part.backward()
        total += part.item()
    gradient = {name: p.grad.clone() for name, p in trainer.tuned.parameters.items()}
    trainer.tuning.optimizer.zero_grad()
    return total, gradient


def compared(trainer, kind, batch, predict_with, levels, name, clip):
    """Loss and gradient by the slow loops, in float64, with the adapter's current weights."""
    denoiser = copy.deepcopy(trainer.tuned.denoiser).double()
    frozen = copy.deepcopy(denoiser)
    frozen.disable_adapters()
    piece = trainer.drawn.trajectories[0]
    settings = {"authors_bias": False, "kl_coef": 0.0} | SETTINGS[name] | {"clip": clip}
    expected = slow.loss(
        predict_with(denoiser),
        predict_with(frozen),
        latents=piece.latents.double(),
        means=piece.means.double(),
        levels=levels,
        trained=range(piece.steps - 1),
        kind=kind,
        noise_level=NOISE[kind],
        advantage=slow.advantages(batch.outcome.tolist(), batch.group.tolist()),
        settings=settings,
    )
    expected.backward()
    return expected.item(), {n: p.grad for n, p in denoiser.named_parameters() if p.requires_grad}


def assert_same_step(found, gradient, expected, expected_gradient):
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    scale = max(g.abs().max() for g in expected_gradient.values())
    assert gradient.keys() == expected_gradient.keys() and scale > 1e-4
    for name, value in expected_gradient.items():
        torch.testing.assert_close(gradient[name].double(), value, rtol=0, atol=2e-4 * scale.item(), msg=name)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_loss_and_gradient_are_those_of_the_papers(tmp_path, kind, name):
    clip = 0.01
    objective = SETTINGS[name] | {"clip_low": clip, "clip_high": clip}
    rollout = {"sde": {"kind": kind, "noise_level": NOISE[kind]}, "prompts_per_step": 2, "group_size": 3}
    trainer = points_trainer(tmp_path / "run", rollout=rollout, objective=objective, call={"guidance_scale": 2.0})
    batch, found, gradient = step_of(trainer)
    labels = batch.prompt_id.tolist()
    levels = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]  # five even levels, as `ConditionalFlowPipeline` takes them

    def predict_with(denoiser):
        def predict(row, step, x):
            time = torch.tensor([1000 * levels[step]], dtype=torch.float64)
            with_label, without = (
                denoiser(hidden_states=x[None], timestep=time, labels=torch.tensor([label]))[0][0]
                for label in (labels[row], 2)
            )
            return without + 2.0 * (with_label - without)

        return predict

    assert_same_step(found, gradient, *compared(trainer, kind, batch, predict_with, levels, name, clip))


@pytest.mark.parametrize("name", ["plain", "guard", "kl"])
def test_loss_and_gradient_of_ddpo_on_ddim_steps(tmp_path, name):
    clip, kind = 0.01, "ddim"
    pipeline = tiny_pipeline("sd15")
    embeddings = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(3))
    trainer = FlowGRPOTrainer(
        pipeline,
        [{"prompt_embeds": row} for row in embeddings],
        brightness,
        run_dir=tmp_path / "run",
        lora={"r": 2, "alpha": 6.0},
        rollout={
            "prompts_per_step": 1,
            "group_size": 3,
            "num_inference_steps": 3,
            "sde": {"kind": "ddim", "noise_level": 1.0},
        },
        minibatches=1,
        objective=SETTINGS[name] | {"clip_low": clip, "clip_high": clip},
        call={"height": 8, "width": 8, "guidance_scale": 1.0},
    )
    batch, found, gradient = step_of(trainer)
    betas = torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)
    times = [667, 334, 1]  # "leading" spacing with an offset of 1
    levels = [kept[t].item() for t in times] + [kept[0].item()]

    def predict_with(denoiser):
        def predict(row, step, x):
            states = embeddings[batch.prompt_id[row]].double()[None]
            return denoiser(x[None], times[step], encoder_hidden_states=states, return_dict=False)[0][0]

        return predict

    assert_same_step(found, gradient, *compared(trainer, kind, batch, predict_with, levels, name, clip))


@pytest.mark.parametrize("name", ["plain", "guard", "kl"])
def test_micro_batches_pieces_and_dead_groups_do_not_change_the_gradient(tmp_path, name):
    def only_one_group(samples, prompts):
        return [float(sample[0, 0]) if prompt == 0 else 1.0 for sample, prompt in zip(samples, prompts, strict=True)]

    found = []
    for number, (micro_batch, batch_size) in enumerate(((64, 64), (1, 64), (5, 4))):
        trainer = points_trainer(
            tmp_path / str(number),
            only_one_group,
            optim={"micro_batch": micro_batch},
            rollout={"batch_size": batch_size, "prompts_per_step": 2, "group_size": 3, "num_inference_steps": 3},
            objective=SETTINGS[name],
        )
        batch, loss, gradient = step_of(trainer)
        found.append((loss, gradient))
        assert int(trainer.with_signal(batch).mask.sum()) == (12 if name == "kl" else 6)
    trainer.with_signal = lambda batch: batch  # nothing is dropped
    found.append(gradient_of(trainer, batch))
    # With everything kept the constant groups' share of the value is their advantage, 0.
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-5)
        for key, value in found[0][1].items():
            torch.testing.assert_close(gradient[key], value, rtol=1e-3, atol=1e-6)


def test_the_reference_that_kl_pulls_to_is_the_generator_as_it_came(tmp_path):
    """With full tuning it is a copy that is swapped in while the loss has a graph on the live weights."""
    pipeline = points_pipeline()
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    trainer = points_trainer(tmp_path / "run", pipeline=pipeline, lora=None, objective={"kl_coef": 1.0})
    _, _, gradient = step_of(trainer)
    assert all(bool(value.isfinite().all()) for value in gradient.values())
    with trainer.tuned.reference():
        assert all(torch.equal(value, before[name]) for name, value in pipeline.transformer.state_dict().items())
    assert not torch.equal(pipeline.transformer.out.weight, before["out.weight"])
