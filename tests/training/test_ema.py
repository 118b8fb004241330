"""EMA arithmetic, the bitwise swap, and resume."""

import pytest
import torch

from rlalign.training.checkpoint import Checkpoints
from rlalign.training.ema import EMA


def test_update_by_hand() -> None:
    parameter = torch.nn.Parameter(torch.tensor([0.0]))
    ema = EMA([parameter], 0.75)
    for value in (4.0, 8.0):
        parameter.data.fill_(value)
        ema.update()
    # 0 -> 0.25 * 4 = 1 -> 0.75 * 1 + 0.25 * 8 = 2.75
    with ema.swap():
        assert parameter.item() == 2.75
    assert parameter.item() == 8.0


def test_warm_up_by_hand() -> None:
    parameter = torch.nn.Parameter(torch.tensor([0.0], dtype=torch.float64))
    ema = EMA([parameter], 0.15, warmup=True)
    parameter.data.fill_(1.0)
    ema.update()  # decay min(0.15, 1/10): 0.9
    ema.update()  # decay min(0.15, 2/11 = 0.18) = 0.15: 0.15 * 0.9 + 0.85
    with ema.swap():
        torch.testing.assert_close(parameter.data, torch.tensor([0.985], dtype=torch.float64))


def test_swap_restores_the_trained_weights_bit_for_bit_on_the_cpu() -> None:
    # the trap: `.detach().cpu()` aliases a CPU tensor, and restoring from the alias restores nothing
    parameters = [torch.nn.Parameter(torch.randn(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)]
    ema = EMA(parameters, 0.5)
    for parameter in parameters:
        parameter.data.mul_(3.0)
    before = [p.detach().clone() for p in parameters]
    with ema.swap():
        assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_swap_restores_after_an_error_inside() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([parameter], 0.5)
    parameter.data.fill_(2.0)
    with pytest.raises(KeyError), ema.swap():
        raise KeyError
    assert parameter.item() == 2.0


def test_half_precision_parameters_are_averaged_in_float32() -> None:
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ema = EMA([parameter], 0.999)
    parameter.data.fill_(2.0)
    ema.update()
    # 1 + 0.001 is not a bfloat16: an average kept in bfloat16 would never leave 1
    torch.testing.assert_close(ema.state_dict()["averages"][0], torch.tensor([1.001]))


def test_construction_does_not_alias_the_parameters() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    ema = EMA([parameter], 0.0)
    parameter.data.fill_(5.0)
    assert ema.state_dict()["averages"][0].item() == 1.0
    ema.update()
    assert ema.state_dict()["averages"][0].item() == 5.0


def test_resume_continues_bit_for_bit(tmp_path) -> None:
    def train(ema: EMA, parameter: torch.nn.Parameter, values: torch.Tensor) -> None:
        for value in values:
            parameter.data.copy_(value)
            ema.update()

    values = torch.randn(6, 4)
    whole, half = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    uninterrupted, first = EMA([whole], 0.9, warmup=True), EMA([half], 0.9, warmup=True)
    train(uninterrupted, whole, values)
    train(first, half, values[:3])
    Checkpoints(tmp_path).save(3, {"ema": first.state_dict()})
    resumed = EMA([half], 0.1)
    resumed.load_state_dict(Checkpoints(tmp_path).load().state["ema"])
    train(resumed, half, values[3:])
    assert torch.equal(resumed.state_dict()["averages"][0], uninterrupted.state_dict()["averages"][0])
    assert resumed.updates == 6


def test_state_of_another_model_is_refused() -> None:
    state = EMA([torch.zeros(2)], 0.5).state_dict()
    with pytest.raises(ValueError, match="follows 1 tensors and this model has 2"):
        EMA([torch.zeros(2), torch.zeros(2)], 0.5).load_state_dict(state)
    with pytest.raises(ValueError, match="shape differs"):
        EMA([torch.zeros(3)], 0.5).load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="ema.decay"):
        EMA([torch.zeros(1)], decay)
