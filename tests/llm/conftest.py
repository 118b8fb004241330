"""A language model small enough to check by hand: built offline, 2 layers, grouped-query attention, tied embeddings."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.llm.commands import prepare

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token per byte (ids 0-255 in the order of the alphabet), then three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|text|>", "<|start|>", "<|end|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def tiny_tokenizer(tokenizer_file: Path) -> PreTrainedTokenizerFast:
    """As SmolLM2's: the padding token IS the end-of-sequence token. Left padding, ready for generation."""
    return make_tokenizer(tokenizer_file)


def make_tokenizer(tokenizer_file: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        unk_token="<|text|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def tiny_model(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Random float32 weights, the same in every test; `.double()` for exact comparisons."""
    return make_model(tiny_tokenizer)


def make_model(tiny_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
    return model.eval()


@pytest.fixture(scope="session")
def workshop(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.yaml` and all it names, for runs of the command line; see `commands`."""
    folder = tmp_path_factory.mktemp("workshop")
    tokenizer = make_tokenizer(tokenizer_file)
    make_model(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return prepare(folder, folder / "model")


@pytest.fixture
def tiny_checkpoint(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The tiny model as a plain checkpoint directory."""
    path = tmp_path / "tiny-checkpoint"
    tiny_model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path
