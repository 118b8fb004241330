"""The chunked output layer against plain torch: values and gradients, through the log-probability and the entropy."""

import pytest
import torch
from torch import Tensor

from rlalign.llm.log_prob import chosen_log_prob

TOKENS, WIDTH, VOCABULARY = 7, 5, 11


def numbers(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    random = torch.Generator().manual_seed(0)
    hidden, weight, shift = (
        torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    )
    return hidden, weight, shift if bias else None, torch.randint(VOCABULARY, (TOKENS,), generator=random)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, temperature: float):
    log_probs = (torch.nn.functional.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    return log_probs.gather(1, chosen[:, None]).squeeze(1), -(log_probs.exp() * log_probs).sum(-1)


def test_two_tokens_by_hand():
    # logits (0, ln 3): p = (1/4, 3/4); H = ln 4 - 3/4 ln 3
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [3.0]]).log().nan_to_num(neginf=0.0)
    log_prob, entropy = chosen_log_prob(hidden, weight, torch.tensor([0, 1]))
    torch.testing.assert_close(log_prob.exp(), torch.tensor([0.25, 0.75]))
    expected = torch.tensor(4.0).log() - 0.75 * torch.tensor(3.0).log()
    torch.testing.assert_close(entropy, expected.expand(2))


@pytest.mark.parametrize("chunk", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_plain_torch(chunk, temperature, bias):
    hidden, weight, shift, chosen = numbers(bias=bias)
    leaves = [leaf for leaf in (hidden, weight, shift) if leaf is not None]
    factor = torch.randn(2, TOKENS, dtype=torch.float64)
    results = []
    for log_prob, entropy in (
        chosen_log_prob(hidden, weight, chosen, bias=shift, temperature=temperature, chunk=chunk),
        plain(hidden, weight, shift, chosen, temperature),
    ):
        loss = (factor[0] * log_prob).sum() + (factor[1] * entropy).sum()
        results.append([log_prob, entropy, *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("output", [0, 1])
def test_gradients_agree_with_finite_differences(chunk, output):
    hidden, weight, shift, chosen = numbers()

    def function(hidden, weight, shift):
        return chosen_log_prob(hidden, weight, chosen, bias=shift, temperature=1.3, chunk=chunk)[output]

    assert torch.autograd.gradcheck(function, (hidden, weight, shift))


def test_a_tied_weight_gets_the_gradient_of_both_uses():
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random, dtype=torch.float64, requires_grad=True)
    ids, chosen = torch.tensor([3, 3, 0, 10]), torch.tensor([3, 1, 0, 2])
    gradients = [
        torch.autograd.grad(log_prob.sum() + 0.1 * entropy.sum(), weight)[0]
        for log_prob, entropy in (
            chosen_log_prob(weight[ids].tanh(), weight, chosen, chunk=3),
            plain(weight[ids].tanh(), weight, None, chosen, 1.0),
        )
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 2])
def test_what_is_frozen_gets_no_gradient(chunk):
    hidden, weight, shift, chosen = numbers()
    assert shift is not None
    frozen = chosen_log_prob(hidden, weight.detach(), chosen, bias=shift.detach(), chunk=chunk)[0].sum()
    log_prob, _ = plain(hidden, weight, shift, chosen, 1.0)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden)[0], torch.autograd.grad(log_prob.sum(), hidden)[0])
    only_weight = chosen_log_prob(hidden.detach(), weight, chosen, bias=shift, chunk=chunk)[0].sum()
    only_weight.backward()
    assert hidden.grad is None
    assert weight.grad is not None
    assert shift.grad is not None
    without = chosen_log_prob(hidden.detach(), weight.detach(), chosen, bias=shift.detach(), chunk=chunk)
    assert not any(values.requires_grad for values in without)


@pytest.mark.parametrize("chunk", [None, 2])
def test_no_tokens_give_no_numbers_and_a_gradient_of_zero(chunk):
    hidden, weight, shift, chosen = numbers(torch.float32)
    log_prob, entropy = chosen_log_prob(hidden[:0], weight, chosen[:0], bias=shift, chunk=chunk)
    assert log_prob.shape == entropy.shape == (0,)
    (log_prob.sum() + entropy.sum()).backward()
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


def kept_sizes(chunk: int) -> list[int]:
    hidden, weight, shift, chosen = numbers()
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chosen_log_prob(hidden, weight, chosen, bias=shift, chunk=chunk)
    return sizes


def test_several_chunks_keep_no_logits_for_the_backward_pass():
    assert TOKENS * VOCABULARY in kept_sizes(chunk=TOKENS)  # the one chunk's probabilities
    assert max(kept_sizes(chunk=3)) == VOCABULARY * WIDTH  # the weight, and nothing larger


def test_the_default_chunk_bounds_the_logits(monkeypatch):
    monkeypatch.setattr("rlalign.llm.log_prob.CHUNK_BYTES", 4 * VOCABULARY * 2)
    sizes = []
    original = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: sizes.append(len(args[0])) or original(*args))
    hidden, weight, shift, chosen = numbers(torch.float32)
    chosen_log_prob(hidden, weight, chosen, bias=shift)
    assert sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("chunk", [None, 2])
def test_bfloat16_products_are_normalised_in_float32(chunk):
    hidden, weight, shift, chosen = numbers(torch.bfloat16)
    got = chosen_log_prob(hidden, weight, chosen, bias=shift, temperature=0.7, chunk=chunk)
    assert shift is not None
    logits = torch.nn.functional.linear(hidden, weight, shift).float() / 0.7
    torch.testing.assert_close(got[0], logits.log_softmax(-1).gather(1, chosen[:, None]).squeeze(1))
    assert got[0].dtype == got[1].dtype == torch.float32
    got[0].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_float32_hidden_states_meet_a_bfloat16_weight_in_float32():
    hidden, weight, _, chosen = numbers(torch.float32)
    narrow = weight.detach().bfloat16().requires_grad_()
    log_prob, _ = chosen_log_prob(hidden, narrow, chosen)
    expected, _ = plain(hidden, narrow.float(), None, chosen, 1.0)
    torch.testing.assert_close(log_prob, expected)
    log_prob.sum().backward()
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16


def test_a_certain_token_has_entropy_and_gradients_of_zero():
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[3e4], [-3e4], [0.0]], requires_grad=True)
    log_prob, entropy = chosen_log_prob(hidden, weight, torch.tensor([0, 0]))
    assert log_prob.tolist() == [0.0, -6e4]
    assert entropy.tolist() == pytest.approx([0.0, 0.0])
    entropy.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.tolist() == [[0.0], [0.0]]
    assert weight.grad.tolist() == [[0.0]] * 3


def test_a_second_derivative_is_refused():
    hidden, weight, _, chosen = numbers()
    log_prob, _ = chosen_log_prob(hidden, weight, chosen)
    (gradient,) = torch.autograd.grad((log_prob**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
