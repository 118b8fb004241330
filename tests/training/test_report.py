import json
import os
import re
import socket
from html.parser import HTMLParser

import numpy as np
import pytest

from rlalign.training.report import write_report
from rlalign.training.report_compare import compare
from rlalign.training.report_data import read_run
from rlalign.training.report_findings import find
from rlalign.training.report_media import read_media
from rlalign.training.report_samples import held_out_tables, pairs, training_tables

VOID = {"meta", "br", "img", "link", "input"}


class _Page(HTMLParser):
    """Checks nesting and collects what a browser would act on."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def _write(run, name, content):
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def _lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def _sample(prompt, completion, reward, **more):
    return {"prompt": prompt, "completion": completion, "reward": reward, "parts": {}, "tokens": 3, **more}


def _steps(count, **extra):
    return [
        {
            "kind": "train",
            "step": step,
            "reward/mean": step / count,
            "reward/std": 0.2,
            "signal/group_frac": 0.5,
            "optim/grad_norm": 1.0,
            "time/generate_s": 3.0,
            "time/train_s": 1.0,
            "time/step_s": 5.0,
            **extra,
        }
        for step in range(1, count + 1)
    ]


@pytest.fixture
def run(tmp_path):
    """A finished run of 20 steps: of 100 problems 10 were solved before and 70 after."""
    folder = tmp_path / "demo"
    evaluations = [
        {"kind": "eval", "step": 0, "eval/reward_mean": 0.1, "eval/reward_stderr": 0.03, "eval/n": 100},
        {"kind": "eval", "step": 20, "eval/reward_mean": 0.7, "eval/reward_stderr": 0.045, "eval/n": 100},
    ]
    _write(folder, "metrics.jsonl", _lines([evaluations[0], *_steps(20), evaluations[1]]))
    before = [_sample(f"problem {i}", f"early {i}", float(i < 10)) for i in range(100)]
    after = [_sample(f"problem {i}", f"late {i}", float(i < 65 or i >= 95)) for i in range(100)]
    _write(folder, "samples/eval-000000.jsonl", _lines(before))
    _write(folder, "samples/eval-000020.jsonl", _lines(reversed(after)))
    _write(
        folder, "samples/step-000020.jsonl", _lines([_sample("p", f"c{i}", i / 64, advantage=0.5) for i in range(64)])
    )
    _write(
        folder,
        "config.resolved.json",
        {"method": "bnpo", "seed": 7, "total_steps": 20, "optim": {"learning_rate": 1e-5}},
    )
    _write(folder, "versions.json", {"python": "3.11.4", "torch": "2.13.0"})
    _write(folder, "status.json", {"status": "done", "pid": 1, "host": "elsewhere"})
    return folder


def _page(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return _Page(path.read_text(encoding="utf-8"))


def test_before_and_after_are_matched_by_prompt(run):
    (found,) = compare(read_run(run))
    assert found.before and found.change
    assert (found.before.estimate, found.after.estimate) == (0.1, 0.7)
    assert found.change.estimate == pytest.approx(0.6)
    assert (found.better, found.same, found.worse) == (60, 40, 0)
    # 60 of 100 differences are 1, the rest 0: standard error sqrt(.6 * .4 / 100) = 0.049
    assert found.change.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.011)
    assert found.change.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.011)
    assert found.paired
    assert found.count == 100


def test_the_verdict_says_what_rose_by_how_much_and_how_sure(run):
    verdict = find(read_run(run)).verdict
    assert verdict.sentence == "Held-out reward rose from 10.0 % to 70.0 %: +60.0 points."
    assert verdict.tone == "good"
    assert re.search(
        r"95 % interval \+5\d\.\d to \+6\d\.\d, paired bootstrap over the same problems\. 100 pro", verdict.detail
    )


def test_the_verdict_is_honest_about_noise_and_harm(run):
    flat = [_sample(f"problem {i}", "x", float(i in (*range(9), 50, 51))) for i in range(100)]
    _write(run, "samples/eval-000020.jsonl", _lines(flat))
    verdict = find(read_run(run)).verdict
    assert verdict.tone == "flat"
    assert verdict.sentence.startswith("Held-out reward did not change by more than the noise: from 10.0 % to 11.0 %")
    _write(run, "samples/eval-000020.jsonl", _lines([_sample(f"problem {i}", "x", 0.0) for i in range(100)]))
    verdict = find(read_run(run)).verdict
    assert (verdict.tone, verdict.sentence) == ("bad", "Held-out reward fell from 10.0 % to 0.0 %: −10.0 points.")


def test_correctness_leads_and_parts_are_decomposed(run):
    def rows(correct, form):
        return _lines(
            _sample(f"p{i}", "x", c + f, parts={"format": f, "exact_match": c, "unused": None})
            for i, (c, f) in enumerate(zip(correct, form, strict=True))
        )

    _write(run, "samples/eval-000000.jsonl", rows([0.0] * 40, [0.5] * 40))
    _write(run, "samples/eval-000020.jsonl", rows([1.0] * 30 + [0.0] * 10, [0.25] * 40))
    found = compare(read_run(run))
    assert [item.title for item in found] == ["Held-out exact match", "Held-out reward", "Held-out format"]
    assert [item.change.estimate for item in found if item.change] == pytest.approx([0.75, 0.5, -0.25])
    assert "Held-out exact match rose from 0.0 % to 75.0 %" in _page(run).text


def test_several_completions_per_problem_count_as_one_problem(run):
    _write(
        run,
        "samples/eval-000000.jsonl",
        _lines([_sample("a", "x", 0.0), _sample("a", "y", 1.0), _sample("b", "x", 0.0)]),
    )
    _write(
        run,
        "samples/eval-000020.jsonl",
        _lines([_sample("a", "x", 1.0), _sample("b", "x", None), _sample("b", "y", 1.0)]),
    )
    (found,) = compare(read_run(run))
    assert found.count == 2
    assert found.change
    assert found.change.estimate == pytest.approx((0.5 + 1.0) / 2)
    assert any("1 samples of the last evaluation have no score" in note.text for note in find(read_run(run)).notes)
    assert "2 problems. Few: treat the interval as rough." in find(read_run(run)).verdict.detail


def test_without_samples_the_logged_means_are_compared(run):
    for path in (run / "samples").iterdir():
        path.unlink()
    found = find(read_run(run))
    (item,) = found.comparisons
    assert item.change
    half = 1.959964 * np.hypot(0.03, 0.045)
    assert (item.change.low, item.change.high) == pytest.approx((0.6 - half, 0.6 + half))
    assert found.verdict.sentence == "Held-out reward rose from 0.100 to 0.700: +0.600."
    assert "taken as independent" in found.verdict.detail


def test_with_nothing_held_out_the_verdict_says_so(tmp_path):
    _write(tmp_path, "metrics.jsonl", _lines(_steps(20)))
    verdict = find(read_run(tmp_path)).verdict
    assert verdict.sentence == "Training reward rose from 0.125 to 0.925."  # means of the first and last 4 of 20 steps
    assert verdict.tone == "none"
    assert "Nothing was held out" in verdict.detail


def test_page_is_complete(run):
    page = _page(run)
    for words in (
        "Finished",
        "bnpo · seed 7",
        "Held-out reward rose from 10.0 % to 70.0 %: +60.0 points.",
        "60 better, 40 same, 0 worse",
        "Gradient norm",
        "Groups with signal",
        "Before and after",
        "Training samples of step 20",
        "optim.learning_rate 1e-05",
        "torch 2.13.0",
        "rlalign train",
        "rlalign report",
    ):
        assert words in page.text
    assert "rlalign resume" not in page.text  # it is finished
    # 3 of 5 seconds generate, 1 trains, 1 is unaccounted for
    assert "generate 60.0 % 3 s 1 min 00 s" in page.text
    assert "the rest 20.0 % 1 s 20 s" in page.text


def test_page_needs_no_network_and_allows_only_its_own_script(run):
    page = _page(run)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:", "./")), (tag, name, value)
    assert "link" not in page.tags
    assert "iframe" not in page.tags
    assert page.tags.count("script") == 1
    text = (run / "report.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [value for tag, name, value in page.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_charts_are_described_for_those_who_cannot_see_them(run):
    page = _page(run)
    plots = page.tags.count("svg")
    assert plots >= 5
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == plots
    assert any(label.startswith("Reward. training: 0.050 at step 1, 1 at step 20") for label in labels)
    assert ("html", "lang", "en") in page.attributes


HOSTILE = {
    "script": "<script>document.title='owned'</script><img src=x onerror=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x=\'',
    "template": "{{ 7 * 7 }}{% for x in range(10**9) %}",
    "control": "a\x00b\x1b[2Jc\x07d\x9be",
    "direction": "abc\u202egnp.exe\u2066 \u200b \ufeff",
    "surrogate": "half \ud800 pair",
    "long": "A" * 1_000_000 + "END",
    "comment": "--></style></title></textarea><svg/onload=alert(1)>",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_shown_and_never_obeyed(run, name):
    text = HOSTILE[name]
    clean = _page(run)
    shown = {text: text}
    row = _sample(text, text, 0.5, parts={text: 0.5}, prompt_id=text)
    for file in ("eval-000000", "eval-000020", "step-000020"):
        _write(run, f"samples/{file}.jsonl", _lines([row]))
    _write(run, "errors/reward-1.json", shown)
    _write(run, "errors/crash.txt", text.encode("utf-8", "replace").decode())
    _write(run, "config.resolved.json", {"method": text, "model": text, text: {text: text}})
    _write(run, "versions.json", shown)
    _write(run, "status.json", {"status": "failed", "error": text})
    _write(
        run,
        "metrics.jsonl",
        _lines([{"kind": "train", "step": 1, f"reward/{text}": 1.0, text: text, f"time/{text}_s": 2}]),
    )
    page = _page(run)
    raw = (run / "report.html").read_bytes()
    assert set(page.tags) <= {*clean.tags, "a"}
    assert page.tags.count("script") == 1
    assert not [n for _, n, _ in page.attributes if n.startswith("on")]
    assert len(raw) < 400_000
    hidden = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200b\ufeff]"
    assert not re.search(hidden, raw.decode("utf-8"))
    if name == "long":
        assert "characters left out]" in page.text
        assert "END" in page.text
    if name == "template":
        assert "{{ 7 * 7 }}" in page.text
    if name == "control":
        assert r"a\x00b\x1b[2Jc\x07d\x9be" in page.text


def test_right_to_left_text_is_kept_and_isolated(run):
    _write(run, "samples/eval-000020.jsonl", _lines([_sample("problem 1", "שלום עולם", 1.0)]))
    page = _page(run)
    assert "שלום עולם" in page.text
    assert ("pre", "dir", "auto") in page.attributes


def test_an_empty_directory_still_gives_a_page(tmp_path):
    page = _page(tmp_path)
    assert "Nothing was measured" in page.text
    assert "No status recorded" in page.text
    assert "svg" not in page.tags


def test_one_step_and_no_samples(tmp_path):
    _write(tmp_path, "metrics.jsonl", _lines(_steps(1)))
    _write(tmp_path, "status.json", {"status": "interrupted"})
    page = _page(tmp_path)
    assert "Too short to judge: 1 step recorded, training reward 1, nothing held out." in page.text
    assert "Interrupted, resumable" in page.text
    assert f"rlalign resume {tmp_path}" in page.text


def test_a_crash_shows_its_reason_and_its_traceback(run):
    _write(run, "status.json", {"status": "failed", "error": "RewardError: `math` raised on row 3"})
    _write(run, "errors/error-0001.txt", "Traceback (most recent call last):\n  ZeroDivisionError")
    _write(run, "errors/reward-math.log", "")  # a worker that had nothing to say
    page = _page(run)
    for words in (
        "Failed",
        "RewardError: `math` raised on row 3",
        "ZeroDivisionError",
        "1 recorded in errors/",
        "rlalign resume",
    ):
        assert words in page.text


def test_a_run_that_died_without_a_word_is_told_from_one_that_runs(run):
    _write(run, "status.json", {"status": "running", "pid": os.getpid(), "host": socket.gethostname()})
    assert "Running, or stopped without a word" in _page(run).text
    _write(run, "status.json", {"status": "running", "pid": 2**22 + 1, "host": socket.gethostname()})
    assert "Stopped without a word, resumable" in _page(run).text


def test_damaged_files_cost_only_themselves(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n\xff\xfe\n\n{"kind":"train","step":21,"rew')
    _write(run, "config.resolved.json", '{"method": ')
    _write(run, "versions.json", "[" * 100_000)
    _write(run, "status.json", "[1, 2]")
    _write(run, "samples/eval-000020.jsonl", _lines([_sample("problem 1", "x", 1.0)]) + '{"prompt": "torn')
    page = _page(run)
    assert "metrics.jsonl: 3 lines torn or not JSON, left out." in page.text
    assert "eval-000020.jsonl: 1 line torn or not JSON, left out." in page.text
    assert "config.resolved.json could not be read" in page.text
    assert "versions.json could not be read" in page.text
    assert "Reward" in page.text


def test_odd_values_are_survived(tmp_path):
    rows = [
        {"step": "x", "reward/mean": "nan", "a/b": "inf", "optim/grad_norm": 1e308, "deep": {"x": [1]}, "flag": True},
        {"step": None, "reward/mean": "-inf", "a/b": None, "optim/grad_norm": -1e308, "policy/kl": 5e-324},
        {
            "step": 10**400,
            "reward/mean": 10**400,
            "time/train_s": "nan",
            "time/a_s": 1e308,
            "time/step_s": -5,
            "throughput/x_per_s": "inf",
        },
        {"kind": "eval", "step": 1, "eval/reward_mean": "nan", "eval/n": "nan"},
        {"kind": 7, "step": 3.5, "reward/mean": 0.1},
    ]
    _write(tmp_path, "metrics.jsonl", _lines(rows))
    odd = [
        {},
        {"prompt": 3, "completion": [1], "reward": "x", "parts": [1]},
        {"prompt": [{"content": None}], "reward": True},
    ]
    _write(tmp_path, "samples/eval-000001.jsonl", _lines(odd))
    _write(tmp_path, "samples/eval-000002.jsonl", _lines(odd))
    _write(tmp_path, "samples/step-1.jsonl", "")
    assert "svg" in _page(tmp_path).tags


def test_deep_nesting_is_survived(run):
    deep = {"content": "x"}
    for _ in range(900):
        deep = {"content": deep, "other": [deep]} if _ == 0 else {"content": deep}
    _write(run, "config.resolved.json", deep)
    _write(run, "errors/reward-1.json", deep)
    _write(run, "samples/eval-000020.jsonl", _lines([_sample(deep, [deep], 1.0)]))
    assert "Finished" in _page(run).text


def test_a_nan_is_a_note_and_a_gap(run):
    rows = _steps(20)
    rows[7]["optim/grad_norm"] = "nan"
    _write(run, "metrics.jsonl", _lines(rows))
    page = _page(run)
    assert "`optim/grad_norm` was not a finite number once, first at step 8." in page.text
    assert ("line", "class", "missing") in page.attributes


def test_notes_diagnose_missing_signal_truncation_and_reward_hacking(run):
    extra = {"signal/group_frac": 0.05, "rollout/truncated_frac": 0.5}
    _write(run, "metrics.jsonl", _lines(_steps(20, **extra)))
    _write(run, "samples/eval-000020.jsonl", _lines([_sample(f"problem {i}", "x", 0.0) for i in range(100)]))
    text = " ".join(note.text for note in find(read_run(run)).notes)
    assert "95.0 % of the groups had identical rewards" in text
    assert "50.0 % of the completions were cut" in text
    assert "Training reward rose while held-out reward fell" in text


def test_a_better_evaluation_on_the_way_is_pointed_out(run):
    values = {0: 0.1, 10: 0.9, 20: 0.5}
    rows = [{"kind": "eval", "step": s, "eval/reward_mean": v, "eval/reward_stderr": 0.02} for s, v in values.items()]
    _write(run, "metrics.jsonl", _lines(rows))
    assert any("best evaluation was at step 10 (0.900)" in note.text for note in find(read_run(run)).notes)


def test_samples_are_ranked_and_ties_take_every_prompt_in_turn(run):
    best, median, worst = training_tables(read_run(run))
    assert [len(table.rows) for table in (best, median, worst)] == [20, 20, 20]
    assert best.rows[0].reward == "0.98"  # 63 / 64
    assert worst.rows[0].reward == "0.00"
    assert median.rows[0].sample.reward > 0.5 > median.rows[-1].sample.reward
    _write(run, "samples/step-000020.jsonl", _lines([_sample(f"group {i // 32}", f"c{i}", 1.0) for i in range(96)]))
    prompts = [row.sample.prompt for row in training_tables(read_run(run))[0].rows[:3]]
    assert sorted(prompts) == ["group 0", "group 1", "group 2"]


def test_the_same_prompt_stands_before_and_after(run):
    found = pairs(read_run(run))
    assert [pair.label for pair in found] == ["Rose", "Rose", "Rose", "Still low"]
    for pair in found:
        assert pair.before.prompt == pair.after.prompt
        number = pair.before.prompt.removeprefix("problem ")
        assert (pair.before.completion, pair.after.completion) == (f"early {number}", f"late {number}")
    row = held_out_tables(read_run(run))[0].rows[0]
    assert row.before and row.before.key == row.sample.key


def test_agents_get_their_curves_without_prompts(tmp_path):
    rows = [
        {"step": s, "episode/return_mean": float(s), "episode/length_mean": 9.0, "critic/bias": 0.1} for s in range(50)
    ]
    rows += [
        {"kind": "eval", "step": s, "eval/return_mean": 1.0 + s, "eval/return_stderr": 0.5, "eval/n": 20}
        for s in (0, 49)
    ]
    _write(tmp_path, "metrics.jsonl", _lines(rows))
    page = _page(tmp_path)
    assert "Held-out return rose from 1 to 50: +49." in page.text
    assert "Episode length" in page.text
    assert "Bias" in page.text
    episodes = [{"prompt_id": i, "reward": float(i), "episode": i} for i in range(40)]
    later = [{"prompt_id": i, "reward": float(i) + 2, "episode": i} for i in range(40)]
    _write(tmp_path, "samples/eval-000000.jsonl", _lines(episodes))
    _write(tmp_path, "samples/eval-000049.jsonl", _lines(later))
    (found,) = compare(read_run(tmp_path))
    assert found.paired
    assert found.change
    assert found.change.estimate == 2.0


@pytest.fixture
def agent_run(tmp_path):
    """PPO on a pole: four starts, 10 before and 100, 200, 300, 400 after."""
    folder = tmp_path / "pole"
    rows = [
        {
            "kind": "train",
            "step": 500 * i,
            "episode/return_mean": 10.0 * i,
            "episode/length_mean": 10.0 * i,
            "policy/kl": 0.01,
            "policy/entropy_nats": -0.5,
            "value/explained_variance": 0.4,
            "nap/norm_growth": 1.0,
            "time/collect_s": 0.1,
            "time/train_s": 0.3,
            "time/step_s": 0.5,
            "throughput/env_steps_per_s": 1000.0,
        }
        for i in range(1, 21)
    ]
    ends = [(0, 10.0, 10.0, 10.0), (10_000, 250.0, 150.0, 350.0)]
    rows += [
        {
            "kind": "eval",
            "step": step,
            "eval/return_mean": mean,
            "eval/return_stderr": 60.0,
            "eval/return_low": low,
            "eval/return_high": high,
            "eval/n": 4,
        }
        for step, mean, low, high in ends
    ]
    _write(folder, "metrics.jsonl", _lines(rows))
    for step, returns in ((0, [10, 10, 10, 10]), (10_000, [100, 200, 300, 400])):
        episodes = [{"step": step, "episode": i, "reward": float(r), "length": r} for i, r in enumerate(returns)]
        _write(folder, f"samples/eval-{step:09d}.jsonl", _lines(episodes))
    (folder / "media").mkdir()
    (folder / "media" / "episode-000010000.gif").write_bytes(b"GIF89a" + b"0" * 100)
    config = {"method": "ppo", "seed": 0, "env": {"id": "CartPole-v1"}, "total_env_steps": 10_000}
    _write(folder, "config.resolved.json", config)
    _write(folder, "status.json", {"status": "done", "pid": 1, "host": "elsewhere", "total_steps": 10_000})
    return folder


def test_an_agent_is_compared_start_by_start(agent_run):
    (found,) = compare(read_run(agent_run))
    assert found.before and found.change
    assert (found.before.estimate, found.after.estimate, found.change.estimate) == (10.0, 250.0, 240.0)
    assert (found.paired, found.count, found.better) == (True, 4, 4)
    verdict = find(read_run(agent_run)).verdict
    assert verdict.sentence == "Held-out return rose from 10 to 250: +240."
    assert "paired bootstrap over the same starts. 4 starts." in verdict.detail


def test_the_page_of_an_agent_speaks_of_episodes_and_not_of_language(agent_run):
    page = _page(agent_run)
    for words in (
        "ppo · CartPole-v1 · seed 0",
        "Environment steps 10,000 of 10,000 planned",
        "Time per iteration",
        "KL of an update",
        "Variance explained by the critic",
        "held out, 95 % interval over episodes",
        "0 10 10 100 100",  # the first start: return and length, before and after
        "3 10 10 400 400",
        "Play episodes with it rlalign sample",
        "Weight norms against their start",
    ):
        assert words in page.text, words
    for word in ("prompt", "completion", "Talk to it", "KL to the reference", "token", "problems"):
        assert word not in page.text.partition("Environment steps")[2], word  # before it stands the style sheet
    assert any(tag == "img" and value.startswith("data:image/gif;base64,") for tag, _, value in page.attributes)


def test_a_band_of_unequal_sides_is_given_by_its_ends(agent_run):
    _write(
        agent_run,
        "metrics.jsonl",
        _lines(
            {"kind": "eval", "step": s, "eval/return_mean": 10.0, "eval/return_low": 4.0, "eval/return_high": 12.0}
            for s in (0, 5)
        ),
    )
    page = write_report(agent_run).read_text(encoding="utf-8")
    assert "held out 10 (4 to 12)" in page
    assert page.count('class="f2 band"') == 1


def test_returns_of_zero_and_one_are_returns_and_not_shares(agent_run):
    for step, returns in ((0, [0, 0, 0, 1]), (10_000, [1, 1, 1, 1])):
        episodes = [{"step": step, "episode": i, "reward": float(r), "length": 5} for i, r in enumerate(returns)]
        _write(agent_run, f"samples/eval-{step:09d}.jsonl", _lines(episodes))
    assert find(read_run(agent_run)).verdict.sentence == "Held-out return rose from 0.250 to 1: +0.750."


def test_without_an_evaluation_an_agent_is_judged_by_its_training(agent_run):
    rows = [json.loads(line) for line in (agent_run / "metrics.jsonl").read_text().splitlines()]
    _write(agent_run, "metrics.jsonl", _lines(row for row in rows if row["kind"] == "train"))
    for path in (agent_run / "samples").iterdir():
        path.unlink()
    verdict = find(read_run(agent_run)).verdict
    assert verdict.sentence == "Training return rose from 25 to 185."
    assert "first and last 4 iterations" in verdict.detail
    assert "explored" in verdict.detail


PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 100


def test_media_stand_first_against_last_and_large_files_are_linked(run, tmp_path):
    media = run / "media"
    media.mkdir()
    for step in (0, 10, 200):
        (media / f"grid-{step}.png").write_bytes(PNG)
    (media / "episode 1.mp4").write_bytes(b"0" * 5_000_001)
    (media / "notes.html").write_text("<script>alert(1)</script>")
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    (media / "leak-1.png").symlink_to(secret)
    series = read_media(run)
    assert [one.title for one in series] == ["grid", "episode 1", "notes"]
    assert [m.caption for m in series[0].ends] == ["step 0", "step 200"]
    assert [m.caption for m in series[0].between] == ["step 10"]
    page = _page(run)
    assert ("a", "href", "./media/episode%201.mp4") in page.attributes
    assert (
        sum(name == "src" and value.startswith("data:image/png;base64,iVBOR") for _, name, value in page.attributes)
        == 3
    )
    assert page.tags.count("script") == 1


def test_secrets_of_the_config_are_hidden(run):
    config = {"tracker": {"api_key": "HUSH1", "hf_token": "HUSH2"}, "max_completion_tokens": 64, "tokens": "kept"}
    _write(run, "config.resolved.json", config)
    page = _page(run)
    assert "HUSH" not in page.text
    assert "tracker.api_key (hidden)" in page.text
    assert "max_completion_tokens 64" in page.text
    assert "tokens kept" in page.text


def test_commands_are_quoted(tmp_path):
    folder = tmp_path / "a b; rm -rf $HOME"
    folder.mkdir()
    page = _page(folder)
    assert f"rlalign resume '{folder}'" in page.text


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "flow_grpo", "reward": None, "pipeline": {"source": "somebody/sd"}},
        {"method": "dso", "reward": {"function": "a:b"}, "pipeline": {"source": None, "pretrain": None}},
        {"method": "bnpo", "rewards": [], "model": {"name": "x"}},
    ],
)
def test_what_only_a_script_can_continue_is_not_given_commands_that_fail(run, settings):
    _write(run, "config.resolved.json", settings)
    page = _page(run)
    assert "trainer.fit(resume=True)" in page.text and "rlalign report" in page.text
    assert not any(f"rlalign {word}" in page.text for word in ("train", "eval", "sample", "resume"))


def test_a_long_run_stays_a_small_page(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"step": i, **{f"group{k}/m{k}": float(v) for k, v in enumerate(rng.normal(size=10))}} for i in range(5_000)
    ]
    _write(tmp_path, "metrics.jsonl", _lines(rows))
    write_report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 600_000


def test_a_missing_directory_is_said_plainly(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run directory"):
        write_report(tmp_path / "nowhere")


def test_an_old_page_survives_a_failed_write(run, monkeypatch):
    write_report(run).write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlalign.training.files.os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == "old"
    assert not [path for path in run.iterdir() if ".tmp" in path.name]


def test_other_phrasings_of_the_untouched_model_are_the_fair_baseline(run):
    def phrased(word, solved):
        return _lines(_sample(f"{word} {i}", "x", float(i < solved), prompt_id=i) for i in range(100))

    _write(run, "samples/eval-000000.jsonl", phrased("training words", 10))
    _write(run, "samples/eval-000020.jsonl", phrased("training words", 70))
    _write(run, "samples/baseline-1.jsonl", phrased("politely", 20))
    _write(run, "samples/baseline-2.jsonl", phrased("briefly", 40))
    found = find(read_run(run))
    assert [item.phrasing for item in found.comparisons] == [False, True]
    fair = found.comparisons[1]
    assert fair.before and fair.change
    assert (fair.before.estimate, fair.change.estimate) == (0.4, pytest.approx(0.3))
    assert found.verdict.tone == "good"
    assert "best other phrasing (40.0 %): +30.0 points, 95 % interval +2" in found.verdict.detail
    _write(run, "samples/baseline-2.jsonl", phrased("briefly", 75))
    found = find(read_run(run))
    assert found.verdict.tone == "flat"
    assert any("does as well when asked in other words" in note.text for note in found.notes)


def test_a_failed_run_names_the_last_line_of_its_traceback(run):
    _write(run, "status.json", {"status": "failed", "step": 3, "total_steps": 40})
    _write(run, "errors/error-0001.txt", "Traceback\nOldError: first")
    _write(run, "errors/error-0002.txt", "Traceback\n  line\nRewardError: second\n")
    sample = {"function": "math", "status": "timeout", "sample": {"prompt": "1 + 1?", "completion": "<b>2</b>"}}
    _write(run, "errors/reward-math-timeout.json", sample)
    _write(run, "metrics.jsonl", _lines(_steps(3, **{"reward/error_frac": 0.125})))
    page = _page(run)
    before_tiles = page.text.split("Steps")[0]
    assert "RewardError: second" in before_tiles
    assert "3 of 40 planned" in page.text
    assert "sample.completion <b>2</b>" in page.text
    assert "12.5 % of the reward calls failed or timed out" in page.text
