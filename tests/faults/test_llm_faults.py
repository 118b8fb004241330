"""Faults through the whole trainer: what each costs, what is said, and that the last checkpoint stays good."""

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlalign.llm.config import GuardConfig
from rlalign.llm.data import DataError
from rlalign.llm.trainer import PolicyGradientTrainer
from rlalign.optim.step import TrainingDiverged
from rlalign.training.checkpoint import CheckpointError, Checkpoints
from rlalign.training.guard import RewardError
from rlalign.training.metrics import metrics_hash, read
from rlalign.training.no_signal import NoSignalError
from rlalign.training.run_directory import RunDirectory
from tests.llm.commands import Done, fault, rlalign
from tests.llm.tiny_runs import PROMPTS, constant, even_length, largest_difference, make_trainer, weights

Make = Callable[..., PolicyGradientTrainer]


@pytest.fixture
def make(tiny_model, tiny_tokenizer, tmp_path) -> Make:
    numbers = iter(range(100))

    def build(*arguments: Any, **changes: Any) -> PolicyGradientTrainer:
        model = copy.deepcopy(tiny_model)
        return make_trainer(model, tiny_tokenizer, tmp_path / f"run-{next(numbers)}", *arguments, **changes)

    return build


def status(path: Path) -> dict[str, Any]:
    return json.loads((path / "status.json").read_text())


