"""Packed, padded and one-row-at-a-time scoring are the same function with the same gradient; refusals."""

import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlalign.buffers import Rollout
from rlalign.llm.packing import micro_batches
from rlalign.llm.scoring import Packing, Scorer, base_model, packing_error, reason_against_packing, score_rollout
from tests.llm.hand_made import completion_of, prompt_of, ragged
from tests.reference import sampling as reference

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def gpt2() -> PreTrainedModel:
    """Learned positions and dropout modules."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2, bos_token_id=0,
            eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip


def qwen2() -> PreTrainedModel:
    """Attention biases and an output layer of its own."""
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False, use_sliding_window=False))


def with_output_bias() -> PreTrainedModel:
    model = qwen2()
    head = nn.Linear(16, 259)
    model.set_output_embeddings(head)
    return model


def build(kind: str, tiny_model: LlamaForCausalLM, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(3)
    made: Callable[[], PreTrainedModel] = {
        "llama": lambda: tiny_model,
        "llama_eager": lambda: tiny_model,
        "gpt2": gpt2,
        "qwen2": qwen2,
        "output_bias": with_output_bias,
    }[kind]
    model = made().to(dtype).eval()
    model.set_attn_implementation("eager" if kind.endswith("eager") else "sdpa")
    return exact(model) if dtype == torch.float64 else model


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """Real float64: the normalisation layers of transformers compute in float32 whatever they are given."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def factors(rollout: Rollout) -> Tensor:
    """What each decision's log-probability and entropy weigh in the test's loss."""
    return torch.randn(2, *rollout.mask.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def scored(model: PreTrainedModel, rollout: Rollout, packing: Packing, budget: int, temperature: float):
    """Log-probabilities and entropies in [B, T], and the gradient of a weighted sum of all of them."""
    scorer, shape = Scorer(model, temperature=temperature, packing=packing), (rollout.batch_size, rollout.time)
    total = torch.zeros(2, *shape, dtype=torch.float64)
    model.zero_grad()
    for parts in micro_batches(scorer.segments(rollout, most_tokens=budget), most_tokens=budget):
        layout = scorer.layout(parts, rollout)
        placed = torch.stack([layout.scatter(values, shape).double() for values in scorer(layout)])
        (placed * factors(rollout)).sum().backward()
        total += placed.detach()
    return total, flat_gradient(model)


def one_row_at_a_time(model: PreTrainedModel, rollout: Rollout, temperature: float):
    total = torch.zeros(2, rollout.batch_size, rollout.time, dtype=torch.float64)
    model.zero_grad()
    for row in rollout.mask.any(1).nonzero().squeeze(1).tolist():
        real = rollout.mask[row, : len(completion_of(rollout, row))]
        values = reference.score(model, prompt_of(rollout, row), completion_of(rollout, row), temperature)
        placed = torch.stack([line.double() * real for line in values])
        (placed * factors(rollout)[:, row, : len(real)]).sum().backward()
        total[:, row, : len(real)] = placed.detach()
    return total, flat_gradient(model)


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# Budgets: every completion alone; groups cut; several groups in a micro-batch; everything at once.
@pytest.mark.parametrize("budget", [1, 16, 33, 1000])
@pytest.mark.parametrize("packing", ["prefix_shared", "padded"])
@pytest.mark.parametrize("kind", ["llama", "llama_eager", "gpt2", "qwen2", "output_bias"])
def test_scores_and_gradients_are_those_of_one_row_at_a_time(tiny_model, kind, packing, budget):
    model, rollout = build(kind, tiny_model, torch.float64), ragged()
    expected, expected_gradient = one_row_at_a_time(model, rollout, 0.8)
    got, gradient = scored(model, rollout, packing, budget, 0.8)
    tolerance = 1e-6 if kind.endswith("eager") else 1e-9  # eager attention has its softmax in float32
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < tolerance
    assert got[:, ~rollout.mask].eq(0).all()
    assert expected[0, rollout.mask].std() > 0.5  # the numbers differ enough to be told apart


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("kind", ["llama", "llama_eager", "gpt2"])
def test_float32_agrees_to_a_ten_thousandth(tiny_model, kind, temperature):
    model, rollout = build(kind, tiny_model, torch.float32), ragged()
    expected, expected_gradient = scored(model, rollout, "padded", 1000, temperature)
    for budget in (16, 1000):
        got, gradient = scored(model, rollout, "prefix_shared", budget, temperature)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-4


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses(tiny_model):
    model, rollout = build("llama", tiny_model, torch.float64), ragged()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    scored(model, rollout, "prefix_shared", 1000, 1.0)
    both = model.model.embed_tokens.weight.grad
    assert both is not None
    one_row_at_a_time(model, rollout, 1.0)
    torch.testing.assert_close(both, model.model.embed_tokens.weight.grad, rtol=1e-9, atol=1e-12)
    unused = [token for token in range(259) if not bool((rollout.inputs["completion_ids"].value == token).any())]
    assert both[unused].ne(0).any(dim=1).all()  # as outputs, all tokens have one; as inputs, these have none


def test_truncated_rows_that_are_left_out_cost_nothing_and_change_nothing(tiny_model):
    rollout = ragged()
    with_decisions = rollout.select(rollout.mask.any(1))
    whole, gradient = scored(tiny_model.double(), rollout, "prefix_shared", 1000, 1.0)
    assert whole[:, [3, 7, 8]].eq(0).all()
    layout = Scorer(tiny_model, temperature=1.0, packing="prefix_shared").layout(
        Scorer(tiny_model, temperature=1.0, packing="prefix_shared").segments(rollout, most_tokens=1000), rollout
    )
    assert layout.ids.shape[0] == 3  # group 8 has no row left
    assert len(with_decisions.group.unique()) == 3
    assert gradient.norm() > 0


def test_padded_micro_batches_keep_to_the_budget_with_their_padding(tiny_model):
    scorer, rollout = Scorer(tiny_model, temperature=1.0, packing="padded"), ragged()
    sizes = []
    for parts in micro_batches(scorer.segments(rollout, most_tokens=30), most_tokens=30):
        sizes.append(scorer.layout(parts, rollout).ids.numel())
    assert max(sizes) <= 30
    assert len(sizes) < 9


def test_the_output_layer_stays_out_of_autocast(tiny_model):
    rollout = ragged()
    scorer = Scorer(tiny_model, temperature=1.0, packing="prefix_shared")
    layout = scorer.layout(scorer.segments(rollout, most_tokens=1000), rollout)
    seen: list[Tensor] = []
    tiny_model.model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob, _ = scorer(layout)
    hidden = seen[0].flatten(0, 1)[layout.predictor].float()
    exact = torch.nn.functional.linear(hidden, tiny_model.lm_head.weight).log_softmax(-1)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, exact.gather(1, layout.chosen[:, None]).squeeze(1))
    rounded = score_rollout(scorer, rollout, CPU, most_tokens=1000)
    assert not torch.equal(layout.scatter(log_prob, (12, 7)).double(), rounded)  # the layers did run in bfloat16


