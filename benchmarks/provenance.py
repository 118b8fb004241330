"""Which code a published result came from."""

import subprocess
from importlib.metadata import version
from pathlib import Path

import rlalign


def versions(*packages: str) -> dict[str, str]:
    """Of rlalign and of other packages."""
    return {"rlalign": rlalign.__version__} | {name: version(name) for name in packages}


def commit() -> str:
    """The git commit that ran, with `+changes` where tracked files differ from it; `unknown` outside a clone."""
    try:
        head = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.yaml")
    except (OSError, subprocess.CalledProcessError):  # no git, or no clone
        return "unknown"
    return head + ("+changes" if changes else "")


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[1]
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
