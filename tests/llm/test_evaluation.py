"""Held-out evaluation: its numbers by hand, when it runs, what it keeps, and that training does not feel it."""

import copy
import json
import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlalign.llm.config import RewardConfig
from rlalign.llm.trainer import PolicyGradientTrainer
from rlalign.training.metrics import read
from tests.llm.tiny_runs import HELD_OUT, PROMPTS, even_length, make_trainer, weights

Make = Callable[..., PolicyGradientTrainer]


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path) -> Make:
    numbers = iter(range(100))

    def build(*arguments: Any, **changes: Any) -> PolicyGradientTrainer:
        options = {"eval_dataset": HELD_OUT} | changes
        return make_trainer(
            copy.deepcopy(tiny_model), tiny_tokenizer, tmp_path / f"run-{next(numbers)}", *arguments, **options
        )

    return build


def greedy(trainer: PolicyGradientTrainer, prompt: str, limit: int) -> str:
    """The most probable completion, token by token, by plain calls of the model."""
    tokens = trainer.tokenizer(prompt)["input_ids"]
    start = len(tokens)
    for _ in range(limit):
        with torch.no_grad():
            tokens = [*tokens, int(trainer.policy.model(torch.tensor([tokens])).logits[0, -1].argmax())]
        if tokens[-1] == trainer.tokenizer.eos_token_id:
            break
    return trainer.tokenizer.decode(tokens[start:], skip_special_tokens=True)


def length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def evaluations(trainer: PolicyGradientTrainer) -> list[dict[str, Any]]:
    return [record for record in read(trainer.session.path / "metrics.jsonl") if record["kind"] == "eval"]


def scores(trainer: PolicyGradientTrainer, values: list[float]) -> None:
    """Let the evaluations find these means, one after the other."""
    found, run = iter(values), trainer.evaluator.run

    def scripted(*arguments: Any) -> Any:
        metrics, rows = run(*arguments)
        return metrics | {"eval/reward_mean": next(found)}, rows

    trainer.evaluator.run = scripted  # pyright: ignore[reportAttributeAccessIssue]


def test_mean_standard_error_and_count_of_greedy_completions(make):
    trainer = make([length, even_length], eval={"max_completion_tokens": 9})
    texts = [greedy(trainer, prompt, 9) for prompt in HELD_OUT]
    outcomes = [a + b for a, b in zip(length(texts), even_length(texts), strict=True)]
    assert stdev(outcomes) > 0
    metrics = trainer.evaluate()
    assert metrics == {
        "eval/reward_mean": pytest.approx(mean(outcomes)),
        "eval/reward_stderr": pytest.approx(stdev(outcomes) / math.sqrt(6)),
        "eval/n": 6.0,
        "eval/length_mean": pytest.approx(mean(length(texts))),
        "eval/even_length_mean": pytest.approx(mean(even_length(texts))),
    }
    rows = trainer.evaluator.run()[1]
    assert [row["prompt"] for row in rows] == HELD_OUT
    assert [row["completion"] for row in rows] == texts
    assert [row["reward"] for row in rows] == outcomes


def test_batches_change_nothing(make):
    uneven = ["say a much longer thing 1", "say 2", "say a longer thing 3", "4?"]
    found = [make(length, eval_dataset=uneven, eval={"batch_rows": rows}).evaluator.run() for rows in (1, 3, 128)]
    assert found[0] == found[1] == found[2]
    assert [row["prompt"] for row in found[0][1]] == uneven


