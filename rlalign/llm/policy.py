"""The model as the trainer uses it: sampling, scoring, reference, precision, processes."""

import contextlib
import copy
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
from rlalign.llm.config import ModelConfig, PolicyGradientConfig
from rlalign.llm.engine import Engine, TransformersEngine, build_engine
from rlalign.llm.generate import Generations
from rlalign.llm.models import align_special_tokens, load_model, prepare_tokenizer, resolve_precision
from rlalign.llm.packing import Layout, Segment, micro_batches, segments
from rlalign.llm.scoring import Packing, Scorer, base_model, packing_error, reason_against_packing
from rlalign.training.distributed import sum_over_processes

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Largest difference in nats between packed and padded log-probabilities; lower precisions get 0.3."""
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
        self.end_ids = align_special_tokens(base_model(model), tokenizer)
        silence_dropout(self.model, checkpointing=checkpointing)
        self.packing: Packing | None = None if cfg.packing == "auto" else cfg.packing
        self.scorer = self._scorer(self.model)
        self.forward: nn.Module = self._spread(self.scorer)
        self.here = TransformersEngine(self.model, accelerator)
        self.engine: Engine = build_engine(cfg.rollout.engine, self.here, accelerator)
        self.notes: list[str] = []
        self.reference = self._reference(adapter_is_fresh)

    @classmethod
    def build(cls, model: Any, tokenizer: Any, cfg: PolicyGradientConfig, peft_config: PeftConfig | None) -> "Policy":
        """Load what is a name, wrap it with an adapter when asked, and decide device and precision."""
        settings = cfg.model or ModelConfig(name=model if isinstance(model, str) else "in-memory")
        settings = replace(model, name=model.name) if isinstance(model, ModelConfig) else settings
        settings = replace(settings, name=model) if isinstance(model, str) else settings
        precision = resolve_precision(settings)
        options: dict[str, Any] = {"mixed_precision": "bf16" if precision.autocast else "no"} | cfg.accelerate
        accelerator = Accelerator(cpu=precision.device.type == "cpu", **options)
        if not isinstance(model, PreTrainedModel | PeftModel):
            model, loaded = load_model(settings)
            tokenizer = tokenizer or loaded
        if tokenizer is None:
            raise ValueError("a model object comes without a tokenizer: pass `tokenizer=`, or the model's name instead.")
        fresh = peft_config is not None or cfg.peft is not None
        if fresh and isinstance(model, PeftModel):
            raise ValueError("the model already carries an adapter: leave out `peft_config`, or pass the base model.")
        if fresh:
            peft_config = peft_config or LoraConfig(**{"task_type": "CAUSAL_LM", **(cfg.peft or {})})
            model = get_peft_model(model, peft_config)
            fresh = vars(peft_config).get("init_lora_weights") in STARTS_AT_ZERO
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
        return self.here.generate(prompts, eos_ids=self.end_ids, pad_id=self.tokenizer.pad_token_id, **options)

    def sample(self, prompts: Sequence[Sequence[int]], **options: Any) -> Generations:
        """Let the configured engine generate, with the weights of this moment."""
        self.engine.update_weights(self.model)
        return self.engine.generate(prompts, eos_ids=self.end_ids, pad_id=self.tokenizer.pad_token_id, **options)

    @torch.no_grad()
    def complete(self, rollout: Rollout) -> Rollout:
        """Add what only the model knows: the reference's log-probabilities, and its own where sampling's will not do.

        Own log-probabilities are computed again only when something will read them (a ratio, with more than one update
        per rollout, or a penalty in the reward) and those of sampling differ from them by more than rounding: it ran
        in low precision, or in an external engine. That one's stay in `log_prob_engine`, for the correction.
        """
        if self.packing is None:
            self._use(self._choose_packing(rollout))
        optim, kl = self.cfg.optim, self.cfg.kl
        read = optim.update_epochs * optim.minibatches > 1 or (kl.coef > 0 and kl.where == "reward")
        if read and (self.accelerator.mixed_precision != "no" or rollout.log_prob_engine is not None):
            rollout = replace(rollout, log_prob_old=self.score(rollout, self.forward))
        if self.reference is not None:
            with self.reference() as reference:
                rollout = replace(rollout, log_prob_ref=self.score(rollout, reference))
        return rollout

    @torch.no_grad()
    def score(self, rollout: Rollout, scorer: nn.Module) -> Float[Tensor, "batch time"]:
        """Log-probability of every decision under `scorer`'s model, in nats."""
        total = torch.zeros(rollout.batch_size, rollout.time)
        budget = self.cfg.optim.micro_batch_tokens
        for parts in micro_batches(segments(rollout, most_tokens=budget), most_tokens=budget):
            layout = self.scorer.layout(parts, rollout).to(self.accelerator.device)
            total += layout.scatter(scorer(layout)[0], (rollout.batch_size, rollout.time)).float().cpu()
        return total

    def shares(self, rollout: Rollout, *, whole_groups: bool) -> list[tuple[Layout, float]]:
        """This process's micro-batches with their factors; 0.0 marks one that only keeps the processes in step.

        Every process holds the whole batch and deals it in the same way, so no message is needed. The others have the
        number of processes as factor: gradients are averaged over processes, and their sum is wanted.
        """
        budget = self.cfg.optim.micro_batch_tokens
        undivided = rollout.mask.numel() + rollout.inputs["prompt_ids"].value.numel()
        parts = segments(rollout, most_tokens=undivided if whole_groups else budget)
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
            self.model.save_pretrained(path, state_dict=state)
            self.tokenizer.save_pretrained(path)

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
            raise ValueError(f"the checkpoint is of another model: parameter `{different[0]}` is in only one of the two.")
        for name, value in here.items():
            if value.shape != weights[name].shape:
                raise ValueError(f"`{name}` is {list(weights[name].shape)} in the checkpoint, {list(value.shape)} here.")
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
        reason = reason_against_packing(self.model)
        if reason is None:
            few = rollout.select(torch.isin(rollout.group, rollout.group.unique()[:2]))
            parts = segments(few, most_tokens=self.cfg.optim.micro_batch_tokens)
            error = packing_error(self.scorer, parts, few, self.accelerator.device) if parts else 0.0
            limit = TOLERANCE.get(self.model.dtype, 0.3) if self.accelerator.mixed_precision == "no" else 0.3
            reason = None if error <= limit else f"log-probabilities differ by {error:.2g} nats"
        refused = sum_over_processes({"refused": float(reason is not None)}, self.accelerator)["refused"]
        if refused:
            self.notes.append(f"Packing is off ({reason or 'another process refused'}): one padded row per completion.")
        return "padded" if refused else "prefix_shared"


def silence_dropout(model: nn.Module, *, checkpointing: bool) -> None:
    """Score with the policy that sampled: no dropout. Eval mode does it; gradient checkpointing needs train mode."""
    model.train(checkpointing)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
