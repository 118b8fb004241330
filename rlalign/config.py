"""One strict YAML plus `key=value` overrides -> a frozen config object, or every mistake at once with its line."""

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rlalign.config_messages import validate
from rlalign.config_papers import by_paper
from rlalign.config_schema import default_of, dotted, fill, hints_of, not_finite, plain
from rlalign.config_unknown import unknown_keys
from rlalign.yaml_strict import MAX_DEPTH, ConfigError, Document, Key, Place, Problem, parse, read_document

__all__ = [
    "METHODS",
    "ConfigError",
    "Problem",
    "build",
    "dump",
    "find_preset",
    "load",
    "locate",
    "presets",
    "read_yaml",
]

METHODS = {
    "bnpo": "rlalign.llm.config:BNPOConfig",
    "policy_gradient": "rlalign.llm.config:PolicyGradientConfig",
    "ppo": "rlalign.agents.config:PPOConfig",
    "trpo": "rlalign.agents.config:TRPOConfig",
    "policy_gradient_agent": "rlalign.agents.config:GroupConfig",
    "hnpg": "rlalign.agents.config_hybrid:HNPGConfig",
    "odice": "rlalign.agents.config_offline:ODICEConfig",
    "bc": "rlalign.agents.config_offline:BCConfig",
    "iql": "rlalign.agents.config_offline:IQLConfig",
    "td3_bc": "rlalign.agents.config_offline:TD3BCConfig",
    "flow_grpo": "rlalign.diffusion.config:FlowGRPOConfig",
    "dso": "rlalign.diffusion.config_dso:DSOConfig",
}
"""Method name -> its config class. The package before `.config` has the `run` module that carries the method out."""

_COMMAND_LINE = Place("command line")
_EXAMPLE = "write key=value, such as optim.learning_rate=1e-5"