def test_rows_without_a_reward_do_not_count(make):
    def abstains(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        return [None if prompt == HELD_OUT[2] else v for prompt, v in zip(prompts, length(completions), strict=True)]

    trainer = make(abstains, eval={"max_completion_tokens": 9})
    metrics, rows = trainer.evaluator.run()
    kept = [row["reward"] for row in rows if row["prompt"] != HELD_OUT[2]]
    assert metrics["eval/n"] == 5.0
    assert metrics["eval/reward_mean"] == pytest.approx(mean(kept))
    assert rows[2]["reward"] is None
    assert rows[2]["parts"] == {"abstains": None}


def test_one_row_has_no_standard_error(make):
    metrics = make(eval_dataset=HELD_OUT[:1]).evaluate()
    assert metrics["eval/n"] == 1.0
    assert math.isnan(metrics["eval/reward_stderr"])


def test_own_temperature_and_own_random_numbers(make):
    hot, again, cold = (make(length, eval={"temperature": t, "max_completion_tokens": 9}) for t in (1.3, 1.3, 0.0))
    first, second = hot.evaluator.run(), hot.evaluator.run()
    assert first == second == again.evaluator.run()
    assert first[1] != cold.evaluator.run()[1]


def test_held_out_sampling_shares_no_random_numbers_with_training(make):
    """The same only prompt, the same first place, the same temperature: still another completion."""
    options = {"prompts_per_step": 1, "temperature": 1.3, "max_completion_tokens": 9}
    prompt, held_out = ["say 3"], {"temperature": 1.3, "max_completion_tokens": 9}
    trainer = make(length, prompts=prompt, eval_dataset=prompt, rollout=options, eval=held_out)
    evaluated = trainer.evaluator.run()[1][0]["completion"]
    for step in range(3):
        trainer.step = step
        rows = trainer.collect().inputs["completion_ids"].value.tolist()
        assert evaluated not in [trainer.tokenizer.decode(ids, skip_special_tokens=True) for ids in rows]


def test_nucleus_of_nothing_but_the_top_token_is_greedy(make):
    narrow, cold = make(length, eval={"temperature": 1.0, "top_p": 1e-6}), make(length)
    assert narrow.evaluator.run() == cold.evaluator.run()


def test_other_metrics_than_the_rewards_judge(make, tmp_path, monkeypatch):
    (tmp_path / "judges.py").write_text("def shout(completions, **columns):\n    return [7.0 for _ in completions]\n")
    trainer = make(eval={"metrics": [{"function": f"{tmp_path / 'judges.py'}:shout"}]})
    assert isinstance(trainer.config.eval.metrics[0], RewardConfig)
    metrics = trainer.evaluate()
    assert metrics == {"eval/reward_mean": 7.0, "eval/reward_stderr": 0.0, "eval/n": 6.0, "eval/shout_mean": 7.0}


@pytest.mark.parametrize(
    ("total", "eval_settings", "steps"),
    [
        (3, {}, [0, 3]),
        (3, {"every": 2}, [0, 2, 3]),
        (4, {"every": 2}, [0, 2, 4]),
        (3, {"every": 1, "before": False}, [1, 2, 3]),
    ],
)
def test_before_during_and_after_each_once(make, total, eval_settings, steps):
    trainer = make(total_steps=total, eval=eval_settings).fit()
    assert [record["step"] for record in evaluations(trainer)] == steps
    files = sorted(path.name for path in (trainer.session.path / "samples").iterdir())
    assert files == [f"eval-{step:06d}.jsonl" for step in steps]
    rows = [json.loads(line) for line in (trainer.session.path / "samples" / files[0]).read_text().splitlines()]
    assert [row["prompt"] for row in rows] == HELD_OUT
    assert {row["step"] for row in rows} == {steps[0]}


def test_the_first_evaluation_sees_the_untouched_model_and_the_last_the_trained_one(make):
    trainer = make(length, total_steps=3, optim={"learning_rate": 0.3}, eval={"max_completion_tokens": 9})
    untouched = trainer.evaluate()
    trainer.fit()
    first, last = evaluations(trainer)
    assert {name: first[name] for name in untouched} == untouched
    assert {name: last[name] for name in untouched} == trainer.evaluate()
    assert first["eval/reward_mean"] != last["eval/reward_mean"]


def test_other_phrasings_are_measured_before_training_and_the_best_is_kept(make, tmp_path, capsys):
    phrasings = [(["say what"], None), (["tell a", "tell b", "tell c"], None), (["say so", "say no"], 3)]
    baselines = []
    for number, (prompts, limit) in enumerate(phrasings, 1):
        path = tmp_path / f"phrasing-{number}.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        baselines.append({"data": {"source": str(path)}, "max_completion_tokens": limit})
    trainer = make(length, eval={"baselines": baselines, "max_completion_tokens": 9})
    expected = [
        mean(length([greedy(trainer, prompt, limit or 9) for prompt in prompts])) for prompts, limit in phrasings
    ]
    trainer.fit()
    first, last = evaluations(trainer)
    assert first["eval/best_baseline_mean"] == pytest.approx(max(expected))
    assert "eval/best_baseline_mean" not in last
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("measuring")]
    counts = [len(prompts) for prompts, _ in phrasings] + [len(trainer.evaluator.data)]
    assert told == [
        f"measuring the untouched model: phrasing {number} of 4 ({count} held-out prompts)"
        for number, count in enumerate(counts, 1)
    ]
    folder = trainer.session.path / "samples"
    for number, value in enumerate(expected, 1):
        rows = [json.loads(line) for line in (folder / f"baseline-{number}.jsonl").read_text().splitlines()]
        assert mean(row["reward"] for row in rows) == pytest.approx(value)


