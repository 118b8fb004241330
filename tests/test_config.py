"""Config: numbers are numbers, every mistake is named with its line, overrides and round trips are exact."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from rlalign import config, config_papers
from rlalign.config import ConfigError
from rlalign.yaml_strict import MAX_BYTES, parse

Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """Plain on purpose: extra keys must be refused without any pydantic setting on the class."""

    radius: Positive
    name: str = "wheel"


@dataclass(frozen=True, kw_only=True)
class Petrol:
    type: Literal["petrol"] = "petrol"
    litres: Positive = 2.0
    octane: int = 95


@dataclass(frozen=True, kw_only=True)
class Electric:
    type: Literal["electric"] = "electric"
    volts: Annotated[int, Field(ge=12, le=800)] = 400


@dataclass(frozen=True, kw_only=True)
class Optim:
    learning_rate: Positive = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear"] = "constant"


@dataclass(frozen=True, kw_only=True)
class Car:
    method: Literal["car"] = "car"
    seed: Annotated[int, Field(ge=0)] = 0
    fast: bool = False
    label: str | None = None
    engine: Annotated[Petrol | Electric, Field(discriminator="type")] = field(default_factory=lambda: Petrol(octane=98))
    wheels: list[Wheel] = field(default_factory=lambda: [Wheel(radius=1.0), Wheel(radius=2.0)])
    optim: Optim = field(default_factory=lambda: Optim(betas=(0.5, 0.6)))
    spare: Wheel | None = None
    passed_on: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fast and isinstance(self.engine, Electric) and self.engine.volts < 100:
            raise ValueError("a `fast` car needs `engine.volts` >= 100.")


@pytest.fixture(autouse=True)
def car_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.METHODS, "car", f"{Car.__module__}:Car")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def load_text(text: str, *overrides: str) -> Any:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return config.load(path, overrides)

    return load_text


def sentences(error: ConfigError) -> list[str]:
    """`x.yaml:3: ...` without the folder."""
    return [f"{Path(problem.place.source).name}:{problem.place.line}: {problem.text}" for problem in error.problems]


# --- strict YAML ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("", None),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("True", "True"),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("1_", "1_"),
        ("nan", "nan"),
        ("'1e-5'", "1e-5"),
        ('"true"', "true"),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ("[1, 2e0]", [1, 2.0]),
        ("{a: {b: no}}", {"a": {"b": "no"}}),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: Any):
    got = parse(f"key: {text}", source="x.yaml").data["key"]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "`a` is written twice (first on line 1)"),
        ("a: {b: 1, b: 1}\n", 1, "`b` is written twice"),
        ("a: 1\n\tb: 2\n", 2, "tab"),
        ("a: 1\nb: !!python/object:os.system x\n", 2, "tag"),
        ("a: !!str 5\n", 1, "tag"),
        ("a: 1\nb: &x 1\n", 2, "anchors"),
        ("a: 1\nb: *x\n", 2, "aliases"),
        ("a: 1\n---\nb: 1\n", 2, "second document"),
        ("a: 1\n2: b\n", 2, "the key 2 is not text"),
        ("true: b\n", 1, "the key True is not text"),
        ("? [a, b]\n: 1\n", 1, "is not text"),
        ("a: [1, 2\nb: 1\n", 2, "not valid YAML"),
        ("a: b: c\n", 1, "second `:`"),
        ("a: 1\nb: 'x\n", 3, "not valid YAML"),
        ("a: 1\nb: \x01\n", 2, "character"),
        ('a: 1\nb: "\\UFFFFFFFF"\n', 2, "not valid YAML"),
        ('a: 1\nb: "\\ud83d"\n', 2, "surrogate"),
        ("a: " + "[" * 100_000, 1, "nested deeper"),
        ("a:\n  b: " + "9" * 5000 + "\n", 2, "digits"),
        ("a: 1\n" + "#" * MAX_BYTES, 1, "larger than"),
        ("", 1, "is empty"),
        ("# only a comment\n", 1, "is empty"),
        ("- a\n- b\n", 1, "not a mapping"),
        ("just text\n", 1, "not a mapping"),
    ],
)
def test_yaml_that_could_surprise_is_refused_with_its_line(tmp_path: Path, text: str, line: int, words: str):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        config.read_yaml(path)
    (sentence,) = sentences(caught.value)
    assert sentence.startswith(f"x.yaml:{line}: ")
    assert words in sentence
    assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize(
    ("raw", "line", "words"),
    [
        (b"\xef\xbb\xbfa: 1\n", 1, "byte order mark"),
        ("a: 1\n".encode("utf-16"), 1, "byte order mark"),
        (b"a: 1\nb: caf\xe9\n", 2, "not UTF-8"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, raw: bytes, line: int, words: str):
    (tmp_path / "x.yaml").write_bytes(raw)
    with pytest.raises(ConfigError) as caught:
        config.read_yaml(tmp_path / "x.yaml")
    assert [f"x.yaml:{line}" in sentence and words in sentence for sentence in sentences(caught.value)] == [True]


def test_alias_bomb_is_refused_before_it_expands(tmp_path: Path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="anchors"):
        config.read_yaml(tmp_path / "x.yaml")


# --- what a config may say -----------------------------------------------------------------------------------------


def test_numbers_in_yaml_arrive_as_numbers(load: Callable[..., Car]):
    got = load("method: car\noptim: {learning_rate: 1e-5, betas: [0, 0.95]}\n")
    assert got.optim == Optim(learning_rate=1e-5, betas=(0.0, 0.95))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lr: 1", "`lr` is not a setting; did you mean `optim.learning_rate`?"),
        ("sed: 1", "`sed` is not a setting; did you mean `seed`?"),
        ("octane: 1", "`octane` is not a setting; did you mean `engine.octane`?"),
        ("optim: {learning_rat: 1}", "`optim.learning_rat` is not a setting; did you mean `optim.learning_rate`?"),
        ("optim: {qqq: 1}", "`optim.qqq` is not a setting; `optim` has: learning_rate, betas, schedule"),
        ("wheels: [{radius: 1, nam: a}]", "`wheels.0.nam` is not a setting; did you mean `wheels.0.name`?"),
        ("spare: {radius: 1, rad: 2}", "`spare.rad` is not a setting; `spare` has: radius, name"),
        ("engine: {type: electric, octan: 95}", "`engine.octan` is not a setting; did you mean `engine.octane`?"),
        (
            "engine: {type: electric, octane: 95}",
            "`engine.octane` does not apply to type 'electric'; settings of that type: type, volts",
        ),
        (
            "engine: {volts: 12}",
            "`engine.volts` does not apply to type 'petrol'; settings of that type: type, litres, octane",
        ),
        ("seed: -1", "`seed` must be >= 0, got -1"),
        ("seed: 1e3", "`seed` must be a whole number, got 1000.0; write 1000"),
        ("seed: '7'", "`seed` must be a whole number, got the text '7'; write it without quotes"),
        ("seed: true", "`seed` must be a whole number, got true"),
        ("seed: 99999999999999999999", "`seed` must be a number of at most 63 bits, got 99999999999999999999..."),
        ("fast: yes", "`fast` must be true or false, got the text 'yes'; write true"),
        ("fast: 1", "`fast` must be true or false, got 1"),
        ("label: 5", '`label` must be text, got 5; put it in quotes: "5"'),
        ("optim: {learning_rate: 0}", "`optim.learning_rate` must be > 0, got 0"),
        ("optim: {learning_rate: .nan}", "`optim.learning_rate` must be a finite number, got nan"),
        ("optim: {learning_rate: -.inf}", "`optim.learning_rate` must be a finite number, got -inf"),
        ("optim: {learning_rate: 1e999}", "`optim.learning_rate` must be a finite number, got inf"),
        ("passed_on: {deep: [.inf]}", "`passed_on.deep.0` must be a finite number, got inf"),
        ("optim: {betas: [0.9]}", "`optim.betas` is too short: entry 1 is missing"),
        (
            "optim: {schedule: linaer}",
            "`optim.schedule` must be one of 'constant', 'linear', got the text 'linaer'; did you mean 'linear'?",
        ),
        (
            "engine: {type: electro}",
            "`engine.type` must be one of 'petrol', 'electric', got the text 'electro'; did you mean 'electric'?",
        ),
        ("engine: {type: electric, volts: 11}", "`engine.volts` must be >= 12, got 11"),
        ("engine: {type: electric, volts: 801}", "`engine.volts` must be <= 800, got 801"),
        ("wheels: [{name: a}]", "`wheels.0.radius` is missing and has no default"),
        ("wheels: {radius: 1}", "`wheels` must be a list, got a mapping"),
        ("optim: 3", "`optim` must be a mapping (`key: value`), got 3"),
        ("optim: null", "`optim` must be a mapping (`key: value`), got null"),
        ("fast: true\nengine: {type: electric, volts: 50}", "a `fast` car needs `engine.volts` >= 100."),
    ],
)
def test_one_mistake_gives_one_sentence(load: Callable[..., Car], text: str, sentence: str):
    with pytest.raises(ConfigError) as caught:
        load(f"# a car\nmethod: car\n{text}\n")
    (problem,) = caught.value.problems
    assert problem.text == sentence
    # A rule between settings belongs to the section that states it, here the file.
    assert problem.place.line == (1 if sentence.startswith("a `fast`") else 3)


def test_all_mistakes_come_at_once_in_the_order_of_the_file(load: Callable[..., Car]):
    text = "method: car\nseed: -1\nwheels:\n  - radius: 1\n  - radius: 0\n    nmae: x\n"
    text += "optim:\n  learning_rat: 1\nseed: 2\n"
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert sentences(caught.value) == [
        "x.yaml:2: `seed` must be >= 0, got -1",
        "x.yaml:5: `wheels.1.radius` must be > 0, got 0",
        "x.yaml:6: `wheels.1.nmae` is not a setting; did you mean `wheels.1.name`?",
        "x.yaml:8: `optim.learning_rat` is not a setting; did you mean `optim.learning_rate`?",
        "x.yaml:9: the key `seed` is written twice (first on line 2); keep one",
    ]
    assert str(caught.value).startswith("5 problems:\n")


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("seed: 1\n", "x.yaml:1: `method` is missing; it is one of ", ""),
        ("seed: 1\nmethod: bnop\n", "x.yaml:2: `method` must be one of ", ", got 'bnop'; did you mean 'bnpo'?"),
        (
            "method: grpo\n",
            "x.yaml:1: `method` must be one of ",
            ", got 'grpo'. GRPO is `method: policy_gradient` with `advantage.type: group_relative`; preset "
            "`grpo_arithmetic`",
        ),
        ("method: 3\n", "x.yaml:1: `method` must be one of ", ", got 3"),
    ],
)
def test_method_chooses_the_config_class(load: Callable[..., Car], text: str, start: str, end: str):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert sentences(caught.value) == [f"{start}{', '.join(config.METHODS)}{end}"]


@pytest.mark.parametrize(
    "name", ["Dr. GRPO", "DAPO", "REINFORCE++", "reinforce_plus_plus", "o-dice", "MaxRL", "TD3+BC"]
)
def test_methods_by_their_papers_names_lead_to_a_preset_that_exists(name: str):
    hint = config_papers.by_paper(name)
    assert hint is not None
    assert hint.rpartition("preset ")[2].strip("`") in config.presets()


def test_every_paper_is_set_up_by_settings_that_its_preset_has():
    for paper, (words, preset) in config_papers._PAPERS.items():
        loaded = config.dump(config.load(preset))
        for setting, value in re.findall(r"`([\w.]+): ([\w.]+)`", words):
            held = loaded
            for key in setting.split("."):
                held = held[key]
            assert str(held).lower() == value, (paper, setting)


def test_a_section_given_in_part_keeps_the_methods_default_for_the_rest(load: Callable[..., Car]):
    # Car's own default is octane 98 and betas (0.5, 0.6); the classes alone would give 95 and (0.9, 0.999).
    got = load("method: car\nengine: {litres: 3}\noptim: {learning_rate: 1}\n")
    assert got.engine == Petrol(litres=3.0, octane=98)
    assert got.optim == Optim(learning_rate=1.0, betas=(0.5, 0.6))
    assert load("method: car\nengine: {type: electric}\n").engine == Electric()


# --- key=value -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("seed=7", {"seed": 7}),
        ("optim.learning_rate=1e-5", {"optim": Optim(learning_rate=1e-5, betas=(0.5, 0.6))}),
        ("optim.betas=[0.1, 0.2]", {"optim": Optim(betas=(0.1, 0.2))}),
        ("optim.betas.1=0.7", {"optim": Optim(betas=(0.5, 0.7))}),
        ("wheels.1.radius=5", {"wheels": [Wheel(radius=1.0), Wheel(radius=5.0)]}),
        ("wheels=[{radius: 3, name: no}]", {"wheels": [Wheel(radius=3.0, name="no")]}),
        ("engine.type=electric", {"engine": Electric()}),
        ("engine.litres=4", {"engine": Petrol(litres=4.0, octane=98)}),
        ("spare.radius=4", {"spare": Wheel(radius=4.0)}),
        ("label=a=b", {"label": "a=b"}),
        ("label='1'", {"label": "1"}),
        ("label=null", {"label": None}),
        ("passed_on.any.thing=no", {"passed_on": {"any": {"thing": "no"}}}),
    ],
)
def test_override_changes_exactly_what_it_names(load: Callable[..., Car], override: str, change: dict[str, Any]):
    assert load("method: car\n", override) == Car(**change)


def test_later_overrides_win_and_may_build_on_earlier_ones(load: Callable[..., Car]):
    assert load("method: car\nseed: 1\n", "seed=2", "seed=3").seed == 3
    got = load("method: car\n", "engine.volts=48", "engine.type=electric")
    assert got.engine == Electric(volts=48)
    assert load("method: bnpo\n", "seed=4", "method=car") == Car(seed=4)


DEEP = ".".join("a" * 30)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", "`seed` is not a setting; write key=value, such as optim.learning_rate=1e-5"),
        ("=3", "`=3` is not a setting; write key=value, such as optim.learning_rate=1e-5"),
        ("optim..betas=3", "`optim..betas=3` is not a setting; write key=value, such as optim.learning_rate=1e-5"),
        ("seed=", "`seed` has no value; for none write seed=null"),
        ("optim.lr=1", "`optim.lr` is not a setting; did you mean `optim.learning_rate`?"),
        ("optm.betas=1", "`optm` is not a setting; did you mean `optim`?"),
        ("optim.learning_rate=abc", "`optim.learning_rate` must be a number, got the text 'abc'"),
        ("optim.learning_rate.x=1", "`optim.learning_rate` must be a number, got a mapping"),
        ("seed.x=1", "`seed` is a single value; it has no `x`"),
        ("wheels.2.radius=1", "`wheels` is a list and its entries are 0 to 1, got `2`"),
        ("wheels.first.radius=1", "`wheels` is a list and its entries are 0 to 1, got `first`"),
        ("wheels.-1.radius=1", "`wheels` is a list and its entries are 0 to 1, got `-1`"),
        ("wheels.0.radius=-1", "`wheels.0.radius` must be > 0, got -1"),
        ("label=&a b", "`label`: anchors (&) and aliases (*) are not allowed; write the value out"),
        ("passed_on={a: 1, a: 2}", "`passed_on`: the key `a` is written twice (first on line 1); keep one"),
        (f"{DEEP}=1", f"`{DEEP}=1` is not a setting; write key=value, such as optim.learning_rate=1e-5"),
    ],
)
def test_bad_override_says_so_and_where(load: Callable[..., Car], override: str, sentence: str):
    with pytest.raises(ConfigError) as caught:
        load("method: car\nseed: 3\n", override)
    assert sentences(caught.value) == [f"command line:None: {sentence}"]
    assert str(caught.value) == f"command line: {sentence}"


def test_a_mistake_in_the_file_is_gone_once_overridden(load: Callable[..., Car]):
    assert load("method: car\nseed: -1\n", "seed=1").seed == 1


# --- round trips ---------------------------------------------------------------------------------------------------

finite = st.floats(min_value=1e-300, max_value=1e300)
words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20)
anything = st.none() | st.booleans() | finite | words | st.lists(st.integers(-5, 5))
cars = st.builds(
    Car,
    seed=st.integers(0, 2**63 - 1),
    fast=st.booleans(),
    label=st.none() | words | st.sampled_from(["null", "1e-5", "true", "~", "# no", "a: b", "\U0001f600", "\n"]),
    engine=st.builds(Petrol, litres=finite) | st.builds(Electric, volts=st.integers(100, 800)),
    wheels=st.lists(st.builds(Wheel, radius=finite, name=words), max_size=3),
    optim=st.builds(Optim, betas=st.tuples(finite, finite)),
    spare=st.none() | st.builds(Wheel, radius=finite),
    passed_on=st.dictionaries(words, anything, max_size=3),
)


@settings(deadline=None)
@given(car=cars)
def test_dump_builds_back_to_an_equal_config(tmp_path_factory: pytest.TempPathFactory, car: Car):
    data = config.dump(car)
    assert config.build(json.loads(json.dumps(data))) == car
    path = tmp_path_factory.getbasetemp() / "config.resolved.json"
    path.write_text(json.dumps(data, indent=2))
    assert config.load(path) == car


def test_dump_refuses_what_a_file_cannot_say():
    with pytest.raises(TypeError, match="numbers, text, lists and mappings, got set"):
        config.dump(Car(passed_on={"a": {1}}))


def test_build_without_a_file_names_the_key_alone():
    with pytest.raises(ConfigError, match=r"^config: `seed` must be >= 0, got -1$"):
        config.build({"method": "car", "seed": -1})


def test_language_model_configs_keep_their_papers_defaults(load: Callable[..., Any]):
    got = load("method: bnpo\nobjective: {clip_high: 0.3}\n", "advantage.max_weight=5")
    assert (got.objective.type, got.objective.clip_high, got.objective.dual_clip) == ("clipped_surrogate", 0.3, 10.0)
    assert (got.advantage.type, got.advantage.max_weight) == ("beta_normalized", 5.0)
    assert config.build(config.dump(got)) == got


# --- files and presets ---------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with presets, as a wheel installs it."""
    for name in ("llm/grpo_sums.yaml", "smoke/bnpo.yaml", "llm/bnpo.yaml"):
        path = tmp_path / "rlalign" / "presets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# About {name}.\n# More.\nmethod: car\n")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "rlalign" / "config.py"))
    return tmp_path / "rlalign" / "presets"


