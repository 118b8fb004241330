"""Rewards by name: what a string means, what is refused, and that reasoning-gym and math-verify work as they are."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

from rlalign.config import ConfigError
from rlalign.llm.config import RewardConfig
from rlalign.llm.reward_adapters import ReasoningGymReward, TRLReward, extract_answer, is_more_than_an_expression
from rlalign.llm.reward_source import required_parameters
from rlalign.llm.rewards import distinct, probe_reward, resolve_reward, resolve_rewards
from rlalign.training.guard import RewardError, RewardFunction, RewardGuard

SAMPLES = Path(__file__).parents[1] / "training" / "reward_samples.py"
BAD = Path(__file__).parents[1] / "faults" / "bad_rewards.py"
QUICK = ["chain_sum", "puzzle24", "n_queens", "binary_matrix", "number_sorting", "simple_integration", "arc_1d"]


@pytest.fixture
def reasoning_gym() -> Any:
    """It builds a C extension when it is installed, so a machine may lack it."""
    return pytest.importorskip("reasoning_gym", reason="the extra `tasks` is not installed")


def score(specs, completions, *, isolation="auto", **columns):
    functions = [resolve_reward(spec) for spec in specs]
    with RewardGuard(functions, isolation=isolation) as guard:
        return guard.score(prompts=["p"] * len(completions), completions=completions, columns=columns).values


# What a string means.


def test_every_form_of_a_name(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def shout(completions):\n    return [float(t.isupper()) for t in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    for spec, name, path in [
        (f"{SAMPLES}:length", "length", f"{SAMPLES}:length"),
        ("my_rewards.py:shout", "shout", f"{tmp_path / 'my_rewards.py'}:shout"),
        ("my_rewards:shout", "shout", "my_rewards:shout"),
        ("my_rewards.shout", "shout", "my_rewards:shout"),
        ("think_format_reward", "think_format_reward", "rlalign.llm.reward_adapters:TRLReward"),
        ("get_soft_overlong_punishment", "soft_overlong_punishment", "rlalign.llm.reward_adapters:TRLReward"),
    ]:
        got = resolve_reward(spec, weight=0.5)
        assert (got.name, got.import_path, got.weight) == (name, path, 0.5), spec
    assert score(["my_rewards:shout"], ["A", "a"]).tolist() == [[1.0], [0.0]]


def test_callables_keep_their_name():
    def mine(completions):
        return [0.0]

    assert resolve_reward(mine).name == "mine"
    assert resolve_reward(partial(mine)).name == "mine"
    assert resolve_reward(lambda completions: [0.0]).name == "reward"
    assert resolve_reward(TRLReward("think_format_reward")).name == "TRLReward"
    done = RewardFunction(name="x", call=mine)
    assert resolve_reward(done) is done


def test_several_rewards_get_distinct_names_and_their_weights():
    spec = f"{SAMPLES}:scaled"
    got = resolve_rewards(
        [RewardConfig(function=spec, weight=2.0, args={"scale": 3.0}), RewardConfig(function=spec), spec]
    )
    assert [(f.name, f.weight, dict(f.arguments)) for f in got] == [
        ("scaled", 2.0, {"scale": 3.0}),
        ("scaled_2", 1.0, {}),
        ("scaled_3", 1.0, {}),
    ]
    assert distinct(["f", "f", "g", "f_2", "f"]) == ["f", "f_3", "g", "f_2", "f_4"]
    assert [f.weight for f in resolve_rewards([spec, spec], weights=[1.0, 0.25])] == [1.0, 0.25]
    assert [f.name for f in resolve_rewards(spec)] == ["scaled"]
    with pytest.raises(ConfigError, match="3 reward weights for 1 rewards"):
        resolve_rewards([spec], weights=[1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="`rewards` is empty"):
        resolve_rewards([])
    for wrong, place in ((3, 0), ([spec, None], 1)):
        with pytest.raises(ConfigError, match=f"`rewards.{place}.function` must be a function or its name, got"):
            resolve_rewards(wrong)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        (f"{SAMPLES}:lenght", r"defines no 'lenght'. Did you mean length\?"),
        (f"{SAMPLES.with_name('reward_sample.py')}:length", r"there is no file .*Did you mean reward_samples.py"),
        ("accuracy_rewards", r"no name of trl.rewards. Did you mean accuracy_reward"),
        ("no_such_package_here.sub:f", r"no importable module. .*`no_such_package_here/sub.py:f`"),
        ("no_such_package_here.f", "no importable module"),
        ("os:not a name", "no importable module"),
        (3, "must be a function or its name, got int 3"),
    ],
)
def test_what_is_not_there_is_refused_with_what_comes_near(spec, told):
    with pytest.raises(ConfigError, match=told):
        resolve_reward(spec)


def test_a_reward_file_is_parsed_and_not_run(tmp_path):
    path, canary = tmp_path / "r.py", tmp_path / "canary"
    path.write_text(f"open({str(canary)!r}, 'w')\nwith open('x') as f: pass\nf = g = lambda completions: [0.0]\n")
    assert resolve_reward(f"{path}:g").name == "g"
    assert not canary.exists()
    path.write_text("def f(:\n")
    with pytest.raises(ConfigError, match=r"r.py is not valid Python: .*line 1"):
        resolve_reward(f"{path}:f")


# TRL's rewards and math-verify.

SOLUTIONS = [r"$\frac{1}{3}$", r"$\frac{1}{3}$", "no mathematics here", "$4$"]
ANSWERS = [r"It is \boxed{\frac{2}{6}}", r"\boxed{\frac{1}{2}}", r"\boxed{1}", r"The final answer is $4$."]
# `None` for a gold answer that holds no mathematics: TRL's convention
EXPECTED = [1.0, 0.0, None, 1.0]


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_math_verify_grades_plain_text_and_messages(isolation):
    chat = [[{"role": "assistant", "content": text}] for text in ANSWERS]
    for completions in (ANSWERS, chat):
        values = score(["accuracy_reward"], completions, isolation=isolation, solution=SOLUTIONS)[:, 0].tolist()
        assert [None if value != value else value for value in values] == EXPECTED


def test_math_verify_meets_hostile_answers_without_running_them(tmp_path):
    canary = tmp_path / "canary"
    code = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    hostile = [code, rf"\boxed{{{code}}}", r"\boxed{9^{9^{9^{9}}}}", "\\boxed{" * 300, "(" * 20_000, "9" * 20_000]
    values = score(["accuracy_reward"], [r"\boxed{4}", *hostile], solution=["$4$"] * 7)[:, 0].tolist()
    assert values == [1.0] + [0.0] * 6
    assert not canary.exists()


def test_trl_factories_and_formats():
    think = ["<think>\nhm\n</think>\n4", "4"]
    assert score(["think_format_reward"], think).tolist() == [[1.0], [0.0]]
    function = resolve_reward("get_repetition_penalty_reward", arguments={"ngram_size": 2, "max_penalty": -1.0})
    with RewardGuard([function]) as guard:
        got = guard.score(prompts=["p"] * 2, completions=["a", "b"], completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
    # 3 different of 3 pairs: 0; 1 different of 4: -(1 - 1/4)
    assert got.values.tolist() == [[0.0], [-0.75]]


def test_workers_of_trl_rewards_import_no_torch():
    report = probe_reward("accuracy_reward")
    assert report.ok, report
    assert "torch" not in str(report)
    assert "the data set must have: solution" in str(report)


# reasoning-gym.


def test_the_name_of_a_task(reasoning_gym):
    got = resolve_reward("reasoning_gym:chain_sum", weight=0.5)
    expected = ("chain_sum", "rlalign.llm.reward_adapters:ReasoningGymReward", 0.5)
    assert (got.name, got.import_path, got.weight) == expected


def test_a_missing_reasoning_gym_is_named_with_what_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match="needs the package reasoning-gym. Install it: pip install reasoning-gym"):
        resolve_reward("reasoning_gym:chain_sum")


@pytest.mark.parametrize("task", QUICK)
def test_reasoning_gym_rates_its_own_answers_right_and_nonsense_low(task, reasoning_gym):
    entries = list(reasoning_gym.create_dataset(task, size=3, seed=1))
    right = [f"Let me see.\n<answer>{entry['answer']}</answer>" for entry in entries]
    wrong = ["<answer>no idea</answer>"] * 3
    columns = {key: [entry[key] for entry in entries] * 2 for key in ("answer", "metadata")}
    reward = ReasoningGymReward(task)
    scores = reward(completions=right + wrong, **columns)
    dataset = reasoning_gym.create_dataset(task)
    assert scores[:3] == [dataset.score_answer(entry["answer"], entry) for entry in entries] == [1.0] * 3
    assert max(scores[3:]) <= 0.1


def test_reasoning_gym_through_a_worker_keeps_the_entries_types(reasoning_gym):
    # ARC boards are tuples, and a board of lists would compare unequal: 0.05 in place of 1
    entries = list(reasoning_gym.create_dataset("rearc", size=2, seed=3))
    columns = {key: [entry[key] for entry in entries] for key in ("answer", "metadata")}
    values = score(["reasoning_gym:rearc"], [entry["answer"] for entry in entries], **columns)
    assert values.tolist() == [[1.0], [1.0]]


def test_mixed_tasks_and_whole_entries(reasoning_gym):
    entries = [reasoning_gym.create_dataset(task, size=1, seed=1)[0] for task in ("chain_sum", "gcd")]
    reward = ReasoningGymReward("auto")
    assert reward(completions=[entry["answer"] for entry in entries], entry=entries) == [1.0, 1.0]
    chat = [[{"role": "assistant", "content": entry["answer"]}] for entry in entries]
    assert reward(completions=chat, entry=entries) == [1.0, 1.0]
    with pytest.raises(LookupError, match="need the columns `answer` and `metadata`, or `entry`"):
        reward(completions=["1"])


def test_an_unknown_task_is_named(reasoning_gym):
    with (
        RewardGuard([resolve_reward("reasoning_gym:chain_sums")]) as guard,
        pytest.raises(RewardError, match="no task 'chain_sums'; it has ab, "),
    ):
        guard.prepare(["answer", "metadata"])


@pytest.mark.parametrize("task", ["n_queens", "binary_matrix", "spiral_matrix", "string_insertion", "number_sorting"])
def test_tasks_that_evaluate_answers_run_no_code(task, tmp_path, reasoning_gym):
    canary = tmp_path / "canary"
    entry = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
    attack = f"[__import__('pathlib').Path({str(canary)!r}).touch()]"
    assert ReasoningGymReward(task)(completions=[attack], entry=[entry])[0] < 0.5
    assert not canary.exists()


@pytest.mark.parametrize("task", ["puzzle24", "countdown", "simple_integration", "polynomial_multiplication"])
def test_tasks_that_parse_with_sympy_run_no_code(task, tmp_path, reasoning_gym):
    canary = tmp_path / "canary"
    entry = reasoning_gym.create_dataset(task, size=1, seed=1)[0]
    attacks = [
        f"open({str(canary)!r}, 'w')",
        f"__import__('pathlib').Path({str(canary)!r}).touch()",
        "exit()",
        "1" * 5000,
    ]
    assert ReasoningGymReward(task)(completions=attacks, entry=[entry] * 4) == [0.0] * 4
    assert not canary.exists()


@pytest.mark.parametrize(
    "text",
    [
        *("x**2 + 3*x - 1", "sin(x)*exp(-2.5*x)/3 + C", "log(Abs(x))", "(1 + 3) * 6", "max(x, 2)", "pi", "", "1.5e3*X"),
        *("2x + y_1 - z2", "sqrt(theta)/3!", "x == y", "asin(x/2) + Integral(exp(-x**2), x)"),
    ],
)
def test_mathematics_is_let_through(text):
    assert not is_more_than_an_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        *("().__class__", "x.foo", "'a'", "lambda: 0", "open(x)", "print(1)", "eval(x)", "a[0]", "1 " * 600),
        # Names that sympy's parser finds in sympy itself: a viewer, its tests, a compiler, windows, its sources.
        *("preview(x)", "test()", "doctest()", "lambdify(x, x)", "plot(x)", "textplot(x, 0, 1)", "source(sin)"),
        *("sympify(x)", "parse_expr(x)", "symbols(x)", "init_printing()", "interactive_traversal(x)", "pager_print(x)"),
        *("global_dict", "exit()", "x if y else z", "not x", "_", "x\\\ny", "1 # 2"),
        # Python reads these letters as `preview` and `eval`.
        *(
            "\N{FULLWIDTH LATIN SMALL LETTER P}review(x)",
            "\N{MATHEMATICAL BOLD SMALL E}val(x)",
            "\N{GREEK SMALL LETTER PI}",
        ),
    ],
)
def test_everything_else_is_more_than_an_expression(text):
    assert is_more_than_an_expression(text)


@pytest.mark.parametrize("attack", ["preview(x)", "test()", "lambdify(x, x)", "plot(x)"])
def test_sympys_own_functions_are_not_called(attack, monkeypatch, reasoning_gym):
    called = []
    for name in ("preview", "test", "lambdify", "plot"):
        monkeypatch.setattr(sympy, name, lambda *arguments, name=name: called.append(name) or sympy.Integer(24))
    entry = reasoning_gym.create_dataset("puzzle24", size=1, seed=1)[0]
    assert ReasoningGymReward("puzzle24")(completions=[attack], entry=[entry]) == [0.0]
    assert called == []


def test_the_answer_is_taken_from_the_last_tag_or_after_the_thoughts():
    assert extract_answer("<answer>1</answer> or <answer>\n 2 \n</answer>.") == "2"
    assert extract_answer("<think>3</think>\n 4 ") == "4"
    assert extract_answer(" 5 ") == "5"


# `rlalign check file.py:function`.


def verdicts(report) -> dict[str, str]:
    return {probe.name: probe.status for probe in report.probes}


def test_probe_of_a_good_reward():
    report = probe_reward(f"{SAMPLES}:matches")
    assert report.ok
    assert set(verdicts(report).values()) == {"pass", "note"}
    text = str(report)
    assert text.endswith(f"ready to train with\nin a config:\nrewards:\n  - function: {SAMPLES}:matches")
    assert re.search(r"\n +reward  answer +completion\n +1  4 +4\n +0  4 +The answer is", text)
    assert re.search(r"pass  import +in a process of its own, in \d\.\d\d s\n", str(report))
    assert re.search(r"note  columns +the data set must have: answer", str(report))
    assert re.search(r"pass  signal +rewards of the samples: 1, 0, 0, 0, 0", str(report))


@pytest.mark.parametrize(
    ("name", "probe", "status", "told"),
    [
        ("too_short", "samples", "pass", "plain text and chat messages"),
        ("constant", "signal", "note", "all samples got the same: 1, 1, 1, 1, 1"),
        ("mutates", "inputs", "note", "changes its arguments"),
        ("mutates_deep", "samples", "FAIL", "string indices|'str' object|TypeError"),
    ],
)
def test_probe_tells_what_is_odd(name, probe, status, told):
    report = probe_reward(f"{BAD}:{name}")
    (found,) = [p for p in report.probes if p.name == probe]
    assert found.status == status
    assert re.search(told, found.detail), found.detail


def test_probe_fails_with_a_fix(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(
        "import re, math\n"
        "count = []\n"
        "def fragile(completions):\n    return [float(re.search(r'\\w+', t).end()) for t in completions]\n"
        "def stateful(completions):\n    count.append(1)\n    return [float(len(count)) for t in completions]\n"
        "def hangs(completions):\n"
        "    while any(len(t) > 50_000 for t in completions): pass\n"
        "    return [float(len(t)) for t in completions]\n"
        "def chat(completions):\n    return [float(len(c[0]['content'])) for c in completions]\n"
        "def nan(completions):\n    return [math.nan for _ in completions]\n"
        "def alone(completions):\n    return [float(completions.index(t)) for t in completions]\n"
    )
    fragile = probe_reward(f"{path}:fragile")
    assert not fragile.ok
    assert verdicts(fragile)["empty"] == "FAIL"
    (empty,) = [found for found in fragile.probes if found.name == "empty"]
    assert empty.detail == "it raised AttributeError: 'NoneType' object has no attribute 'end' at r.py:4"
    assert empty.fix.startswith("correct that line; for a completion that it cannot judge")
    assert "probes failed" in str(fragile)
    assert verdicts(probe_reward(f"{path}:stateful"))["repeatable"] == "FAIL"
    hangs = probe_reward(f"{path}:hangs", timeout_s=0.5)
    assert verdicts(hangs) | {"speed": ""} == verdicts(hangs) | {"100,000 characters": "FAIL", "speed": ""}
    chat = probe_reward(f"{path}:chat")
    assert chat.ok
    assert "chat messages only" in str(chat)
    nan = probe_reward(f"{path}:nan")
    assert [p.status for p in nan.probes] == ["pass", "FAIL"]
    assert "it returned nan" in str(nan)
    assert "fix: return None where the reward is undefined" in str(nan)
    assert verdicts(probe_reward(f"{path}:alone"))["order"] == "note"


def test_probe_of_what_cannot_be_imported_and_of_a_closure(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("import nothing_like_this\ndef f(completions): return [0.0]\n")
    report = probe_reward(f"{path}:f")
    assert not report.ok
    (told,) = report.probes
    assert told.detail.startswith("raised ModuleNotFoundError: No module named 'nothing_like_this'")
    assert told.detail.endswith("at r.py:1")
    assert told.fix == "install what is missing into this Python environment, or correct the import"
    closure = probe_reward(lambda completions: [float(len(text)) for text in completions])
    assert closure.ok
    assert "runs inside the trainer: a crash would end the run" in str(closure)


def test_a_failure_is_told_once_with_its_line_and_its_fix(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(
        "def deep(text):\n    return text['no such key']\n"
        "def raises(completions):\n    return [{}['gold'] for text in completions]\n"
        "def differs(completions):\n"
        "    return [deep({}) if isinstance(text, list) else text for text in completions]\n"
    )
    (failed,) = [found for found in probe_reward(f"{path}:raises").probes if found.status == "FAIL"]
    assert failed.detail == "it raised KeyError: 'gold' (a column or key that the data lacks?) at r.py:4"
    (failed,) = [found for found in probe_reward(f"{path}:differs").probes if found.status == "FAIL"]
    assert failed.detail.startswith("it returned str '4'")
    assert failed.detail.endswith("at r.py:2")  # the line inside the helper
    assert "; with chat messages it raised KeyError: 'no such key'" in failed.detail


def test_a_file_without_a_function_is_answered_with_its_functions(tmp_path):
    path = tmp_path / "r.py"
    path.write_text("def _own(): pass\ndef close(completions): pass\nif True:\n    def far(completions): pass\n")
    with pytest.raises(ConfigError, match=r"names no function; it defines close. Write .*r\.py:close"):
        resolve_reward(str(path))
    with pytest.raises(ConfigError, match="no such file"):
        resolve_reward(str(tmp_path / "gone.py"))
    assert resolve_reward(f"{path}:far").name == "far"
    path.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="the file defines none"):
        resolve_reward(str(path))


def test_a_module_is_searched_for_the_function(tmp_path, monkeypatch):
    (tmp_path / "module_of_rewards.py").write_text("def close(completions): pass\n")
    (tmp_path / "lazy_rewards.py").write_text("def __getattr__(name): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"defines no 'closed'. Did you mean close\?"):
        resolve_reward("module_of_rewards:closed")
    assert resolve_reward("module_of_rewards:close").import_path == "module_of_rewards:close"
    assert resolve_reward("lazy_rewards:anything").name == "anything"


def test_required_parameters_are_read_off_the_source(tmp_path):
    path = tmp_path / "r.py"
    path.write_text(
        "import functools\n"
        "def plain(completions, answer, scale=1.0, *, hint, loud=False, **columns): pass\n"
        "@functools.cache\ndef hidden(completions, answer): pass\n"
        "class Made:\n    def __init__(self, size): pass\n    def __call__(self, completions, gold): pass\n"
    )
    assert required_parameters(resolve_reward(f"{path}:plain")) == ["completions", "answer", "hint"]
    bound = resolve_reward(f"{path}:plain", arguments={"hint": 1})
    assert required_parameters(bound) == ["completions", "answer"]
    assert required_parameters(resolve_reward(f"{path}:hidden")) == []
    assert required_parameters(resolve_reward(f"{path}:Made", arguments={"size": 2})) == ["completions", "gold"]


def test_probe_with_rows_of_the_data():
    rows = [{"prompt": "1+1", "completion": "2", "answer": "2"}, {"prompt": "1+2", "completion": "4", "answer": "3"}]
    assert "rewards of the samples: 1, 0" in str(probe_reward(f"{SAMPLES}:matches", rows=rows))


def test_probe_with_a_task(reasoning_gym):
    report = probe_reward("reasoning_gym:chain_sum")
    assert report.ok
    assert "rewards of the samples: 1, 0, 1, 0" in str(report)


def test_checking_a_reward_imports_no_torch():
    code = (
        "import sys\nfrom rlalign.llm.rewards import probe_reward\n"
        f"assert probe_reward({f'{SAMPLES}:length'!r}).ok\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_library_function_given_as_an_object_still_gets_a_process():
    from trl.rewards import think_format_reward

    completions = [[{"role": "assistant", "content": "<think>a</think>b"}], [{"role": "assistant", "content": "b"}]]
    with RewardGuard([resolve_reward(think_format_reward)], isolation="process") as guard:
        values = guard.score(prompts=["p"] * 2, completions=completions).values
    assert torch.equal(values, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
