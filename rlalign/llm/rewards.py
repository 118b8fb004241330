"""Turn what a config or a script calls a reward into a `RewardFunction` that the guard can run."""

import difflib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

from rlalign.config import ConfigError
from rlalign.llm.config import RewardConfig
from rlalign.llm.reward_source import functions_in, module_file, names_in
from rlalign.training.reward_function import RewardFunction

if TYPE_CHECKING:
    from rlalign.llm.reward_probe import ProbeReport

ADAPTERS = "rlalign.llm.reward_adapters"

Reward = str | Callable[..., Any] | RewardFunction


def resolve_reward(
    reward: Any, *, weight: float = 1.0, arguments: Mapping[str, Any] | None = None, key: str = "rewards.function"
) -> RewardFunction:
    """Find the reward a string names, or wrap a Python callable.

    | form | means |
    |---|---|
    | `package.module:function` | anything importable; the current directory counts |
    | `path/to/file.py:function` | a function (or a class, made with the arguments) in a file |
    | `accuracy_reward`, `think_format_reward` ... | a name of `trl.rewards`; plain completions work too |
    | `reasoning_gym:<task>` | the task's own `score_answer` over the columns `answer` and `metadata` |
    | a callable | sync or async; an importable one still gets a process of its own |

    No user code runs here: files are parsed, not imported, and the reward worker imports them.

    Args:
        weight: Factor in the sum of rewards.
        arguments: Keyword arguments bound to the function.
        key: Name of the setting, for messages.

    Raises:
        ConfigError: There is no such file, module, function or name; the message says which come near.
    """
    bound = dict(arguments or {})
    if isinstance(reward, RewardFunction):
        return reward
    if not isinstance(reward, str):
        if not callable(reward):
            raise ConfigError(f"`{key}` must be a function or its name, got {type(reward).__name__} {reward!r}.")
        return RewardFunction(name=_callable_name(reward), call=reward, weight=weight, arguments=bound)
    if reward.endswith(".py"):
        raise _without_function(reward, key)
    place, _, name = reward.rpartition(":")
    if place == "reasoning_gym":
        return _reasoning_gym(name, weight, bound, key)
    if place.endswith(".py"):
        path = _file(Path(place).expanduser(), name, key)
    elif place:
        path = _module(place, name, key)
    elif "." in reward:  # the spelling of TRL's command line
        path = _module(reward.rpartition(".")[0], reward.rpartition(".")[2], key)
    else:
        return _trl(reward, weight, bound, key)
    return RewardFunction(name=path.rpartition(":")[2], import_path=path, weight=weight, arguments=bound)


def resolve_rewards(
    rewards: Any, *, weights: Sequence[float] | None = None, key: str = "rewards"
) -> list[RewardFunction]:
    """Resolve several rewards and give those that share a name a number: `length`, `length_2`.

    Args:
        rewards: One reward, or several; as names, callables, `RewardConfig` or `RewardFunction`.
        weights: One per reward; overrides nothing a `RewardConfig` says.
    """
    several = list(rewards) if isinstance(rewards, Iterable) and not isinstance(rewards, str) else [rewards]
    if not several:
        raise ConfigError(f"`{key}` is empty; name at least one reward function.")
    factors = list(weights) if weights is not None else [1.0] * len(several)
    if len(factors) != len(several):
        raise ConfigError(f"{len(factors)} reward weights for {len(several)} rewards; give one each.")
    resolved = []
    for index, (item, factor) in enumerate(zip(several, factors, strict=True)):
        where = f"{key}.{index}.function"
        if isinstance(item, RewardConfig):
            resolved.append(resolve_reward(item.function, weight=item.weight, arguments=item.args, key=where))
        else:
            resolved.append(resolve_reward(item, weight=factor, key=where))
    names = distinct([function.name for function in resolved])
    return [replace(function, name=name) for function, name in zip(resolved, names, strict=True)]


def distinct(names: Sequence[str]) -> list[str]:
    """Number reward functions that share a name (two lambdas, say) from the second on, so that none hides another.

    Example:
        >>> distinct(["length", "length", "exact"])
        ['length', 'length_2', 'exact']
    """
    result: list[str] = []
    for name in names:
        numbered = (f"{name}_{number}" for number in count(2))
        free = (candidate for candidate in numbered if candidate not in result and candidate not in names)
        result.append(next(free) if name in result else name)
    return result


