"""finite_step and adamw against arithmetic and faults."""

import math

import pytest
import torch
from torch import Tensor

from rlalign.optim.step import (
    SkipBudget,
    TrainingDiverged,
    adamw,
    bring_moments,
    finite_step,
    load_optimizer,
    set_learning_rate,
)

Named = list[tuple[str, torch.nn.Parameter]]


def two_parameters() -> Named:
    """Gradients 3 and 4: global norm 5."""
    named = [("a", torch.nn.Parameter(torch.tensor([1.0]))), ("b", torch.nn.Parameter(torch.tensor([[2.0]])))]
    named[0][1].grad, named[1][1].grad = torch.tensor([3.0]), torch.tensor([[4.0]])
    return named


def sgd(named: Named) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in named], lr=1.0)


def values(named: Named) -> list[float]:
    return [p.item() for _, p in named]


def test_clips_the_global_norm_by_hand() -> None:
    named = two_parameters()
    norm = finite_step(sgd(named), named, max_grad_norm=2.5)
    # 2.5 / 5 = 1/2: gradients 1.5 and 2
    assert norm == 5.0
    assert values(named) == pytest.approx([-0.5, 0.0], abs=1e-5)


@pytest.mark.parametrize("largest", [None, 5.1, 1e9])
def test_no_clipping_below_the_bound(largest) -> None:
    named = two_parameters()
    assert finite_step(sgd(named), named, max_grad_norm=largest) == 5.0
    assert values(named) == [-2.0, -2.0]


def test_gradients_are_cleared_after_a_step_and_after_a_skip() -> None:
    for bad in (1.0, math.nan):
        named = two_parameters()
        named[0][1].grad.fill_(bad)
        finite_step(sgd(named), named, max_grad_norm=1.0, budget=SkipBudget())
        assert [p.grad for _, p in named] == [None, None]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_changes_neither_parameters_nor_moments(bad) -> None:
    named = two_parameters()
    optimizer = adamw(named, learning_rate=0.1, weight_decay=0.5)
    finite_step(optimizer, named, max_grad_norm=1.0)
    before = values(named)
    moments = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    named[1][1].grad.fill_(bad)
    norm = finite_step(optimizer, named, max_grad_norm=1.0, budget=SkipBudget())
    assert not math.isfinite(norm)
    assert values(named) == before
    for old, new in zip(moments, optimizer.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


def test_the_budget_counts_steps_in_a_row_then_raises_naming_the_parameter() -> None:
    named = two_parameters()
    optimizer, budget = sgd(named), SkipBudget(limit=2)

    def one(bad: float) -> float:
        named[0][1].grad, named[1][1].grad = torch.tensor([1.0]), torch.tensor([[bad]])
        return finite_step(optimizer, named, max_grad_norm=None, budget=budget)

    one(math.nan)
    one(math.inf)
    assert (budget.consecutive, budget.total) == (2, 2)
    one(1.0)
    assert (budget.consecutive, budget.total) == (0, 2)
    one(math.nan)
    one(math.nan)
    before = values(named)
    with pytest.raises(TrainingDiverged, match=r"gradient of `b` has 1 of 1 entries.*\(3 non-finite steps in a row, 2"):
        one(math.nan)
    assert values(named) == before
    assert named[0][1].grad is None


def test_without_a_budget_the_first_one_raises_and_the_first_bad_parameter_is_named() -> None:
    named = two_parameters()
    named[0][1].grad.fill_(math.nan)
    named[1][1].grad.fill_(math.nan)
    with pytest.raises(TrainingDiverged, match="gradient of `a`"):
        finite_step(sgd(named), named, max_grad_norm=1.0)


def test_a_norm_that_overflows_is_a_skip_too() -> None:
    named = two_parameters()
    for _, parameter in named:
        parameter.grad.fill_(3e38)
    with pytest.raises(TrainingDiverged, match="every gradient here is finite but the global norm is not"):
        finite_step(sgd(named), named, max_grad_norm=1.0)


def test_an_own_clip_function_is_used_and_cannot_hide_the_culprit() -> None:
    named = two_parameters()

    def clip(parameters: list[Tensor], largest: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)

    assert finite_step(sgd(named), named, max_grad_norm=2.5, clip=clip) == 5.0
    assert values(named) == pytest.approx([-0.5, 0.0], abs=1e-5)
    named[0][1].grad, named[1][1].grad = torch.tensor([1.0]), torch.tensor([[math.nan]])
    # clipping by a NaN norm makes `a` NaN as well; `b` is to blame
    with pytest.raises(TrainingDiverged, match="gradient of `b`"):
        finite_step(sgd(named), named, max_grad_norm=1.0, clip=clip)


def test_parameters_without_gradient_are_passed_over_and_none_at_all_is_an_error() -> None:
    named = two_parameters()
    named[0][1].grad = None
    assert finite_step(sgd(named), named, max_grad_norm=None) == 4.0
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        finite_step(sgd(named), named, max_grad_norm=None)


@pytest.mark.parametrize("largest", [0.0, -1.0, math.nan])
def test_a_bound_that_is_not_positive_is_refused(largest) -> None:
    named = two_parameters()
    with pytest.raises(ValueError, match="`optim.max_grad_norm` must be positive"):
        finite_step(sgd(named), named, max_grad_norm=largest)


def test_named_parameters_may_be_a_generator() -> None:
    model = torch.nn.Linear(2, 1)
    model(torch.ones(1, 2)).sum().backward()
    norm = finite_step(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), max_grad_norm=1.0)
    assert norm == pytest.approx(3**0.5)  # gradients 1, 1 and 1


