"""Atomic writes, hashes, and what importing the package costs."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from rlalign.training.files import file_sha256, process_is_alive, share_as_umask_says, write_atomic


def test_write_atomic_replaces_whole_files(tmp_path) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, "old, and longer than the new")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_saved_weights_get_the_mode_of_any_new_file(tmp_path) -> None:
    weights, other = tmp_path / "model.safetensors", tmp_path / "run.sh"
    for path, mode in ((weights, 0o600), (other, 0o700)):
        path.touch()
        path.chmod(mode)
    before = os.umask(0o027)
    try:
        share_as_umask_says(tmp_path)
        assert os.umask(0o027) == 0o027  # it was put back
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (weights, other)] == [0o640, 0o700]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, call) -> None:
    path = tmp_path / "status.json"
    write_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_file_sha256_equals_the_hash_of_the_whole(tmp_path, size) -> None:
    content = os.urandom(size)
    (tmp_path / "f").write_bytes(content)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_file_sha256_does_not_follow_links(tmp_path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    with pytest.raises(OSError, match="symbolic links"):
        file_sha256(tmp_path / "link")


def test_process_is_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_is_alive(os.getpid())
    assert process_is_alive(1)
    assert not process_is_alive(child.pid)


@pytest.mark.parametrize("package", ["rlalign.training", "rlalign.optim"])
def test_importing_the_package_imports_no_torch_and_every_name_resolves(package) -> None:
    program = (
        f"import sys, {package} as package\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "assert all(getattr(package, name) is not None for name in package.__all__)\n"
        "assert set(package.__all__) <= set(dir(package))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
