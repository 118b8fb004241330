"""The guard on rewards that behave: what they get, what comes back, where they run. Misbehaviour: tests/faults."""

import math
import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rlalign.training.guard import RewardError, RewardFunction, RewardGuard, RewardWarning
from rlalign.training.reward_function import importable_path
from rlalign.training.reward_local import RewardInProcess, own_randomness
from rlalign.training.reward_process import RewardProcess

SAMPLES = Path(__file__).with_name("reward_samples.py")


def from_file(name: str, **options) -> RewardFunction:
    return RewardFunction(name=name, import_path=f"{SAMPLES}:{name}", **options)


def score(guard: RewardGuard, completions: list, **options):
    return guard.score(prompts=["p"] * len(completions), completions=completions, **options)


def test_total_is_the_weighted_sum_without_what_does_not_apply():
    # 2 * 1 + 0.5 * 4 = 4;  2 * 0.5 + nothing = 1;  nothing at all: not scored
    table = {"x": [1.0, 0.5, None], "y": [4, None, None]}
    functions = [
        RewardFunction(name="x", call=lambda completions: table["x"], weight=2.0),
        RewardFunction(name="y", call=lambda completions: table["y"], weight=0.5),
    ]
    with RewardGuard(functions) as guard:
        got = score(guard, ["a", "b", "c"])
        outcome, scored = guard.total(got)
    assert outcome.tolist() == [4.0, 1.0, 0.0]
    assert scored.tolist() == [True, True, False]
    assert got.status == [["ok", "ok"], ["ok", "not_applicable"], ["not_applicable", "not_applicable"]]
    assert got.values.dtype == torch.float64
    assert math.isnan(got.values[1, 1])
    assert got.parts()["x"].tolist()[:2] == [1.0, 0.5]
    assert got.metrics == {"reward/error_frac": 0.0, "reward/timeout_count": 0.0}


@pytest.mark.parametrize("isolation", ["process", "thread", "none"])
def test_functions_get_what_they_declare_and_no_more(isolation):
    functions = [from_file("length"), from_file("matches"), from_file("what_it_gets"), from_file("none_for_empty")]
    with RewardGuard(functions, isolation=isolation) as guard:
        table = score(guard, ["42", ""], completion_ids=[[4, 2], []], columns={"answer": ["42", "1"], "prompt": [0, 0]})
    # prompts, completions, completion_ids, answer, trainer_state, log_metric, log_extra; `prompt` is the plural's row
    assert table.values[:, :3].tolist() == [[2.0, 1.0, 7.0], [0.0, 0.0, 7.0]]
    assert table.status[1][3] == "not_applicable"


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_bound_arguments_and_classes(isolation):
    functions = [
        from_file("Scaled", arguments={"scale": 3.0}),
        from_file("scaled", arguments={"scale": 2.0}),
    ]
    with RewardGuard(functions, isolation=isolation) as guard:
        assert score(guard, ["ab"]).values.tolist() == [[6.0, 4.0]]


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_async_functions_and_the_logging_arguments(isolation):
    metrics, extras = [], []
    with RewardGuard([from_file("asynchronous"), from_file("logs")], isolation=isolation) as guard:
        table = score(
            guard,
            ["a", "b"],
            trainer_state={"global_step": 7, "model": object()},
            log_metric=lambda *item: metrics.append(item),
            log_extra=lambda *item: extras.append(item),
        )
    assert table.values.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert metrics == [("my/metric", 7.5)]
    assert extras == [("shout", ["A", "B"])]


def test_bool_numpy_and_torch_scalars_are_numbers():
    def mixed(completions):
        return [True, np.float32(0.5), np.bool_(False), np.array(2), torch.tensor(3.0), torch.tensor(True), 4]

    def array(completions):
        return np.arange(7)

    def tensor(completions):
        return torch.arange(7.0, requires_grad=True).detach()

    functions = [RewardFunction(name=f.__name__, call=f) for f in (mixed, array, tensor)]
    with RewardGuard(functions) as guard:
        values = score(guard, list("abcdefg")).values
    assert values[:, 0].tolist() == [1.0, 0.5, 0.0, 2.0, 3.0, 1.0, 4.0]
    assert values[:, 1].tolist() == values[:, 2].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_no_rows_are_an_empty_table():
    with RewardGuard([from_file("length"), from_file("matches")]) as guard:
        table = guard.score(prompts=[], completions=[])
    assert table.values.shape == (0, 2)
    assert guard.state_dict() == {"batches": 0, "recent": []}