def test_presets_are_found_by_name(installed: Path):
    assert list(config.presets()) == ["llm/bnpo", "grpo_sums", "smoke/bnpo"]
    assert config.find_preset("grpo_sums") == installed / "llm" / "grpo_sums.yaml"
    assert config.find_preset("llm/grpo_sums") == installed / "llm" / "grpo_sums.yaml"
    assert config.find_preset("smoke/bnpo") == installed / "smoke" / "bnpo.yaml"
    assert config.describe(installed / "smoke" / "bnpo.yaml") == "About smoke/bnpo.yaml."
    assert config.load("grpo_sums", ["seed=2"]) == Car(seed=2)


def test_configs_beside_an_installed_package_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "theirs.yaml").write_text("a: 1")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "rlalign" / "config.py"))
    assert config.presets() == {}


@pytest.mark.parametrize(
    ("source", "what", "hint"),
    [
        ("grpo_sum", "neither a file nor a preset", "Did you mean the preset `grpo_sums`?"),
        ("here/grpo_sums.yaml", "no such file", "Did you mean the preset `grpo_sums`?"),
        ("../presets/llm/bnpo", "neither a file nor a preset", "Did you mean the preset `llm/bnpo`?"),
        ("zzz", "neither a file nor a preset", "`rlalign list` names the presets."),
        ("z" * 300, "neither a file nor a preset", "`rlalign list` names the presets."),
    ],
)
def test_a_missing_file_or_preset_names_the_nearest(installed: Path, source: str, what: str, hint: str):
    with pytest.raises(ConfigError) as caught:
        config.locate(source)
    assert str(caught.value).removesuffix(" (`rlalign list` shows all)") == f"{source}: {what}. {hint}"


def test_a_directory_is_no_config(tmp_path: Path):
    with pytest.raises(ConfigError, match="is a directory"):
        config.load(tmp_path)