def assert_clean(done: Done, code: int) -> None:
    """One message, no traceback on the terminal, and the run says how it ended."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    assert done.out.splitlines()[-1].startswith("Report: ")


# --- rewards ---------------------------------------------------------------------------------------------------------

BAD_REWARDS = {
    "not_a_number": r"failed on row 0 of 5 \(not_finite\): returned nan",
    "infinite": r"failed on row 0 of 5 \(not_finite\): returned inf",
    "raises": r"failed on row 0 of 5 \(raised\): raised RuntimeError: no grader here",
    "too_few": r"failed on row 0 of 5 \(wrong_shape\): returned 1 rewards for 5 completions",
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_reward_that_never_worked_stops_the_run_before_any_update(workshop, name):
    run = workshop / f"reward-{name}"
    function = f"rewards.0.function=rewards.py:{name}"
    done = rlalign(workshop, "train", "tiny.yaml", function, "--run-dir", run.name)
    assert_clean(done, 1)
    assert re.search(rf"Failed: reward '{name}' {BAD_REWARDS[name]}.*'say 10'.*rlalign check", done.err)
    assert status(run)["status"] == "failed"
    assert Checkpoints(run / "checkpoints").steps() == []
    (sample,) = run.glob("errors/reward-*.json")
    assert json.loads(sample.read_text())["sample"]["prompts"] == "say 10"
    assert [path.name for path in run.glob("errors/error-*.txt")] == ["error-0001.txt"]


def spoiled(values: Callable[[list[float]], Any], *, since: int = 1) -> Callable[..., Any]:
    """`even_length` on the first steps, and what `values` makes of it from then on."""

    def reward(completions: list[str], trainer_state: Any, **columns: Any) -> Any:
        even = even_length(completions)
        return even if trainer_state.global_step < since else values(even)

    return reward


def crash(values: list[float]) -> list[float]:
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "nan": lambda even: [math.nan, *even[1:]],
        "inf": lambda even: [math.inf, *even[1:]],
        "text": lambda even: ["yes", *even[1:]],
        "huge": lambda even: [1e39, *even[1:]],
    }.items(),
)
def test_one_bad_row_later_on_is_left_out_and_counted(make, name, values):
    trainer = make(spoiled(values), total_steps=3)
    records = list(trainer.steps())
    assert [record["reward/error_frac"] for record in records] == [0.0, 1 / 16, 1 / 16]
    assert all(math.isfinite(record["reward/mean"]) for record in records)
    assert all(value.isfinite().all() for value in weights(trainer.policy.model).values())
    assert trainer.step == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda even: even[1:], "returned 15 rewards for 16"),
        (crash, "raised KeyError: 'answer'"),
        (lambda even: [math.nan] * 16, "returned nan"),
    ],
    ids=["wrong length", "raises", "all nan"],
)
def test_a_reward_that_breaks_down_ends_the_run_with_a_count_and_a_sample(make, values, message):
    trainer = make(spoiled(values, since=2), total_steps=9, checkpoint={"every": 1})
    with pytest.raises(RewardError, match=message) as caught:
        trainer.fit()
    assert "error_budget" in str(caught.value)
    assert trainer.step == 2
    run = trainer.session.path
    assert status(run)["status"] == "failed"
    assert Checkpoints(run / "checkpoints").load().step == 2
    assert list((run / "errors").glob("reward-*.json"))


def test_penalty_gives_failed_rows_the_penalty(make):
    trainer = make(spoiled(lambda even: [math.nan, *even[1:]]), guard={"on_error": "penalty", "penalty": -3.0})
    assert trainer.config.guard == GuardConfig(isolation="none", on_error="penalty", penalty=-3.0)
    first = []
    for _ in trainer.steps():
        first.append(float(trainer.metrics.rows.outcome[0]))
    assert first[0] in (0.0, 1.0)
    assert first[1] == -3.0


def test_raise_stops_at_the_first_error(make):
    trainer = make(spoiled(lambda even: [math.nan, *even[1:]]), guard={"on_error": "raise"}, total_steps=5)
    with pytest.raises(RewardError, match="`guard.on_error=raise` stops the run"):
        trainer.fit()
    assert trainer.step == 1


def test_a_batch_without_any_reward_is_no_update_and_no_crash(make):
    trainer = make(spoiled(lambda even: [None] * 16), total_steps=2)
    records = list(trainer.steps())
    assert records[1]["optim/updates"] == 0.0
    assert math.isnan(records[1]["reward/mean"])
    logged = (trainer.session.path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(logged[1])["reward/mean"] == "nan"


def test_a_reward_cannot_touch_the_rollout_or_the_random_numbers(make):
    def vandal(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        values = even_length(completions)
        torch.manual_seed(0)
        completions.clear()
        for ids in completion_ids:
            ids.append(7)
        return values

    gentle, rough = make().fit(), make(vandal).fit()
    assert largest_difference(weights(gentle.policy.model), weights(rough.policy.model)) == 0.0


# --- no signal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cause"), [("constant", "Every reward is 1"), ("constant_zero", "the task is too hard")]
)
def test_a_constant_reward_is_told_within_five_steps(workshop, name, cause):
    function = f"rewards.0.function=rewards.py:{name}"
    done = rlalign(workshop, "train", "tiny.yaml", function, "data.eval=null", "--run-dir", f"no-signal-{name}")
    assert_clean(done, 0)
    (note,) = [line for line in done.out.splitlines() if "there is nothing to learn" in line]
    assert note.startswith("step 5: for 5 steps in a row")
    assert cause in note


def test_stop_without_signal_stops(make):
    trainer = make(constant, total_steps=9, stop_without_signal=3)
    with pytest.raises(NoSignalError, match="Stopped by `stop_without_signal`=3"):
        trainer.fit()
    assert trainer.step == 3
    assert status(trainer.session.path)["status"] == "failed"
    assert Checkpoints(trainer.session.path / "checkpoints").steps() == [3]


def test_an_error_in_a_callback_costs_no_step(make, tiny_model, tiny_tokenizer):
    def breaks(step: int, metrics: Any) -> None:
        if step == 3:
            raise KeyError("my own code")

    trainer = make(total_steps=5, checkpoint={"every": 50}, callback=breaks)
    with pytest.raises(KeyError, match="my own code"):
        trainer.fit()
    run = trainer.session.path
    assert status(run)["status"] == "failed"
    assert "my own code" in (run / "errors/error-0001.txt").read_text()
    whole = make(total_steps=5).fit()
    again = make_trainer(tiny_model, tiny_tokenizer, run, total_steps=5, checkpoint={"every": 50}).fit(resume=True)
    assert [record["step"] for record in read(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert largest_difference(weights(again.policy.model), weights(whole.policy.model)) == 0.0


def test_a_run_that_is_refused_leaves_nothing_and_takes_no_name(workshop):
    settings = ("model.name=./nowhere", "guard.isolation=process")
    for _ in range(2):
        done = rlalign(workshop, "train", "tiny.yaml", *settings)
        assert done.code == 2, done.err
    assert not list(workshop.glob("runs/tiny*"))


# --- gradients and weights that are not finite -----------------------------------------------------------------------


def poison(trainer: PolicyGradientTrainer, updates: set[int], value: float = math.nan) -> None:
    """Let one entry of one gradient be `value` in these updates, counted from 1 over the run."""
    take_step, passed = trainer.take_step, [0]

    def poisoned() -> None:
        passed[0] += 1
        if passed[0] in updates:
            parameter = next(p for p in trainer.policy.model.parameters() if p.grad is not None)
            parameter.grad.view(-1)[3] = value
        take_step()

    trainer.take_step = poisoned  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_is_skipped_and_training_goes_on(make, value):
    trainer = make(total_steps=4)
    poison(trainer, {2}, value)
    states = []
    records = []
    for record in trainer.steps():
        states.append(weights(trainer.policy.model))
        records.append(record)
    assert not math.isfinite(records[1]["optim/grad_norm"])
    assert largest_difference(states[1], states[0]) == 0.0
    assert largest_difference(states[2], states[1]) > 0
    assert (trainer.budget.total, trainer.budget.consecutive) == (1, 0)
    assert trainer.step == 4


def test_too_many_bad_gradients_stop_the_run_at_its_last_good_weights(make):
    trainer = make(total_steps=9, optim={"nonfinite_budget": 2}, checkpoint={"every": 1, "keep": 1})
    poison(trainer, {3, 4, 5})
    with pytest.raises(
        TrainingDiverged, match=r"1 of .* entries NaN or infinite \(3 non-finite steps in a row, 2 allowed"
    ):
        trainer.fit()
    run = trainer.session.path
    assert trainer.step == 4
    assert status(run)["status"] == "failed"
    saved = Checkpoints(run / "checkpoints").load()
    assert saved.step == 4
    healthy = make(total_steps=2).fit()
    assert largest_difference(saved.state["model"]["weights"], weights(healthy.policy.model)) == 0.0
    assert saved.state["trainer"]["budget"] == {"consecutive": 2, "total": 2}


@pytest.mark.parametrize("rate", ["1e30", "1e39"])
def test_a_learning_rate_out_of_all_bounds_ends_in_a_sentence(workshop, rate):
    """1e30 makes logits overflow, 1e39 the weights themselves."""
    run = workshop / f"rate-{rate}"
    settings = (f"optim.learning_rate={rate}", "optim.warmup_steps=0", "data.eval=null", "checkpoint.every=1")
    done = rlalign(workshop, "train", "tiny.yaml", *settings, "--run-dir", run.name)
    assert_clean(done, 1)
    assert "NaN or infinite" in done.err
    assert "Lower `optim.learning_rate`" in done.err
    assert status(run)["status"] == "failed"
    checkpoints = Checkpoints(run / "checkpoints")
    if checkpoints.steps():
        assert all(value.isfinite().all() for value in checkpoints.load().state["model"]["weights"].values())


def test_extreme_log_ratios_do_not_overflow(make):
    """Weights that jump between two updates: the ratio is bounded, the gradient finite."""
    trainer = make(optim={"update_epochs": 2, "learning_rate": 50.0, "eps": 1e-8})
    objective, ratios = trainer.objective, []

    def recorded(batch: Any, log_prob: Any, entropy: Any, here: Any) -> Any:
        ratios.append(float((log_prob.detach() - batch.log_prob_old)[here].abs().mean()))
        return objective(batch, log_prob, entropy, here)

    trainer.objective = recorded  # pyright: ignore[reportAttributeAccessIssue]
    records = list(trainer.steps())
    assert all(math.isfinite(record["optim/grad_norm"]) for record in records)
    assert all(map(math.isfinite, ratios))
    assert ratios[1] > 5


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(workshop: Path) -> Path:
    """A run that was killed in its sixth step, with checkpoints of steps 2 and 4."""
    assert rlalign(workshop, "train", "tiny.yaml", "--run-dir", "whole").code == 0
    killed = rlalign(workshop, "train", "tiny.yaml", "--run-dir", "stopped", faults=[fault("rollout", 6)])
    assert killed.code == -9
    assert Checkpoints(workshop / "stopped/checkpoints").steps() == [2, 4]
    return workshop / "stopped"


def copy_of(run: Path, name: str) -> Path:
    import shutil

    return Path(shutil.copytree(run, run.with_name(name)))


@pytest.mark.parametrize("damaged", ["model.safetensors", "trainer.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(workshop, stopped, damaged):
    run = copy_of(stopped, f"damaged-{damaged.replace('.', '-')}")
    path = run / "checkpoints/ckpt-000004" / damaged
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = rlalign(workshop, "resume", run.name)
    assert_clean(done, 0)
    assert "passing over a damaged checkpoint" in done.err
    assert damaged in done.err
    assert "Resumed step 2 from ckpt-000002" in done.out
    assert metrics_hash(run / "metrics.jsonl") == metrics_hash(workshop / "whole/metrics.jsonl")
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (workshop / "whole" / weights).read_bytes()


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_over(workshop, stopped):
    run = copy_of(stopped, "all-damaged")
    for path in run.glob("checkpoints/ckpt-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    done = rlalign(workshop, "resume", run.name)
    assert_clean(done, 1)
    assert "Failed: no checkpoint in" in done.err
    assert "is intact" in done.err


def test_a_checkpoint_without_optimizer_is_refused(workshop, stopped, make):
    run = copy_of(stopped, "no-optimizer")
    checkpoints = Checkpoints(run / "checkpoints")
    state = {name: value for name, value in checkpoints.load().state.items() if name != "optimizer"}
    checkpoints.save(5, state)
    done = rlalign(workshop, "resume", run.name)
    assert_clean(done, 1)
    assert "holds no optimizer, so the run cannot continue exactly" in done.err


# --- disk ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nth", [10, 60])
def test_a_disk_full_while_saving_stops_cleanly_and_resumes_when_there_is_space(workshop, stopped, nth):
    run = workshop / f"disk-full-{nth}"
    done = rlalign(workshop, "train", "tiny.yaml", "--run-dir", run.name, faults=[fault("file", nth, "ENOSPC")])
    assert_clean(done, 1)
    assert re.search(
        r"Failed: could not save step \d in .*No space left on device. Older checkpoints are intact", done.err
    )
    assert "Free disk space" in done.err
    assert not list(run.glob("checkpoints/*.tmp-*"))
    resumed = rlalign(workshop, "resume", run.name)
    assert_clean(resumed, 0)
    assert metrics_hash(run / "metrics.jsonl") == metrics_hash(workshop / "whole/metrics.jsonl")


def test_a_disk_full_while_tidying_up_costs_nothing(workshop, stopped):
    """The checkpoint stands already when older ones are removed and `latest` is written."""
    done = rlalign(workshop, "train", "tiny.yaml", "--run-dir", "tidying", faults=[fault("prune", 2, "ENOSPC")])
    assert done.code == 0
    assert "is saved, but tidying up failed" in done.err
    assert Checkpoints(workshop / "tidying/checkpoints").load().step == 6
    assert metrics_hash(workshop / "tidying/metrics.jsonl") == metrics_hash(workshop / "whole/metrics.jsonl")


@pytest.mark.parametrize(("at", "nth"), [("record", 4), ("model", 1)])
def test_a_disk_full_while_logging_stops_cleanly_too(workshop, stopped, at, nth):
    run = workshop / f"disk-full-{at}"
    done = rlalign(workshop, "train", "tiny.yaml", "--run-dir", run.name, faults=[fault(at, nth, "ENOSPC")])
    assert_clean(done, 1)
    assert "No space left on device" in done.err
    assert rlalign(workshop, "resume", run.name).code == 0
    assert metrics_hash(run / "metrics.jsonl") == metrics_hash(workshop / "whole/metrics.jsonl")


def test_a_report_that_cannot_be_written_does_not_fail_the_run(workshop):
    settings = ("total_steps=1", "data.eval=null", "--run-dir", "no-report")
    done = rlalign(workshop, "train", "tiny.yaml", *settings, faults=[fault("report", 1, "ENOSPC")])
    assert done.code == 0
    assert "The report could not be written" in done.out
    assert done.out.splitlines()[-1].endswith("Later: rlalign report no-report")
    assert status(workshop / "no-report")["status"] == "done"


def test_no_space_for_a_checkpoint_is_told_in_numbers(make, monkeypatch):
    from collections import namedtuple

    from rlalign.training import checkpoint

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 700_000))
    trainer = make(checkpoint={"every": 1})
    with pytest.raises(CheckpointError, match=r"the checkpoint needs 1\.\d MiB and 0.7 MiB are free"):
        trainer.fit()
    assert status(trainer.session.path)["status"] == "failed"


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "nth", "number", "saved"),
    [
        ("token", 20, "SIGINT", 3),
        ("reward", 4, "SIGTERM", 3),
        ("update", 5, "SIGUSR1", 2),
        ("eval", 1, "SIGINT", 0),
        ("eval", 2, "SIGTERM", 3),
        ("file", 40, "SIGTERM", 2),
    ],
)
def test_a_signal_finishes_the_step_saves_and_exits_75(workshop, stopped, at, nth, number, saved):
    run = workshop / f"{number}-{at}-{nth}"
    done = rlalign(workshop, "train", "tiny.yaml", "--run-dir", run.name, faults=[fault(at, nth, number)])
    assert_clean(done, 75)
    assert f"{number}: finishing this step, then saving. Ctrl-C again stops at once." in done.err
    assert done.err.endswith(f"Saved step {saved}. Continue: rlalign resume {run.name}\n")
    assert status(run)["status"] == "interrupted"
    assert Checkpoints(run / "checkpoints").load().step == saved
    resumed = rlalign(workshop, "resume", run.name)
    assert resumed.code == 0, resumed.err
    weights = "model/model.safetensors"
    assert (run / weights).read_bytes() == (workshop / "whole" / weights).read_bytes()
    assert metrics_hash(run / "metrics.jsonl") == metrics_hash(workshop / "whole/metrics.jsonl")


@pytest.mark.parametrize(("first", "second"), [("token", "update"), ("eval", "reward"), ("save", "file")])
def test_a_second_ctrl_c_stops_at_once_and_the_run_is_still_good(workshop, stopped, first, second):
    run = workshop / f"twice-{first}-{second}"
    nth = {"token": 20, "update": 7, "reward": 5, "eval": 2, "save": 2, "file": 70}
    strikes = [fault(first, nth[first], "SIGINT"), fault(second, nth[second], "SIGINT")]
    done = rlalign(workshop, "train", "tiny.yaml", "--run-dir", run.name, faults=strikes)
    assert_clean(done, 75)
    assert done.err.endswith(f"Stopped at once. Continue from the last checkpoint: rlalign resume {run.name}\n")
    assert status(run)["status"] == "interrupted"
    assert rlalign(workshop, "resume", run.name).code == 0
    assert metrics_hash(run / "metrics.jsonl") == metrics_hash(workshop / "whole/metrics.jsonl")


# --- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_process_is_kept_out(workshop, stopped):
    with RunDirectory.open(stopped):
        done = rlalign(workshop, "resume", "stopped")
    assert done.code == 2
    assert re.fullmatch(
        r"run stopped is locked by pid \d+ on host \S+; wait for it, or stop that process\.\n", done.err
    )


# --- data ------------------------------------------------------------------------------------------------------------

HOSTILE_ROWS = {
    "nothing": ([], "has no rows"),
    "no prompt": ([{"text": "x"}], "has no column `prompt`"),
    "none": ([{"prompt": "x"}, {"prompt": None}], r"row 2 has no prompt$"),
    "number": ([{"prompt": 3}], "prompt is a int, not text or a list of messages"),
    "empty": ([{"prompt": "x"}, {"prompt": "  "}], r"prompt is empty; correct or remove \(row 2"),
    "mixed": ([{"prompt": "x"}, {"prompt": [{"role": "user", "content": "x"}]}], "mixes text prompts"),
    "role": ([{"prompt": [{"role": "king", "content": "x"}]}], "message role 'king'"),
    "long": ([{"prompt": "x" * 5000}], "longer than `rollout.max_prompt_tokens`"),
    "hides an argument": ([{"prompt": "x", "completions": 1}], "rename it"),
    "not a row": ([["prompt", "x"]], "row 1 is a list, not a mapping"),
}


@pytest.mark.parametrize("name", HOSTILE_ROWS)
def test_data_that_cannot_be_trained_on_is_refused_with_its_row(make, tmp_path, name):
    rows, message = HOSTILE_ROWS[name]
    with pytest.raises(DataError, match=message):
        make(prompts=rows)
    assert not [path for path in tmp_path.glob("run-*/*") if path.name != "errors"]


def test_strange_text_trains_and_is_logged_as_it_is(make):
    strange = [
        "</script><script>alert(1)</script>",
        "null \x00 byte, bell \x07, escape \x1b[31m",
        "right to left \u202e and line \u2028 separator",
        "emoji \U0001f600 and 漢字",
        "{prompt} {0} %s %(x)s <|end|> \\n",
        "\"quoted\", 'twice'",
    ]
    rows = [{"prompt": text, "answer": text, "n": index} for index, text in enumerate(strange)]
    trainer = make(prompts=rows, rollout={"prompts_per_step": 6}, eval_dataset=rows[:2], log={"samples_every": 1}).fit()
    lines = (trainer.session.path / "samples/step-000001.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert {json.loads(line)["prompt"] for line in lines} == set(strange)
    page = (trainer.session.path / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert [record["step"] for record in read(trainer.session.path / "metrics.jsonl")] == [0, 1, 2, 2]


def test_half_a_surrogate_pair_is_refused_before_training(make):
    """Valid JSON (`"\\ud800"`), but no text that a tokenizer or a UTF-8 file could hold."""
    with pytest.raises(DataError, match=r"row 2"):
        make(prompts=[PROMPTS[0], "half \ud800 a pair"])


def test_columns_of_any_kind_reach_the_reward_unharmed(make):
    seen = []

    def reward(completions: list[str], extra: list[Any], **columns: Any) -> list[float]:
        seen.extend(extra)
        return even_length(completions)

    values = [None, {"a": [1, {"b": None}]}, [], "", math.inf, "x" * 100_000]
    rows = [{"prompt": f"say {n}", "extra": value} for n, value in enumerate(values)]
    make(reward, prompts=rows, rollout={"prompts_per_step": 6}, total_steps=1).fit()
    assert sorted(map(repr, seen)) == sorted([repr(value) for value in values] * 4)
