"""Ready-made rewards of other packages in TRL's signature. Imported inside reward workers, so nothing heavy up here."""

import ast
import inspect
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from rlalign.training import reward_wire

_MATHS_NAMES = """
    abs Abs sign sqrt cbrt root exp log ln pow Pow mod Mod gcd lcm max Max min Min round floor ceiling
    sin cos tan cot sec csc asin acos atan atan2 acot asec acsc sinh cosh tanh coth sech csch asinh acosh atanh acoth
    asech acsch sinc erf erfc erfi Ei Si Ci li LambertW gamma beta zeta factorial binomial re im conjugate
    Integer Rational Float Integral Derivative pi oo
    alpha delta epsilon eta theta iota kappa mu nu xi rho sigma tau upsilon phi chi psi omega
"""
_ALLOWED = frozenset(_MATHS_NAMES.split())
_SYMBOL = re.compile(r"[A-Za-z](_?[0-9]+)?")
_LONGEST_EXPRESSION = 1000


class TRLReward:
    """A function of `trl.rewards` that also takes plain-text completions.

    TRL's functions read `completion[0]["content"]`; here a plain completion is handed to them as one assistant
    message. `accuracy_reward` grades with math-verify, which sets `signal.alarm`: it must run in a main thread, as it
    does in a reward worker.

    Args:
        name: As in `trl.rewards`. A `get_...` factory is called with the arguments first.
        arguments: Bound to the function, or given to the factory.
    """

    def __init__(self, name: str, **arguments: Any) -> None:
        import trl.rewards

        found = getattr(trl.rewards, name)
        self._reward = found(**arguments) if name.startswith("get_") else partial(found, **arguments)
        self.__signature__ = inspect.signature(self._reward)

    def __call__(self, *, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        messages = [[{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in completions]
        return self._reward(completions=messages, **columns)


class ReasoningGymReward:
    """Score with the `score_answer` of a reasoning-gym data set.

    The answer is what stands in the last `<answer>...</answer>` of a completion, else all of it after `</think>`. The
    entry comes from the columns `answer` and `metadata`, or whole from a column `entry` (a dict or its JSON).

    Some tasks parse answers with Python's `eval`, directly or inside sympy. Model output must never run as code: those
    tasks get `ast.literal_eval`, and an answer for sympy that is more than an expression of known names scores 0.

    Args:
        task: Name of the data set, or `auto` for the `source_dataset` in each entry's metadata (mixed tasks).
        config: Its settings, the same as for the data: a few tasks score by them.
    """

    def __init__(self, task: str, **config: Any) -> None:
        from reasoning_gym.factory import DATASETS

        if task not in ("auto", "composite") and task not in DATASETS:
            raise LookupError(f"reasoning_gym has no task '{task}'; it has {', '.join(sorted(DATASETS))}, or `auto`")
        self.task, self.config = task, config
        self._datasets: dict[str, Any] = {}
        if task not in ("auto", "composite"):
            self._dataset(task)

    def __call__(
        self,
        *,
        completions: Sequence[Any],
        answer: Sequence[Any] | None = None,
        metadata: Sequence[Any] | None = None,
        entry: Sequence[Any] | None = None,
    ) -> list[float]:
        if entry is not None:
            entries = [reward_wire.loads(item.encode()) if isinstance(item, str) else item for item in entry]
        elif answer is not None and metadata is not None:
            entries = [{"answer": a, "metadata": m} for a, m in zip(answer, metadata, strict=True)]
        else:
            raise LookupError("reasoning_gym rewards need the columns `answer` and `metadata`, or `entry`")
        return [self._score(completion, item) for completion, item in zip(completions, entries, strict=True)]

    def _score(self, completion: Any, entry: dict[str, Any]) -> float:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        mixed = self.task in ("auto", "composite")
        dataset = self._dataset(entry["metadata"]["source_dataset"] if mixed else self.task)
        answer = extract_answer(text)
        if "parse_expr" in type(dataset).score_answer.__code__.co_names and is_more_than_an_expression(answer):
            return 0.0
        return float(dataset.score_answer(answer, entry))

    def _dataset(self, task: str) -> Any:
        if task not in self._datasets:
            from reasoning_gym.factory import create_dataset

            self._datasets[task] = create_dataset(task, **self.config)
            score = type(self._datasets[task]).score_answer
            if "eval" in score.__code__.co_names:
                # A module global comes before the builtin: this module's `eval(answer)` now reads literals only.
                vars(sys.modules[score.__module__])["eval"] = ast.literal_eval
        return self._datasets[task]


def extract_answer(text: str) -> str:
    """The content of the last `<answer>` tag, else everything after the last `</think>`, without outer spaces."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (tagged[-1] if tagged else text.rpartition("</think>")[2]).strip()


def is_more_than_an_expression(text: str) -> bool:
    """Whether an answer holds anything but numbers, operators, symbols of one letter and known names of mathematics.

    sympy's parser evaluates text with all of `from sympy import *` and Python's builtins in reach, among them
    functions that open a window (`preview`, `plot`), run sympy's tests (`test`) or compile code (`lambdify`). So what
    is not known to be mathematics is refused, and so is what is absurdly long.
    """
    if len(text) > _LONGEST_EXPRESSION or "__" in text or re.search(r"['\"`\[{\\;:@#]|\.\s*[A-Za-z_]", text):
        return True
    # Python reads letters of other alphabets as their plain form: a fullwidth `eval` is `eval`.
    names = re.findall(r"[A-Za-z_]\w*", text)
    return not text.isascii() or not all(name in _ALLOWED or _SYMBOL.fullmatch(name) for name in names)
