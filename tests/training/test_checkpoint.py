"""Checkpoints: exact round trips, what is kept, what is required."""

import json
import math
import os
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from rlalign.optim.step import adamw, finite_step
from rlalign.training.checkpoint import CheckpointError, Checkpoints
from rlalign.training.seeding import rng_state

BIT_VIEW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    torch.bool,
)


def same_bits(a: Any, b: Any) -> bool:
    """Equal type, structure and bits; NaN equals itself, -0.0 differs from 0.0."""
    if isinstance(a, Tensor):
        if not isinstance(b, Tensor) or (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        flat = [t.detach().contiguous().reshape(-1).view(BIT_VIEW[t.element_size()]) for t in (a, b)]
        return torch.equal(*flat)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same_bits(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_bits, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


def random_bits(dtype: torch.dtype, count: int) -> Tensor:
    """Every bit pattern is as good as any other, so NaN payloads and denormals are among them."""
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,)).bool()
    return torch.randint(0, 256, (count * torch.empty((), dtype=dtype).element_size(),), dtype=torch.uint8).view(dtype)


def there_and_back(tmp_path, state: dict[str, Any]) -> dict[str, Any]:
    Checkpoints(tmp_path / "c").save(3, state)
    return Checkpoints(tmp_path / "c").load().state


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_survives_bit_for_bit_in_every_shape(tmp_path, dtype) -> None:
    state = {
        "model": {
            "vector": random_bits(dtype, 257),
            "matrix": random_bits(dtype, 15).view(3, 5),
            "scalar": random_bits(dtype, 1).view(()),
            "empty": random_bits(dtype, 0).view(0, 4),
        }
    }
    assert same_bits(there_and_back(tmp_path, state), state)


def test_non_finite_and_signed_zero_values_survive(tmp_path) -> None:
    state = {
        "loop": {"best": -math.inf, "loss": math.nan, "zero": -0.0},
        "t": torch.tensor([math.nan, -math.inf, -0.0]),
    }
    assert same_bits(there_and_back(tmp_path, state), state)


def test_nested_state_survives(tmp_path) -> None:
    state = {
        "loop": {"step": 3, "history": [1, [2.5, None, [True, "x"]], ()], "seen": {7: 0.5, "7": 1}, "none": None},
        "buffer": [{"tokens": torch.arange(4), "parts": {"len": torch.rand(2)}}, {"tokens": torch.empty(0).long()}],
        "rng": rng_state(),
        "count": 5,
    }
    assert same_bits(there_and_back(tmp_path, state), state)


def small_model(dtype: torch.dtype) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 5, bias=False))
    model[2].weight = model[0].weight
    return model.to(dtype)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(0, 5, (8,), generator=torch.Generator().manual_seed(seed))
    torch.nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1)).backward()
    finite_step(optimizer, model.named_parameters(), max_grad_norm=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["adamw_fused", "adamw_foreach", "adamw_amsgrad", "sgd", "adafactor"])
def test_training_resumed_from_a_checkpoint_equals_uninterrupted_training(tmp_path, kind, dtype) -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = small_model(dtype)
        match kind:
            case "sgd":
                return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
            case "adafactor":
                return model, torch.optim.Adafactor(model.parameters(), lr=0.1)
            case "adamw_amsgrad":
                return model, torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
        return model, adamw(model.named_parameters(), learning_rate=0.1, weight_decay=0.1, fused=kind == "adamw_fused")

    whole, whole_optimizer = build()
    for seed in range(6):
        step(whole, whole_optimizer, seed)

    first, first_optimizer = build()
    for seed in range(3):
        step(first, first_optimizer, seed)
    state = {"model": first.state_dict(), "optimizer": first_optimizer.state_dict()}
    loaded = there_and_back(tmp_path, {key: dict(value) for key, value in state.items()})
    assert same_bits(loaded["optimizer"], state["optimizer"])
    assert loaded["model"]["0.weight"] is loaded["model"]["2.weight"]

    resumed, resumed_optimizer = build()
    for parameter in resumed.parameters():
        parameter.data.zero_()
    resumed.load_state_dict(loaded["model"])
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    for seed in range(3, 6):
        step(resumed, resumed_optimizer, seed)
    assert same_bits(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert same_bits(resumed_optimizer.state_dict(), whole_optimizer.state_dict())


def test_the_model_file_is_ordinary_safetensors(tmp_path) -> None:
    model = small_model(torch.float32)
    path = Checkpoints(tmp_path).save(1, {"model": model.state_dict()})
    table = safetensors.torch.load_file(path / "model.safetensors")
    assert set(table) == {"0.weight", "1.weight", "1.bias"}
    assert torch.equal(table["1.weight"], model[1].weight)


def test_loaded_tensors_own_their_memory(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"model": {"w": torch.arange(4.0)}})
    loaded = checkpoints.load().state["model"]["w"]
    before = (path / "model.safetensors").read_bytes()
    loaded += 1
    assert (path / "model.safetensors").read_bytes() == before
    untouched = checkpoints.load().state["model"]["w"]
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-16, os.SEEK_END)
        file.write(bytes(16))
    assert loaded.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert untouched.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_saving_does_not_touch_the_state(tmp_path) -> None:
    state = {"model": {"w": torch.arange(6.0).view(2, 3).t()}, "loop": {"x": [1, (2,)]}}
    Checkpoints(tmp_path).save(1, state)
    assert state["model"]["w"].stride() == (1, 3)
    assert state["loop"] == {"x": [1, (2,)]}


