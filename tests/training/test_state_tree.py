"""Nested state -> JSON tree + tensors -> the same state, bit for bit."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from rlalign.training.state_tree import StateTreeError, decode, encode

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.bool, torch.complex64),
)


def there_and_back(state: Any) -> Any:
    tree, tensors = encode(state)
    return decode(json.loads(json.dumps(tree, allow_nan=False)), tensors)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -1, 2**200, 0.1, -0.0, 5e-324, "", "naïve \u2028 \x00", [], {}, ()),
        [1, [2, [3, None]], "4"],
        (1, (2.5, [True]), {}),
        {"a": {"b": [None, {"c": ()}]}},
        {0: "int", "0": "str", 2: {1: 3}},
        {True: "bool", "True": "str", None: 1, 2.5: 2},
        {"$": "tensor", "name": "not one of ours"},
        {"": 1, "a.b": 2, "a": {"b": 3}},
    ],
    ids=repr,
)
def test_plain_values_keep_value_type_and_key_order(value: Any) -> None:
    got = there_and_back(value)
    assert got == value
    # repr tells 1 from True and 1.0, -0.0 from 0.0, tuples from lists, and shows the order of keys
    assert repr(got) == repr(value)


def test_non_finite_floats_pass_through_strict_json() -> None:
    got = there_and_back({"nan": math.nan, "inf": [math.inf, -math.inf]})
    assert math.isnan(got["nan"])
    assert got["inf"] == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_names_are_the_keys_of_a_flat_dict_and_nothing_is_copied(dtype: torch.dtype) -> None:
    value = torch.zeros(3, dtype=torch.uint8).to(dtype)
    _, tensors = encode({"layer.weight": value})
    assert list(tensors) == ["layer.weight"]
    assert tensors["layer.weight"].data_ptr() == value.data_ptr()


def test_names_that_would_collide_stay_apart() -> None:
    state = {"a.b": torch.tensor([1.0]), "a": {"b": torch.tensor([2.0])}, 0: torch.tensor(3.0), "0": torch.tensor(4.0)}
    got = there_and_back(state)
    assert [got["a.b"].item(), got["a"]["b"].item(), got[0].item(), got["0"].item()] == [1.0, 2.0, 3.0, 4.0]


def test_tied_tensors_are_stored_once_and_come_back_tied() -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    tree, tensors = encode({"wte": weight, "lm_head": weight.detach(), "other": weight.detach().clone()})
    assert list(tensors) == ["wte", "other"]
    got = decode(tree, tensors)
    assert got["wte"] is got["lm_head"]
    assert got["wte"] is not got["other"]


def test_views_of_one_storage_are_stored_apart_with_their_own_values() -> None:
    base = torch.arange(12.0)
    state = {"all": base, "head": base[:3], "square": base.view(3, 4), "bits": base.view(torch.int32)}
    tree, tensors = encode(state)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(pointers) == 4
    for name, value in decode(tree, tensors).items():
        assert torch.equal(value, state[name])


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    ],
    ids=["transposed", "channels_last", "permuted"],
)
def test_dense_tensors_keep_their_strides(value: torch.Tensor) -> None:
    got = there_and_back({"a": value, "tied": value})
    assert torch.equal(got["a"], value)
    assert got["a"].stride() == value.stride()
    assert got["a"] is got["tied"]


def test_a_strided_slice_and_an_expanded_tensor_become_plain_ones() -> None:
    value = torch.arange(10.0)[::2]
    got = there_and_back([value, torch.tensor([7.0]).expand(3)])
    assert torch.equal(got[0], value)
    assert got[0].stride() == (1,)
    assert got[1].tolist() == [7.0, 7.0, 7.0]


def test_conjugate_views_are_resolved_and_not_taken_for_their_base() -> None:
    base = torch.tensor([1.0 + 2.0j, 3.0 - 1.0j])
    got = there_and_back({"base": base, "conjugate": base.conj()})
    assert torch.equal(got["base"], base)
    assert got["conjugate"].tolist() == [1.0 - 2.0j, 3.0 + 1.0j]
    assert not got["conjugate"].is_conj()


class Computed(Mapping[str, torch.Tensor]):
    """Every look-up makes a new tensor, whose memory is free again once it is dropped."""

    def __getitem__(self, key: str) -> torch.Tensor:
        if not key.isdigit():
            raise KeyError(key)
        return torch.full((1,), float(key)).expand(2000)

    def __iter__(self) -> Iterator[str]:
        return (str(number) for number in range(20))

    def __len__(self) -> int:
        return 20


def test_tensors_that_live_only_during_the_walk_are_not_taken_for_tied() -> None:
    got = there_and_back(Computed())
    assert [int(value[0]) for value in got.values()] == list(range(20))


def test_two_empty_tensors_are_not_tied() -> None:
    got = there_and_back({"a": torch.empty(0, 3), "b": torch.empty(2, 0, dtype=torch.int64)})
    assert (got["a"].shape, got["b"].shape, got["b"].dtype) == ((0, 3), (2, 0), torch.int64)


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64", "uint32", "bool", "uint8"])
def test_numpy_arrays_come_back_as_numpy_arrays(dtype: str) -> None:
    value = np.arange(6).reshape(2, 3).astype(dtype)
    got = there_and_back({"array": value, "scalar": value[0, 1:2].reshape(())})
    assert isinstance(got["array"], np.ndarray)
    np.testing.assert_array_equal(got["array"], value, strict=True)
    assert got["scalar"].shape == ()


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", np.float32(1.0), np.int64(3), lambda: 0, 1j])
def test_other_types_are_refused_with_their_place(value: Any) -> None:
    with pytest.raises(StateTreeError, match=r"'sampler' > '1'.*State may hold"):
        encode({"sampler": [0, value]})


def test_tuple_keys_and_sparse_tensors_are_refused() -> None:
    with pytest.raises(StateTreeError, match="key of type tuple"):
        encode({"a": {(1, 2): 3}})
    with pytest.raises(StateTreeError, match="sparse"):
        encode({"a": torch.eye(2).to_sparse()})
    with pytest.raises(StateTreeError, match="meta"):
        encode({"a": torch.empty(2, device="meta")})


@pytest.mark.parametrize(
    "tree",
    [
        {"$": "tensor", "name": "absent"},
        {"$": "tensor"},
        {"$": "exec", "value": "print(1)"},
        {"$": ["list"]},
        {"$": "float", "value": "__import__('os')"},
        {"$": "dict", "items": [[1]]},
        {"$": "dict", "items": [[[1], 2]]},
        {"$": "array", "tensor": 3},
        {"$": "tensor", "name": "here", "stride": [10**15, 1]},
        {"$": "tensor", "name": "here", "stride": "ab"},
    ],
    ids=str,
)
def test_hostile_trees_raise_one_kind_of_error(tree: Any) -> None:
    with pytest.raises(StateTreeError):
        decode({"a": [tree]}, {"here": torch.zeros(2, 2)})
