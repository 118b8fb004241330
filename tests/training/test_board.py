import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from rlalign.training.board import Board
from rlalign.training.board_panel import sparkline

STEP = {
    "reward/mean": 0.412,
    "reward/std": 0.31,
    "signal/group_frac": 0.75,
    "policy/entropy_nats": 1.2,
    "policy/kl": 0.003,
    "optim/grad_norm": 0.81,
    "throughput/tokens_per_s": 512.0,
    "time/generate_s": 6.0,
    "time/train_s": 2.0,
    "time/step_s": 8.0,
}


def _console(width=110):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)


def _live(console, *calls, total=40, title="demo"):
    with Board(total, title, console=console, enabled=True) as board:
        for call in calls:
            call(board)
    return console.file.getvalue()


def test_plain_line_holds_the_six_numbers_and_the_eta(capsys):
    with Board(200, "demo", enabled=False) as board:
        board.step(12, STEP)
        board.evaluation(12, {"eval/reward_mean": 0.5, "eval/reward_stderr": 0.02, "eval/n": 500})
    step, evaluation = capsys.readouterr().out.splitlines()
    # 188 steps at 8 s are 1504 s
    assert step.split() == [
        "step",
        "12/200",
        "reward",
        "0.412",
        "±0.310",
        "signal",
        "75.0%",
        "entropy",
        "1.20",
        "kl",
        "0.003",
        "grad",
        "0.810",
        "speed",
        "512",
        "tokens/s",
        "8.0",
        "s/step",
        "ETA",
        "25",
        "min",
        "04",
        "s",
    ]
    assert evaluation.split() == ["eval", "12", "reward", "0.500", "±0.020", "(n=500)"]


def test_without_a_terminal_the_lines_are_chosen_and_with_one_the_panel(capsys):
    with Board(3, "demo") as board:
        board.step(1, STEP)
    assert capsys.readouterr().out.startswith("step       1/3")
    console = _console()
    with Board(3, "demo", console=console) as board:
        board.step(1, STEP)
    assert "╭" in console.file.getvalue()


def test_panel_shows_numbers_sample_sparkline_and_time_split():
    out = _live(
        _console(),
        lambda b: b.evaluation(0, {"eval/reward_mean": 0.06, "eval/n": 9}),
        lambda b: b.step(1, STEP),
        lambda b: b.sample([{"role": "user", "content": "2 + 2?"}], "It is 4.", 1.0),
        lambda b: b.step(2, STEP | {"reward/mean": 0.6}),
        lambda b: b.evaluation(2, {"eval/reward_mean": 0.86, "eval/n": 9}),
        lambda b: b.note("a note that stays"),
    )
    for words in ("step 2/40", "0.600 ±0.310", "75.0%", "512 tokens/s", "ETA 5 min 04 s", "2 + 2?", "It is 4.", "▁█"):
        assert words in out
    assert "generate 75%" in out
    assert "train 25%" in out
    assert "reward 0.860  (n=9)  at step 2; before, at step 0: reward 0.060" in out
    assert "a note that stays" in out


def test_what_goes_on_before_the_first_step_is_said(capsys):
    console = _console()
    out = _live(console, lambda b: b.doing("measuring the untouched model: phrasing 1 of 3"), lambda b: b.step(1, STEP))
    panels = out.split("╭")
    assert "waiting for the first step" in panels[1]
    assert "phrasing 1 of 3" in panels[2]
    assert "phrasing 1 of 3" not in panels[3]
    with Board(3, "demo", enabled=False) as board:
        board.doing("measuring")
    assert capsys.readouterr().out == "measuring\n"


def test_a_closed_board_is_followed_by_plain_lines():
    console = _console()
    with Board(3, "demo", console=console, enabled=True) as board:
        board.step(3, STEP)
        board.close()
        before = len(console.file.getvalue())
        board.note("Report: here")
    assert console.file.getvalue()[before:] == "Report: here\n"


def test_a_baseline_is_called_by_what_it_is(capsys):
    with Board(3, "demo", enabled=False) as board:
        board.evaluation(0, {"eval/reward_mean": 0.25, "eval/best_baseline_mean": 0.125})
    assert "reward 0.250  best other phrasing 0.125" in capsys.readouterr().out


@pytest.mark.parametrize("enabled", [True, False])
def test_missing_and_strange_values_never_stop_a_run(enabled):
    strange = {
        "reward/mean": float("nan"),
        "reward/std": None,
        "policy/kl": float("inf"),
        "optim/grad_norm": torch.tensor(1.5),
        "signal/group_frac": np.float32(0.5),
        "time/step_s": float("nan"),
        "time/train_s": -1.0,
        "throughput/tokens_per_s": "n/a",
        "x": object(),
        "y": torch.ones(3),
        "z": 10**400,
        "": 1.0,
    }
    console = _console()
    with Board(0, "", console=console, enabled=enabled) as board:
        board.step(0, {})
        board.evaluation(0, {})
        board.step(1, strange)
        board.evaluation(1, strange)
        board.sample(None, {"odd": [1]}, float("nan"))
        board.step(99, strange)
    out = console.file.getvalue()
    assert "1.50" in out
    assert "∞" in out
    assert "50.0%" in out
    assert "n/a" in out


def test_hostile_text_is_neither_markup_nor_control():
    hostile = "[red]x[/nope] \x1b[2J\x07 \u202e evil \ud800 [/]" + "A" * 100_000
    out = _live(_console(), lambda b: b.note(hostile), lambda b: b.sample(hostile, hostile), title=hostile)
    assert "[red]x[/nope]" in out
    assert "\x1b[2J" not in out
    assert "\x07" not in out
    assert "\u202e" not in out
    assert "\\x1b[2J" in out
    assert len(out) < 20_000