def test_scoring_a_rollout_keeps_no_graph_and_the_caller_may_wrap_the_forward(tiny_model):
    scorer, rollout = Scorer(tiny_model.double(), temperature=0.9, packing="prefix_shared"), ragged()
    calls = []

    class Wrapped(nn.Module):
        def forward(self, layout):
            calls.append(layout.ids.shape)
            return scorer(layout)

    got = score_rollout(scorer, rollout, CPU, most_tokens=16, forward=Wrapped())
    assert not got.requires_grad
    assert len(calls) > 2
    torch.testing.assert_close(got, scored(tiny_model, rollout, "padded", 1000, 0.9)[0][0], rtol=0, atol=1e-10)


def test_packing_error_is_rounding_for_a_plain_model(tiny_model):
    scorer = Scorer(tiny_model, temperature=0.7, packing="padded")
    assert 0 < packing_error(scorer, ragged(), CPU, most_tokens=1000) < 1e-4
    assert (
        packing_error(Scorer(tiny_model.double(), temperature=0.7, packing="padded"), ragged(), CPU, most_tokens=16)
        < 1e-12
    )
    assert scorer.packing == "padded"


def test_packing_error_shows_a_model_that_scales_its_logits():
    torch.manual_seed(0)
    model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25, tie_word_embeddings=True)).eval()
    assert reason_against_packing(model) is None  # nothing in its structure says so
    assert packing_error(Scorer(model, temperature=1.0, packing="padded"), ragged(), CPU, most_tokens=1000) > 0.1


@pytest.mark.parametrize("error", [ValueError, TypeError, NotImplementedError])
def test_packing_error_is_nan_when_the_model_takes_no_4d_mask(tiny_model, error):
    def refuse(module, args, kwargs):
        if kwargs["attention_mask"].ndim == 4:
            raise error("only padding masks here")

    tiny_model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert math.isnan(
        packing_error(Scorer(tiny_model, temperature=1.0, packing="padded"), ragged(), CPU, most_tokens=99)
    )


def test_what_goes_wrong_on_padded_rows_is_an_error(tiny_model):
    def refuse(module, args, kwargs):
        if kwargs["attention_mask"].ndim == 2:
            raise ValueError("broken")

    tiny_model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(ValueError, match="broken"):
        packing_error(Scorer(tiny_model, temperature=1.0, packing="padded"), ragged(), CPU, most_tokens=99)


def reasons(tiny_model: LlamaForCausalLM) -> Iterator[tuple[PreTrainedModel, str | None]]:
    yield tiny_model, None
    yield gpt2(), None
    yield qwen2(), None
    yield MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)), "sliding window of 4"
    yield MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)), None
    window = Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    yield Qwen2ForCausalLM(window), "sliding window of 8"
    mixed = Qwen2Config(**SMALL, layer_types=["full_attention", "sliding_attention"])
    yield Qwen2ForCausalLM(mixed), "layers of type sliding_attention"


def test_reasons_against_packing_come_from_the_structure(tiny_model):
    for model, reason in reasons(tiny_model):
        got = reason_against_packing(model)
        assert got is reason is None or (got is not None and reason is not None and reason in got), model.config
    tiny_model.config._attn_implementation = "flash_attention_2"
    assert reason_against_packing(tiny_model) == "attention `flash_attention_2` takes no 4-D mask"


def test_an_adapted_output_layer_speaks_against_packing(tiny_model):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about the embedding that is tied to the output layer
        model = get_peft_model(tiny_model, config)
    assert base_model(model) is tiny_model
    reason = reason_against_packing(model)
    assert reason is not None
    assert "output layer of type Linear" in reason


def test_a_model_under_an_adapter_is_scored_with_the_adapter(tiny_model):
    model = get_peft_model(
        tiny_model.double(), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    assert reason_against_packing(model) is None
    rollout = ragged()
    scores = {}
    for packing in ("prefix_shared", "padded"):
        scorer = Scorer(model, temperature=1.0, packing=packing)
        scores[packing] = score_rollout(scorer, rollout, CPU, most_tokens=1000)
        with model.disable_adapter():
            assert (score_rollout(scorer, rollout, CPU, most_tokens=1000) - scores[packing]).abs().max() > 0.01
    torch.testing.assert_close(scores["prefix_shared"], scores["padded"], rtol=0, atol=1e-10)
