"""Durable file operations: a reader sees the old content or the new one, never half of either."""

import hashlib
import os
from pathlib import Path

_CHUNK_BYTES = 1 << 22


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` so that a crash at any instant leaves the old file or the new one.

    One process at a time writes `path`; what a crash leaves beside it is overwritten by the next write.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_durable(temporary, content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_durable(path: Path, content: str | bytes) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def share_as_umask_says(folder: Path) -> None:
    """Give saved weights the mode of any new file: the safetensors writer leaves them readable by their owner alone."""
    mask = os.umask(0o077)  # the only way to read it is to set it
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~mask)


def sync_file(path: Path) -> None:
    """Flush a file that somebody else wrote to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename outlives a power cut. Windows has no such call."""
    if os.name == "posix":
        sync_file(path)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces; refuses to follow a symbolic link."""
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0, opener=_open_without_following) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def process_is_alive(pid: int) -> bool:
    """True while a process of this machine has the id `pid`, whoever owns it."""
    if os.name != "posix":
        # There, os.kill ends the process whatever the signal; assume the cautious answer.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _open_without_following(path: str, flags: int) -> int:
    # O_NOFOLLOW is missing on Windows, where links need a privilege to create.
    return os.open(path, flags | (os.O_NOFOLLOW if os.name == "posix" else 0))


def cache_directory() -> Path:
    """Where what is made once is kept: `$RLALIGN_CACHE`, else `~/.cache/rlalign`."""
    return Path(os.environ.get("RLALIGN_CACHE") or Path.home() / ".cache" / "rlalign")
