"""Call a configuration's rewards on a few completions of its own data, as `rlalign check CONFIG` does. No torch."""

from collections.abc import Sequence

from rlalign.config import ConfigError
from rlalign.llm.config import PolicyGradientConfig
from rlalign.llm.consistency import decomposed, reward_bounds
from rlalign.llm.data import Prompts, as_completion
from rlalign.llm.reward_place import where_it_failed
from rlalign.training.reward_call import Reply, RewardError, RowResult
from rlalign.training.reward_function import RewardFunction
from rlalign.training.reward_isolation import make_runner
from rlalign.training.reward_request import Request, check_columns, make_request

ANSWERS = ("answer", "solution", "target", "ground_truth", "label")
"""Columns that most often hold what a completion should say."""
WRONG = "I do not know."
_ROWS = 3
_IMPORTS_TORCH = ":TRLReward"


def try_rewards(config: PolicyGradientConfig, functions: Sequence[RewardFunction], data: Prompts | None) -> list[str]:
    """Score the answers of the first rows, and a completion that answers nothing; return notes.

    Functions of `trl.rewards` are left out: they import torch.

    Raises:
        ConfigError: A function cannot be imported, fails on every sample, or leaves the range the estimator takes.
    """
    if data is None or any((function.import_path or "").endswith(_IMPORTS_TORCH) for function in functions):
        return []
    request, texts = _samples(data)
    results = [_ask(function, f"rewards.{i}.function", request, config) for i, function in enumerate(functions)]
    _require_range(config, functions, results, texts)
    notes = [
        f"`rewards.{i}.function`: on {bad[0]!r:.60} it {_told(failed[0])}"
        for i, row in enumerate(results)
        if (failed := [result for result in row if result.failed])
        and (bad := [text for text, result in zip(texts, row, strict=True) if result.failed])
    ]
    whole = [_total(functions, row) for row in zip(*results, strict=True)]
    shown = ", ".join(
        f"{'None' if value is None else f'{value:g}'} for {text!r:.40}"
        for value, text in zip(whole, texts, strict=True)
    )
    return [f"rewards of sample completions: {shown}", *notes]


def _samples(data: Prompts) -> tuple[Request, list[str]]:
    rows = list(range(min(_ROWS, len(data))))
    column = next((name for name in ANSWERS if name in data.reward_columns), None)
    answers = [] if column is None else [(row, str(data[row].get(column))) for row in rows]
    asked = [*answers, (rows[0], WRONG)]
    indices, texts = [row for row, _ in asked], [text for _, text in asked]
    prompts = [data[row]["prompt"] for row in indices]
    request = make_request(
        prompts,
        [as_completion(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        [[len(word) for word in text.split()] for text in texts],  # no tokenizer here: numbers that stand for ids
        data.columns(indices),
        {"global_step": 0, "max_steps": 1},
    )
    return request, texts


def _ask(function: RewardFunction, key: str, request: Request, config: PolicyGradientConfig) -> list[RowResult]:
    runner = make_runner(function, "auto", start_timeout_s=config.guard.start_timeout_s)
    try:
        runner.prepare()
        check_columns(function, runner.required, request.columns)
        runner.begin(request)
        reply: Reply = runner.finish(config.guard.timeout_s)
        results = reply.results if reply.error is None else list(runner.alone(request, config.guard.timeout_s))
    except RewardError as error:
        raise ConfigError(f"`{key}`: {error}") from None
    finally:
        runner.close()
    if all(result.failed for result in results):
        raise ConfigError(
            f"`{key}`: {function.name} fails on every sample completion: it {_told(results[0])}. Try it: "
            f"rlalign check {function.import_path}"
        )
    return results


def _told(result: RowResult) -> str:
    place = where_it_failed(result.detail)
    return f"{result.message}{f' at {place}' if place else ''}"


def _total(functions: Sequence[RewardFunction], row: Sequence[RowResult]) -> float | None:
    parts = [
        function.weight * result.value
        for function, result in zip(functions, row, strict=True)
        if result.value is not None
    ]
    return sum(parts) if parts and not any(result.failed for result in row) else None


def _require_range(
    config: PolicyGradientConfig,
    functions: Sequence[RewardFunction],
    results: Sequence[Sequence[RowResult]],
    texts: Sequence[str],
) -> None:
    low, high = reward_bounds(config)
    if decomposed(config):
        values = [(text, result.value) for row in results for text, result in zip(texts, row, strict=True)]
    else:
        rows = zip(*results, strict=True)
        values = [(text, _total(functions, row)) for text, row in zip(texts, rows, strict=True)]
    for text, value in values:
        if value is not None and not low <= value <= high:
            raise ConfigError(
                f"the completion {text!r:.60} is rewarded with {value:g}, and `advantage: {config.advantage.type}` "
                f"takes rewards in [{low:g}, {high:g}]: rescale the reward, or set "
                + ("its range." if high == float("inf") else "`advantage.reward_range`.")
            )
