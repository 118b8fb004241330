"""Random state: seed it, derive independent seeds from it, save it and put it back bit for bit."""

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_NUMPY_SEEDS = 2**32


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed the global generators of Python, NumPy and PyTorch (CPU and every accelerator).

    Args:
        seed: Any non-negative integer below 2**63.
        deterministic: True also makes PyTorch refuse operations that have no deterministic form. CUDA users set
            `CUBLAS_WORKSPACE_CONFIG=:4096:8` as well.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be an integer in [0, 2**63), got {seed}.")
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)  # noqa: NPY002  third-party code draws from it
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def derived_seed(seed: int, *keys: int | str) -> int:
    """Hash a seed and the keys that name one use of it into a 63-bit seed.

    The same arguments give the same seed on every machine and release; any other key gives an unrelated one. Keys
    keep their type: 1 and "1" differ.

    Example:
        >>> derived_seed(0, "generate", 3) == derived_seed(0, "generate", 3)
        True
        >>> derived_seed(0, "generate", 3) == derived_seed(0, "generate", "3")
        False
    """
    digest = hashlib.sha256(json.dumps([seed, *keys]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *keys: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a fresh generator on `device`, seeded with `derived_seed(seed, *keys)`."""
    return torch.Generator(device=device).manual_seed(derived_seed(seed, *keys))


def rng_state() -> dict[str, Any]:
    """Capture the global generators of Python, NumPy, PyTorch CPU and the current CUDA device.

    Returns:
        Nested dict of tensors and JSON values, ready for a checkpoint. `cuda` is None until CUDA has been used.
    """
    version, words, gauss = random.getstate()
    algorithm, key, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": {
            "algorithm": str(algorithm),
            "key": torch.from_numpy(np.asarray(key).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to what `rng_state` captured.

    Raises:
        ValueError: The state holds a CUDA generator and this machine has no CUDA device.
    """
    if state["cuda"] is not None and not torch.cuda.is_available():
        raise ValueError(
            "The saved random state belongs to a CUDA run and this machine has no CUDA device, so the run cannot "
            "continue exactly. Resume it on a machine with a GPU."
        )
    python, legacy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    key = legacy["key"].numpy().astype(np.uint32)
    numpy_state = (legacy["algorithm"], key, legacy["position"], legacy["has_gauss"], legacy["cached_gaussian"])
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
