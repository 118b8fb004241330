"""The benchmark against TRL runs from its one command, and finds the same gradient on both sides."""

import importlib
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import rlalign

pytest.importorskip("trl", reason="the extra `llm` is not installed")
pytest.importorskip("matplotlib", reason="the extra `dev` is not installed")

ROOT = Path(__file__).parents[2]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark as a module, without running it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


def test_the_verdict_also_names_the_fastest_setting_of_trl(monkeypatch):
    times = {"trl": 8.0, "rlalign": 2.0, "trl_half": 1.0, "rlalign_half": 0.5, "trl_bf16": 5.0, "trl_defaults": 6.0}
    arms = {name: {"wall_s": wall, "cpu_s": 2 * wall + (name == "rlalign")} for name, wall in times.items()}
    parity = {"loss_difference": 0.0, "relative_gradient_difference": 0.0}
    result = {"arms": arms, "parity": parity, "runs": [{"busy_before": 0.0}]}
    said = load("llm_vs_trl", monkeypatch).verdict("88/16", result)
    # `trl_half` has less to do, so its 1.0 s are no setting's time for this step.
    assert (said["speedup_wall"], said["speedup_cpu"]) == (8 / 2, 16 / 5)
    assert (said["fastest_trl"], said["speedup_wall_vs_fastest"], said["speedup_cpu_vs_fastest"]) == (
        "trl_bf16",
        5 / 2,
        10 / 5,
    )


def test_results_say_which_code_made_them(monkeypatch, tmp_path):
    provenance = load("provenance", monkeypatch)
    assert provenance.versions("torch") == {"rlalign": rlalign.__version__, "torch": version("torch")}
    assert re.fullmatch(r"unknown|[0-9a-f]{40}(\+changes)?", provenance.commit())
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "benchmarks" / "provenance.py"))
    assert provenance.commit() == "unknown"


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
    report = json.loads((tmp_path / "result.json").read_text())
    result = report["regimes"]["16/8"]
    assert [run["arm"] for run in result["runs"]] == ["trl", "rlalign"]
    assert all(len(run["steps"]) == 1 and run["completion_tokens_per_step"] == 128 for run in result["runs"])
    assert result["parity"]["packing"] == "prefix_shared"
    assert result["parity"]["loss_difference"] < 1e-5
    assert result["parity"]["relative_gradient_difference"] < 1e-3
    assert result["parity"]["gradient_norm"] > 0.1
    said = result["verdict"]  # the only setting of TRL that was measured is its fastest
    assert [said[f"speedup_{key}_vs_fastest"] for key in ("wall", "cpu")] == [
        said[f"speedup_{key}"] for key in ("wall", "cpu")
    ]
    assert {"rlalign", "torch", "transformers", "trl"} == set(report["versions"])
    assert report["commit"]
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