class _Closing(io.StringIO):
    """A terminal that goes away."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.gone = False

    def write(self, text):
        if self.gone:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [BrokenPipeError(32, "EPIPE"), OSError(5, "EIO"), ValueError("closed file")])
def test_a_terminal_that_goes_away_does_not_stop_the_run(enabled, error):
    stream = _Closing(error)
    console = Console(file=stream, force_terminal=True, width=100)
    with Board(10, "demo", console=console, enabled=enabled) as board:
        board.step(1, STEP)
        stream.gone = True
        board.step(2, STEP)
        board.note("unseen")
        board.evaluation(2, STEP)
        board.sample("p", "c")
    assert board.state.step == 2
    assert console.file is stream


@pytest.mark.parametrize("enabled", [True, False])
def test_closed_pipe_leaves_exit_code_zero_and_a_quiet_stderr(enabled):
    script = f"""
import sys
from rlalign.training.board import Board
with Board(5, "demo", enabled={enabled}) as board:
    sys.stdin.readline()  # the reader has gone by now
    for step in range(5):
        board.step(step, {{"reward/mean": 0.5}})
print("done", file=sys.stderr)
"""
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=_environment())
    process.stdout.close()
    process.stdin.write("go\n")
    process.stdin.close()
    with process.stderr:
        assert process.stderr.read() == "done\n"
    assert process.wait(timeout=120) == 0


def _environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_terminal_without_unicode_gets_replacements():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with Board(2, "démo", console=Console(file=stream, width=80), enabled=False) as board:
        board.step(1, STEP)
    assert b"0.412 ?0.310" in raw.getvalue()


def test_quiet_boards_write_nothing(capsys):
    with Board(2, "demo", quiet=True, enabled=True) as board:
        board.step(1, STEP)
        board.note("x")
    assert capsys.readouterr().out == ""


def test_dumb_terminals_get_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = _console()
    with Board(2, "demo", console=console) as board:
        board.step(1, STEP)
    assert "╭" not in console.file.getvalue()


def test_an_exception_inside_passes_through_and_restores_the_console():
    console = _console()
    before = console.file
    with pytest.raises(RuntimeError, match="boom"), Board(2, "demo", console=console, enabled=True):
        raise RuntimeError("boom")
    assert console.file is before


def test_sparkline_scales_averages_and_leaves_gaps():
    nan = float("nan")
    assert sparkline([0.0, 1.0], width=8) == "▁█"
    assert sparkline([0.0, nan, 7.0], width=8) == "▁ █"
    assert sparkline([0.0, 2.0, 4.0, 10.0], width=2) == "▁█"  # bins average to 1 and 7
    assert sparkline([3.0, 3.0], width=8) == "▄▄"
    assert sparkline([nan], width=8) == " "
    assert sparkline([], width=8) == ""


def test_importing_the_board_and_plain_use_need_neither_rich_nor_torch():
    script = """
import sys
from rlalign.training.board import Board
with Board(1, "demo", enabled=False) as board:
    board.step(1, {"reward/mean": 1.0})
print(sorted({"rich", "torch", "jinja2"} & set(sys.modules)))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120, env=_environment()
    )
    assert result.stdout.splitlines()[-1] == "[]"


ITERATION = {
    "episode/return_mean": 21.5,
    "reward/mean": 0.25,
    "policy/kl": 0.008,
    "time/collect_s": 0.06,
    "time/train_s": 0.12,
    "time/step_s": 0.2,
    "throughput/env_steps_per_s": 2500.0,
}


def test_the_clock_of_an_agent_counts_environment_steps(capsys):
    with Board(100_000, "pole", enabled=False) as board:
        board.step(500, ITERATION)
    (line,) = capsys.readouterr().out.splitlines()
    # 99,500 steps are left at 2,500 in a second: 40 s, however few records there were
    assert line == "step     500/100000  return 21.5  kl 0.008  speed 2,500 env steps/s  ETA 40 s"


def test_the_pace_of_an_agent_is_that_of_its_last_twenty_iterations():
    board = Board(10_000, "pole", enabled=False, quiet=True)
    board.step(1_000, ITERATION)
    board.step(2_000, ITERATION | {"throughput/env_steps_per_s": 500.0, "time/step_s": 1.0})
    # 500 steps in 0.2 s and 500 in 1.0 s; 8,000 are left
    assert board.state.eta_seconds == pytest.approx(8_000 * 1.2 / 1_000)


def test_an_offline_agent_counts_updates():
    board = Board(1_000, "cloning", enabled=False, quiet=True)
    board.step(100, {"policy/loss": 1.0, "time/step_s": 0.5, "throughput/updates_per_s": 200.0})
    assert board.state.eta_seconds == pytest.approx(900 / 200)


def test_the_many_short_iterations_of_an_agent_are_thinned_out_but_not_the_last(capsys):
    with Board(1_000, "pole", enabled=False) as board:
        for step in range(1, 1_001):
            board.step(step, ITERATION)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 50
    assert lines[0].startswith("step       1/1000")
    assert lines[-1].startswith("step    1000/1000")


def test_the_panel_of_an_agent_shows_returns():
    out = _live(
        _console(),
        lambda b: b.step(500, ITERATION),
        lambda b: b.evaluation(500, {"eval/return_mean": 30.0, "eval/return_stderr": 2.0, "eval/n": 20}),
        lambda b: b.step(4_000, ITERATION | {"episode/return_mean": 90.0}),
        total=4_000,
    )
    for words in ("step 4,000/4,000", "return  ▁█", "collect 33%", "train 67%", "return 30 ±2  (n=20)"):
        assert words in out
    for word in ("prompt", "answer", "reward"):
        assert word not in out
