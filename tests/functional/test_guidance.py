"""Guidance: worked vectors, the paper's loop, invariances, limits, gradients."""

import pytest
import torch

from rlalign.functional.guidance import adaptive_projected, classifier_free
from rlalign.functional.prediction import from_denoised, to_denoised
from tests.reference import diffusion as reference

OFF = {"eta": 1.0, "norm_threshold": 0, "momentum": 0.0}
PAPER = {"eta": 0.0, "norm_threshold": 2.5, "momentum": -0.5}


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


COND, UNCOND = f64([[3.0, 4.0, 0.0, 0.0]]), f64([[1.0, 0.0, 2.0, 0.0]])


def random_pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))


def test_classifier_free_matches_the_worked_vector():
    assert classifier_free(COND, UNCOND, scale=5).tolist() == [[11.0, 20.0, -8.0, 0.0]]
    assert torch.equal(classifier_free(COND, UNCOND, scale=1), COND)
    assert torch.equal(classifier_free(COND, UNCOND, scale=0), UNCOND)


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"eta": 0.0, "norm_threshold": 0}, [0.44, 5.92, -8.0, 0.0]),
        ({"eta": 0.0, "norm_threshold": 2.5}, [1.693606, 4.979796, -4.082483, 0.0]),
        ({"eta": 0.5, "norm_threshold": 2.5}, [4.388044, 8.572380, -4.082483, 0.0]),
    ],
)
def test_adaptive_projected_matches_the_worked_vectors(settings, want):
    guided, running = adaptive_projected(COND, UNCOND, scale=5, momentum=-0.5, **settings)
    assert guided[0].tolist() == pytest.approx(want, abs=1e-6)
    assert running.tolist() == [[2.0, 4.0, -2.0, 0.0]]


def test_momentum_matches_the_worked_vector_of_a_second_step():
    """m = [1, 1, 1, 1] - 1/2 [2, 4, -2, 0] = [0, -1, 2, 1], 2.449 long: under the limit. Trap: m is kept unlimited."""
    _, running = adaptive_projected(COND, UNCOND, scale=5, **PAPER)
    guided, second = adaptive_projected(COND, COND - 1, scale=5, running=running, **PAPER)
    assert second.tolist() == [[0.0, -1.0, 2.0, 1.0]]
    assert guided[0].tolist() == pytest.approx([4.92, 2.56, 8.0, 4.0])


@pytest.mark.parametrize("settings", [OFF, PAPER, {"eta": 0.3, "norm_threshold": 100, "momentum": -0.75}])
def test_three_steps_agree_with_the_papers_loop(settings):
    running, before = None, [[0.0] * 12] * 2
    for step in range(3):
        cond, uncond = random_pair(2, 3, 4, seed=step)
        guided, running = adaptive_projected(cond, uncond, scale=7.5, running=running, **settings)
        for i in range(2):
            rows = cond[i].flatten().tolist(), uncond[i].flatten().tolist()
            want, now = reference.apg(
                *rows, 7.5, settings["eta"], settings["norm_threshold"], settings["momentum"], before[i]
            )
            assert guided[i].flatten().tolist() == pytest.approx(want)
            assert running[i].flatten().tolist() == pytest.approx(now)
        before = [row.flatten().tolist() for row in running]


def test_with_everything_off_it_is_classifier_free_guidance():
    cond, uncond = random_pair(2, 3, 4, 4)
    guided, _ = adaptive_projected(cond, uncond, scale=7.5, **OFF)
    torch.testing.assert_close(guided, classifier_free(cond, uncond, scale=7.5))


def test_a_scale_of_one_is_the_conditional_prediction_under_any_setting():
    cond, uncond = random_pair(2, 5)
    torch.testing.assert_close(adaptive_projected(cond, uncond, scale=1, **PAPER)[0], cond)