def test_the_best_model_is_kept_and_not_the_last(make):
    trainer = make(total_steps=4, eval={"every": 1})
    scores(trainer, [0.2, 0.4, 0.9, 0.9, 0.5])
    kept = []
    for _ in trainer.steps():
        kept.append(weights(trainer.policy.model))
    best = load_file(trainer.session.path / "best" / "model.safetensors")
    assert all(torch.equal(best[name], kept[1][name]) for name in kept[1])
    assert any(not torch.equal(best[name], kept[3][name]) for name in kept[3])
    assert trainer.evaluator.best == 0.9


@pytest.mark.parametrize(("settings", "values"), [({"save_best": False}, [0.1, 0.9]), ({}, [0.9, 0.1])])
def test_best_is_not_written_when_not_wanted_or_when_the_untouched_model_was_better(make, settings, values):
    trainer = make(eval=settings)
    scores(trainer, values)
    trainer.fit()
    assert not (trainer.session.path / "best").exists()
    assert (trainer.session.path / "model").exists()


def test_patience_stops_training(make):
    trainer = make(total_steps=9, eval={"every": 1, "patience": 2})
    scores(trainer, [0.1, 0.5, 0.4, 0.6, 0.6, 0.2, 1.0, 1.0, 1.0, 1.0])
    trainer.fit()
    assert trainer.step == 5
    assert [record["step"] for record in evaluations(trainer)] == [0, 1, 2, 3, 4, 5]
    assert json.loads((trainer.session.path / "status.json").read_text())["status"] == "done"


def test_patience_survives_a_checkpoint(make):
    trainer = make(eval={"every": 1, "patience": 2})
    trainer.evaluator.best, trainer.evaluator.stale, trainer.evaluator.started = 0.75, 2, True
    state = trainer.evaluator.state_dict()
    other = make(eval={"every": 1, "patience": 2})
    assert not other.finished
    other.evaluator.load_state_dict(state)
    assert other.finished
    assert (other.evaluator.best, other.evaluator.started) == (0.75, True)


def test_the_guard_of_other_metrics_survives_a_checkpoint(make, tmp_path):
    text = (
        "def stumbles(completions, **columns):\n"
        "    stumbles.calls = getattr(stumbles, 'calls', 0) + 1\n"
        "    return [None if i == stumbles.calls % 3 else 1.0 for i in range(len(completions))]\n"
    )
    (tmp_path / "judges.py").write_text(text)
    metrics = {"eval": {"metrics": [{"function": f"{tmp_path / 'judges.py'}:stumbles"}]}}
    trainer, other = make(**metrics), make(**metrics)
    trainer.evaluate()
    other.load_state_dict(trainer.state_dict())
    assert other.evaluator.guard.state_dict() == {"batches": 1, "recent": [0] * 6}
    assert other.guard.state_dict() == {"batches": 0, "recent": []}


def test_an_evaluation_that_is_not_a_number_is_never_the_best(make):
    trainer = make(total_steps=1)
    scores(trainer, [math.nan, math.nan])
    trainer.fit()
    assert trainer.evaluator.best == -math.inf
    assert not (trainer.session.path / "best").exists()


def test_without_held_out_data_nothing_is_evaluated(make):
    trainer = make(eval_dataset=None).fit()
    assert evaluations(trainer) == []
    with pytest.raises(ValueError, match="there is no held-out data: pass `eval_dataset`, or set `data.eval`"):
        trainer.evaluate()


def test_prompts_that_training_also_sees_are_reported(make, capsys):
    make(eval_dataset=[*HELD_OUT, PROMPTS[0]]).fit()
    assert "1 of 7 prompts are also in `train_dataset`, so the evaluation is not held out" in capsys.readouterr().out
