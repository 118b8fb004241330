"""How completions are sampled, and by whom: data only, no torch."""

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Annotated, Literal

from pydantic import Field

from rlalign.config_fields import STRICT, Count, NonNegative, Port, Positive


@dataclass(frozen=True, kw_only=True)
class Transformers:
    """Sample in the training process with the model itself."""

    __pydantic_config__ = STRICT
    type: Literal["transformers"] = "transformers"
    prepack: bool = True
    """Float32 on a CPU only: hold a second copy of the weights while sampling, in an order that decodes faster."""


@dataclass(frozen=True, kw_only=True)
class VLLMServer:
    """Sample with a running `trl vllm-serve`, which gets the new weights before every rollout. Needs CUDA devices.

    The server has devices of its own. Held-out evaluation and greedy baselines still sample in the training process.
    A run resumes with the right weights, but a server's random numbers are its own: not bit for bit.
    """

    __pydantic_config__ = STRICT
    type: Literal["vllm_server"] = "vllm_server"
    host: str = "127.0.0.1"
    port: Port = 8000
    group_port: Port = 51216
    """Of the connection that carries the weights."""
    timeout_s: NonNegative = 240.0
    """How long to wait, when training begins, for a server that is still loading."""
    allow_remote: bool = False
    """Talk to another machine. The server asks nobody for a password and nothing is encrypted: whoever reaches its
    ports can read prompts and replace weights, so keep both on a network of your own."""

    def __post_init__(self) -> None:
        if not (self.allow_remote or is_loopback(self.host)):
            raise ValueError(
                f"`host`={self.host} is not this machine. Use 127.0.0.1, or set `allow_remote: true` on a network "
                "where nobody else reaches the server, which has no password and no encryption."
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can be meant: `localhost`, 127.0.0.0/8 or ::1."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name; who knows where it leads
        return False


EngineConfig = Annotated[Transformers | VLLMServer, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How completions are sampled. Batch sizes follow from prompts x group; micro-batches are derived."""

    __pydantic_config__ = STRICT

    prompts_per_step: Count = 32
    group_size: Annotated[int, Field(ge=2)] = 16
    """Completions per prompt. Group estimators compare them with each other, so at least two."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are refused by the data check (never silently cut)."""
    max_completion_tokens: Count = 3072
    stop: list[str] = field(default_factory=list)
    """Texts of one token each, such as "\\n", that end a completion like the end-of-sequence token; part of it."""
    temperature: Positive = 1.0
    """Of sampling and of every log-probability in training alike."""
    mask_truncated: bool = False
    """Completions that hit `max_completion_tokens` count in baselines but not in the loss (DAPO)."""
    decode_rows: Count | None = None
    """Most rows decoded at once; None decodes the whole step in one batch."""
    engine: EngineConfig = field(default_factory=Transformers)
    """Who samples: this process, or a vLLM server on other CUDA devices."""