# Where functions run.


def test_auto_gives_a_process_to_what_a_fresh_interpreter_can_import():
    from textwrap import shorten  # any module-level function of an importable module

    in_file = RewardFunction(name="a", call=shorten)
    with_number = RewardFunction(name="b", call=shorten, arguments={"width": 3})
    with_object = RewardFunction(name="c", call=shorten, arguments={"width": object()})
    closure = RewardFunction(name="d", call=lambda completions: [0.0])
    with RewardGuard([in_file, with_number, with_object, closure]) as guard:
        kinds = [type(runner) for runner in guard._runners]
    assert kinds == [RewardProcess, RewardProcess, RewardInProcess, RewardInProcess]


def test_importable_path_refuses_main_closures_partials_and_impostors(monkeypatch):
    import textwrap

    assert importable_path(textwrap.shorten) == "textwrap:shorten"
    assert importable_path(lambda completions: 0) is None
    assert importable_path(textwrap.TextWrapper) is None
    original = textwrap.shorten
    monkeypatch.setattr(textwrap, "shorten", lambda *_: 0)
    assert importable_path(original) is None
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "scripted", original, raising=False)
    monkeypatch.setattr(original, "__module__", "__main__")
    assert importable_path(original) is None


def test_a_file_loaded_under_a_private_name_is_found_by_its_place(monkeypatch):
    import importlib.util

    spec = importlib.util.spec_from_file_location("loaded_by_hand", SAMPLES)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "loaded_by_hand", module)
    spec.loader.exec_module(module)
    assert importable_path(module.length) == f"{SAMPLES}:length"


def test_process_isolation_of_a_lambda_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"'f' to be importable .* Move it to the top level of a file"):
        RewardGuard([RewardFunction(name="f", call=lambda completions: [0.0])], isolation="process")


def test_a_worker_is_kept_between_calls_and_needs_no_torch():
    functions = [from_file("process_id"), from_file("has_torch")]
    with RewardGuard(functions, isolation="process") as guard:
        first, second = score(guard, ["a"]).values, score(guard, ["a"]).values
    assert torch.equal(first, second)
    assert int(first[0, 0]) != os.getpid()
    assert first[0, 1] == 0.0


def test_functions_that_set_alarms_work_in_a_worker_and_beside_the_trainer():
    for isolation in ("process", "thread", "none"):
        with RewardGuard([from_file("needs_alarm")], isolation=isolation) as guard:
            assert score(guard, ["fast", "slow"]).values.tolist() == [[1.0], [0.0]], isolation


def test_tuples_reach_the_worker_as_tuples():
    grid = [([1, 2], [3, 4]), [[1, 2], [3, 4]]]
    with RewardGuard([from_file("is_tuple")], isolation="process") as guard:
        assert score(guard, ["a", "b"], columns={"grid": grid}).values.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_random_rewards_repeat(isolation):
    with RewardGuard([from_file("draws")], isolation=isolation) as guard:
        first, second = score(guard, ["a", "b"]).values, score(guard, ["a", "b"]).values
        other = score(guard, ["a", "c"]).values
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_trainers_generators_are_put_back():
    def seeds_everything(completions):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        return [float(torch.rand(())) + random.random() for _ in completions]

    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    with RewardGuard([RewardFunction(name="f", call=seeds_everything)]) as guard:
        score(guard, ["a", "b"])
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])  # noqa: NPY002
    # Python's generator is looked at from nearby: the type checker of the test run draws from it too.
    before = random.getstate()
    with own_randomness(7):
        random.random()
    assert random.getstate() == before


def test_a_worker_ends_with_its_guard():
    guard = RewardGuard([from_file("process_id")], isolation="process")
    pid = int(score(guard, ["a"]).values[0, 0])
    ended = os.pidfd_open(pid)
    guard.close()
    assert has_ended(ended)


def has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = bool(poll.poll(10_000))
    os.close(pidfd)
    return ended


