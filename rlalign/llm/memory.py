"""Out of memory, in one sentence: where it happened, and which settings need less of it, with values to try."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from rlalign.llm.config import PolicyGradientConfig

Phase = Literal["generate", "score", "train"]
IN_WORDS: dict[Phase, str] = {
    "generate": "sampling completions",
    "score": "computing log-probabilities of completions",
    "train": "the forward and backward pass",
}
ALLOCATORS = ("DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory", "CUDA out of memory")
"""How allocators that raise a plain RuntimeError begin their message, somewhere in it."""


class OutOfMemory(RuntimeError):
    """Memory ran out; the message says what to set."""


class MemoryAdvice:
    """Wraps the phases of a step, and turns running out of memory into advice. None of it changes what is learned.

    Args:
        processes: How many share the prompts of a step.

    Example:
        >>> print(MemoryAdvice(PolicyGradientConfig(), processes=1).sentence("generate").partition(", ")[0])
        Out of memory in sampling completions (phase `generate`): try `rollout.decode_rows`=256 (now 512)
    """

    def __init__(self, cfg: PolicyGradientConfig, *, processes: int):
        self.cfg, self.processes = cfg, processes

    @contextmanager
    def __call__(self, phase: Phase, *, tokens: int | None = None) -> Iterator[None]:
        """Explain what happens inside.

        Args:
            tokens: What this process has to score; a budget above that would not bind.

        Raises:
            OutOfMemory: In place of the allocator's error.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not ran_out(error):
                raise
            raise OutOfMemory(f"{self.sentence(phase, tokens)}{_first_line(error)}") from error

    def sentence(self, phase: Phase, tokens: int | None = None) -> str:
        """The advice; what helps most in this phase comes first, what is used up already last."""
        training = [self._micro_batch_tokens(tokens), self._gradient_checkpointing()]
        knobs = [self._decode_rows(), *training] if phase == "generate" else [*training, self._decode_rows()]
        tries = [text for text, left in knobs if left]
        spent = "".join(f"; {text}" for text, left in knobs if not left)
        listed = " or ".join(text for text in (", ".join(tries[:-1]), tries[-1]) if text)
        where = f"Out of memory in {IN_WORDS[phase]} (phase `{phase}`)"
        return f"{where}: try {listed}, which does not change what is learned{spent}."

    def _decode_rows(self) -> tuple[str, bool]:
        cfg = self.cfg.rollout
        rows = cfg.prompts_per_step // self.processes * cfg.group_size
        groups = max(1, min(cfg.decode_rows or rows, rows) // cfg.group_size)
        if groups == 1:
            return f"`rollout.decode_rows` is down to one group (`rollout.group_size`={cfg.group_size})", False
        return f"`rollout.decode_rows`={groups // 2 * cfg.group_size} (now {groups * cfg.group_size})", True

    def _micro_batch_tokens(self, tokens: int | None) -> tuple[str, bool]:
        now = self.cfg.optim.micro_batch_tokens
        binding = now if tokens is None else min(now, tokens)
        return f"`optim.micro_batch_tokens`={max(1, binding // 2)} (now {now})", True

    def _gradient_checkpointing(self) -> tuple[str, bool]:
        if self.cfg.model is not None and self.cfg.model.gradient_checkpointing:
            return "`model.gradient_checkpointing` is on", False
        return "`model.gradient_checkpointing`=true (now false)", True


def ran_out(error: BaseException) -> bool:
    """Whether this is an allocator giving up; on the CPU and MPS that is a RuntimeError like any other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATORS)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f" [{text[:200]}]" if text else ""
