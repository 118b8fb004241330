"""Every shipped config parses, says what it is for, and is found by name from a checkout and from an installation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlalign import config
from rlalign.training.run_directory import check_run_name

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT / "configs")) for path in FILES]


def test_there_are_configs():
    assert FILES
    assert not [path for path in (ROOT / "configs").rglob("*") if path.is_file() and path.suffix != ".yaml"]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_config_is_valid_and_survives_a_round_trip(path: Path):
    loaded = config.load(path)
    assert config.build(config.dump(loaded)) == loaded


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_config_opens_with_a_comment_that_says_what_it_is_for(path: Path):
    assert path.read_text().startswith("# ")
    assert 10 <= len(config.describe(path)) <= 110


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_config_name_can_be_the_name_of_a_run(path: Path):
    check_run_name(path.stem)


def test_presets_of_a_checkout_are_its_configs():
    assert sorted(config.presets().values()) == FILES
    for name, path in config.presets().items():
        assert config.find_preset(name) == path


def test_presets_of_an_installation_are_the_same_files(tmp_path: Path):
    """Lay the package out as its wheel does, with configs/ as rlalign/presets, and ask it from elsewhere."""
    site = tmp_path / "site-packages"
    shutil.copytree(ROOT / "rlalign", site / "rlalign", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", site / "rlalign" / "presets")
    code = "from rlalign import config; [print(name, path) for name, path in config.presets().items()]"
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert list(listed) == list(config.presets())
    assert all(Path(path).is_relative_to(site / "rlalign" / "presets") for path in listed.values())
