"""Seeds and random state."""

import json
import random

import numpy as np
import pytest
import torch

from rlalign.training.checkpoint import Checkpoints
from rlalign.training.seeding import derived_seed, generator, rng_state, seed_everything, set_rng_state


def draw() -> list[float]:
    values = [random.random(), random.gauss(0.0, 1.0), float(np.random.rand()), float(np.random.randn())]  # noqa: NPY002
    return [*values, float(torch.rand(())), float(torch.randn(()))]


def test_the_same_seed_gives_the_same_draws_and_another_does_not() -> None:
    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    seed_everything(4)
    assert not set(draw()) & set(first)


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1])
def test_seeds_beyond_numpys_range_are_accepted(seed: int) -> None:
    seed_everything(seed)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="`seed` must be an integer in"):
        seed_everything(seed)


def test_derived_seed_is_the_first_63_bits_of_a_sha256() -> None:
    # echo -n '[0, "generate", 3]' | sha256sum  ->  its first 16 hex digits, shifted right by one bit
    assert derived_seed(0, "generate", 3) == 7537021512665904260
    assert 0 <= derived_seed(2**80, "x") < 2**63


def test_derived_seeds_tell_types_order_and_grouping_of_keys_apart() -> None:
    keys = [(), (1,), ("1",), (1, 2), (2, 1), (12,), ("1", "2"), ("12",), ('1", "2',)]
    assert len({derived_seed(7, *key) for key in keys}) == len(keys)


def test_generators_of_equal_keys_agree_and_ignore_the_global_one() -> None:
    first = torch.rand(4, generator=generator(0, "minibatch", 5))
    torch.manual_seed(99)
    assert torch.equal(torch.rand(4, generator=generator(0, "minibatch", 5)), first)
    assert not torch.equal(torch.rand(4, generator=generator(0, "minibatch", 6)), first)


def test_rng_state_survives_a_checkpoint_bit_for_bit(tmp_path) -> None:
    # one Gaussian more leaves Python's and NumPy's second one cached, which is part of the state
    random.gauss(0.0, 1.0)
    np.random.randn()  # noqa: NPY002
    state = rng_state()
    assert state["python"]["gauss"] is not None
    assert state["numpy"]["has_gauss"] == 1
    Checkpoints(tmp_path).save(1, {"rng": state})
    loaded = Checkpoints(tmp_path).load().state["rng"]
    set_rng_state(state)
    expected = [draw() for _ in range(3)]
    set_rng_state(loaded)
    assert [draw() for _ in range(3)] == expected


def test_reading_the_state_draws_nothing_and_does_not_alias() -> None:
    before = rng_state()
    again = rng_state()
    assert torch.equal(before["torch"], again["torch"])
    set_rng_state(before)
    expected = draw()
    set_rng_state(before)
    assert draw() == expected


def test_a_cuda_state_is_refused_where_there_is_no_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    state = rng_state() | {"cuda": torch.zeros(16, dtype=torch.uint8)}
    expected = rng_state()["torch"]
    with pytest.raises(ValueError, match="no CUDA device"):
        set_rng_state(state)
    assert torch.equal(rng_state()["torch"], expected)


def test_numpy_part_is_json_but_for_its_key() -> None:
    state = rng_state()["numpy"]
    assert state.pop("key").shape == (624,)
    assert json.loads(json.dumps(state)) == state
