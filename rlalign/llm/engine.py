"""Who samples rollouts: the training process itself, or a vLLM server that is sent the weights before each of them."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Protocol, assert_never, runtime_checkable

import torch
from accelerate import Accelerator, DistributedType
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from rlalign.config import ConfigError
from rlalign.llm.config import EngineConfig, Transformers, VLLMServer, is_loopback
from rlalign.llm.generate import Generations, generate_groups
from rlalign.llm.scoring import base_model
from rlalign.llm.served_weights import announcements, served_weights

LARGEST_GAP = 0.02
"""Mean difference, in nats per token, up to which two programs may disagree about the same weights."""

Model = PreTrainedModel | PeftModel


class EngineError(RuntimeError):
    """The sampling engine failed, or gave something else than it was asked for."""


@runtime_checkable
class Engine(Protocol):
    """What the trainer needs of whoever samples."""

    external: bool
    """Another program samples: its log-probabilities are its own, so training corrects for the difference."""

    def prepare(self) -> None:
        """Called when training begins: raise at once what would go wrong at the first rollout."""
        ...

    def update_weights(self, model: Model) -> None:
        """Sample with these weights from now on."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        eos_ids: Sequence[int],
        pad_id: int,
        uniforms: Float[Tensor, "rows time"] | None = None,
        decode_rows: int | None = None,
    ) -> Generations:
        """Sample `group_size` completions of every prompt from the full distribution at `temperature`."""
        ...


def build_engine(cfg: EngineConfig, here: "TransformersEngine", accelerator: Accelerator) -> Engine:
    """The engine a config names; `here` is the one inside this process."""
    match cfg:
        case Transformers():
            here.prepack = cfg.prepack
            return here
        case VLLMServer():
            return VLLMServerEngine(cfg, accelerator)
        case _:
            assert_never(cfg)


class TransformersEngine:
    """Samples with the trained model itself, in its training precision."""

    external = False

    def __init__(self, model: Model, accelerator: Accelerator):
        self.model, self.accelerator = model, accelerator
        self.prepack = True

    def prepare(self) -> None:
        """Nothing to do: the model is here."""

    def update_weights(self, model: Model) -> None:
        """Nothing to send: it is the same model."""
        self.model = model

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generations:
        """See `generate_groups`, which takes the options; `top_p` among them, for evaluation."""
        with self.accelerator.autocast():
            return generate_groups(base_model(self.model), prompts, prepack=self.prepack, **options)


