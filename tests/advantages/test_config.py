"""The union of estimators as a config: `type` picks, unknown keys are errors, defaults are the equations' own."""

import dataclasses
import inspect
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from rlalign.advantages import (
    AdvantageConfig,
    BatchScaled,
    BetaNormalized,
    GroupRelative,
    PerPromptRunning,
    ReinforcePlusPlus,
    build_estimator,
)
from rlalign.functional import advantages as equations

ADAPTER = TypeAdapter(AdvantageConfig)
MEMBERS = get_args(get_args(AdvantageConfig)[0])


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_every_member_is_found_by_its_type_and_has_an_estimator(member):
    name = dataclasses.fields(member)
    kind = next(f.default for f in name if f.name == "type")
    cfg = ADAPTER.validate_python({"type": kind})
    assert type(cfg) is member
    assert cfg == member()
    assert build_estimator(cfg).metrics == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.type = "other"


def test_members_have_distinct_types():
    kinds = [member().type for member in MEMBERS]
    assert len(set(kinds)) == len(kinds) == 11


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__name__)
def test_an_unknown_key_is_an_error(member):
    with pytest.raises(ValidationError, match="max_wieght"):
        ADAPTER.validate_python({"type": member().type, "max_wieght": 1.0})


def test_values_are_read_as_in_yaml():
    cfg = ADAPTER.validate_python({"type": "beta_normalized", "reward_range": [-1, 1], "max_concentration": None})
    assert cfg == BetaNormalized(reward_range=(-1.0, 1.0), max_concentration=None)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"type": "bnpo"}, "beta_normalized"),
        ({}, "type"),
        ({"type": "beta_normalized", "alpha": 2.0}, "both `alpha` and `beta`"),
        ({"type": "beta_normalized", "reward_range": [1, 0]}, "`reward_range` must be"),
        ({"type": "beta_normalized", "max_weight": 0}, "greater than 0"),
        ({"type": "gae", "gamma": 1.5}, "less than or equal to 1"),
        ({"type": "group_relative", "part_weights": {"a": float("nan")}}, "finite"),
        ({"type": "per_prompt_running", "window": 4, "min_count": 5}, "`min_count`=5 is never reached"),
    ],
)
def test_an_impossible_value_is_an_error_that_says_so(given, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ADAPTER.validate_python(given)


@pytest.mark.parametrize(
    ("cfg", "equation"),
    [
        (BetaNormalized(), equations.beta_normalized),
        (GroupRelative(), equations.group_relative),
        (ReinforcePlusPlus(), equations.reinforce_plus_plus),
        (BatchScaled(), equations.batch_scaled),
    ],
    ids=lambda value: getattr(value, "type", ""),
)
def test_defaults_are_those_of_the_equation(cfg, equation):
    parameters = inspect.signature(equation).parameters
    shared = {f.name for f in dataclasses.fields(cfg)} & set(parameters)
    for name in shared:
        assert getattr(cfg, name) == parameters[name].default, name


def test_the_window_of_running_statistics_holds_its_smallest_count():
    assert PerPromptRunning().min_count <= PerPromptRunning().window
