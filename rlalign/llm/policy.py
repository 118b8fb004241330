"""The model as the trainer uses it: sampling, scoring, reference, precision, processes."""

import contextlib
import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from jaxtyping import Float
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlalign.buffers import Rollout
from rlalign.config import ConfigError
from rlalign.llm.config import ModelConfig, PolicyGradientConfig
from rlalign.llm.engine import Engine, TransformersEngine, build_engine
from rlalign.llm.generate import Generations
from rlalign.llm.gradient_checks import require_true_gradients, sharding_notes, trained_dtype_notes
from rlalign.llm.models import align_special_tokens, load_model, prepare_tokenizer, resolve_precision
from rlalign.llm.packing import Layout, Segment, micro_batches, segments
from rlalign.llm.scoring import Packing, Scorer, base_model, packing_error, reason_against_packing, score_rollout
from rlalign.training.distributed import leave_at_exit, sum_over_processes
from rlalign.training.files import share_as_umask_says

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest difference in nats between packed and padded log-probabilities; lower precisions get 0.3.

Float64 is no tighter because normalisation layers and eager attention of transformers compute in float32 even then.
"""
STARTS_AT_ZERO = (True, "gaussian")
"""`LoraConfig.init_lora_weights` under which the fresh adapter changes nothing."""


class Policy:
    """A language model with its tokenizer, spread over processes by `accelerate`."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        cfg: PolicyGradientConfig,
        accelerator: Accelerator,
        *,
        adapter_is_fresh: bool,
        checkpointing: bool = False,
    ):
        self.cfg, self.accelerator, self.tokenizer = cfg, accelerator, tokenizer
        self.model = model.to(accelerator.device)
        self.end_ids = (*align_special_tokens(base_model(model), tokenizer), *stop_ids(tokenizer, cfg.rollout.stop))
        assert isinstance(tokenizer.pad_token_id, int)  # `prepare_tokenizer` saw to it
        self.pad_id = tokenizer.pad_token_id
        silence_dropout(self.model, checkpointing=checkpointing)
        self.packing: Packing | None = None if cfg.packing == "auto" else cfg.packing
        if self.packing == "prefix_shared" and (reason := reason_against_packing(model)):
            raise ConfigError(f"`packing: prefix_shared` gives wrong numbers for {reason}; use `packing: auto`.")
        self.scorer = self._scorer(self.model)
        self.forward: nn.Module = self._spread(self.scorer)
        self.here = TransformersEngine(self.model, accelerator)
        self.engine: Engine = build_engine(cfg.rollout.engine, self.here, accelerator)
        self.notes = [*trained_dtype_notes(model, cfg.optim.learning_rate), *sharding_notes(accelerator)]
        self.reference = self._reference(adapter_is_fresh)

    @classmethod
    def build(cls, model: Any, tokenizer: Any, cfg: PolicyGradientConfig, peft_config: PeftConfig | None) -> "Policy":
        """Load what is a name, wrap it with an adapter when asked, and decide device and precision."""
        settings = cfg.model or ModelConfig(name=model if isinstance(model, str) else "in-memory")
        settings = model if isinstance(model, ModelConfig) else settings
        settings = replace(settings, name=model) if isinstance(model, str) else settings
        precision = resolve_precision(settings)
        options: dict[str, Any] = {"mixed_precision": "bf16" if precision.autocast else "no"} | cfg.accelerate
        accelerator = Accelerator(cpu=precision.device.type == "cpu", **options)
        leave_at_exit(accelerator)
        require_true_gradients(accelerator)
        if not isinstance(model, PreTrainedModel | PeftModel):
            model, loaded = load_model(settings)
            tokenizer = tokenizer or loaded
        if tokenizer is None:
            raise ValueError("a model object needs its tokenizer: pass `tokenizer=`, or the model's name instead.")
        fresh = peft_config is not None or cfg.peft is not None
        if fresh and isinstance(model, PeftModel):
            raise ValueError("the model already carries an adapter: leave out `peft_config`, or pass the base model.")
        if fresh:
            peft_config = peft_config or LoraConfig(**{"task_type": "CAUSAL_LM", **(cfg.peft or {})})
            model = get_peft_model(model, peft_config)
            if peft_config.is_prompt_learning:
                raise ValueError(f"{peft_config.peft_type} learns prompts, which sampling here leaves out; use LoRA.")
            fresh = starts_as_base(peft_config)
        return cls(
            model,
            prepare_tokenizer(tokenizer),
            cfg,
            accelerator,
            adapter_is_fresh=fresh,
            checkpointing=settings.gradient_checkpointing,
        )

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generations:
        """`generate_groups` with this model's end and padding tokens, in its training precision."""
        return self.here.generate(prompts, eos_ids=self.end_ids, pad_id=self.pad_id, **options)

    def sample(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generations:
        """Let the configured engine generate, with the weights of this moment."""
        self.engine.update_weights(self.model)
        return self.engine.generate(prompts, eos_ids=self.end_ids, pad_id=self.pad_id, **options)

    @torch.no_grad()
    def complete(self, rollout: Rollout) -> Rollout:
        """Add what only the model knows: the reference's log-probabilities, and its own where sampling's will not do.

        Own log-probabilities are computed again only when something will read them (a ratio, with more than one update
        per rollout, or a penalty in the reward) and those of sampling differ from them by more than rounding: it ran
        in low precision, or in an external engine. That one's stay in `log_prob_engine`, for the correction.
        """
        if self.packing is None:
            self._use(self._choose_packing(rollout))
        kl = self.cfg.kl
        read = self.cfg.optim.updates_per_rollout > 1 or (kl.coef > 0 and kl.where == "reward")
        if read and (self.accelerator.mixed_precision != "no" or rollout.log_prob_engine is not None):
            rollout = replace(rollout, log_prob_old=self.score(rollout, self.forward))
        if self.reference is not None:
            with self.reference() as reference:
                rollout = replace(rollout, log_prob_ref=self.score(rollout, reference))
        return rollout

    def score(self, rollout: Rollout, scorer: nn.Module) -> Float[Tensor, "batch time"]:
        """Log-probability of every decision under `scorer`'s model, in nats."""
        device, budget = self.accelerator.device, self.cfg.optim.micro_batch_tokens
        return score_rollout(self.scorer, rollout, device, most_tokens=budget, forward=scorer).float()

    def shares(self, rollout: Rollout, *, whole_groups: bool) -> list[tuple[Layout, float]]:
        """This process's micro-batches with their factors; 0.0 marks one that only keeps the processes in step.

        Every process holds the whole batch and deals it in the same way, so no message is needed. The others have the
        number of processes as factor: gradients are averaged over processes, and their sum is wanted.
        """
        budget = self.cfg.optim.micro_batch_tokens
        undivided = rollout.mask.numel() + rollout.inputs["prompt_ids"].value.numel()
        split = self.scorer.segments(rollout, most_tokens=budget)
        parts = segments(rollout, most_tokens=undivided) if whole_groups else split
        hands: list[list[Segment]] = [[] for _ in range(self.accelerator.num_processes)]
        for part in sorted(parts, key=lambda part: -part.tokens):
            min(hands, key=lambda hand: sum(held.tokens for held in hand)).append(part)
        dealt = [micro_batches(hand, most_tokens=budget) for hand in hands]
        mine = [(batch, float(len(hands))) for batch in dealt[self.accelerator.process_index]]
        idle = max(map(len, dealt)) - len(mine)
        mine += [([min(parts, key=lambda part: part.tokens)], 0.0)] * idle
        return [(self.scorer.layout(batch, rollout).to(self.accelerator.device), share) for batch, share in mine]

    @contextlib.contextmanager
    def synchronising(self, last: bool) -> Iterator[None]:
        """Let gradients cross processes only in the last micro-batch of an optimizer step."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.forward):
            yield

    def save(self, path: str | Path) -> None:
        """Write a checkpoint (or an adapter) that plain `transformers` (`peft`) loads, with the tokenizer."""
        state = self.accelerator.get_state_dict(self.model) if self.accelerator.num_processes > 1 else None
        if self.accelerator.is_main_process:
            self.model.save_pretrained(str(path), state_dict=state)
            self.tokenizer.save_pretrained(path)
            share_as_umask_says(Path(path))

    def state_dict(self) -> dict[str, Any]:
        """The trained tensors and the packing that was chosen; frozen weights come from where they came from."""
        trained = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        weights = {name: value for name, value in self.model.state_dict().items() if name in trained}
        return {"weights": weights, "packing": self.packing}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put trained tensors back.

        Raises:
            ValueError: They belong to another model.
        """
        here, weights = self.state_dict()["weights"], state["weights"]
        if different := sorted(set(here) ^ set(weights)):
            raise ValueError(
                f"the checkpoint is of another model: parameter `{different[0]}` is in only one of the two."
            )
        for name, value in here.items():
            if value.shape != weights[name].shape:
                there = list(weights[name].shape)
                raise ValueError(f"`{name}` is {there} in the checkpoint, {list(value.shape)} here.")
            value.copy_(weights[name])
        if state["packing"] is not None:
            self._use(state["packing"])

    def new_notes(self) -> list[str]:
        """What is worth telling the user since the last call."""
        notes, self.notes = self.notes, []
        return notes

    @property
    def sharded_clip(self) -> Any:
        """How to clip gradients that are spread over processes; None where every process holds them whole."""
        return self.accelerator.clip_grad_norm_ if self.accelerator.distributed_type == DistributedType.FSDP else None

    def _spread(self, scorer: Scorer) -> nn.Module:
        if self.accelerator.num_processes > 1 or self.accelerator.mixed_precision != "no":
            return self.accelerator.prepare_model(scorer)
        return scorer

    def _use(self, packing: Packing) -> None:
        self.packing = self.scorer.packing = packing

    def _scorer(self, model: Any) -> Scorer:
        return Scorer(model, temperature=self.cfg.rollout.temperature, packing=self.packing or "padded")

    def _reference(self, adapter_is_fresh: bool) -> Any:
        """A context that gives the reference's scorer, or None when no divergence from it is asked for."""
        if self.cfg.kl.coef == 0:
            return None
        if isinstance(self.model, PeftModel) and adapter_is_fresh:
            adapted = self.model

            @contextlib.contextmanager
            def without_adapter() -> Iterator[nn.Module]:
                with adapted.disable_adapter():
                    yield self.scorer

            return without_adapter
        frozen = copy.deepcopy(self.model).requires_grad_(False).eval()

        @contextlib.contextmanager
        def copied() -> Iterator[nn.Module]:
            scorer = self._scorer(frozen)
            with self.accelerator.autocast():
                yield scorer

        return copied

    def _choose_packing(self, rollout: Rollout) -> Packing:
        reason = reason_against_packing(self.model) or self._packing_disagrees(rollout)
        refused = sum_over_processes({"refused": float(reason is not None)}, self.accelerator)["refused"]
        if refused:
            self.notes.append(f"Packing is off ({reason or 'another process refused'}): one padded row per completion.")
        return "padded" if refused else "prefix_shared"

    def _packing_disagrees(self, rollout: Rollout) -> str | None:
        """How the packed path differs from the padded one on two groups, beyond rounding; None when it does not."""
        few = rollout.select(torch.isin(rollout.group, rollout.group.unique()[:2]))
        # All tokens, in the loss or not: a first batch of nothing but truncated completions must not go unchecked.
        written = torch.arange(few.time) < few.inputs["completion_length"].value[:, None]
        budget = self.cfg.optim.micro_batch_tokens
        error = packing_error(self.scorer, replace(few, mask=written), self.accelerator.device, most_tokens=budget)
        if math.isnan(error):
            return "the model does not take the packed layout"
        limit = TOLERANCE.get(self.model.dtype, 0.3) if self.accelerator.mixed_precision == "no" else 0.3
        return None if error <= limit else f"log-probabilities differ by {error:.2g} nats"


def stop_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """The token of each stop text.

    Raises:
        ConfigError: A text is not exactly one token.
    """
    found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    for text, ids in zip(texts, found, strict=True):
        if len(ids) != 1:
            raise ConfigError(f"`rollout.stop` takes texts of one token; {text!r} is {len(ids)} tokens of this model.")
    return [ids[0] for ids in found]


def starts_as_base(cfg: PeftConfig) -> bool:
    """Whether disabling a fresh adapter of this kind gives the base model now and after any training."""
    settings = vars(cfg)
    return settings.get("init_lora_weights") in STARTS_AT_ZERO and settings.get("bias") == "none"


def silence_dropout(model: nn.Module, *, checkpointing: bool) -> None:
    """Score with the policy that sampled: no dropout. Eval mode does it; gradient checkpointing needs train mode."""
    model.train(checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            vars(module)["attention_dropout"] = 0.0