def probe_reward(
    reward: Reward,
    *,
    rows: Sequence[Mapping[str, Any]] | None = None,
    arguments: Mapping[str, Any] | None = None,
    timeout_s: float = 10.0,
) -> "ProbeReport":
    """Try a reward on samples in a few seconds; `print` what comes back, or ask its `ok`. See `reward_probe`."""
    from rlalign.llm.reward_probe import probe

    function = resolve_reward(reward, arguments=arguments, key="reward")
    return probe(function, rows=rows, timeout_s=timeout_s, written=reward if isinstance(reward, str) else None)


def _callable_name(function: Callable[..., Any]) -> str:
    named = function.func if isinstance(function, partial) else function
    if not isinstance(named, FunctionType | BuiltinFunctionType | type):  # an object; TRL's say their name in the class
        return str(vars(type(named)).get("__name__", type(named).__name__))
    name = named.__name__
    return "reward" if name == "<lambda>" else name


def _file(path: Path, name: str, key: str) -> str:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        raise ConfigError(f"`{key}`: there is no file {path.absolute()}.{_did_you_mean(near)}")
    _require_name(path, name, key)
    return f"{path.resolve()}:{name}"


def _require_name(path: Path, name: str, key: str) -> None:
    try:
        names = names_in(path)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"`{key}`: {path} is not valid Python: {error}.") from None
    if name in names or {"*", "__getattr__"} & set(names):
        return
    near = difflib.get_close_matches(name, names, n=3)
    there = f" It defines {', '.join(functions_in(path)[:8]) or 'no functions'}." if not near else ""
    raise ConfigError(f"`{key}`: {path} defines no {name!r}.{_did_you_mean(near)}{there}")


def _without_function(reward: str, key: str) -> ConfigError:
    path = Path(reward).expanduser()
    if not path.is_file():
        return ConfigError(f"`{key}`={reward} names no function, and there is no such file. Write file.py:function.")
    try:
        defined = functions_in(path)
    except (SyntaxError, ValueError) as error:
        return ConfigError(f"`{key}`: {path} is not valid Python: {error}.")
    if not defined:
        return ConfigError(f"`{key}`={reward} names no function, and the file defines none at its top level.")
    return ConfigError(
        f"`{key}`={reward} names no function; it defines {', '.join(defined)}. Write {reward}:{defined[0]}"
    )


def _module(module: str, name: str, key: str) -> str:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        found = False
    if not found or not name.isidentifier():
        raise ConfigError(
            f"`{key}`={module}:{name} names no importable module. Is it installed for {sys.executable}, or do you mean "
            f"a file: `{module.replace('.', '/')}.py:{name}`?"
        )
    source = module_file(module)
    if source is not None:
        _require_name(source, name, key)
    return f"{module}:{name}"


def _trl(name: str, weight: float, arguments: dict[str, Any], key: str) -> RewardFunction:
    if importlib.util.find_spec("trl") is None:
        raise ConfigError(f"`{key}`={name} is a name of trl.rewards. Install it: pip install 'rlalign[llm]'")
    import trl.rewards

    names = [known for known in dir(trl.rewards) if known.endswith(("_reward", "_punishment"))]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or names
        raise ConfigError(
            f"`{key}`={name} is no name of trl.rewards.{_did_you_mean(near)} Your own functions are written "
            "`package.module:function` or `path/file.py:function`."
        )
    if "accuracy" in name or "cosine" in name:
        _require("math_verify", "math-verify", key)
    return RewardFunction(
        name=name.removeprefix("get_"),
        import_path=f"{ADAPTERS}:TRLReward",
        weight=weight,
        arguments={"name": name, **arguments},
    )


def _reasoning_gym(task: str, weight: float, arguments: dict[str, Any], key: str) -> RewardFunction:
    _require("reasoning_gym", "reasoning-gym", key)
    return RewardFunction(
        name=task,
        import_path=f"{ADAPTERS}:ReasoningGymReward",
        weight=weight,
        arguments={"task": task, **arguments},
    )


def _require(module: str, package: str, key: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"`{key}` needs the package {package}. Install it: pip install {package}")


def _did_you_mean(names: Sequence[str]) -> str:
    return f" Did you mean {', '.join(names)}?" if names else ""
