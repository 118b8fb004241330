"""Load a causal language model and its tokenizer, ready for sampling and training, or say in one sentence why not."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub import errors as hub_errors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlalign.llm.config import ModelConfig
from rlalign.llm.gguf_checkpoint import converted_checkpoint
from rlalign.llm.model_names import ModelError, alternatives, check_name


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Where the weights live, in which type, and what the forward pass computes in."""

    device: torch.device
    weights: torch.dtype
    autocast: torch.dtype | None
    """None: the forward pass computes in the type of the weights."""


def load_model(config: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer that `config` names, with padding and end-of-sequence tokens set right.

    `config.name` is an alias of `EMBEDDED`, a `.gguf` file, a checkpoint directory or a Hub id, looked for in this
    order. Weights are read from safetensors only, and code that comes with a model is never run.

    Returns:
        The model in eval mode on its device, and the tokenizer, padding on the left.

    Raises:
        ModelError: The model is missing, gated, unreadable or of another kind, or the device does not exist.
    """
    precision = resolve_precision(config)
    source = resolve_source(config)
    tokenizer = load_tokenizer(config)
    options: dict[str, Any] = {"dtype": precision.weights, "use_safetensors": True}
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    model = _from_pretrained(AutoModelForCausalLM, source, config, **options)
    align_special_tokens(model, tokenizer)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(precision.device).eval(), tokenizer


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer alone: enough to check a dataset before the model is read."""
    tokenizer = _from_pretrained(AutoTokenizer, resolve_source(config), config)
    if config.chat_template is not None:
        path = Path(config.chat_template).expanduser()
        if not path.is_file():
            raise ModelError(f"`model.chat_template` names {path}, which is not a file.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    return prepare_tokenizer(tokenizer)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Pad on the left, as generation needs, with the end-of-sequence token where no padding token is defined."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path!r} defines neither a padding nor an end-of-sequence token; "
                "set `pad_token` and `eos_token` in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Make the model's generation settings agree with the tokenizer; return the ids that end a completion."""
    ends = end_token_ids(model, tokenizer)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    assert model.generation_config is not None
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
    return ends


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's, the tokenizer's, the chat template's end of turn."""
    assert model.generation_config is not None
    declared = model.generation_config.eos_token_id
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    ids += [tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    found = tuple(dict.fromkeys(int(token) for token in ids if token is not None))
    if not found:
        raise ModelError(
            f"{tokenizer.name_or_path!r} declares no end-of-sequence token, so no completion would ever end."
        )
    return found


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token the chat template writes right after an assistant message, if there is one."""
    if not tokenizer.chat_template:
        return None
    mark = "rlalign-end-of-turn-probe"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except jinja2.TemplateError:
        return None  # a template that takes no plain assistant message; the other sources of end tokens remain
    ids = tokenizer(text.rpartition(mark)[2].lstrip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in special_token_ids(tokenizer) else None


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of every token the tokenizer marks special, the named ones and all others it was given."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def resolve_precision(config: ModelConfig) -> Precision:
    """Decide device and number types: `auto` is float32, with bfloat16 autocast on CUDA devices that have it.

    Weights in float32 keep small steps: a bfloat16 weight does not move at a learning rate of 1e-6. An explicit
    `dtype` is the type of the weights (for frozen ones under LoRA, say), and nothing is cast on the way.
    """
    device = _device(config.device)
    if config.dtype != "auto":
        return Precision(device=device, weights=getattr(torch, config.dtype), autocast=None)
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Precision(device=device, weights=torch.float32, autocast=torch.bfloat16 if bfloat16 else None)


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"`model.device`={name!r} is no device; choose auto, cpu, cuda, cuda:0 or mps.") from error
    available = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = available.get(device.type, 0)
    if (device.index or 0) >= count:
        raise ModelError(
            f"`model.device`={name!r}, but this torch build ({torch.__version__}) sees {count} {device.type} "
            "device(s); "
            "use `model.device=auto`."
        )
    return device


def resolve_source(config: ModelConfig) -> str:
    """Turn `config.name` into what `from_pretrained` takes: a directory or a Hub id."""
    found = check_name(config.name)
    return str(converted_checkpoint(found) if isinstance(found, Path) and found.is_file() else found)


def _from_pretrained(loader: Any, source: str, config: ModelConfig, **options: Any) -> Any:
    """`from_pretrained` with every failure turned into one sentence that names the way out."""
    revision = None if Path(source).is_dir() else config.revision
    try:
        return loader.from_pretrained(source, revision=revision, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError, hub_errors.HfHubHTTPError) as error:
        raise ModelError(_explain(error, config)) from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):  # its error class derives from Exception alone
            raise ModelError(
                f"`model.name`={config.name!r}: a safetensors file is damaged ({error}). Copy it again."
            ) from error
        raise


def _explain(error: BaseException, config: ModelConfig) -> str:
    name, chain = f"`model.name`={config.name!r}", _causes(error)
    text = " ".join(str(error).split())[:300]
    if any(isinstance(cause, hub_errors.GatedRepoError) for cause in chain) or "gated repo" in text:
        return (
            f"{name} is gated: accept its licence on its Hub page, then log in with `hf auth login`. {alternatives()}"
        )
    if any(isinstance(cause, hub_errors.RevisionNotFoundError) for cause in chain):
        return f"{name} has no revision {config.revision!r}; set `model.revision` to a commit, tag or branch of it."
    if any(isinstance(cause, hub_errors.RepositoryNotFoundError) for cause in chain):
        return f"{name}: the Hub knows no such model, or it is private and you are not logged in. {alternatives()}"
    if "trust_remote_code" in text:
        return f"{name} needs code of its own, and rlalign never runs code that comes with a model. {alternatives()}"
    if any(
        isinstance(cause, hub_errors.OfflineModeIsEnabled | hub_errors.LocalEntryNotFoundError) for cause in chain
    ) or (isinstance(error, OSError) and not Path(config.name).exists() and "connect" in text):
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else ""
        return f"{name} is not in the local Hub cache and the Hub cannot be reached{offline}. {alternatives()}"
    return f"{name} cannot be loaded as a causal language model: {text}. {alternatives()}"


def _causes(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