def test_only_the_newest_are_kept(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.empty) == ([], None, True)
    for number in range(1, 6):
        checkpoints.save(number, {"n": number})
    assert (checkpoints.steps(), checkpoints.empty) == ([4, 5], False)
    assert checkpoints.latest() == tmp_path / "ckpt-000005"
    assert (tmp_path / "latest").read_text() == "ckpt-000005\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt-000004", "ckpt-000005", "latest"]


def test_newest_means_saved_last_after_training_went_back(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=4)
    for number in (10, 20, 30):
        checkpoints.save(number, {"branch": "first"})
    assert checkpoints.load(tmp_path / "ckpt-000010").step == 10
    checkpoints.save(11, {"branch": "second"})
    assert checkpoints.load().step == 11
    assert checkpoints.latest() == tmp_path / "ckpt-000011"
    assert checkpoints.steps() == [10, 11, 20, 30]


def test_saving_a_step_again_replaces_it(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"v": "old", "extra": torch.zeros(2)})
    checkpoints.save(1, {"v": "new"})
    assert checkpoints.load().state == {"v": "new"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt-000001", "latest"]


def test_steps_beyond_six_digits(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(123_456_789, {"v": 1})
    assert checkpoints.load().step == 123_456_789


def test_only_reads_and_checks_just_those_keys(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"model": {"w": torch.ones(2)}, "optimizer": {"m": torch.ones(2)}})
    (path / "optimizer.safetensors").write_bytes(b"damaged")
    assert list(checkpoints.load(only=("model",)).state) == ["model"]
    with pytest.raises(CheckpointError, match="optimizer.safetensors has 7 bytes"):
        checkpoints.load(path)


@pytest.mark.parametrize("missing", ["optimizer", "rng", "scheduler"])
def test_a_missing_part_refuses_exact_resume_and_says_what_is_there(tmp_path, missing) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {key: {"x": 1} for key in ("model", "optimizer", "rng", "scheduler")})
    checkpoints.save(2, {key: {"x": 1} for key in ("model", "optimizer", "rng", "scheduler") if key != missing})
    # falling back to step 1 would silently lose a step, so it is an error
    for path in (None, tmp_path / "ckpt-000002"):
        with pytest.raises(CheckpointError, match=f"holds no {missing}, so the run cannot continue exactly.*model"):
            checkpoints.load(path, require=("model", "optimizer", "rng", "scheduler"))
    assert checkpoints.load(only=("model",)).step == 2


def test_the_manifest_names_the_writer(tmp_path) -> None:
    path = Checkpoints(tmp_path).save(4, {"model": {"w": torch.ones(2)}})
    body = json.loads((path / "manifest.json").read_text())["manifest"]
    assert (body["schema"], body["step"]) == (1, 4)
    assert set(body["files"]) == {"model.json", "model.safetensors"}
    assert body["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in body["versions"]


def test_unstorable_values_and_bad_keys_are_refused_before_anything_is_written(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")
    loop: list[Any] = []
    loop.append(loop)
    for state, message in (
        ({"model": {"f": object()}}, "checkpoint key 'model': cannot store .*'f'"),
        ({"../model": {}}, "cannot be a file name"),
        ({"manifest": {}}, "cannot be a file name"),
        ({"loop": loop}, "checkpoint key 'loop'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(1, state)
    assert not (tmp_path / "c").exists()


def test_arguments_out_of_range(tmp_path) -> None:
    with pytest.raises(ValueError, match="`checkpoint.keep` must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="must not be negative"):
        Checkpoints(tmp_path).save(-1, {})


def test_an_empty_place_says_so(tmp_path) -> None:
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match="there is no checkpoint in"):
            Checkpoints(root).load()
