"""A pipeline's call, kept so that the pipeline itself can be run again on some samples for a single step."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from diffusers import DiffusionPipeline
from jaxtyping import Int
from torch import Tensor
from torch.utils import _pytree as pytree

# Arguments that may be as long as the batch by chance and still belong to no sample.
_NOT_ROWS = frozenset({"sigmas", "timesteps", "callback_on_step_end_tensor_inputs", "skip_guidance_layers"})


@runtime_checkable
class EncodesPrompts(Protocol):
    """A pipeline that turns prompts into embeddings."""

    encode_prompt: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class PipelineCall:
    """Arguments with one entry per sample, and what `encode_prompt` answered, in the order of its calls."""

    arguments: dict[str, Any]
    batch_size: int
    encoded: tuple[Any, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the recorded embeddings; the arguments are the caller's own."""
        tensors = [leaf for leaf in pytree.tree_leaves(self.encoded) if isinstance(leaf, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def select(self, rows: Int[Tensor, " n"]) -> "PipelineCall":
        """Return the call for these samples."""

        def pick(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.batch_size:
                return value[rows.to(value.device)]
            if isinstance(value, list) and len(value) == self.batch_size:
                return [value[row] for row in rows.tolist()]
            return value

        arguments = {name: value if name in _NOT_ROWS else pick(value) for name, value in self.arguments.items()}
        encoded = pytree.tree_map(lambda leaf: leaf if _is_table(leaf) else pick(leaf), self.encoded)
        return replace(self, arguments=arguments, batch_size=len(rows), encoded=encoded)

    def run(self, pipeline: DiffusionPipeline, **changed: Any) -> Any:
        """Run the pipeline without its `no_grad`, with the recorded embeddings instead of the text encoders."""
        answers = iter(self.encoded)
        with _replaced(pipeline, "encode_prompt", lambda *_, **__: next(answers), when=bool(self.encoded)):
            return inspect.unwrap(type(pipeline).__call__)(pipeline, **{**self.arguments, **changed})


def per_sample(arguments: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
    """Write a call out with one prompt per sample, so that any samples of it can be asked for.

    Prompts times `num_images_per_prompt` become a prompt for each image.
    """
    images = arguments.get("num_images_per_prompt") or 1
    prompts = batch_size // images

    def per_image(name: str, value: Any) -> Any:
        if isinstance(value, str) and "prompt" in name:
            return [value] * batch_size
        if images > 1 and isinstance(value, list) and len(value) == prompts and name not in _NOT_ROWS:
            return [entry for entry in value for _ in range(images)]
        if images > 1 and isinstance(value, Tensor) and value.ndim > 0 and len(value) == prompts:
            return value.repeat_interleave(images, dim=0)
        return value

    written_out = {name: per_image(name, value) for name, value in arguments.items()}
    return written_out | ({"num_images_per_prompt": 1} if images > 1 else {})


@contextmanager
def recorded_prompts(pipeline: DiffusionPipeline) -> Iterator[list[Any]]:
    """Collect what the pipeline's `encode_prompt` answers inside the context."""
    answers: list[Any] = []
    if not isinstance(pipeline, EncodesPrompts):
        yield answers
        return
    encode = pipeline.encode_prompt

    def listening(*args: Any, **kwargs: Any) -> Any:
        answers.append(encode(*args, **kwargs))
        return answers[-1]

    with _replaced(pipeline, "encode_prompt", listening):
        yield answers


@contextmanager
def replaced_scheduler(pipeline: DiffusionPipeline, scheduler: Any) -> Iterator[None]:
    """Give the pipeline another scheduler inside the context, past its bookkeeping of components."""
    with _replaced(pipeline, "scheduler", scheduler):
        yield


@contextmanager
def quiet(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Let the pipeline show no progress bar inside the context."""
    with _replaced(pipeline, "_progress_bar_config", {"disable": True}):
        yield


@contextmanager
def _replaced(pipeline: DiffusionPipeline, name: str, value: Any, *, when: bool = True) -> Iterator[None]:
    members = vars(pipeline)
    before = {name: members[name]} if name in members else {}
    try:
        if when:
            members[name] = value
        yield
    finally:
        if when:
            del members[name]
            members.update(before)


def _is_table(leaf: Any) -> bool:
    """Flux's text ids, [tokens, 3], may be as long as the batch."""
    return isinstance(leaf, Tensor) and leaf.ndim == 2 and leaf.shape[-1] == 3
