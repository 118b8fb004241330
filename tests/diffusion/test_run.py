"""A YAML run of either method: check without torch, train, resume, evaluate, sample, and the messages on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlalign import config
from rlalign.config import ConfigError
from rlalign.diffusion import run
from tests.diffusion.small_runs import merged

ROOT = Path(__file__).parents[2]
HERE = "tests.diffusion.half_plane"

SHARED: dict[str, Any] = {
    "pipeline": {"source": f"{HERE}:untrained"},
    "prompts": {"values": ["low", "high"]},
    "reward": {"function": f"{HERE}:RightHalf"},
    "lora": None,
    "eval": {"samples": 4, "num_inference_steps": 3, "pictures": 0},
    "checkpoint": {"every": 1},
}
DSO = SHARED | {
    "method": "dso",
    "total_updates": 2,
    "data": {"samples": 24, "num_inference_steps": 3},
    "optim": {"pairs_per_step": 4},
}
GRPO = SHARED | {
    "method": "flow_grpo",
    "total_steps": 2,
    "rollout": {"prompts_per_step": 2, "group_size": 4, "num_inference_steps": 3},
}
PRESETS = sorted(name for name, path in config.presets().items() if "\npipeline:" in path.read_text())
"""Of diffusion, smoke runs included."""
BOTH = pytest.mark.parametrize("settings", [DSO, GRPO], ids=["dso", "flow_grpo"])


def built(settings: dict[str, Any], **more: Any) -> Any:
    return config.build(merged(settings, more))


@BOTH
def test_a_run_trains_and_its_model_is_evaluated_and_sampled(tmp_path: Path, settings):
    folder = tmp_path / "run"
    run.train(built(settings), run_dir=folder, config_text="# a test\n")
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    found = run.evaluate(folder)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in logged if record["kind"] == "eval"][-1]
    assert found["eval/right_mean"] == last["eval/right_mean"]
    first = run.evaluate(folder, checkpoint=folder / "checkpoints" / "ckpt-000001")
    assert first["eval/n"] == 4
    lines = run.sample(folder, None, count=3)
    assert [line.split(":")[0] for line in lines[:3]] == ["low", "high", "low"]
    assert "right " in lines[0]
    assert lines[3] == f"Pictures: {folder / 'media' / 'drawn-000000002.png'}"


@BOTH
def test_a_finished_run_is_not_resumed(tmp_path: Path, settings, capsys):
    folder = tmp_path / "run"
    run.train(built(settings), run_dir=folder, config_text="# a test\n")
    capsys.readouterr()
    run.train(built(settings), run_dir=folder, config_text="", resume=True)
    assert "is finished" in capsys.readouterr().out


def test_a_prompt_may_be_named_by_text_or_number_and_an_unknown_one_is_refused(tmp_path: Path):
    folder = tmp_path / "run"
    run.train(built(DSO), run_dir=folder, config_text="# a test\n")
    assert run.sample(folder, "high", count=2)[0].startswith("high:")
    assert run.sample(folder, "1", count=1)[0].startswith("1:")
    with pytest.raises(ConfigError, match="does not take 'tall'"):
        run.sample(folder, "tall", count=1)


def pictures(samples: Any) -> list[Any]:
    """Triangles in place of points."""
    import numpy as np

    corners = np.array([[0.0, 0, 0], [1, 0, 0], [0, 0, 1]])
    return [(corners, np.array([[0, 1, 2]]), np.full((1, 3), 0.5)) for _ in samples]


def test_samples_are_drawn_into_the_runs_media(tmp_path: Path):
    folder = tmp_path / "run"
    settings = merged(DSO, {"eval": {"render": "tests.diffusion.test_run:pictures"}})
    run.train(built(settings), run_dir=folder, config_text="# a test\n")
    lines = run.sample(folder, None, count=2)
    files = lines[-1].removeprefix("Pictures: ").split(", ")
    assert files
    assert all(Path(file).is_file() and Path(file).parent == folder / "media" for file in files)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "`reward.function` must be set"),
        ({"pipeline": {"source": None}}, "`pipeline.source` or `pipeline.pretrain` must be set"),
        ({"prompts": {"values": []}}, "`prompts.values` or `prompts.file` must be set"),
        ({"prompts": {"file": "there.txt"}}, "either `prompts.values` or `prompts.file`"),
        ({"pipeline": {"pretrain": {}}}, "two generators"),
        ({"reward": {"function": f"{HERE}:LeftHalf"}}, "`reward.function`=.*has no 'LeftHalf'"),
        ({"eval": {"watch": "nowhere:watch"}}, "`eval.watch`=nowhere:watch: No module named 'nowhere'"),
        ({"data": {"path": "nowhere"}}, "`data.path`=nowhere: no such file or folder"),
        ({"pipeline": {"source": "./nowhere"}}, "`pipeline.source`=./nowhere: no such file or folder"),
        ({"data": {"rounds": 3}}, "`total_updates`=2 cannot be shared out evenly"),
    ],
)
def test_check_finds_what_training_would_stop_at(change, message):
    with pytest.raises(ConfigError, match=message):
        run.check(built(DSO, **change))


def test_check_says_what_a_run_would_do():
    notes = run.check(built(DSO))
    assert notes == [
        "24 samples are drawn and judged once",
        "2 updates of 4 pairs, `objective.kind: dpo`",
    ]
    assert run.check(built(GRPO))[0].startswith("a step draws 8 samples and trains 2 of 3 denoising steps")


def test_check_warns_of_faithful_dro_without_a_limit():
    faithful = {"objective": {"kind": "dro"}}
    assert "`dro` has no bound" in run.check(built(DSO, **faithful))[2]
    limited = faithful | {"eval": {"every": 1, "stop_below": {"right": 0.1}}}
    assert len(run.check(built(DSO, **limited))) == 2
    late = faithful | {"eval": {"stop_below": {"right": 0.1}}}
    assert "which is none here" in run.check(built(DSO, **late))[2]


@pytest.fixture(scope="module")
def checked() -> dict[str, list[str]]:
    """What each preset had imported of the heavy packages after its check, in one process for all of them."""
    code = (
        "import json, sys; from rlalign import config; from rlalign.diffusion import run\n"
        "found = {}\n"
        "for name in sys.argv[1:]:\n"
        "    run.check(config.load(config.locate(name)))\n"
        "    found[name] = sorted({'torch', 'diffusers', 'transformers', 'mujoco'} & set(sys.modules))\n"
        "print(json.dumps(found))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'envs'}"}
    command = [sys.executable, "-c", code, *PRESETS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_checked_without_torch(checked, name):
    assert checked[name] == []


def test_every_method_has_a_preset_and_a_smoke_run():
    assert {"dso_stability", "dso_smoke", "flow_grpo_stability", "flow_grpo_smoke"} <= set(PRESETS)


@pytest.mark.e2e
def test_the_command_line_trains_resumes_evaluates_samples_and_reports(tmp_path: Path):
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'envs'}",
        "RLALIGN_CACHE": str(tmp_path / "cache"),
    }

    def rlalign(*arguments: str) -> str:
        command = [sys.executable, "-m", "rlalign", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert "ok (method dso)" in rlalign("check", "dso_smoke")
    assert "Report: run/report.html" in rlalign("train", "dso_smoke", "--run-dir", "run")
    assert "is finished" in rlalign("resume", "run")
    assert "eval/robust_mean" in rlalign("eval", "run")
    drawn = rlalign("sample", "run", "chair", "--count", "2")
    assert drawn.splitlines()[0].startswith("chair: ")
    assert (tmp_path / "run" / "media" / "drawn-000000002.png").is_file()
    assert "Report: run/report.html" in rlalign("report", "run")
