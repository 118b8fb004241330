"""The policy as a function from laid-out tokens to log-probabilities, and the check that its fast path is right."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlalign.buffers import Rollout
from rlalign.llm.log_prob import chosen_log_prob
from rlalign.llm.packing import Layout, Segment, micro_batches, pack_padded, pack_prefix_shared, segments

Packing = Literal["prefix_shared", "padded"]
PACK: dict[Packing, Callable[[Sequence[Segment], Rollout], Layout]] = {
    "prefix_shared": pack_prefix_shared,
    "padded": pack_padded,
}


class Scorer(nn.Module):
    """Wraps the model so that one `forward` (the one DDP and FSDP hook) gives log-probabilities and entropies.

    `prefix_shared` runs the backbone on packed rows and the output layer on predicting positions only. `padded` calls
    the model as any user would, on one row per completion; slower, and the reference the other is checked against.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, temperature: float, packing: Packing):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.packing: Packing = packing

    def forward(self, layout: Layout) -> tuple[Float[Tensor, " decisions"], Float[Tensor, " decisions"]]:
        """Log-probability and entropy of every decision of the layout, in nats, float32 or better."""
        with torch.autocast(layout.ids.device.type, enabled=torch.is_autocast_enabled(layout.ids.device.type)):
            if self.packing == "padded":
                return self._padded(layout)
            return self._prefix_shared(layout)

    def layout(self, parts: Sequence[Segment], rollout: Rollout) -> Layout:
        return PACK[self.packing](parts, rollout)

    def segments(self, rollout: Rollout, *, most_tokens: int) -> list[Segment]:
        """What is dealt into micro-batches: completions that share their prompt, or each alone in a padded row."""
        return segments(rollout, most_tokens=most_tokens if self.packing == "prefix_shared" else 1)

    def _prefix_shared(self, layout: Layout) -> tuple[Tensor, Tensor]:
        base = base_model(self.model)
        hidden = base.base_model(
            input_ids=layout.ids,
            attention_mask=_mask_for(base, layout.attention),
            position_ids=layout.positions,
            use_cache=False,
        ).last_hidden_state
        head = base.get_output_embeddings()
        assert isinstance(head, nn.Linear)  # see `reason_against_packing`
        # The output layer stays out of autocast: rounding logits to bfloat16 is the largest error of a log-probability.
        with torch.autocast(hidden.device.type, enabled=False):
            return chosen_log_prob(
                hidden.flatten(0, 1)[layout.predictor],
                head.weight,
                layout.chosen,
                bias=head.bias,
                temperature=self.temperature,
            )

    def _padded(self, layout: Layout) -> tuple[Tensor, Tensor]:
        width = layout.ids.shape[1]
        columns, place = (layout.predictor % width).unique(return_inverse=True)
        logits = self.model(
            input_ids=layout.ids,
            attention_mask=layout.attention,
            position_ids=layout.positions,
            use_cache=False,
            logits_to_keep=columns,
        ).logits[layout.predictor // width, place]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        log_probs = (logits / self.temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(1, layout.chosen[:, None]).squeeze(1), entropy


def base_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model inside, with any adapter layers in place."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    return base


def _mask_for(model: PreTrainedModel, sees: Tensor) -> Tensor:
    # The eager attention of transformers adds its mask to the scores; sdpa takes booleans.
    if model.config._attn_implementation != "eager":
        return sees
    return torch.zeros_like(sees, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)


def reason_against_packing(model: PreTrainedModel | PeftModel) -> str | None:
    """Why the packed path cannot serve this model, from its structure alone; None when nothing speaks against it."""
    base = base_model(model)
    config = base.config.get_text_config().to_dict()
    if base.config._attn_implementation not in ("sdpa", "eager"):
        return f"attention `{base.config._attn_implementation}` takes no 4-D mask"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return f"attention with a sliding window of {config['sliding_window']}"
    if other := sorted(set(config.get("layer_types") or ()) - {"full_attention"}):
        return f"layers of type {', '.join(other)}"
    if type(base.get_output_embeddings()) is not nn.Linear:
        return f"output layer of type {type(base.get_output_embeddings()).__name__}"
    return None


@torch.no_grad()
def score_rollout(
    scorer: Scorer, rollout: Rollout, device: torch.device, *, most_tokens: int, forward: nn.Module | None = None
) -> Float[Tensor, "batch time"]:
    """Log-probability of every decision, in nats, float64 on the CPU; 0 where the mask is False.

    Args:
        most_tokens: Size of a micro-batch.
        forward: What is called with each layout; None calls `scorer`.
    """
    total = torch.zeros(rollout.batch_size, rollout.time, dtype=torch.float64)
    for parts in micro_batches(scorer.segments(rollout, most_tokens=most_tokens), most_tokens=most_tokens):
        layout = scorer.layout(parts, rollout).to(device)
        total += layout.scatter((forward or scorer)(layout)[0], (rollout.batch_size, rollout.time)).cpu()
    return total


def packing_error(scorer: Scorer, rollout: Rollout, device: torch.device, *, most_tokens: int) -> float:
    """Largest difference, in nats, between the packed and the padded log-probabilities of this rollout.

    NaN when the model raised on the packed layout, as models that refuse a 4-D mask do.
    """
    packed, padded = (Scorer(scorer.model, temperature=scorer.temperature, packing=packing) for packing in PACK)
    try:
        got = score_rollout(packed, rollout, device, most_tokens=most_tokens)
    except (ValueError, RuntimeError, TypeError):
        return float("nan")
    return float((got - score_rollout(padded, rollout, device, most_tokens=most_tokens)).abs().max())