class VLLMServerEngine:
    """Samples with a running `trl vllm-serve`, through TRL's own client.

    Start it on devices that the training does not use, and on loopback (its default is every interface):

        CUDA_VISIBLE_DEVICES=1 trl vllm-serve --model MODEL --host 127.0.0.1

    Before every rollout the weights go there over NCCL, adapters merged. Token ids come back and are kept as they are;
    text is never tokenised again. The server's log-probabilities become `Rollout.log_prob_engine`, from which
    `correction` computes importance weights. Sampling is from the full distribution: no top-p, top-k, min-p or
    repetition penalty, whatever the model's generation config says.

    Needs CUDA devices and vLLM for real work; the tests put a stand-in where the client is.

    Args:
        connect: Gives the client; `connect_client` when None.
    """

    external = True

    def __init__(
        self,
        cfg: VLLMServer,
        accelerator: Accelerator,
        *,
        connect: Callable[[VLLMServer, Accelerator], Any] | None = None,
    ):
        self.cfg, self.accelerator, self.connect = cfg, accelerator, connect or connect_client
        self._client: Any = None

    def prepare(self) -> None:
        """Connect, once.

        Raises:
            ConfigError: A package or a CUDA device is missing, or weights are sharded over processes.
            EngineError: No server answers, or it was started with other settings than `trl vllm-serve` gives it.
        """
        if self._client is None:
            with self._explained("connecting"):
                self._client = self.connect(self.cfg, self.accelerator)

    def update_weights(self, model: Model) -> None:
        """Send every weight, then let no process sample before they have arrived."""
        self.prepare()
        if self.accelerator.is_main_process:
            with self._explained("receiving weights"):
                self._client.update_named_params(announcements(model), served_weights(model))
                self._client.reset_prefix_cache()  # keys and values of the old weights
        self.accelerator.wait_for_everyone()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        eos_ids: Sequence[int],
        pad_id: int,
        uniforms: Float[Tensor, "rows time"] | None = None,
        decode_rows: int | None = None,
    ) -> Generations:
        """Sample on the server, which has random numbers and batches of its own: the last two options are not used."""
        self.prepare()
        sent = [list(prompt) for prompt in prompts]
        with self._explained("sampling"):
            answer = self._client.generate(
                prompts=sent,
                n=group_size,
                temperature=temperature,
                max_tokens=max_new_tokens,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                logprobs=0,
                generation_kwargs={"stop_token_ids": list(eos_ids)},
            )
            return generations_from(answer, sent, group_size=group_size, eos_ids=eos_ids, pad_id=pad_id)

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (ConfigError, EngineError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # TRL's client raises bare `Exception`, and whatever requests and NCCL raise
            text = " ".join(str(error).split())[:300]
            raise EngineError(
                f"the vLLM server at {address(self.cfg)} failed while {doing}: {type(error).__name__}: {text}. It is "
                f"started with `trl vllm-serve --model MODEL --host {self.cfg.host} --port {self.cfg.port}`; once it "
                "answers, continue with `rlalign resume RUN`."
            ) from error


def address(cfg: VLLMServer) -> str:
    """The server's URL."""
    return f"http://[{cfg.host}]:{cfg.port}" if ":" in cfg.host else f"http://{cfg.host}:{cfg.port}"


def connect_client(cfg: VLLMServer, accelerator: Accelerator) -> Any:
    """TRL's `VLLMClient`, connected; on the main process with the group that carries weights.

    Raises:
        ConfigError: A package or a CUDA device is missing, or weights are sharded over processes.
        EngineError: The server reports log-probabilities of another distribution than it samples from.
    """
    _require_packages()
    if accelerator.device.type != "cuda":
        raise ConfigError(
            "`rollout.engine.type: vllm_server` sends weights over NCCL, from CUDA devices only, and this process "
            f"trains on {accelerator.device.type}. Use `rollout.engine.type: transformers`."
        )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError(
            "`rollout.engine.type: vllm_server` needs whole weights in each process, and "
            f"{accelerator.distributed_type.value} shards them. Train on one device or with plain data parallelism, or "
            "use `rollout.engine.type: transformers`."
        )
    from trl.generation.vllm_client import VLLMClient

    client = VLLMClient(base_url=address(cfg), group_port=cfg.group_port, connection_timeout=cfg.timeout_s)
    if accelerator.is_main_process:
        mode = client.get_server_info()["model_config"]["logprobs_mode"]
        if mode != "processed_logprobs":
            raise EngineError(
                f"the vLLM server reports `{mode}`, which are not those of the distribution at `rollout.temperature`. "
                "Restart it with `trl vllm-serve`, or with `--logprobs-mode processed_logprobs`."
            )
        if is_loopback(cfg.host):
            # Otherwise vLLM offers the group on the address that faces the network.
            os.environ.setdefault("VLLM_HOST_IP", "::1" if ":" in cfg.host else "127.0.0.1")
        client.init_communicator(device=accelerator.device)
    return client


def _require_packages() -> None:
    for module, extra in (("trl", "llm"), ("vllm", "vllm")):
        if find_spec(module) is None:
            raise ConfigError(
                f"`rollout.engine.type: vllm_server` needs the package {module} beside the trainer too, for its client "
                f"and the transfer of weights. Run: pip install 'rlalign[{extra}]'"
            )


def generations_from(
    answer: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    eos_ids: Sequence[int],
    pad_id: int,
) -> Generations:
    """What TRL's client returned, as `Generations`; a log-probability that is missing becomes NaN.

    Raises:
        EngineError: Other prompts, another number of completions, or one without any token.
    """
    ids: list[list[int]] = answer["completion_ids"]
    rows = len(prompts) * group_size
    if [list(prompt) for prompt in answer["prompt_ids"]] != [list(prompt) for prompt in prompts]:
        raise EngineError("the vLLM server continued other tokens than it was sent; does it serve the trained model?")
    if len(ids) != rows or not all(ids):
        got = f"{len(ids)} completions, {sum(not row for row in ids)} of them empty"
        raise EngineError(f"the vLLM server returned {got}, where {rows} with at least one token were asked for.")
    reported = _reported(answer, ids)
    longest = max(map(len, ids))
    return Generations(
        ids=torch.tensor([row + [pad_id] * (longest - len(row)) for row in ids]),
        log_prob=torch.tensor([row + [0.0] * (longest - len(row)) for row in reported]),
        lengths=torch.tensor([len(row) for row in ids]),
        truncated=torch.tensor([row[-1] not in eos_ids for row in ids]),
        external=True,
    )


def _reported(answer: Mapping[str, Any], ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """Log-probability of every sampled token, which need not be the first of the candidates at its position."""
    if answer["logprobs"] is None:
        return [[torch.nan] * len(row) for row in ids]
    result = []
    for row, values, candidates in zip(ids, answer["logprobs"], answer["logprob_token_ids"], strict=True):
        by_token = [dict(zip(*pair, strict=True)) for pair in zip(candidates, values, strict=True)]
        found = [known.get(token) for known, token in zip(by_token, row, strict=True)]
        result.append([torch.nan if value is None else value for value in found])
    return result


def gap_note(gap: float, *, external: bool) -> str:
    """What to tell the user when sampling and training disagree by more than `LARGEST_GAP`."""
    size = f"differ by {gap:.3f} nats per token on average (policy/sampling_gap_nats; usual is below {LARGEST_GAP})"
    if not external:
        return (
            f"Sampling and training {size} although both use this model, and nothing corrects for it. Look for the "
            "cause: numbers of low precision (`model.dtype: float32`), `rollout.engine.prepack`, `packing: padded`."
        )
    return (
        f"Sampling engine and trainer {size}. `correction` bounds the harm, but look for a cause: another `--dtype` or "
        "a coarse `--kv-cache-dtype` on the server, a model it implements differently, or weights that did not arrive."
    )