def load(source: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read a config file or preset, apply `key=value` overrides and validate the result.

    Args:
        source: Path of a YAML (or resolved JSON) file, or the name of a preset.
        overrides: Dotted paths with values in YAML, such as `rewards.0.weight=2`. Later ones win.

    Raises:
        ConfigError: Everything that is wrong, each entry with file, line, key, what was got and what is allowed.
    """
    document = read_document(locate(source))
    settings = [_parse_override(text) for text in overrides]
    _require_mapping(document)
    for path, value in settings:
        if path == ["method"]:
            document.data["method"] = value
            document.places[("method",)] = _COMMAND_LINE
    cls = _config_class(document)
    for path, value in settings:
        _override(document, document.data, path, value, default=cls)
    return _build(document, cls)


def build(data: dict[str, Any], *, source: str = "config") -> Any:
    """Validate plain data, such as `dump` returns or a resolved JSON file holds, into a config object.

    Raises:
        ConfigError: The data does not describe a config.
    """
    document = Document(data, source, places={(): Place(source)})
    _require_mapping(document)
    return _build(document, _config_class(document))


def dump(config: Any) -> dict[str, Any]:
    """A config object as JSON-able data; `build(dump(config)) == config`."""
    cls = type(config)
    method = {target: name for name, target in METHODS.items()}[f"{cls.__module__}:{cls.__qualname__}"]
    return {"method": method} | plain(config)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping, strictly: see `rlalign.yaml_strict`.

    Raises:
        ConfigError: Broken syntax, duplicate keys, tags, anchors, tabs, byte order mark, too large or not UTF-8.
    """
    document = read_document(Path(path))
    _require_mapping(document)
    if document.problems:
        raise ConfigError(document.problems)
    return document.data


def locate(source: str | Path) -> Path:
    """The file that a path or preset name stands for.

    Raises:
        ConfigError: Neither a file nor a preset; the message names the nearest preset.
    """
    path = Path(source)
    try:
        exists = path.exists()
    except OSError:  # such as a name that is too long for the file system
        exists = False
    if exists:
        return path
    if path.suffix in (".yaml", ".yml", ".json"):
        raise ConfigError(f"{path}: no such file.{_preset_hint(path.stem)}")
    return find_preset(str(source))


def presets() -> dict[str, Path]:
    """Preset name -> file. A name is the file's stem, with its folder in front where two folders share a stem."""
    root = _preset_root()
    files = sorted(root.rglob("*.yaml")) if root is not None else []
    stems = [file.stem for file in files]
    return {
        file.stem if stems.count(file.stem) == 1 else f"{file.parent.name}/{file.stem}": file for file in sorted(files)
    }


def find_preset(name: str) -> Path:
    """The file of a preset, by stem (`bnpo_arithmetic`) or with its folder (`llm/bnpo_arithmetic`).

    Raises:
        ConfigError: There is none of that name.
    """
    known = presets()
    for preset, file in known.items():
        if name in (preset, f"{file.parent.name}/{file.stem}"):
            return file
    raise ConfigError(f"{name}: neither a file nor a preset.{_preset_hint(name)}")


def describe(path: Path) -> str:
    """The first comment line of a config file, which says what the config is for."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("#").strip() for line in lines if line.startswith("#")), "")


def _preset_hint(name: str) -> str:
    known = list(presets())
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f" Did you mean the preset `{near[0]}`? (`rlalign list` shows all)"
    return " `rlalign list` names the presets."


def _preset_root() -> Path | None:
    package = Path(__file__).parent
    if (package / "presets").is_dir():  # an installed wheel
        return package / "presets"
    checkout = package.parent  # a `configs` folder beside an installed package would be somebody else's
    return checkout / "configs" if (checkout / "pyproject.toml").is_file() else None


def _require_mapping(document: Document) -> None:
    if isinstance(document.data, dict):
        return
    what = "is empty" if document.data is None else "is not a mapping of keys to values"
    text = f"{what}; `rlalign list` names complete examples"
    raise ConfigError([*document.problems, Problem(document.place(()), text)])


def _config_class(document: Document) -> type:
    method, known = document.data.get("method"), ", ".join(METHODS)
    if isinstance(method, str) and method in METHODS:
        module, _, name = METHODS[method].partition(":")
        return vars(import_module(module))[name]
    if "method" not in document.data:
        text = f"`method` is missing; it is one of {known}"
    else:
        text = f"`method` must be one of {known}, got {method!r:.50}{_meant_method(str(method))}"
    raise ConfigError([*document.problems, Problem(document.place(("method",)), text)])


def _meant_method(method: str) -> str:
    paper = by_paper(method)
    if paper is not None:
        return f". {paper}"
    near = difflib.get_close_matches(method, METHODS, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _build(document: Document, cls: type) -> Any:
    data = {key: value for key, value in document.data.items() if key != "method" or key in hints_of(cls)}
    found: dict[Key, str] = {}
    for path, text in [*unknown_keys(cls, data), *not_finite(data)]:
        found.setdefault(path, text)
    result, wrong = validate(cls, fill(cls, data))
    for path, text in wrong:
        found.setdefault(path, text)
    problems = document.problems + [Problem(document.place(path), text) for path, text in found.items()]
    if problems:
        raise ConfigError(problems)
    return result


def _parse_override(text: str) -> tuple[list[str], Any]:
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path) or len(path) > MAX_DEPTH:
        raise ConfigError([Problem(_COMMAND_LINE, f"`{text:.80}` is not a setting; {_EXAMPLE}")])
    if not value.strip():
        raise ConfigError([Problem(_COMMAND_LINE, f"`{key}` has no value; for none write {key}=null")])
    try:
        document = parse(value, source="command line")
    except ConfigError as error:
        document = Document(None, "command line", problems=error.problems)
    if document.problems:
        raise ConfigError([Problem(_COMMAND_LINE, f"`{key}`: {problem.text}") for problem in document.problems])
    return path, document.data


def _override(document: Document, node: Any, path: list[str], value: Any, default: Any, here: Key = ()) -> None:
    """Set `value` below `node`, making what is missing on the way; `default` is the default that `node` replaces."""
    step: str | int = path[0]
    if isinstance(node, list):
        step = _index(path[0], here, len(node))
    elif not isinstance(node, dict):
        text = f"`{dotted(here)}` is a single value; it has no `{step}`"
        raise ConfigError([Problem(_COMMAND_LINE, text)])
    here, holder = (*here, step), typing.cast(Any, node)
    if len(path) == 1:
        holder[step] = value
        document.places = {key: place for key, place in document.places.items() if key[: len(here)] != here}
        document.places[here] = _COMMAND_LINE
        return
    below = _default_below(default, path[0])
    if (holder[step] if isinstance(node, list) else holder.get(step)) is None:
        holder[step] = plain(below) if isinstance(below, list | tuple | dict) else {}
        document.places[here] = _COMMAND_LINE
    _override(document, holder[step], path[1:], value, below, here)


def _default_below(default: Any, name: str) -> Any:
    if isinstance(default, type):
        return default_of(default, name)
    if dataclasses.is_dataclass(default) and name in hints_of(type(default)):
        return vars(default)[name]
    return None


def _index(segment: str, here: Key, length: int) -> int:
    if segment.isascii() and segment.isdecimal() and int(segment[:9]) < length:
        return int(segment)
    allowed = f"its entries are 0 to {length - 1}" if length else "it has no entries"
    text = f"`{dotted(here)}` is a list and {allowed}, got `{segment:.20}`"
    raise ConfigError([Problem(_COMMAND_LINE, text)])