@pytest.mark.skipif(sys.platform != "linux", reason="other systems notice within half a second by polling")
@pytest.mark.parametrize("busy", [False, True])
def test_a_worker_dies_with_a_trainer_that_is_killed(tmp_path, busy):
    # Busy: the worker and a child it forked loop for ever when the trainer is killed without a chance to clean up.
    reward, marker = tmp_path / "reward.py", tmp_path / "pids"
    os.mkfifo(marker)
    reward.write_text(
        "import os\n"
        "def f(completions):\n"
        f"    if {busy}:\n"
        "        child = os.fork()\n"
        "        if child == 0:\n"
        "            while True: pass\n"
        f"        open({str(marker)!r}, 'w').write(f'{{os.getpid()}} {{child}}')\n"
        "        while True: pass\n"
        "    return [os.getpid() for _ in completions]\n"
    )
    script = (
        "from rlalign.training.guard import *\n"
        f"guard = RewardGuard([RewardFunction(name='f', import_path={f'{reward}:f'!r})])\n"
        "pid = guard.score(prompts=['p'], completions=['c']).values[0, 0]\n"
        f"open({str(marker)!r}, 'w').write(f'{{int(pid)}}')\n"
        "input()\n"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=".")
    )
    pids = [os.pidfd_open(int(pid)) for pid in marker.read_text().split()]
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdin.close()
    assert [has_ended(pid) for pid in pids] == [True] * (2 if busy else 1)


# Failures that are the configuration's.


def test_missing_columns_are_named_before_the_function_is_called():
    with RewardGuard([from_file("matches")]) as guard:
        with pytest.raises(RewardError, match=r"'matches' asks for `answer`, but the rows have only .*`gold`"):
            score(guard, ["a"], columns={"gold": ["a"]})
        with pytest.raises(RewardError, match="asks for `answer`"):
            guard.prepare(["gold"])
        guard.prepare(["answer"])


def test_a_column_of_another_length_is_refused():
    with RewardGuard([from_file("length")]) as guard, pytest.raises(ValueError, match="'gold' has 2 entries for 1"):
        score(guard, ["a"], columns={"gold": ["a", "b"]})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("def f(completions) return 1", "SyntaxError"),
        ("import no_such_package_at_all", "No module named 'no_such_package_at_all'"),
        ("raise SystemExit(0)", "raised SystemExit"),
        ("g = 1", "has no 'f'"),
        ("import os; os._exit(3)", "status 3 .* while it was imported"),
    ],
)
def test_a_function_that_cannot_be_imported_says_why(tmp_path, text, told):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with (
        RewardGuard([RewardFunction(name="f", import_path=f"{path}:f")]) as guard,
        pytest.raises(RewardError, match=rf"(?s)reward 'f' .*broken.py:f.*{told}"),
    ):
        score(guard, ["a"])


def test_names_must_differ_and_weights_be_finite():
    with pytest.raises(ValueError, match="distinct names, at least one; got \\['length'\\]"):
        RewardGuard([from_file("length"), from_file("length")])
    with pytest.raises(ValueError, match="distinct names, at least one; got none"):
        RewardGuard([])
    with pytest.raises(ValueError, match="`weight` of reward 'length' is nan"):
        from_file("length", weight=float("nan"))


def test_columns_that_are_no_data_say_so():
    with (
        RewardGuard([from_file("what_it_gets")], isolation="process") as guard,
        pytest.raises(TypeError, match=r"`image\[0\]` is a object, .* Use `guard.isolation=thread`"),
    ):
        score(guard, ["a"], columns={"image": [object()]})


def test_silence_about_a_whole_batch_is_told():
    def silent(completions):
        return [None for _ in completions]

    mute = RewardFunction(name="mute", call=silent)
    with (
        RewardGuard([mute]) as guard,
        pytest.raises(RewardError, match=r"every reward \(mute\) returned None for all 2"),
    ):
        score(guard, ["a", "b"])
    with RewardGuard([mute, from_file("length")]) as guard, pytest.warns(RewardWarning, match="'mute' returned None"):
        _, scored = guard.total(score(guard, ["a", "b"]))
    assert scored.tolist() == [True, True]


def test_state_survives_a_checkpoint():
    with RewardGuard([from_file("length")]) as guard:
        score(guard, ["a", "b"])
        state = guard.state_dict()
    assert state == {"batches": 1, "recent": [0, 0]}
    with RewardGuard([RewardFunction(name="f", call=lambda completions: [math.nan])]) as resumed:
        resumed.load_state_dict(state)
        table = score(resumed, ["a"])  # no longer the first batch, so the bad row is only left out
        assert resumed.state_dict() == {"batches": 2, "recent": [0, 0, 1]}
    assert table.metrics["reward/error_frac"] == 1.0
