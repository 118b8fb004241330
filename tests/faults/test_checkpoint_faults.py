"""Checkpoints under damage, kills, full disks and hostile content."""

import errno
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from rlalign.training import checkpoint_files, files
from rlalign.training.checkpoint import CheckpointError, Checkpoints, CheckpointWarning
from rlalign.training.manifest import Manifest

FILES = ("manifest.json", "model.json", "model.safetensors", "optimizer.json", "optimizer.safetensors", "rng.json")


def state(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((64,), float(step)), "b": torch.arange(8) + step},
        "optimizer": {"state": {0: {"exp_avg": torch.full((64,), step / 7), "step": torch.tensor(float(step))}}},
        "rng": {"seed": step},
    }


def assert_is_state(loaded: dict[str, Any], step: int) -> None:
    assert torch.equal(loaded["model"]["w"], state(step)["model"]["w"])
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], state(step)["optimizer"]["state"][0]["exp_avg"])
    assert loaded["rng"] == {"seed": step}


def two(root: Path) -> Checkpoints:
    checkpoints = Checkpoints(root)
    for step in (1, 2):
        checkpoints.save(step, state(step))
    return checkpoints


# Damage: each file x each kind


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def flip_late(path: Path) -> None:
    flip(path, path.stat().st_size - 3)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def delete(path: Path) -> None:
    path.unlink()


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = (truncate, zero, flip_first, flip_middle, flip_late, append, delete, replace_by_directory)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_in_the_newest_is_named_and_the_one_before_is_used(tmp_path, name, damage) -> None:
    checkpoints = two(tmp_path)
    damage(tmp_path / "ckpt-000002" / name)
    with pytest.warns(CheckpointWarning, match=rf"passing over a damaged checkpoint: .*ckpt-000002.*{name}"):
        loaded = checkpoints.load()
    assert loaded.step == 1
    assert_is_state(loaded.state, 1)
    with pytest.raises(CheckpointError, match=name):
        checkpoints.load(tmp_path / "ckpt-000002")


@pytest.mark.parametrize("place", range(0, 700, 7))
def test_no_flipped_bit_of_a_manifest_changes_what_is_loaded(tmp_path, place) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(3, state(3)) / "manifest.json"
    flip(path, place % path.stat().st_size)
    try:
        loaded = checkpoints.load(path.parent)
    except CheckpointError:
        return
    # white space between tokens is the only thing that may change unnoticed
    assert Manifest.read(path.parent).step == 3
    assert_is_state(loaded.state, 3)


def test_when_all_are_damaged_every_reason_is_given(tmp_path) -> None:
    checkpoints = two(tmp_path)
    truncate(tmp_path / "ckpt-000001" / "model.safetensors")
    delete(tmp_path / "ckpt-000002" / "manifest.json")
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(
            CheckpointError, match=r"(?s)is intact:.*ckpt-000002.*no manifest.*ckpt-000001/model.safetensors"
        ),
    ):
        checkpoints.load()


def test_files_swapped_between_checkpoints_are_noticed(tmp_path) -> None:
    checkpoints = two(tmp_path)
    shutil.copy(tmp_path / "ckpt-000001" / "model.safetensors", tmp_path / "ckpt-000002" / "model.safetensors")
    with pytest.warns(CheckpointWarning, match="SHA-256 differs"):
        assert checkpoints.load().step == 1


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path) -> None:
    checkpoints = two(tmp_path)
    (tmp_path / "ckpt-000002").rename(tmp_path / "ckpt-000009")
    with pytest.warns(CheckpointWarning, match="ckpt-000009 holds step 2"):
        assert checkpoints.load().step == 1


def test_pruning_never_counts_a_damaged_one_as_kept(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1))
    checkpoints.save(2, state(2))
    delete(tmp_path / "ckpt-000002" / "manifest.json")
    checkpoints.save(3, state(3))
    assert checkpoints.steps() == [3]
    assert_is_state(checkpoints.load(tmp_path / "ckpt-000003").state, 3)


def test_a_newer_format_is_not_passed_over(tmp_path) -> None:
    checkpoints = two(tmp_path)
    manifest = Manifest.read(tmp_path / "ckpt-000002")
    newer = Manifest(step=2, sequence=2, files=manifest.files, versions={"rlalign": "9.1"}, schema=2)
    (tmp_path / "ckpt-000002" / "manifest.json").write_text(newer.to_json())
    with pytest.raises(CheckpointError, match="schema 2, written by rlalign 9.1; this release reads schema 1"):
        checkpoints.load()


# Kills and failing system calls, at every one of them in turn

