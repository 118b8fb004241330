"""Everything a reward function can do wrong, and that it costs the failing row and nothing else.

Every fault strikes in the second batch: in the first one errors stop the run, which has tests of its own.
"""

import copy
import hashlib
import json
import os
import re
import signal
from pathlib import Path

import psutil
import pytest
import torch

from rlalign.training.guard import RewardError, RewardFunction, RewardGuard, RewardWarning
from rlalign.training.no_signal import NoSignalWarning, SignalWatch

BAD = Path(__file__).with_name("bad_rewards.py")
GOOD_BATCH = ["1", "22"]
BATCH = ["1", "bad", "333", "4444"]


def guard_of(name: str, **options) -> RewardGuard:
    function = RewardFunction(name=name, import_path=f"{BAD}:{name}")
    return RewardGuard([function], **({"timeout_s": 1.0, "row_timeout_s": 1.0} | options))


def score(guard: RewardGuard, completions: list[str], **columns):
    return guard.score(prompts=[f"p{i}" for i in range(len(completions))], completions=completions, columns=columns)


def second_batch(guard: RewardGuard):
    score(guard, GOOD_BATCH)
    return score(guard, BATCH)


ROWS = {
    "nan": ("not_finite", "returned nan; return None where"),
    "inf": ("not_finite", "returned inf"),
    "minus_inf": ("not_finite", "returned -inf"),
    "huge": ("too_large", "returned 1e\\+38, beyond .*; rescale the reward"),
    "huge_int": ("not_finite", "returned inf"),
    "text_value": ("bad_type", "returned str '0.5'; return a float, a bool or None"),
    "nested_list": ("bad_type", "returned list \\[1.0\\]"),
    "mapping": ("bad_type", "returned dict {'score': 1.0}"),
    "complex_value": ("bad_type", "returned complex 1j"),
    "numpy_nan": ("not_finite", "returned nan"),
    "raises": ("raised", "raised RuntimeError: on purpose$"),
    "key_error": ("raised", "raised KeyError: 'answer' \\(a column or key that the data lacks\\?\\)"),
    "exits": ("raised", "raised SystemExit"),
    "recursion": ("raised", "raised RecursionError"),
    "async_raises": ("raised", "raised RuntimeError: on purpose"),
    "reads_stdin": ("raised", "raised EOFError|OSError"),
}


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_left_out_and_the_others_keep_their_rewards(name, isolation):
    status, message = ROWS[name]
    with guard_of(name, isolation=isolation) as guard:
        table = second_batch(guard)
        outcome, scored = guard.total(table)
        again = score(guard, GOOD_BATCH)
    assert [row[0] for row in table.status] == ["ok", status, "ok", "ok"]
    assert scored.tolist() == [True, False, True, True]
    assert outcome[scored].tolist() == [1.0, 3.0, 4.0]
    assert table.values[1, 0].isnan()
    (error,) = table.errors
    assert (error.function, error.row) == (name, 1)
    assert re.search(message, error.result.message), error.result.message
    assert table.metrics == {"reward/error_frac": 0.25, "reward/timeout_count": 0.0}
    assert again.values.tolist() == [[1.0], [2.0]]


WHOLES = {
    "too_short": "returned 1 rewards for 4 completions; return a list with one number",
    "too_long": "returned 5 rewards for 4",
    "empty": "returned 0 rewards for 4",
    "scalar": "returned a float; return a list",
    "nothing": r"returned None for the whole batch \(a missing `return`\?\)",
    "text": "returned a str",
    "dictionary": "returned a dict",
    "generator": r"returned a generator; .* Write `list\(...\)` around it",
    "mapped": r"returned a map; .* Write `list\(...\)`",
    "a_set": "returned a set",
    "numpy_matrix": r"returned an array of shape \(4, 1\)",
    "zero_dimensional": "returned a float64",
    "endless_generator": "returned a repeat",
}


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize("name", WHOLES)
def test_an_answer_that_is_no_list_of_numbers_blames_the_function(name, isolation):
    with guard_of(name, isolation=isolation) as guard:
        table = second_batch(guard)
    assert {row[0] for row in table.status} == {"wrong_shape"}
    with (
        guard_of(name, isolation=isolation) as guard,
        pytest.raises(RewardError, match=rf"reward '{name}' failed on row 0 of 4 \(wrong_shape\): {WHOLES[name]}"),
    ):
        score(guard, BATCH)