def test_adamw_first_step_by_hand() -> None:
    # m / (1 - b1) = g, sqrt(v / (1 - b2)) = |g|: the step is lr g / (|g| + eps), the decay lr wd p on matrices only
    named = two_parameters()
    optimizer = adamw(named, learning_rate=0.1, weight_decay=0.5, eps=1.0)
    finite_step(optimizer, named, max_grad_norm=None)
    vector = 1.0 - 0.1 * 3.0 / (3.0 + 1.0)
    matrix = 2.0 * (1.0 - 0.1 * 0.5) - 0.1 * 4.0 / (4.0 + 1.0)
    assert values(named) == pytest.approx([vector, matrix], rel=1e-6)


@pytest.mark.parametrize("fused", [True, False, None])
def test_adamw_variants_agree(fused) -> None:
    named, reference = two_parameters(), two_parameters()
    settings = {"learning_rate": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    for _ in range(3):
        for pair in (named, reference):
            pair[0][1].grad, pair[1][1].grad = torch.tensor([3.0]), torch.tensor([[4.0]])
        finite_step(adamw(named, fused=fused, **settings), named, max_grad_norm=1.0)
        finite_step(adamw(reference, fused=False, **settings), reference, max_grad_norm=1.0)
    assert values(named) == pytest.approx(values(reference), rel=1e-6)


def test_adamw_leaves_frozen_parameters_out_and_takes_tied_ones_once() -> None:
    named = two_parameters()
    named[0][1].requires_grad_(False)
    optimizer = adamw([*named, ("tied", named[1][1])], learning_rate=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]
    named[1][1].requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        adamw(named, learning_rate=0.1)


def test_set_learning_rate_reaches_every_group() -> None:
    optimizer = adamw(two_parameters(), learning_rate=0.1)
    set_learning_rate(optimizer, 0.025)
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


def test_budget_state_round_trips() -> None:
    budget = SkipBudget(limit=5, consecutive=2, total=9)
    other = SkipBudget(limit=5)
    other.load_state_dict(budget.state_dict())
    assert other == budget


def test_a_loaded_optimizer_has_the_moments_of_then_and_the_settings_of_now():
    def stepped(optimizer, weight, times):
        for _ in range(times):
            weight.grad = torch.tensor([[1.0, -2.0]])
            optimizer.step()
        return weight

    first = torch.nn.Parameter(torch.zeros(1, 2))
    before = adamw([("w", first)], learning_rate=0.1)
    stepped(before, first, 3)
    second = torch.nn.Parameter(first.detach().clone())
    after = adamw([("w", second)], learning_rate=0.2, betas=(0.0, 0.5), eps=1.0, weight_decay=0.5)
    load_optimizer(after, before.state_dict())
    group = after.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.2, (0.0, 0.5), 1.0, 0.5)
    m, v = (after.state[second][name].clone() for name in ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(m, (1 - 0.9**3) * torch.tensor([[1.0, -2.0]]))
    stepped(after, second, 1)
    # By hand: the fourth step with beta1 = 0 and beta2 = .5 on the old second moment.
    gradient = torch.tensor([[1.0, -2.0]])
    v = 0.5 * v + 0.5 * gradient**2
    wanted = first.detach() * (1 - 0.2 * 0.5) - 0.2 * gradient / ((v / (1 - 0.5**4)).sqrt() + 1.0)
    torch.testing.assert_close(second.detach(), wanted)


@pytest.mark.parametrize("fused", [True, False])
def test_moments_follow_their_parameters_and_kernels_that_are_not_fused_count_on_the_cpu(fused):
    weight = torch.nn.Parameter(torch.zeros(2, 2, device="meta"))  # a device of its own on every machine
    optimizer = adamw([("w", weight)], learning_rate=0.1, fused=False)
    optimizer.param_groups[0]["fused"] = fused
    here = {"exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.zeros(2, 2), "step": torch.tensor(1.0)}
    optimizer.state[weight] = here
    bring_moments(optimizer)
    found = {name: value.device.type for name, value in optimizer.state[weight].items()}
    assert found == {"exp_avg": "meta", "exp_avg_sq": "meta", "step": "meta" if fused else "cpu"}