DRIVER = '''
"""argv: root, how ("kill" or "raise"). Prints one JSON line per injection point, until one run meets no injection."""

import errno, json, os, random, shutil, signal, sys
from pathlib import Path

import torch
from rlalign.training.checkpoint import CheckpointError, Checkpoints
from rlalign.training.versions import library_versions

EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir"}
left, armed = 0, False


def inject(event, arguments):
    global left, armed
    if not armed or event not in EVENTS or not (event != "open" or str(arguments[0]).startswith(root)):
        return
    left -= 1
    if left == 0:
        armed = how == "kill"
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, "No space left on device")


def state(step):
    return {"model": {"w": torch.full((64,), float(step))}, "rng": {"seed": step}}


def train(point, folder):
    """Save steps 1, 2 and 2 once more, keeping one; note each save that returned or failed."""
    global left, armed
    import warnings
    warnings.simplefilter("ignore")
    checkpoints, notes = Checkpoints(Path(folder), keep=1), os.open(folder + ".notes", os.O_WRONLY | os.O_CREAT)
    left, armed = point, True
    for step in (1, 2, 2):
        try:
            checkpoints.save(step, state(step))
            os.write(notes, b"%d\\n" % step)
        except CheckpointError as error:
            assert "Older checkpoints are intact" in str(error), error
            os.write(notes, b"failed\\n")
    return left > 0


root, how = sys.argv[1], sys.argv[2]
sys.addaudithook(inject)
torch.set_num_threads(1)
library_versions()  # cached from here on
os.fsync = lambda descriptor: None  # a killed process loses nothing that it has written
for point in range(1, 10_000):
    folder = f"{root}/{point:04d}"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = 1 if train(point, folder) else 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps({"folder": folder, "code": code}))
    if code == 1:
        break
'''