@pytest.mark.parametrize("name", ["sleeps", "loops", "loops_and_catches", "regex", "power", "c_loop", "async_sleeps"])
def test_what_never_ends_is_killed_in_a_process(name):
    with guard_of(name, isolation="process", row_timeout_s=0.3) as guard:
        table = second_batch(guard)
        again = score(guard, GOOD_BATCH)
    assert [row[0] for row in table.status] == ["ok", "timeout", "ok", "ok"]
    assert table.metrics["reward/timeout_count"] == 1.0
    assert "0.3 s on this row alone and was killed" in table.errors[0].result.message
    assert again.values.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("name", ["sleeps", "loops", "regex", "power", "async_sleeps"])
def test_most_of_what_never_ends_is_interrupted_beside_the_trainer(name):
    with guard_of(name, isolation="thread", timeout_s=0.3, row_timeout_s=0.3) as guard:
        table = second_batch(guard)
        again = score(guard, GOOD_BATCH)
    assert [row[0] for row in table.status] == ["ok", "timeout", "ok", "ok"]
    assert again.values.tolist() == [[1.0], [2.0]]


DEATHS = {
    "exits_hard": "ended its process with status 0 ",
    "segfault": "SIGSEGV: a crash in C code",
    "aborts": "SIGABRT",
    "kills_itself": "SIGKILL: out of memory",
    "closes_everything": "ended its process|closed its pipe|killed its process",
    "forks_a_sleeper_then_dies": "ended its process with status 1 ",
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_crash_costs_one_row(name, tmp_path):
    with guard_of(name, errors_dir=tmp_path) as guard:
        table = second_batch(guard)
        again = score(guard, GOOD_BATCH)
    assert [row[0] for row in table.status] == ["ok", "died", "ok", "ok"]
    assert re.search(DEATHS[name], table.errors[0].result.message)
    assert again.values.tolist() == [[1.0], [2.0]]
    if name == "segfault":  # the worker's last words are kept
        saved = json.loads((tmp_path / "reward-segfault-died.json").read_text())
        assert "Segmentation fault" in saved["detail"]
        assert saved["sample"]["completions"] == "bad"


def test_a_memory_hog_meets_its_limit():
    with guard_of("memory_hog", memory_limit_gb=0.5, timeout_s=60.0) as guard:
        table = second_batch(guard)
    assert [row[0] for row in table.status] == ["ok", "raised", "ok", "ok"]
    assert "raised MemoryError (the worker may use `memory_limit_gb`)" in table.errors[0].result.message


def test_keyboard_interrupt_belongs_to_the_trainer():
    with guard_of("interrupts", isolation="process") as guard:
        assert second_batch(guard).status[1] == ["raised"]
    with guard_of("interrupts", isolation="thread") as guard, pytest.raises(KeyboardInterrupt):
        second_batch(guard)


def test_an_interrupted_call_leaves_no_answer_behind_for_the_next():
    def ring(*_):
        raise KeyboardInterrupt

    with guard_of("sleeps", timeout_s=60.0) as guard:
        score(guard, GOOD_BATCH)
        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            score(guard, BATCH)
        signal.signal(signal.SIGALRM, before)
        assert score(guard, ["55555"]).values.tolist() == [[5.0]]


# Odd, but no failure.


def test_a_fork_that_comes_back_twice_answers_once():
    with guard_of("forks_and_both_return", timeout_s=60.0) as guard:
        for batch in (["1"], ["22"], ["333"]):
            assert score(guard, batch).values.tolist() == [[float(len(batch[0]))]]


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_inputs_cannot_be_changed(isolation):
    columns = {"answer": ["a", "b"], "metadata": [{"list": [0]}, {"list": [0]}]}
    before = copy.deepcopy(columns)
    functions = [RewardFunction(name=n, import_path=f"{BAD}:{n}") for n in ("mutates", "mutates_deep")]
    completions, prompts = ["1", "22"], ["p", "q"]
    with RewardGuard(functions, isolation=isolation) as guard:
        table = guard.score(prompts=prompts, completions=completions, columns=columns)
    assert table.values.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    assert (completions, prompts, columns) == (["1", "22"], ["p", "q"], before)


def test_printing_goes_to_the_log_and_never_into_the_protocol(tmp_path, capfd):
    with guard_of("prints_a_megabyte", errors_dir=tmp_path, timeout_s=60.0) as guard:
        assert score(guard, GOOD_BATCH).values.tolist() == [[1.0], [2.0]]
    assert (tmp_path / "reward-prints_a_megabyte.log").stat().st_size > 2**21
    assert capfd.readouterr() == ("", "")


def test_a_reward_may_close_stdout_seed_and_change_directory():
    here, state = os.getcwd(), torch.random.get_rng_state()
    names = ("closes_stdout", "seeds", "changes_directory", "fractions_and_bools")
    functions = [RewardFunction(name=n, import_path=f"{BAD}:{n}") for n in names]
    with RewardGuard(functions) as guard:
        for _ in range(2):
            values = score(guard, GOOD_BATCH).values
    assert values.tolist() == [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 0.5]]
    assert os.getcwd() == here
    assert torch.equal(torch.random.get_rng_state(), state)


