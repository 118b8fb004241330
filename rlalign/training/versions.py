"""Which releases of Python and of the libraries wrote a file."""

import platform
from functools import cache
from importlib import metadata

_PACKAGES = (
    "rlalign",
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "gymnasium",
    "diffusers",
)


def library_versions() -> dict[str, str]:
    """Installed version of Python, the platform and each library that can change a run's numbers."""
    return dict(_installed())


# Looking packages up reads hundreds of files, and their versions do not change under a running process.
@cache
def _installed() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