def drive(root: Path, how: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", DRIVER, str(root), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_survivor(folder: Path, notes: list[str]) -> None:
    """The newest checkpoint is the last that a save returned from, or the one that was being saved."""
    returned = [0, *(int(note) for note in notes if note != "failed")]
    checkpoints = Checkpoints(folder, keep=1)
    found = max(checkpoints.steps(), default=0)
    assert found in (returned[-1], min(returned[-1] + 1, 2))
    if found:
        loaded = checkpoints.load()
        assert loaded.step == found
        assert loaded.state["rng"] == {"seed": found}
        assert torch.equal(loaded.state["model"]["w"], torch.full((64,), float(found)))
    # the next process continues and leaves nothing behind
    checkpoints.save(3, {"v": 3})
    assert checkpoints.load().state == {"v": 3}
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt-000003", "latest"]


@pytest.fixture
def no_flushing(monkeypatch) -> None:
    """Hundreds of flushes take half a minute, and matter to power cuts only."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


@pytest.mark.usefixtures("no_flushing")
def test_kill_9_at_every_file_operation_loses_at_most_the_save_in_progress(tmp_path) -> None:
    runs = drive(tmp_path, "kill")
    assert len(runs) > 40
    assert [run["code"] for run in runs] == [-9] * (len(runs) - 1) + [1]
    for run in runs:
        folder = Path(run["folder"])
        notes = Path(run["folder"] + ".notes").read_text().split()
        assert "failed" not in notes
        check_survivor(folder, notes)


@pytest.mark.usefixtures("no_flushing")
def test_enospc_at_every_file_operation_loses_at_most_that_save(tmp_path) -> None:
    runs = drive(tmp_path, "raise")
    assert len(runs) > 40
    failed = 0
    for point, run in enumerate(runs, start=1):
        assert run["code"] == (0 if point < len(runs) else 1)
        notes = Path(run["folder"] + ".notes").read_text().split()
        # one injection: at most one save fails, and the one after it works again
        assert len(notes) == 3
        assert notes.count("failed") <= 1
        failed += notes.count("failed")
        check_survivor(Path(run["folder"]), notes)
    assert failed > 20


KILLED_WHILE_WRITING = """
import sys, torch
from pathlib import Path
from rlalign.training.checkpoint import Checkpoints
checkpoints, step = Checkpoints(Path(sys.argv[1]), keep=2), 0
while True:
    step += 1
    checkpoints.save(step, {"model": {"w": torch.full((1 << 18,), float(step))}})
    print(step, flush=True)
"""


@pytest.mark.parametrize("saves", [1, 4, 9])
def test_kill_9_from_outside_while_large_tensors_are_written(tmp_path, saves) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(saves):
        last = int(child.stdout.readline())
    child.kill()
    last = max([last, *map(int, child.communicate()[0].split())])
    loaded = Checkpoints(tmp_path).load()
    assert loaded.step in (last, last + 1)
    assert torch.equal(loaded.state["model"]["w"], torch.full((1 << 18,), float(loaded.step)))


def test_a_live_process_keeps_its_temporary_folder(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path)
    theirs = tmp_path / f"ckpt-000007.tmp-{os.getppid()}"
    theirs.mkdir()
    checkpoints.save(1, state(1))
    assert theirs.is_dir()


# Disk full, read-only, no such place


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 700 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_checkpoint_that_cannot_fit_is_refused_before_writing(small_disk) -> None:
    with pytest.raises(CheckpointError, match=r"needs 4\.8 MiB and 0\.\d MiB are free.*Free disk space"):
        Checkpoints(small_disk).save(1, {"model": {"w": torch.zeros(1_000_000)}})
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_keeps_the_last_good_one(small_disk, monkeypatch) -> None:
    monkeypatch.setattr(Checkpoints, "_require_space", lambda *_: None)
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, state(1))
    for _ in range(3):
        with pytest.raises(CheckpointError, match="No space left.*Older checkpoints are intact. Free disk space"):
            checkpoints.save(2, state(2) | {"buffer": {"x": torch.ones(500_000)}})
        assert sorted(p.name for p in small_disk.iterdir()) == ["ckpt-000001", "latest"]
    assert_is_state(checkpoints.load().state, 1)
    checkpoints.save(2, state(2))
    assert checkpoints.load().step == 2


def failing(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def failing_rust(*_: Any) -> None:
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("module", "name", "fault"),
    [
        (checkpoint_files.safetensors.torch, "save_file", failing_rust),
        (checkpoint_files, "file_sha256", failing),
        (checkpoint_files, "sync_file", failing),
        (files.os, "fsync", failing),
        (os, "rename", failing),
    ],
    ids=["tensor_write", "hash", "flush", "fsync", "rename"],
)
def test_enospc_in_each_stage_of_a_save(tmp_path, monkeypatch, module, name, fault) -> None:
    checkpoints = two(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fault)
        with pytest.raises(CheckpointError, match="could not save step 3.*No space left.*Free disk space, or lower"):
            checkpoints.save(3, state(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt-000001", "ckpt-000002", "latest"]
    assert_is_state(checkpoints.load().state, 2)
    checkpoints.save(3, state(3))
    assert checkpoints.steps() == [2, 3]


def test_a_failure_while_tidying_up_does_not_undo_the_save(tmp_path, monkeypatch) -> None:
    checkpoints = two(tmp_path)
    monkeypatch.setattr(Checkpoints, "_prune", failing)
    with pytest.warns(CheckpointWarning, match="ckpt-000003 is saved, but tidying up failed: .*No space left"):
        checkpoints.save(3, state(3))
    assert checkpoints.load().step == 3


def test_places_that_cannot_be_written() -> None:
    with pytest.raises(
        CheckpointError, match="could not save step 1 in /proc/rlalign.*Check the directory's permissions"
    ):
        Checkpoints(Path("/proc/rlalign")).save(1, state(1))


def test_a_file_where_the_folder_should_be(tmp_path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="could not save step 1"):
        Checkpoints(tmp_path / "checkpoints").save(1, state(1))


# Hostile content


class Canary:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (os.system, (f"touch {self.path}",))


def canary_bytes(canary: Path, form: str) -> bytes:
    content = pickle.dumps(Canary(canary))
    if form == "pickle":
        return content
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return buffer.getvalue()


def test_the_canary_sings_when_unpickled(tmp_path) -> None:
    pickle.loads(canary_bytes(tmp_path / "canary", "pickle"))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("form", ["pickle", "zip"])
@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "state.pkl", "agent.zip"])
def test_pickle_files_are_refused_with_a_way_out(tmp_path, name, form) -> None:
    folder, canary = tmp_path / "c" / "ckpt-000001", tmp_path / "canary"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(canary_bytes(canary, form))
    checkpoints = Checkpoints(tmp_path / "c")
    for path in (folder / name, folder):
        with pytest.raises(CheckpointError, match=f"{name} is a pickle-based file.*convert it once"):
            checkpoints.load(path)
    with pytest.warns(CheckpointWarning, match="pickle-based"), pytest.raises(CheckpointError):
        checkpoints.load()
    assert not canary.exists()


@pytest.mark.parametrize("form", ["pickle", "zip"])
@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_pickle_content_under_an_innocent_name_is_never_executed(tmp_path, name, form) -> None:
    checkpoints, canary = Checkpoints(tmp_path / "c"), tmp_path / "canary"
    folder = checkpoints.save(1, state(1))
    (folder / name).write_bytes(canary_bytes(canary, form))
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match=r"model.json cannot be read"):
        checkpoints.load(folder)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["model.pt", "../model.json", "/etc/passwd", "a/b.json", "manifest.json", "", ".json"])
def test_a_manifest_that_names_anything_else_is_refused(tmp_path, name) -> None:
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(1, state(1))
    rewrite_manifest(folder, extra={name: {"bytes": 1, "sha256": "0" * 64}})
    with pytest.raises(CheckpointError, match="cannot be part of a checkpoint|pickle-based"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    "document",
    [
        b"[]",
        b"null",
        b'{"manifest": {}}',
        b'{"manifest": [], "sha256": ""}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
        b'{"sha256": NaN, "manifest": 1e999}',
        b" " * (5 << 20),
    ],
    ids=lambda d: repr(d[:16]),
)
def test_nonsense_manifests_are_damage_not_tracebacks(tmp_path, document) -> None:
    checkpoints = two(tmp_path)
    (tmp_path / "ckpt-000002" / "manifest.json").write_bytes(document)
    with pytest.warns(CheckpointWarning, match="manifest.json is damaged"):
        assert checkpoints.load().step == 1


def test_a_well_signed_manifest_with_wrong_fields_is_refused(tmp_path) -> None:
    for number, change in enumerate(
        (
            {"step": "1"},
            {"sequence": None},
            {"files": []},
            {"files": {"model.json": {}}},
            {"files": {"model.json": 3}},
            {"color": 1},
        )
    ):
        checkpoints = Checkpoints(tmp_path / str(number))
        folder = checkpoints.save(1, state(1))
        rewrite_manifest(folder, **change)
        with pytest.raises(CheckpointError, match="malformed"):
            checkpoints.load(folder)


@pytest.mark.parametrize(
    "table",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 99_999_999) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 70)
        + b'{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}'.ljust(70)
        + bytes(8),
        struct.pack("<Q", 70)
        + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4398046511104]}}'.ljust(70)
        + bytes(8),
        b"",
    ],
    ids=["header_2**63", "header_100_MB", "no_tensors", "huge_shape", "huge_offset", "empty"],
)
def test_hostile_safetensors_headers_are_refused_without_allocating(tmp_path, table) -> None:
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(1, state(1))
    (folder / "model.safetensors").write_bytes(table)
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match="model.json cannot be read"):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    "tree", [b"[" * 100_000, b'{"$": "tensor", "name": "nowhere"}', b'{"$": "pickle"}', b"{", b"\xff"]
)
def test_hostile_trees_are_refused(tmp_path, tree) -> None:
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(1, state(1))
    (folder / "model.json").write_bytes(tree)
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match="model.json cannot be read"):
        checkpoints.load(folder)


def rewrite_manifest(folder: Path, *, extra: dict[str, Any] | None = None, **changes: Any) -> None:
    """Sign the folder's present content, as an attacker would."""
    document = json.loads((folder / "manifest.json").read_text())
    body = document["manifest"]
    for name in body["files"]:
        body["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": files.file_sha256(folder / name)}
    body["files"] |= extra or {}
    body |= changes
    digest = files.hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"sha256": digest, "manifest": body}))


