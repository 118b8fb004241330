"""Digits: tokens and back, judges of known quality, and measures whose answers can be worked out."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from rlalign_envs import digits
from rlalign_envs.digits import DigitJudge, frechet_distance, margin, measure, patchify, pictures, unpatchify


def held_out() -> tuple[np.ndarray, np.ndarray]:
    """The images that the generator does not see, as tokens."""
    images, labels = digits._split()[1]
    return patchify(images), labels


def test_patches_by_hand():
    image = np.arange(64.0).reshape(1, 8, 8)
    tokens = patchify(image)
    assert tokens.shape == (1, 16, 4)
    np.testing.assert_array_equal(tokens[0, 0], [0, 1, 8, 9])
    np.testing.assert_array_equal(tokens[0, 1], [2, 3, 10, 11])
    np.testing.assert_array_equal(tokens[0, 4], [16, 17, 24, 25])
    np.testing.assert_array_equal(unpatchify(tokens), image)


def test_training_set_keeps_the_held_out_images_out():
    samples, labels = digits.training_set(1200, seed=0)
    assert samples.shape == (1200, 16, 4) and samples.dtype == np.float32 and labels.dtype == np.int64
    assert samples.min() == -1 and samples.max() == 1
    kept = {row.tobytes() for row in samples.astype(np.float64)}
    assert len(held_out()[0]) == 597
    assert not any(row.tobytes() in kept for row in held_out()[0])
    again, _ = digits.training_set(50, seed=1)
    assert {row.tobytes() for row in again.astype(np.float64)} <= kept  # another seed changes the order, not the split
    with pytest.raises(ValueError, match="`count`=1201, but there are 1200"):
        digits.training_set(1201)


def test_the_weak_judge_is_weak_and_the_strong_one_strong():
    samples, labels = digits.training_set(1200, seed=0)
    found = DigitJudge().simulate(samples, labels)
    assert 0.88 < found["proxy_correct"].mean() < 0.96
    assert found["gold"].mean() > 0.97


def test_margin_is_positive_exactly_where_the_weak_judge_agrees():
    samples, labels = digits.training_set(200, seed=0)
    found = DigitJudge().simulate(samples, labels)
    np.testing.assert_array_equal(found["margin"] > 0, found["proxy_correct"] == 1)
    assert margin(samples, [str(k) for k in labels]) == found["margin"].tolist()
    wrong = DigitJudge().simulate(samples, (labels + 1) % 10)
    assert wrong["gold"].mean() < 0.03
    # without labels: of what the weak judge sees, so never negative
    assert DigitJudge().simulate(samples)["margin"].min() >= 0


def test_a_broken_image_is_unknown():
    samples, labels = digits.training_set(5, seed=0)
    samples[2, 0, 0] = np.inf
    samples[3, 0, 0] = np.nan
    found = DigitJudge().simulate(samples, labels)
    np.testing.assert_array_equal(np.isnan(found["gold"]), [False, False, False, True, False])  # infinite ink is ink
    assert margin(samples, labels.tolist())[3] is None


def test_ink_beyond_black_earns_nothing():
    samples, labels = digits.training_set(50, seed=0)
    judge = DigitJudge()
    loud = np.where(np.abs(samples) == 1, 3 * samples, samples)
    np.testing.assert_array_equal(judge.simulate(loud, labels)["margin"], judge.simulate(samples, labels)["margin"])


def test_the_judge_is_a_simulator_with_settings_that_are_json():
    import json

    from rlalign.diffusion.rewards import Simulator

    judge = DigitJudge()
    assert isinstance(judge, Simulator)
    assert {judge.proxy, judge.gold} <= set(judge.simulate(digits.training_set(3, seed=0)[0]))
    assert json.loads(json.dumps(judge.settings)) == judge.settings
    judge.close()


def test_frechet_distance_by_hand():
    rng = np.random.default_rng(0)
    cloud = rng.standard_normal((4000, 3))
    cloud = (cloud - cloud.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(cloud.T))).T  # mean 0, covariance 1
    # means 2 apart: 4. Deviations 3 against 1 in each of 3 dimensions: 3 (3 - 1)^2 = 12.
    assert frechet_distance(cloud, cloud) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(cloud + [2.0, 0, 0], cloud) == pytest.approx(4)
    assert frechet_distance(3 * cloud, cloud) == pytest.approx(12)


def test_measures_rank_real_images_noise_and_collapse():
    samples, labels = digits.training_set(600, seed=0)
    noise = np.random.default_rng(0).uniform(-1, 1, samples.shape)
    collapsed = np.stack([samples[labels == k][0] for k in labels])
    real, random, same = (measure(x, labels) for x in (samples, noise, collapsed))
    assert real["frechet_distance"] < 0.5 < 3 < min(random["frechet_distance"], same["frechet_distance"])
    assert np.mean(real["distance_to_data"]) < 0.6 * np.mean(random["distance_to_data"])
    assert same["diversity"] == pytest.approx(0, abs=1e-6) and real["diversity"] > 0.4
    assert real["gold_accuracy"] > 0.97 and random["gold_accuracy"] < 0.3


def test_distance_to_data_by_hand():
    reference = (np.stack([np.full((16, 4), -1.0), np.full((16, 4), 1.0)]), np.array([0, 0]))
    found = measure(np.stack([np.full((16, 4), -0.5), np.full((16, 4), 0.9)]), [0, 0], reference=reference)
    np.testing.assert_allclose(found["distance_to_data"], [0.5, 0.1])
    assert found["diversity"] == pytest.approx(1.4)


def test_pictures_are_dark_ink_on_white():
    tokens = np.full((1, 16, 4), -1.0)
    tokens[0, 0, 0], tokens[0, 0, 1], tokens[0, 0, 2] = 1.0, 5.0, np.nan
    drawn = pictures(tokens)
    assert drawn.dtype == np.uint8 and drawn.shape == (1, 8, 8)
    assert drawn[0, 0, 0] == 0 and drawn[0, 0, 1] == 0 and drawn[0, 7, 7] == 255


def test_wrong_labels_and_shapes_are_named():
    samples, _ = digits.training_set(3, seed=0)
    with pytest.raises(ValueError, match="expected 3 labels from 0 to 9, got 2"):
        DigitJudge().simulate(samples, [1, 2])
    with pytest.raises(ValueError, match=r"expected samples \[B, 16, 4\]"):
        DigitJudge().simulate(samples[:, :4])
