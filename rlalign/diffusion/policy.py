"""The generator that is trained: its denoiser's adapter or weights, the frozen reference, the moving average."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import convert_state_dict_to_diffusers
from jaxtyping import Float
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rlalign.config import ConfigError
from rlalign.diffusion.config import DiffusionConfig, LoRASettings
from rlalign.diffusion.folding import bypassed, folded, pays
from rlalign.training.ema import EMA

ADAPTER = "policy"
COMPARE_EVERY = 10
"""Steps of a trainer between comparisons with the generator as it came that metrics alone need."""
JOINT_ATTENTION = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
"""Projections of the text stream in transformers that attend over both (SD3, Flux, Qwen)."""


class TunedPipeline:
    """A diffusers pipeline whose denoiser is trained in place; everything else is frozen.

    Args:
        pipeline: Any `DiffusionPipeline` with a `transformer` or a `unet`.
        cfg: Adapter, average, checkpointing, device and precision.

    Raises:
        ConfigError: There is no denoiser, or it takes no adapter.
    """

    def __init__(self, pipeline: DiffusionPipeline, cfg: DiffusionConfig):
        self.pipeline, self.cfg = pipeline, cfg
        self.denoiser = denoiser_of(pipeline)
        self.adapter = cfg.lora is not None
        _require_no_adapter(self.denoiser)
        if cfg.lora is None:
            _require_float32(self.denoiser)
        networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        self._modes = {module: module.training for network in networks for module in network.modules()}
        self._flags = {p: p.requires_grad for network in networks for p in network.parameters()}
        with ExitStack() as failed:
            failed.callback(self.release)
            self._prepare(networks)
            failed.pop_all()
        self.parameters = {name: p for name, p in self.denoiser.named_parameters() if p.requires_grad}
        for parameter in self.parameters.values():  # half precision cannot hold what an optimizer adds
            parameter.data = parameter.data.float()
        trained = list(self.parameters.values())
        self.average = EMA(trained, cfg.average.decay, warmup=True) if cfg.average is not None else None
        self.frozen = None if self.adapter else EMA(trained, 0.0)
        """Without an adapter to switch off, the reference is a copy of the weights as they came."""

    def release(self) -> None:
        """Leave the pipeline as it came: what a trainer that cannot be built does before it says why."""
        if self.adapter and isinstance(self.denoiser, PeftAdapterMixin) and self.denoiser._hf_peft_config_loaded:
            self.denoiser.unload_lora()
        if self.cfg.pipeline.gradient_checkpointing and not self._checkpointed:
            self.denoiser.disable_gradient_checkpointing()
        for module, training in self._modes.items():
            module.training = training
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)

    @property
    def device(self) -> torch.device:
        """Where the pipeline works; with CPU offload not where its weights are at the moment."""
        return self.pipeline._execution_device

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Run a block with the generator as it came."""
        if self.frozen is not None:
            with self.frozen.swap():
                yield
            return
        with bypassed(self._layers()):
            yield

    @contextmanager
    def folded(self) -> Iterator[None]:
        """Run a block, of at most one backward pass, with small adapters added to their weights: the same to rounding.

        Checkpointed layers run again in the backward pass, after the block, and are left alone.
        """
        layers = [] if self.cfg.pipeline.gradient_checkpointing else self._layers()
        with folded([layer for layer in layers if isinstance(layer, LoraLinear) and pays(layer, ADAPTER)], ADAPTER):
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run a block with the averaged weights, where an average is kept; before its first update it says nothing."""
        if self.average is None or self.average.updates == 0:
            yield
            return
        with self.average.swap():
            yield

    def stepped(self, updates: int) -> None:
        """Take note of an optimizer step; `updates` counts them from 1."""
        if self.average is not None and self.cfg.average is not None and updates % self.cfg.average.every == 0:
            self.average.update()

    def distance(self) -> float:
        """How far the denoiser's weights are from those it came with: the norm of their movement, adapter included."""
        if self.frozen is None:
            return float(torch.stack([_low_rank_norm(layer) for layer in self._layers()]).norm())
        kept = self.frozen.state_dict()["averages"]
        moves = [(p.detach().to(k) - k).norm() for p, k in zip(self.parameters.values(), kept, strict=True)]
        return float(torch.stack(moves).norm())

    @torch.no_grad()
    def norm_ratio(self, predict: Callable[[], Float[Tensor, "n *dims"]]) -> float:
        """Mean of |v|/|v_ref|: predictions against those of the generator as it came, on the same input.

        It grows where a reward is over-optimised (NormGuard, arXiv:2606.27771).
        """
        now = predict().flatten(1).norm(dim=1)
        with self.reference():
            before = predict().flatten(1).norm(dim=1)
        return float((now / before).mean())

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"trained": {name: p.detach() for name, p in self.parameters.items()}}
        state |= {} if self.average is None else {"average": self.average.state_dict()}
        return state | ({} if self.frozen is None else {"frozen": self.frozen.state_dict()})

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` took.

        Raises:
            ConfigError: The state is that of another adapter or denoiser.
        """
        if state["trained"].keys() != self.parameters.keys():
            raise ConfigError("the checkpoint trained other tensors than this configuration does; resume with its own.")
        for name, parameter in self.parameters.items():
            if state["trained"][name].shape != parameter.shape:
                raise ConfigError(
                    f"the checkpoint's `{name}` has the shape {list(state['trained'][name].shape)}, here it is "
                    f"{list(parameter.shape)}: resume with the `lora.r` and the generator that the run began with."
                )
        for name, parameter in self.parameters.items():
            parameter.copy_(state["trained"][name])
        for name, part in (("average", self.average), ("frozen", self.frozen)):
            if part is not None:
                part.load_state_dict(state[name])

    def save(self, path: str | Path) -> None:
        """Write the averaged weights: an adapter as plain diffusers loads it, else the whole pipeline."""
        with self.averaged():
            if self.adapter:
                save_adapter(self.pipeline, path)
            else:
                self.pipeline.save_pretrained(path)

    def _layers(self) -> list[LoraLayer]:
        return [module for module in self.denoiser.modules() if isinstance(module, LoraLayer)]

    def _prepare(self, networks: Sequence[nn.Module]) -> None:
        for network in networks:
            network.requires_grad_(False).eval()
        self._checkpointed = self.denoiser.is_gradient_checkpointing
        if self.cfg.pipeline.gradient_checkpointing:
            self._save_memory()
        if self.cfg.lora is not None:
            self._add_adapter(self.cfg.lora)
        else:
            self.denoiser.requires_grad_(True)

    def _save_memory(self) -> None:
        try:
            self.denoiser.enable_gradient_checkpointing()
        except ValueError as error:
            raise ConfigError(
                f"{type(self.denoiser).__name__} has no gradient checkpointing; set "
                "`pipeline.gradient_checkpointing: false` and lower `optim.micro_batch`."
            ) from error

    def _add_adapter(self, cfg: LoRASettings) -> None:
        if not isinstance(self.denoiser, PeftAdapterMixin):
            raise ConfigError(
                f"{type(self.denoiser).__name__} takes no adapter (no PeftAdapterMixin of diffusers); set `lora: null`."
            )
        names = [name for name, module in self.denoiser.named_modules() if isinstance(module, nn.Linear)]
        joint = [target for target in JOINT_ATTENTION if any(name.endswith(f".{target}") for name in names)]
        targets = [*cfg.targets, *joint]
        if not any(name.endswith(tuple(targets)) for name in names):
            raise ConfigError(f"`lora.targets`={targets} fit no linear layer of {type(self.denoiser).__name__}.")
        self.denoiser.add_adapter(
            LoraConfig(
                r=cfg.r,
                lora_alpha=cfg.alpha,  # type: ignore[arg-type]  # peft's annotation says int; it divides
                init_lora_weights="gaussian" if cfg.init == "gaussian" else True,
                target_modules=targets,
            ),
            adapter_name=ADAPTER,
        )


def denoiser_of(pipeline: DiffusionPipeline) -> ModelMixin:
    """The network that is called at every denoising step.

    Raises:
        ConfigError: There is neither `transformer` nor `unet`.
    """
    for name in ("transformer", "unet"):
        found = pipeline.components.get(name)
        if isinstance(found, ModelMixin):
            return found
    raise ConfigError(
        f"{type(pipeline).__name__} has no `transformer` and no `unet`; its parts are {', '.join(pipeline.components)}."
    )


def _require_no_adapter(denoiser: nn.Module) -> None:
    """An adapter that is there already would be switched off with ours, and the reference would lose it."""
    loaded: Any = (
        denoiser.peft_config if isinstance(denoiser, PeftAdapterMixin) and denoiser._hf_peft_config_loaded else {}
    )
    if loaded:
        raise ConfigError(
            f"the {type(denoiser).__name__} carries an adapter already ({', '.join(loaded)}). "
            "`pipeline.unload_lora_weights()` throws it away, as after a failed attempt; `pipeline.fuse_lora()` before "
            "that keeps what it has learned."
        )


def _require_float32(denoiser: nn.Module) -> None:
    kinds = {p.dtype for p in denoiser.parameters()} - {torch.float32, torch.float64}
    if kinds:
        raise ConfigError(
            f"`lora: null` trains the weights themselves, and {', '.join(sorted(map(str, kinds)))} cannot hold an "
            "optimizer's steps: load the pipeline in float32 (`pipeline.dtype: float32`), or train an adapter."
        )


@torch.no_grad()
def _low_rank_norm(layer: LoraLayer) -> Tensor:
    """‖s B A‖ without the product: ‖B A‖² = Σ (BᵀB ∘ A Aᵀ)."""
    a, b = layer.lora_A[ADAPTER].weight.double(), layer.lora_B[ADAPTER].weight.double()
    return layer.scaling[ADAPTER] * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()  # type: ignore[operator]


def save_adapter(pipeline: DiffusionPipeline, path: str | Path) -> None:
    """Write the adapter with its settings: without them diffusers would load it with alpha = r."""
    denoiser = denoiser_of(pipeline)
    if not isinstance(pipeline, LoraBaseMixin):  # its denoiser has a loader of its own
        denoiser.save_lora_adapter(path, adapter_name=ADAPTER)
        return
    part = "transformer" if pipeline.components.get("transformer") is denoiser else "unet"
    layers = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER)
    layers = convert_state_dict_to_diffusers(layers) if part == "unet" else layers
    settings = denoiser.peft_config[ADAPTER].to_dict()
    type(pipeline).save_lora_weights(path, **{f"{part}_lora_layers": layers, f"{part}_lora_adapter_metadata": settings})  # type: ignore[call-arg]
