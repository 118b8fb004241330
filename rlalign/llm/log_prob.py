"""Log-probabilities of chosen tokens from hidden states, in chunks, so that the full logits never exist."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 256 * 2**20
"""Most bytes of logits alive at once; 1365 tokens of a 49,152-token vocabulary in float32."""


def chosen_log_prob(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocabulary width"],
    chosen: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocabulary"] | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Log-probability of each chosen token and the entropy of its distribution, both in nats and differentiable.

        log p(y) = z_y - logsumexp(z),   H = logsumexp(z) - sum_v p_v z_v,   z = (W h + b) / temperature

    The product runs in the dtype of `hidden`, everything after it in float32 (float64 stays float64). A single chunk
    keeps its probabilities for the backward pass; with several, each is computed again there.

    Args:
        hidden: Last hidden state at the position *before* each chosen token.
        temperature: The sampling temperature. Training at another one gives the gradient of another policy.
        chunk: Tokens per chunk; None takes as many as fit in `CHUNK_BYTES` of logits.
    """
    chunk = chunk or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return _ChosenLogProb.apply(hidden, weight, bias, chosen, temperature, chunk)


class _ChosenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, chosen, temperature, chunk):
        parts, probs = [], None
        for start in range(0, len(hidden), chunk):
            span = slice(start, start + chunk)
            logits = _logits(hidden[span], weight, bias, temperature)
            log_total = logits.logsumexp(-1)
            picked = logits.gather(1, chosen[span, None]).squeeze(1) - log_total
            mean_logit, probs = _mean_logit(logits, log_total)
            parts.append((picked, log_total, log_total - mean_logit))
        empty = hidden.new_zeros(0, dtype=_accurate(hidden.dtype))
        columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else [empty] * 3
        log_prob, log_total, entropy = columns
        keep = probs if len(parts) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, chosen, log_total, entropy, keep)
        ctx.temperature, ctx.chunk = temperature, chunk
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_prob, grad_entropy):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, chosen, log_total, entropy, kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        wants_entropy = bool(grad_entropy.any())
        for start in range(0, len(hidden), ctx.chunk):
            span = slice(start, start + ctx.chunk)
            if kept is not None:
                probs = kept
            else:
                probs = _logits(hidden[span], weight, bias, ctx.temperature).sub_(log_total[span, None]).exp_()
            # d log p(y) / dz = onehot(y) - p        dH / dz = -p (log p + H)
            scale = -grad_log_prob[span, None]
            if wants_entropy:
                surprise = probs.clamp_min(torch.finfo(probs.dtype).tiny).log().add_(entropy[span, None])
                scale = scale - grad_entropy[span, None] * surprise
            grad = probs * scale
            grad.scatter_add_(1, chosen[span, None], grad_log_prob[span, None].to(grad.dtype))
            grad = grad.div_(ctx.temperature).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[span] = grad @ weight.to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (grad.t() @ hidden[span]).to(weight.dtype)
            if grad_bias is not None:
                grad_bias += grad.sum(0).to(grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    # The product in bfloat16 (its sums are float32 inside), then float32: a bfloat16 logsumexp would lose the tail.
    bias = None if bias is None else bias.to(hidden.dtype)
    logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).to(_accurate(hidden.dtype))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _mean_logit(logits: Tensor, log_total: Tensor) -> tuple[Tensor, Tensor]:
    """E_p[z] per row, and p."""
    probs = (logits - log_total[:, None]).exp_()
    return torch.linalg.vecdot(probs, logits), probs
