"""The wheel: what it holds, and that a fresh environment can use it from anywhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from an exported copy, so that leftovers of the checkout cannot slip in or be left behind."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout.decode()
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work), str(source)]
    built = subprocess.run(command, cwd=work, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return next(work.glob("rlalign-*-py3-none-any.whl"))


def test_top_level_names_are_ours_alone(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rlalign", "rlalign_envs"}


def test_every_module_preset_and_data_file_is_carried(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "rlalign").rglob("*.py")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "rlalign").rglob("*.j2")}
    wanted |= {str(path.relative_to(ROOT / "envs")) for path in (ROOT / "envs").rglob("*.py")}
    wanted |= {f"rlalign/presets/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    wanted |= {str(path.relative_to(ROOT / "envs")) for path in (ROOT / "envs/rlalign_envs/data").iterdir()}
    wanted |= {"rlalign/py.typed"}
    assert any(name.startswith("rlalign/presets/") for name in wanted)
    assert wanted <= carried, sorted(wanted - carried)


def test_a_fresh_environment_imports_it_and_lists_the_presets(wheel: Path, tmp_path: Path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # A wheel is a zip archive of what belongs in site-packages; the dependencies come from the running environment,
    # through a .pth line that does not process the editable install's own .pth files.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    (Path(site) / "dependencies.pth").write_text(dependencies + "\n")
    code = "import rlalign, rlalign_envs.arithmetic; print(rlalign.__version__, rlalign.__file__)"
    done = subprocess.run([str(python), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    version, location = done.stdout.split()
    assert version == "0.1.0"
    assert Path(location).is_relative_to(site)
    listed = subprocess.run([str(python), "-m", "rlalign", "list"], cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert "bnpo_arithmetic" in listed.stdout


@pytest.mark.parametrize("name", ["envs", "tests", "configs", "examples", "benchmarks"])
def test_source_folders_are_not_importable(wheel: Path, name: str):
    with zipfile.ZipFile(wheel) as archive:
        assert not [entry for entry in archive.namelist() if entry.startswith(f"{name}/")]
