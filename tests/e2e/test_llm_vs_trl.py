"""The benchmark against TRL runs from its one command, and finds the same gradient on both sides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the extra `llm` is not installed")
pytest.importorskip("matplotlib", reason="the extra `dev` is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_one_command_gives_json_figure_and_the_same_gradient(tmp_path):
    options = ["--model", "tiny", "--regimes", "16/8", "--steps", "1", "--repeats", "1", "--threads", "1"]
    options += ["--trl-micro-batch", "8", "--no-extra", "--out", str(tmp_path / "result")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "llm_vs_trl.py"), *options],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())["regimes"]["16/8"]
    assert [run["arm"] for run in result["runs"]] == ["trl", "rlalign"]
    assert all(len(run["steps"]) == 1 and run["completion_tokens_per_step"] == 128 for run in result["runs"])
    assert result["parity"]["packing"] == "prefix_shared"
    assert result["parity"]["loss_difference"] < 1e-5
    assert result["parity"]["relative_gradient_difference"] < 1e-3
    assert result["parity"]["gradient_norm"] > 0.1
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
