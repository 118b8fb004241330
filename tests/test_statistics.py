"""Running moments: the same numbers however a stream is cut into batches, ranks and runs."""

import math

import pytest
import torch

from rlalign.statistics import RunningMoments

NAN = math.nan


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def moments_of(*batches, shape=()):
    moments = RunningMoments(shape)
    for batch in batches:
        moments.update(batch)
    return moments


def test_moments_match_hand_arithmetic():
    # 1 3 | 5: mean 3, squared deviations 4 + 0 + 4
    moments = moments_of(f64([1.0, 3.0]), f64([5.0]))
    assert int(moments.count) == 3
    assert moments.mean.item() == 3.0
    assert moments.variance().item() == 4.0
    assert moments.variance(unbiased=False).item() == pytest.approx(8 / 3)
    assert moments.std().item() == 2.0
    assert (moments.lowest.item(), moments.highest.item()) == (1.0, 5.0)


@pytest.mark.parametrize("cuts", [[100], [1] * 100, [50, 50], [1, 98, 1], [7, 33, 60]])
def test_any_cut_of_the_stream_gives_its_moments(cuts):
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = moments_of(*x.split(cuts), shape=(3,))
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.variance(), x.var(0))
    assert moments.lowest.tolist() == x.amin(0).tolist()
    assert moments.highest.tolist() == x.amax(0).tolist()


def test_ranks_merge_into_the_whole_in_any_order():
    x = torch.randn(4, 25, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * f64([[1], [5], [9], [2]])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        whole = RunningMoments()
        for rank in order:
            whole.merge(moments_of(x[rank]))
        assert int(whole.count) == 100
        torch.testing.assert_close(whole.mean, x.mean())
        torch.testing.assert_close(whole.variance(), x.var())


def test_merging_nothing_changes_nothing():
    moments = moments_of(f64([1.0, 2.0]))
    before = moments.state_dict()
    moments.merge(RunningMoments())
    moments.update(torch.zeros(0))
    moments.update(f64([NAN]), mask=torch.tensor([False]))
    assert all(torch.equal(before[name], value) for name, value in moments.state_dict().items())
    empty = RunningMoments()
    empty.merge(moments)
    assert all(torch.equal(before[name], value) for name, value in empty.state_dict().items())


def test_masked_observations_do_not_count_whatever_they_are():
    moments = RunningMoments()
    moments.update(f64([[1.0, NAN], [3.0, math.inf]]), mask=torch.tensor([[True, False], [True, False]]))
    assert (int(moments.count), moments.mean.item(), moments.variance().item()) == (2, 2.0, 2.0)
    vectors = RunningMoments((2,))
    vectors.update(f64([[[1.0, 2.0], [NAN, NAN]]]), mask=torch.tensor([[True, False]]))
    assert vectors.mean.tolist() == [1.0, 2.0]


def test_a_large_offset_and_a_long_stream_cost_no_digits():
    # 1e8 ± 1 in many small float32 batches: sums of squares would need 16 digits more than there are
    moments = RunningMoments()
    for _ in range(2000):
        moments.update(torch.tensor([99_999_992.0, 100_000_008.0]))
    assert moments.mean.item() == pytest.approx(1e8, abs=1e-6)
    assert moments.variance(unbiased=False).item() == pytest.approx(64, rel=1e-9)


def test_thirds_are_exact_to_double_precision():
    # one part in three: a quotient of integer tensors would be rounded to float32 here
    assert moments_of(f64([0.0, 0.0]), f64([1.0])).mean.item() == pytest.approx(1 / 3, abs=1e-16)


def test_one_observation_has_no_variance_and_none_has_none():
    assert RunningMoments().variance().item() == 0.0
    assert moments_of(f64([7.0])).variance().item() == 0.0
    assert moments_of(f64([7.0])).variance(unbiased=False).item() == 0.0


def test_normalize_centres_and_scales_in_the_dtype_given():
    moments = moments_of(f64([1.0, 3.0]))
    assert moments.normalize(torch.tensor([1.0, 2.0, 4.0]), eps=0.0).tolist() == [-1.0, 0.0, 2.0]
    assert moments.normalize(torch.ones(2, dtype=torch.float32)).dtype == torch.float32
    assert moments_of(f64([5.0])).normalize(f64([6.0])).tolist() == [6.0]  # too early to tell
    assert moments_of(f64([5.0, 5.0])).normalize(f64([5.0])).tolist() == [0.0]


def test_a_restored_object_goes_on_bit_for_bit():
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(2))
    whole, first = moments_of(x[:30], x[30:], shape=(2,)), moments_of(x[:30], shape=(2,))
    restored = RunningMoments((2,))
    restored.load_state_dict(first.state_dict())
    first.update(torch.full((1, 2), 1e9))  # the state is a copy: what happens to its origin does not reach it
    restored.update(x[30:])
    for name, value in whole.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value)


def test_observations_that_would_poison_the_statistics_are_refused_and_leave_them_alone():
    moments = moments_of(f64([1.0, 2.0]))
    for bad in (NAN, math.inf):
        with pytest.raises(ValueError, match="non-finite observations"):
            moments.update(f64([1.0, bad]))
    assert (int(moments.count), moments.mean.item()) == (2, 1.5)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"must end in shape \[3\], got \[4, 2\]"):
        RunningMoments((3,)).update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"must end in shape \[3\], got \[\]"):
        RunningMoments((3,)).update(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"mask must be \[4\], got \[2\]"):
        RunningMoments((2,)).update(torch.zeros(4, 2), mask=torch.ones(2).bool())
    with pytest.raises(ValueError, match=r"shape \[\] cannot take in shape \[2\]"):
        RunningMoments().merge(RunningMoments((2,)))


def test_a_state_that_does_not_fit_is_refused():
    state = RunningMoments((2,)).state_dict()
    with pytest.raises(ValueError, match=r"of shape \[\], got \[2\]"):
        RunningMoments().load_state_dict(state)
    del state["squares"]
    with pytest.raises(ValueError, match="running moments consist of"):
        RunningMoments((2,)).load_state_dict(state)
