"""Names that scripts outside the repository call, and the docstrings every equation must carry."""

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import rlalign

EQUATION_MODULES = [
    info.name
    for info in pkgutil.iter_modules(importlib.import_module("rlalign.functional").__path__)
    if not info.name.startswith("_")
]
POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
NO_DEFAULT = inspect.Parameter.empty


def modules() -> list[str]:
    found = pkgutil.walk_packages(rlalign.__path__, "rlalign.")
    return [module.name for module in found if not module.name.endswith("__main__")]


def packages() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(rlalign.__path__, "rlalign.") if module.ispkg]


def equations() -> Iterator[tuple[str, Callable[..., Any]]]:
    for home in EQUATION_MODULES:
        module = importlib.import_module(f"rlalign.functional.{home}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                yield f"{home}.{name}", value


def shortcomings(doc: str | None) -> list[str]:
    """What an equation's docstring lacks of the house's template."""
    text = inspect.cleandoc(doc or "")
    body = re.split(r"^(?:Args|Returns|Raises|Example|Reference):", text, flags=re.MULTILINE)[0]
    sections = dict(re.findall(r"^(\w+):\n((?:(?: .*)?\n?)*)", text, re.MULTILINE))
    wanted = {
        "an equation, four spaces deep, before the sections": re.search(r"^ {4}.*=", body, re.MULTILINE),
        "a doctest under `Example:`": ">>>" in sections.get("Example", ""),
        "a work under `Reference:`": re.search(r"\b(19|20)\d\d\b|arXiv:\d{4}", sections.get("Reference", "")),
    }
    return [what for what, found in wanted.items() if not found]


def resolve(dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("name", modules())
def test_every_module_imports(name):
    importlib.import_module(name)


@pytest.mark.parametrize("name", packages())
def test_every_name_a_package_announces_is_there(name):
    package = importlib.import_module(name)
    announced = vars(package).get("__all__", [])
    assert len(announced) == len(set(announced))
    for one in announced:
        getattr(package, one)
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name


@pytest.mark.parametrize("function", [pytest.param(function, id=name) for name, function in equations()])
def test_every_equation_is_stated_shown_and_cited(function):
    assert shortcomings(function.__doc__) == []


def test_a_docstring_without_equation_example_or_reference_is_noticed():
    good = """Add.

        y = a + b

    Example:
        >>> 1 + 1
        2

    Reference:
        Hilbert 1900.
    """
    assert shortcomings(good) == []
    assert len(shortcomings(good.replace("y = a + b", "the sum"))) == 1
    assert len(shortcomings(good.replace(">>>", "..."))) == 1
    assert len(shortcomings(good.replace("1900", ""))) == 1
    assert len(shortcomings(None)) == 3


@pytest.mark.parametrize("module", EQUATION_MODULES)
def test_the_examples_of_the_equations_run(module):
    result = doctest.testmod(importlib.import_module(f"rlalign.functional.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


SIGNATURES = {
    "rlalign.functional.advantages.gae": (
        ["rewards", "values", "next_values", "terminated", "truncated"],
        {"gamma": NO_DEFAULT, "gae_lambda": NO_DEFAULT, "mask": None},
    ),
    "rlalign.functional.advantages.group_relative": (
        ["rewards", "group"],
        {"scale": True, "unbiased": True, "eps": 1e-4},
    ),
    "rlalign.functional.advantages.leave_one_out": (["rewards", "group"], {}),
    "rlalign.functional.advantages.beta_normalized": (
        ["rewards", "group"],
        {"alpha": None, "beta": None, "reward_range": (0.0, 1.0)},
    ),
    "rlalign.functional.policy.clipped_surrogate": (
        ["log_ratio", "advantages"],
        {"clip_low": NO_DEFAULT, "clip_high": NO_DEFAULT, "dual_clip": None},
    ),
    "rlalign.functional.masked.aggregate": (
        ["objective", "mask"],
        {"weights": None, "mode": NO_DEFAULT, "group": None, "denominator": None},
    ),
    "rlalign.functional.policy.guarded_log_ratio": (["log_prob", "log_prob_old", "mean", "mean_old", "std"], {}),
    "rlalign.functional.flow.sde_step": (
        ["x", "velocity", "sigma", "sigma_next"],
        {"noise_level": NO_DEFAULT, "kind": "flow_sde", "sigma_max": NO_DEFAULT},
    ),
    "rlalign.functional.preference.flow_dpo": (
        ["err_win", "err_lose", "err_win_ref", "err_lose_ref"],
        {"beta": NO_DEFAULT},
    ),
    "rlalign.functional.preference.flow_dro": (["err", "label"], {}),
    "rlalign.functional.guidance.adaptive_projected": (
        ["cond", "uncond"],
        {"scale": NO_DEFAULT, "eta": NO_DEFAULT, "norm_threshold": NO_DEFAULT, "momentum": NO_DEFAULT, "running": None},
    ),
    "rlalign.llm.BNPOTrainer": (["model", "reward_funcs", "train_dataset", "config"], {}),
    "rlalign.llm.PolicyGradientTrainer": (["model", "reward_funcs", "train_dataset", "config"], {}),
}


@pytest.mark.parametrize(("dotted", "positional", "keyword"), [(n, p, k) for n, (p, k) in SIGNATURES.items()])
def test_names_others_rely_on_keep_their_parameters(dotted, positional, keyword):
    parameters = inspect.signature(resolve(dotted)).parameters
    assert [name for name, p in parameters.items() if p.kind is POSITIONAL] == positional
    for name, default in keyword.items():
        assert parameters[name].kind is KEYWORD
        assert parameters[name].default == default, f"{dotted}({name}=...)"
    more = [p for name, p in parameters.items() if p.kind is KEYWORD and name not in keyword]
    assert all(p.default is not NO_DEFAULT for p in more), f"{dotted} asks for more than the promise"


def test_the_caps_of_the_beta_normaliser_are_optional():
    parameters = inspect.signature(resolve("rlalign.functional.advantages.beta_normalized")).parameters
    assert isinstance(parameters["max_weight"].default, float)
    assert parameters["max_concentration"].default is not NO_DEFAULT


@pytest.mark.parametrize("trainer", ["rlalign.llm.BNPOTrainer", "rlalign.llm.PolicyGradientTrainer"])
def test_language_model_trainers_keep_their_methods(trainer):
    cls = resolve(trainer)
    for name in ("eval_dataset", "tokenizer", "peft_config"):
        assert inspect.signature(cls).parameters[name].default is None
    for name in ("fit", "evaluate", "save_model", "collect", "objective", "update", "state_dict", "load_state_dict"):
        assert callable(getattr(cls, name)), f"{trainer} has no {name}()"


def test_the_command_line_has_every_command():
    import typer.main

    commands = typer.main.get_command(resolve("rlalign.cli.app")).commands  # pyright: ignore[reportAttributeAccessIssue]
    assert {"train", "resume", "eval", "sample", "check", "report", "list"} <= set(commands)
