"""The tiny language model of `tests/llm`, and its workshop."""

from tests.llm.conftest import (  # noqa: F401
    tiny_checkpoint,
    tiny_model,
    tiny_tokenizer,
    tokenizer_file,
    workshop,
)