# How a failed call is taken apart.


def test_survivors_of_a_failed_batch_are_still_scored_as_a_batch():
    # Ranks among {1, 333, 4444}: 0/3, 1/3, 2/3. Alone every row would be 0.
    samples = Path(__file__).parents[1] / "training" / "reward_samples.py"
    with RewardGuard([RewardFunction(name="rank", import_path=f"{samples}:rank_in_batch")]) as guard:
        table = second_batch(guard)
    assert table.values[:, 0].tolist()[::2] == [0.0, 1 / 3]
    assert table.values[3, 0] == 2 / 3
    assert table.status[1] == ["raised"]


def test_a_hiccup_is_forgiven_and_a_function_that_cannot_batch_is_not():
    with guard_of("flaky", isolation="process") as guard:
        table = second_batch(guard)
    assert table.values[:, 0].tolist() == [1.0, 3.0, 3.0, 4.0]
    assert table.errors == []
    with guard_of("only_alone", isolation="process") as guard:
        table = second_batch(guard)
    assert {row[0] for row in table.status} == {"raised"}


def test_a_batch_that_is_slow_only_together_is_scored_and_told(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text(
        "import time\n"
        "def f(completions):\n"
        "    time.sleep(1e6 if len(completions) > 1 and 'bad' in completions else 0)\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    function = RewardFunction(name="f", import_path=f"{path}:f")
    with (
        RewardGuard([function], timeout_s=0.5, row_timeout_s=5.0) as guard,
        pytest.warns(RewardWarning, match="4 rows together took longer than `guard.timeout_s`=0.5"),
    ):
        table = second_batch(guard)
    assert table.values[:, 0].tolist() == [1.0, 3.0, 3.0, 4.0]


# When the run must stop.


def test_an_error_in_the_first_batch_stops_and_names_everything(tmp_path):
    with (
        guard_of("raises", errors_dir=tmp_path / "errors") as guard,
        pytest.raises(RewardError) as caught,
    ):
        score(guard, BATCH)
    told = str(caught.value)
    digest = hashlib.sha256(b"p1").hexdigest()[:8]
    assert told.startswith(
        f"reward 'raises' failed on row 1 of 4 (raised): raised RuntimeError: on purpose. Prompt {digest}: 'p1'."
    )
    assert "the first batch stops the run" in told
    assert "reward-raises-raised.json" in told
    saved = json.loads((tmp_path / "errors" / "reward-raises-raised.json").read_text())
    assert saved["sample"] == {"prompts": "p1", "completions": "bad"}
    assert "RuntimeError: on purpose" in saved["detail"]


def test_on_error_raise_stops_in_any_batch():
    with guard_of("nan", on_error="raise") as guard, pytest.raises(RewardError, match="`guard.on_error=raise` stops"):
        second_batch(guard)


def test_penalty_gives_failed_rows_a_value():
    with guard_of("nan", on_error="penalty", penalty=-2.0) as guard:
        table = second_batch(guard)
        outcome, scored = guard.total(table)
    assert outcome.tolist() == [1.0, -2.0, 3.0, 4.0]
    assert scored.all()
    assert table.metrics["reward/error_frac"] == 0.25


def test_a_failed_part_makes_the_whole_row_unscored():
    functions = [RewardFunction(name=n, import_path=f"{BAD}:{n}") for n in ("nan", "constant")]
    with RewardGuard(functions) as guard:
        outcome, scored = guard.total(second_batch(guard))
    assert scored.tolist() == [True, False, True, True]
    assert outcome[scored].tolist() == [2.0, 4.0, 5.0]


@pytest.mark.parametrize("name", ["nan", "raises"])
def test_the_budget_counts_rows_of_the_last_two_hundred(name):
    # 5 % of 200 are 10: ten bad rows pass, the eleventh stops; after 200 good rows the count is back at 0.
    with guard_of(name, isolation="thread", error_budget=0.05) as guard:
        score(guard, GOOD_BATCH)
        score(guard, ["bad"] * 10)
        score(guard, ["x"] * 200)
        score(guard, ["bad"] * 10)
        with pytest.raises(RewardError) as caught:
            score(guard, ["bad", *["x"] * 50])
    told = str(caught.value)
    assert told.startswith("11 of the last 200 rows could not be scored, more than `guard.error_budget`=0.05 of 200")
    assert f"{name}\n  reward '{name}' failed on row 0 of 51" in told


def test_a_batch_beyond_the_window_is_looked_at_whole():
    # 5 % of 400 are 20, wherever in the batch they stand
    with guard_of("raises", isolation="thread") as guard:
        score(guard, GOOD_BATCH)
        score(guard, [*["bad"] * 20, *["x"] * 380])
        score(guard, ["x"] * 400)
        with pytest.raises(RewardError, match="21 of the last 400 rows .*`guard.error_budget`=0.05 of 400"):
            score(guard, [*["bad"] * 21, *["x"] * 379])


def test_a_budget_overrun_shows_three_samples_and_searches_no_further():
    with guard_of("loops", timeout_s=0.3, row_timeout_s=0.3, error_budget=0.005) as guard:  # 0.5 % of 200: one row
        score(guard, GOOD_BATCH)
        with pytest.raises(RewardError) as caught:
            score(guard, ["bad"] * 64)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["    62 x not_run      loops", "     2 x timeout      loops"]
    assert sum(line.startswith("  reward 'loops' failed on row") for line in lines) == 2


def test_budget_zero_and_one():
    with (
        guard_of("nan", isolation="thread", error_budget=0.0) as guard,
        pytest.raises(RewardError, match="1 of the last"),
    ):
        second_batch(guard)
    with guard_of("nan", isolation="thread", error_budget=1.0) as guard:
        score(guard, GOOD_BATCH)
        for _ in range(3):
            assert score(guard, ["bad"] * 100).metrics["reward/error_frac"] == 1.0


# Rewards that teach nothing.


def test_none_for_everything_stops_the_first_batch_and_is_unscored_later():
    told = "returned None for all 4 rows of the first batch, so there is nothing to learn"
    with guard_of("all_none") as guard, pytest.raises(RewardError, match=told):
        score(guard, BATCH)
    with guard_of("all_none") as guard:
        guard.load_state_dict({"batches": 3, "recent": []})
        _, scored = guard.total(score(guard, BATCH))
    assert not scored.any()


def test_a_constant_reward_is_noticed_after_some_steps():
    watch = SignalWatch(patience=3)
    with guard_of("constant") as guard:
        outcome, _ = guard.total(score(guard, BATCH))
    groups = outcome.reshape(2, 2)
    flat = int((groups.amax(1) == groups.amin(1)).sum())
    for step in (1, 2):
        assert watch.update(step, groups=2, groups_without_signal=flat, rewards=outcome.tolist()) is None
    with pytest.warns(NoSignalWarning, match="Every reward is 1: the task is solved or the function does not look at"):
        watch.update(3, groups=2, groups_without_signal=flat, rewards=outcome.tolist())


def test_what_a_dead_worker_forked_is_killed_too():
    children = psutil.Process().children()
    with guard_of("forks_a_sleeper_then_dies", isolation="process") as guard:
        score(guard, GOOD_BATCH)
        (worker,) = [child for child in psutil.Process().children() if child not in children]
        second_batch(guard)
        in_its_group = [
            p.pid for p in psutil.process_iter() if group_of(p.pid) == worker.pid and p.status() != "zombie"
        ]
    assert in_its_group == []
    assert [child for child in psutil.Process().children() if child not in children] == []


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