def test_without_the_parallel_part_the_update_is_orthogonal_and_limited():
    cond, uncond = random_pair(4, 3, 8)
    guided, _ = adaptive_projected(cond, uncond, scale=5, **PAPER)
    update = (guided - cond).flatten(1)
    torch.testing.assert_close((update * cond.flatten(1)).sum(1), torch.zeros(4, dtype=torch.float64))
    assert (update.norm(dim=1) <= 4 * 2.5 + 1e-9).all()


def test_samples_of_a_batch_do_not_touch_each_other():
    """Trap: norms and products run over each sample's own dimensions, four of them or two."""
    cond, uncond = random_pair(3, 2, 4, 4)
    together, _ = adaptive_projected(cond, uncond, scale=5, **PAPER)
    alone = torch.cat([adaptive_projected(cond[i : i + 1], uncond[i : i + 1], scale=5, **PAPER)[0] for i in range(3)])
    torch.testing.assert_close(together, alone)
    packed, _ = adaptive_projected(cond.reshape(3, 8, 4), uncond.reshape(3, 8, 4), scale=5, **PAPER)
    torch.testing.assert_close(packed.reshape(cond.shape), together)


def test_the_space_decides_what_is_projected():
    """Trap: at σ = .7, x = [5, 7, -2, 1], the same pair guided as velocities ends at another sample."""
    x, sigma = f64([[5.0, 7.0, -2.0, 1.0]]), 0.7
    velocities = [from_denoised(d, x, kind="flow", sigma=sigma) for d in (COND, UNCOND)]
    settings = {"scale": 5, "eta": 0.0, "norm_threshold": 2.5, "momentum": 0.0}
    denoised, _ = adaptive_projected(COND, UNCOND, **settings)
    as_velocity, _ = adaptive_projected(*velocities, **settings)
    other = to_denoised(as_velocity, x, kind="flow", sigma=sigma)
    assert (other - denoised).abs().max() > 0.5
    guided = [adaptive_projected(*pair, scale=5, **OFF)[0] for pair in ((COND, UNCOND), velocities)]
    torch.testing.assert_close(guided[0], to_denoised(guided[1], x, kind="flow", sigma=sigma))  # linear: no difference


def test_equal_and_empty_predictions_are_harmless():
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    cond, _ = random_pair(2, 4)
    for pair in ((cond, cond), (zeros, zeros)):
        inputs = [t.clone().requires_grad_() for t in pair]
        guided, _ = adaptive_projected(*inputs, scale=5, **PAPER)
        torch.testing.assert_close(guided, pair[0])
        guided.sum().backward()
        assert all(t.grad.isfinite().all() for t in inputs)
    guided, _ = adaptive_projected(zeros, zeros + 1, scale=5, **PAPER)  # no axis: nothing is parallel
    torch.testing.assert_close(guided, torch.full_like(zeros, -4.0))


def test_half_precision_is_computed_wide():
    cond, uncond = (t.bfloat16() for t in random_pair(2, 256))
    guided, running = adaptive_projected(cond, uncond, scale=5, **PAPER)
    assert guided.dtype == running.dtype == torch.float32
    exact, _ = adaptive_projected(cond.double(), uncond.double(), scale=5, **PAPER)
    torch.testing.assert_close(guided.double(), exact, rtol=1e-6, atol=1e-6)


def test_guidance_differentiates():
    cond, uncond = (t.requires_grad_() for t in random_pair(2, 3))
    running = random_pair(2, 3, seed=5)[0].requires_grad_()
    for limit in (0, 0.5, 100):
        assert torch.autograd.gradcheck(
            lambda c, u, m, limit=limit: adaptive_projected(
                c, u, scale=5, eta=0.3, norm_threshold=limit, momentum=-0.5, running=m
            ),
            (cond, uncond, running),
        )


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match="`norm_threshold` must be >= 0, and 0 switches the limit off; got -1"):
        adaptive_projected(COND, UNCOND, scale=5, eta=0.0, norm_threshold=-1, momentum=0.0)
    with pytest.raises(ValueError, match=r"`momentum` must lie in \(-1, 1\).* got 1.0"):
        adaptive_projected(COND, UNCOND, scale=5, eta=0.0, norm_threshold=0, momentum=1.0)
