"""The command line: what it prints, which code it exits with, and that it never shows a traceback or imports torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import rlalign
from rlalign import cli, cli_errors, config

ROOT = Path(__file__).parents[1]

FAKE_CONFIG = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class FakeConfig:
    method: str = "fake"
    seed: int = 0
    ending: str = "done"
"""

FAKE_RUN = """
from rlalign.config import dump
from rlalign.training.run_directory import RunDirectory
from rlalign.training.signals import Interrupted

def train(config, *, run_dir, config_text, resume=False):
    if resume:
        print(f"resumed with seed {config.seed}")
        return
    with RunDirectory.create(run_dir, config_text, dump(config)):
        match config.ending:
            case "stopped":
                raise Interrupted(f"Saved step 3. Continue: rlalign resume {run_dir}")
            case "ctrl_c_twice":
                raise KeyboardInterrupt
            case "crashed":
                raise RuntimeError("the loss is not finite at step 3")
            case "no_extra":
                raise ModuleNotFoundError("No module named 'transformers.x'", name="transformers.x")
            case "own_import":
                raise ModuleNotFoundError("No module named 'my_rewards'", name="my_rewards")
    print("trained")

def evaluate(run_dir, *, checkpoint=None):
    return {"eval/reward_mean": 0.123456, "eval/n": 500, "checkpoint": checkpoint}

def sample(run_dir, prompt, *, count):
    return [f"{prompt} -> {index}" for index in range(count)]

def check(config):
    return ["2 steps of 8 completions"]
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, a method named `fake`, and one config of it."""
    package = tmp_path / "packages" / "fake_domain"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "config.py").write_text(FAKE_CONFIG)
    (package / "run.py").write_text(FAKE_RUN)
    monkeypatch.syspath_prepend(package.parent)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_domain"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(config.METHODS, "fake", "fake_domain.config:FakeConfig")
    for name in ("WORLD_SIZE", "RANK", "RLALIGN_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    Path("toy.yaml").write_text("# A toy.\nmethod: fake\n")


def rlalign_command(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert "Traceback" not in result.output
    return result.exit_code, result.stdout, result.stderr


def own_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rlalign", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


# --- without arguments, help ---------------------------------------------------------------------------------------


def test_bare_command_is_a_one_screen_guide_with_three_verbs():
    code, out, _ = rlalign_command()
    lines = out.splitlines()
    assert code == 0
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 110
    assert [line.split()[1] for line in lines if line.startswith("  rlalign ")] == ["train", "train", "check", "resume"]


def test_version():
    assert rlalign_command("--version") == (0, f"{rlalign.__version__}\n", "")


def test_commands_are_the_promised_ones_and_stay_small():
    group = typer.main.get_command(cli.app)
    commands = group.commands  # pyright: ignore[reportAttributeAccessIssue]
    assert set(commands) == {"train", "resume", "eval", "sample", "collect", "check", "report", "list"}
    for command in commands.values():
        assert len(command.params) <= 40
        assert command.help
        assert all(parameter.help for parameter in command.params)


def heavy_imports(*arguments: str) -> tuple[str, str]:
    """Run the command in its own process: what it printed, and which slow libraries it had imported by then."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['rlalign', *{arguments!r}]\n"
        "try:\n    runpy.run_module('rlalign', run_name='__main__')\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'jaxtyping', 'accelerate', 'trl'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    printed, _, heavy = done.stdout.rpartition("heavy: ")
    return printed + done.stderr, heavy.strip()


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["list"], ["--version"], [], ["check", "x.yaml"], ["train", "nothing"]],
)
def test_light_commands_import_nothing_heavy(arguments: list[str]):
    Path("x.yaml").write_text("method: bnpo\nseed: -1\n")
    assert heavy_imports(*arguments)[1] == "[]"


def test_checking_a_language_model_config_imports_no_torch():
    Path("x.yaml").write_text(
        "method: bnpo\nmodel: {name: smollm2-135m}\ndata: {train: {source: prompts.jsonl}}\n"
        "rewards: [{function: 'reward.py:score'}]\n"
    )
    Path("prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    Path("reward.py").write_text("def score(completions, **columns):\n    return [1.0 for _ in completions]\n")
    printed, heavy = heavy_imports("check", "x.yaml")
    assert printed.startswith("x.yaml: ok (method bnpo)")
    assert "torch" not in heavy


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train"], ["train", "toy.yaml", "--run-dri", "x"], ["sample", "r", "--count", "0"]]
)
def test_wrong_usage_exits_2(arguments: list[str]):
    code, _, err = rlalign_command(*arguments)
    assert code == 2
    assert "Error" in err


@pytest.mark.parametrize("written", [["--ending=fine"], ["--ending", "fine"]])
@pytest.mark.parametrize("command", ["train", "check"])
def test_a_setting_written_as_an_option_is_put_right(command: str, written: list[str]):
    code, _, err = rlalign_command(command, "toy.yaml", *written)
    assert (code, err) == (
        2,
        "Error: there is no option --ending. A setting is written without dashes: ending=fine\n",
    )


# --- config mistakes -----------------------------------------------------------------------------------------------


def test_config_mistakes_exit_2_with_file_line_and_nearest_name():
    Path("toy.yaml").write_text("method: fake\nsed: 3\n")
    assert rlalign_command("train", "toy.yaml") == (2, "", "toy.yaml:2: `sed` is not a setting; did you mean `seed`?\n")
    assert not Path("runs").exists()


def test_override_mistakes_exit_2():
    code, _, err = rlalign_command("train", "toy.yaml", "seed=x")
    assert (code, err) == (2, "command line: `seed` must be a whole number, got the text 'x'\n")


# --- train and resume ----------------------------------------------------------------------------------------------


def test_train_makes_predictable_run_directories():
    for expected in ("runs/toy", "runs/toy-2", "runs/toy-3"):
        code, out, _ = rlalign_command("train", "toy.yaml", "--seed", "5", "ending=fine")
        assert (code, out) == (0, "trained\n")
        assert json.loads(Path(expected, "config.resolved.json").read_text()) == {
            "method": "fake",
            "seed": 5,
            "ending": "fine",
        }
    noted = "# A toy.\nmethod: fake\n\n# Changed on the command line:\n#   ending=fine\n#   seed=5\n"
    assert Path("runs/toy/config.yaml").read_text() == noted
    assert config.load("runs/toy/config.yaml").seed == 0  # the note is a comment


def test_run_dir_is_taken_as_given_and_never_reused():
    assert rlalign_command("train", "toy.yaml", "--run-dir", "mine")[0] == 0
    code, _, err = rlalign_command("train", "toy.yaml", "--run-dir", "mine")
    assert code == 2
    assert "rlalign resume mine" in err


def test_run_names_are_made_of_safe_characters():
    Path("my toy!.yaml").write_text("method: fake\n")
    assert rlalign_command("train", "my toy!.yaml")[0] == 0
    assert Path("runs/my-toy/config.yaml").exists()


def test_several_processes_must_name_the_directory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = rlalign_command("train", "toy.yaml")
    assert code == 2
    assert "--run-dir" in err
    assert rlalign_command("train", "toy.yaml", "--run-dir", "mine")[0] == 0


def test_interruption_exits_75_with_the_resume_command():
    assert rlalign_command("train", "toy.yaml", "ending=stopped", "seed=4") == (
        75,
        "",
        "Saved step 3. Continue: rlalign resume runs/toy\n",
    )
    assert rlalign_command("resume", "runs/toy") == (0, "resumed with seed 4\n", "")


def test_second_ctrl_c_still_says_how_to_go_on():
    code, _, err = rlalign_command("train", "toy.yaml", "ending=ctrl_c_twice")
    assert (code, err) == (75, "Stopped at once. Continue from the last checkpoint: rlalign resume runs/toy\n")


def test_failed_run_exits_1_with_one_message_and_keeps_the_traceback():
    code, _, err = rlalign_command("train", "toy.yaml", "ending=crashed")
    first, second = err.splitlines()
    assert (code, first) == (1, "Failed: RuntimeError: the loss is not finite at step 3")
    kept = Path(second.removeprefix("Full traceback: "))
    assert kept.parent == Path("runs/toy/errors")
    assert "Traceback" in kept.read_text()
    assert 'raise RuntimeError("the loss is not finite at step 3")' in kept.read_text()


def test_missing_extra_is_one_line_with_the_pip_command():
    code, _, err = rlalign_command("train", "toy.yaml", "ending=no_extra")
    assert (code, err) == (2, 'transformers.x is not installed. Run: pip install "rlalign[llm]"\n')
    code, _, err = rlalign_command("train", "toy.yaml", "ending=own_import")
    assert code == 1
    assert err.startswith("Failed: ModuleNotFoundError: No module named 'my_rewards'\n")


def test_every_pip_name_is_an_extra_of_the_package():
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for name in cli_errors.PIP_NAMES.values():
        extra = re.search(r"rlalign\[(\w+)\]", name)
        assert extra is None or f"\n{extra[1]} = [" in extras


# --- several seeds -------------------------------------------------------------------------------------------------

CHILD = """
import pathlib, sys
sys.path.insert(0, {packages!r})
from rlalign import cli, config
config.METHODS["fake"] = "fake_domain.config:FakeConfig"
sys.argv = ["rlalign", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture
def seed_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes of the seeds know the method `fake` too."""
    from rlalign.training import seeds

    true_command, code = seeds.command, CHILD.format(packages=str(tmp_path / "packages"))

    def command(folder: Path, plan: seeds.Plan, seed: int) -> list[str]:
        return [sys.executable, "-c", code, *true_command(folder, plan, seed)[3:]]

    monkeypatch.setattr(seeds, "command", command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_several_seeds_are_runs_of_their_own_and_end_with_an_aggregate(seed_processes, tmp_path):
    run_file = tmp_path / "packages" / "fake_domain" / "run.py"
    run_file.write_text(FAKE_RUN.replace('print("trained")', 'RunDirectory(run_dir, None).set_status("done")'))
    code, out, err = rlalign_command("train", "toy.yaml", "--seeds", "2", "--seed", "5", "ending=fine")
    assert (code, err) == (0, "")
    folder = Path("runs/toy-seeds")
    assert out.splitlines()[-1] == f"Report: {folder}/report.html"
    for seed in (5, 6):
        resolved = json.loads((folder / f"seed-{seed}" / "config.resolved.json").read_text())
        assert resolved == {"method": "fake", "seed": seed, "ending": "fine"}
    assert json.loads((folder / "aggregate.json").read_text())["seeds"] == {"5": "done", "6": "done"}
    (folder / "report.html").unlink()
    assert rlalign_command("report", str(folder)) == (0, f"Report: {folder}/report.html\n", "")
    code, out, _ = rlalign_command("resume", str(folder))
    assert (code, out.splitlines()[0].split(",")[0]) == (0, "0 of 2 seeds to train")
    code, _, err = rlalign_command("eval", str(folder))
    assert (code, err) == (2, f"{folder} holds several seeds; name one of them, such as {folder}/seed-5.\n")


def test_a_seed_that_fails_is_exit_code_1_and_a_sentence(seed_processes):
    code, out, err = rlalign_command("train", "toy.yaml", "--seeds", "2", "ending=crashed")
    assert code == 1
    assert "seed 1  FAILED (exit code 1): RuntimeError: the loss is not finite at step 3" in out
    assert err.splitlines()[0] == (
        "2 of 2 seeds failed (0, 1); the aggregate is over the other 0. Try them again: rlalign resume runs/toy-seeds"
    )


def test_config_mistakes_are_found_before_any_seed_starts():
    code, _, err = rlalign_command("train", "toy.yaml", "--seeds", "2", "sed=1")
    assert code == 2
    assert "did you mean `seed`?" in err
    assert not Path("runs").exists()
    assert rlalign_command("train", "toy.yaml", "--seeds", "1")[0] == 2


@pytest.mark.parametrize("command", ["resume", "eval", "sample", "report"])
def test_commands_on_runs_say_when_there_is_no_run(command: str):
    assert rlalign_command("train", "toy.yaml")[0] == 0
    code, _, err = rlalign_command(command, "toy")
    assert code == 2
    assert err == "toy is not a run directory: it has no config.resolved.json. Did you mean runs/toy?\n"


def test_damaged_resolved_config_is_named():
    assert rlalign_command("train", "toy.yaml")[0] == 0
    Path("runs/toy/config.resolved.json").write_text('{\n  "method": "fake",\n  "seed": ')
    code, _, err = rlalign_command("resume", "runs/toy")
    assert code == 2
    assert err.startswith("runs/toy/config.resolved.json:3: is not valid YAML")


# --- eval, sample, check, list -------------------------------------------------------------------------------------


def test_eval_prints_a_table():
    assert rlalign_command("train", "toy.yaml")[0] == 0
    code, out, _ = rlalign_command("eval", "runs/toy", "--checkpoint", "c/step-2")
    assert code == 0
    assert out.splitlines() == ["eval/reward_mean  0.1235", "eval/n            500", "checkpoint        c/step-2"]


def test_sample_prints_each_completion():
    assert rlalign_command("train", "toy.yaml")[0] == 0
    assert rlalign_command("sample", "runs/toy", "1+1=", "--count", "2") == (0, "1+1= -> 0\n1+1= -> 1\n", "")


def test_check_config_prints_the_domains_notes():
    assert rlalign_command("check", "toy.yaml", "seed=2") == (
        0,
        "toy.yaml: ok (method fake)\n  2 steps of 8 completions\n",
        "",
    )


def test_check_reward_prints_what_was_tried():
    Path("good.py").write_text("def score(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    Path("bad.py").write_text("def score(completions, **columns):\n    return [0.5]\n")
    good = own_process("check", "good.py:score")
    assert good.returncode == 0
    assert good.stdout.startswith("reward score (")
    bad = own_process("check", "bad.py:score")
    assert bad.returncode == 1
    assert "FAIL" in bad.stdout
    Path("pictures.py").write_text("def bright(samples, prompts):\n    return [float(s.mean()) for s in samples]\n")
    pictures = own_process("check", "pictures.py:bright")
    assert (pictures.returncode, "FAIL" in pictures.stdout) == (0, False)
    assert "it judges what a generator draws" in pictures.stdout
    missing = own_process("check", "good.py:scor")
    assert missing.returncode == 2
    assert "score" in missing.stderr
    assert own_process("check", "good.py:score", "seed=1").returncode == 2
    nameless = own_process("check", "good.py")
    assert nameless.returncode == 2
    assert "it defines score. Write good.py:score" in nameless.stderr


@pytest.mark.parametrize(
    ("target", "reward"),
    [
        ("toy.yaml", False),
        ("a.py:f", True),
        ("pkg.mod:f", True),
        ("reasoning_gym:sums", True),
        ("a:b.yaml", False),
        ("bnpo", False),
        ("accuracy_reward", True),
    ],
)
def test_check_tells_configs_from_rewards(target: str, reward: bool):
    assert cli._is_reward(target) is reward


@pytest.mark.parametrize(
    ("target", "environment"),
    [
        ("CartPole-v1", True),
        ("rlalign_envs:Chain-v0", True),
        ("ALE/Pong-v5", True),
        ("D4RL/door/human-v2", True),
        ("toy.yaml", False),
        ("rewards.py:exact-v1.py", False),
        ("pkg.mod:score_v1", False),
        ("ppo_cartpole", False),
    ],
)
def test_check_tells_environments_from_the_rest(target: str, environment: bool):
    assert cli._is_environment(target) is environment


def test_check_looks_an_environment_over():
    code, out, _ = rlalign_command("check", "CartPole-v1")
    assert code == 0
    assert out.splitlines()[0] == "environment CartPole-v1"
    assert out.splitlines()[-1] == "ready to train with"
    code, _, err = rlalign_command("check", "CartPol-v1")
    assert code == 2
    assert "Did you mean: `CartPole`?" in err
    assert rlalign_command("check", "CartPole-v1", "seed=1")[0] == 2
    assert rlalign_command("check", "Blackjack-v1")[0] == 1


def test_list_groups_presets_and_methods_by_domain():
    code, out, _ = rlalign_command("list")
    assert code == 0
    lines = out.splitlines()
    assert lines.index("agents:") < lines.index("language models:")
    assert any(line.startswith("ppo_cartpole ") for line in lines)
    assert "language models bnpo, policy_gradient" in [" ".join(line.split()) for line in lines]
    assert "diffusion models flow_grpo, dso" in [" ".join(line.split()) for line in lines]
    assert any(" ".join(line.split()).startswith("agents ppo, trpo, policy_gradient_agent") for line in lines)


def test_list_names_presets_with_their_first_comment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    presets = tmp_path / "rlalign" / "presets" / "llm"
    presets.mkdir(parents=True)
    (presets / "sums.yaml").write_text("# Learn sums.\nmethod: fake\n")
    (presets / "products.yaml").write_text("# Learn products.\nmethod: fake\n")
    monkeypatch.setattr(config, "__file__", str(tmp_path / "rlalign" / "config.py"))
    code, out, _ = rlalign_command("list")
    assert code == 0
    assert out.splitlines()[:2] == ["products  Learn products.", "sums      Learn sums."]
    assert rlalign_command("train", "sums")[0] == 0
    assert Path("runs/sums").is_dir()


def test_exit_code_and_streams_of_a_real_process():
    done = own_process("check", "nothing.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("nothing.yaml: no such file.")
    assert done.stdout == ""
