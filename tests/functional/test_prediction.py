"""Predictions of every kind against the sample and noise they were made of, and back again."""

import math

import pytest
import torch

from rlalign.functional.prediction import from_denoised, to_denoised

LEVELS = [0.02, 0.3, 0.7, 0.95]
KINDS = ["flow", "epsilon", "v_prediction", "v_prediction_sigma", "edm", "sample"]


def setting(kind, level):
    """A clean sample and noise, the noisy sample and the true prediction, and the arguments of the conversion."""
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    keep, add = math.sqrt(level), math.sqrt(1 - level)
    sigma = add / keep
    match kind:
        case "flow":
            x, prediction, known = (1 - level) * data + level * noise, noise - data, {"sigma": level}
        case "epsilon":
            x, prediction, known = keep * data + add * noise, noise, {"alpha_bar": level}
        case "v_prediction":
            x, prediction, known = keep * data + add * noise, keep * noise - add * data, {"alpha_bar": level}
        case "v_prediction_sigma":
            x, prediction, known = data + sigma * noise, keep * noise - add * data, {"sigma": sigma}
        case "edm":
            x, prediction, known = data + 14 * level * noise, noise, {"sigma": 14 * level}
        case _:
            x, prediction, known = data + noise, data, {}
    return data, x, prediction, {"kind": kind.removesuffix("_sigma"), **known}


def test_conversions_match_hand_arithmetic():
    x, p = torch.tensor([[5.0]]), torch.tensor([[2.0]])
    assert to_denoised(p, x, kind="flow", sigma=0.5).item() == 4.0  # 5 - .5 x 2
    assert to_denoised(p, x, kind="edm", sigma=3).item() == -1.0  # 5 - 3 x 2
    assert to_denoised(p, x, kind="epsilon", alpha_bar=0.64).item() == pytest.approx((5 - 0.6 * 2) / 0.8)
    assert to_denoised(p, x, kind="v_prediction", alpha_bar=0.64).item() == pytest.approx(0.8 * 5 - 0.6 * 2)
    assert to_denoised(p, x, kind="v_prediction", sigma=0.75).item() == pytest.approx(5 / 1.5625 - 0.6 * 2)
    assert to_denoised(p, x, kind="sample").item() == 2.0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_true_predictions_denoise_exactly_and_conversions_invert(kind, level):
    data, x, prediction, known = setting(kind, level)
    denoised = to_denoised(prediction, x, **known)
    torch.testing.assert_close(denoised, data)
    torch.testing.assert_close(from_denoised(denoised, x, **known), prediction)


@pytest.mark.parametrize("kind", ["flow", "epsilon", "v_prediction", "edm"])
def test_levels_may_differ_per_sample(kind):
    name = "sigma" if kind in ("flow", "edm") else "alpha_bar"
    generator = torch.Generator().manual_seed(1)
    x, prediction = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    levels = torch.tensor([0.2, 0.9], dtype=torch.float64)
    for convert in (to_denoised, from_denoised):
        got = convert(prediction, x, kind=kind, **{name: levels})
        for i in range(2):
            one = convert(prediction[i : i + 1], x[i : i + 1], kind=kind, **{name: float(levels[i])})
            torch.testing.assert_close(got[i : i + 1], one)


def test_half_precision_is_converted_in_float32():
    x, prediction = torch.randn(2, 4).bfloat16(), torch.randn(2, 4).bfloat16()
    denoised = to_denoised(prediction, x, kind="flow", sigma=0.0089)
    assert denoised.dtype == torch.float32
    torch.testing.assert_close(denoised, x.float() - 0.0089 * prediction.float())
    for kind, known in [("sample", {}), ("epsilon", {"alpha_bar": 0.5}), ("edm", {"sigma": 2.0})]:
        assert to_denoised(prediction, x, kind=kind, **known).dtype == torch.float32
        assert from_denoised(prediction, x, kind=kind, **known).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_differentiate(kind):
    _, x, prediction, known = setting(kind, 0.3)
    inputs = prediction.requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, x: to_denoised(p, x, **known), inputs)
    assert torch.autograd.gradcheck(lambda p, x: from_denoised(p, x, **known), inputs)


def test_levels_that_do_not_belong_to_the_kind_are_refused():
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="a flow prediction is converted at one noise level, given as `sigma` alone"):
        to_denoised(x, x, kind="flow", alpha_bar=0.5)
    with pytest.raises(ValueError, match="a v_prediction prediction is converted at one noise level"):
        to_denoised(x, x, kind="v_prediction", sigma=0.5, alpha_bar=0.5)
    with pytest.raises(ValueError, match=r"`sigma` of a flow prediction must lie in \[0, 1\], got 14.6"):
        to_denoised(x, x, kind="flow", sigma=14.6)
    with pytest.raises(ValueError, match=r"`alpha_bar` of a epsilon prediction must lie in"):
        to_denoised(x, x, kind="epsilon", alpha_bar=0.0)


@pytest.mark.parametrize(
    ("kind", "known"), [("flow", {"sigma": 0.0}), ("edm", {"sigma": 0.0}), ("epsilon", {"alpha_bar": 1.0})]
)
def test_without_noise_nothing_is_left_to_predict(kind, known):
    x = torch.ones(1, 2)
    torch.testing.assert_close(to_denoised(5 * x, x, kind=kind, **known), x)
    with pytest.raises(ValueError, match="there is no noise"):
        from_denoised(x, x, kind=kind, **known)