# Links and paths


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_refused(tmp_path, name) -> None:
    checkpoints = two(tmp_path)
    path = tmp_path / "ckpt-000002" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(CheckpointWarning, match="symbolic link"):
        assert checkpoints.load().step == 1


def test_a_link_in_place_of_a_checkpoint_is_refused_and_replaced_without_following(tmp_path) -> None:
    other = two(tmp_path / "other")
    checkpoints = Checkpoints(tmp_path / "mine")
    checkpoints.save(1, state(1))
    (tmp_path / "mine" / "ckpt-000002").symlink_to(tmp_path / "other" / "ckpt-000002")
    with pytest.warns(CheckpointWarning, match="symbolic link"):
        assert checkpoints.load().step == 1
    checkpoints.save(2, state(2))
    assert not (tmp_path / "mine" / "ckpt-000002").is_symlink()
    assert other.load().step == 2


@pytest.mark.parametrize("path", ["../other/ckpt-000001", "/etc", "/etc/ckpt-000001", "..", "latest", "ckpt-1", ""])
def test_paths_outside_the_run_are_refused(tmp_path, path) -> None:
    two(tmp_path / "other")
    checkpoints = two(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint of this run"):
        checkpoints.load(Path(path) if path != "../other/ckpt-000001" else tmp_path / "mine" / path)


def test_a_bare_name_and_a_full_path_mean_the_same(tmp_path) -> None:
    checkpoints = two(tmp_path)
    for path in (Path("ckpt-000001"), tmp_path / "ckpt-000001"):
        assert checkpoints.load(path).step == 1
    with pytest.raises(CheckpointError, match="ckpt-000005 is not a complete checkpoint"):
        checkpoints.load(Path("ckpt-000005"))
