"""Generation: the batched, cached, padded, shrinking decode loop against one row at a time, and the sampler's law."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rlalign.llm.generate import GrowingLayer, generate_groups, growing_cache, sample_tokens
from tests.reference import sampling as reference

RAGGED = [[5, 9, 200], [17], [3, 1, 4, 1, 5, 9, 2, 6, 5], [100, 101, 102, 103, 104]]
HEADER = [70, 71, 72, 73, 74, 75, 76, 77, 78, 79]
SAME_START = [[*HEADER, 1], [*HEADER, 2, 3, 4], [*HEADER, 2, 3], HEADER[:9]]
ENDS = tuple(range(40))  # about one token in six: completions end early, late and not at all
PAD = 7  # a token that also ends completions, as in SmolLM2


@pytest.fixture
def model(tiny_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """float64: what differs, differs for a reason."""
    return tiny_model.double()


def uniforms(rows: int, time: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, time, generator=torch.Generator().manual_seed(seed))


def sample(model, prompts, *, group_size=3, time=8, ends=ENDS, noise=None, **options):
    noise = uniforms(len(prompts) * group_size, time) if noise is None else noise
    options = {"pad_id": PAD, **options}
    return generate_groups(
        model, prompts, group_size=group_size, max_new_tokens=time, eos_ids=ends, uniforms=noise, **options
    )


def rows_of(generations) -> list[list[int]]:
    return [line[:length] for line, length in zip(generations.ids.tolist(), generations.lengths.tolist(), strict=True)]


@pytest.mark.parametrize("prompts", [RAGGED, SAME_START, [HEADER, HEADER]], ids=["ragged", "same_start", "twice"])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 1.0), (1.0, 0.5), (0.0, 1.0)])
def test_the_batch_gives_what_each_row_gives_alone(model, prompts, temperature, top_p):
    got = sample(model, prompts, temperature=temperature, top_p=top_p)
    noise = uniforms(len(prompts) * 3, 8).tolist()
    for row, tokens in enumerate(rows_of(got)):
        expected, log_prob = reference.complete(
            model, prompts[row // 3], noise[row], ends=ENDS, temperature=temperature, top_p=top_p
        )
        assert tokens == expected
        # the distribution is float32 whatever the model is
        assert got.log_prob[row, : len(tokens)].tolist() == pytest.approx(log_prob, abs=2e-6)
        assert bool(got.truncated[row]) == (expected[-1] not in ENDS)


def test_completions_end_at_the_first_end_token_and_keep_it(model):
    unended = sample(model, RAGGED, ends=()).ids.tolist()
    got = sample(model, RAGGED)
    first = [next((n for n, token in enumerate(row) if token in ENDS), 7) + 1 for row in unended]
    assert got.lengths.tolist() == first
    assert len(set(first)) > 4  # the case is worth something: rows leave at many different times
    assert rows_of(got) == [row[:length] for row, length in zip(unended, first, strict=True)]
    assert got.mask.sum(1).tolist() == first
    assert got.ids[~got.mask].eq(PAD).all()
    assert got.log_prob[~got.mask].eq(0).all()
    assert got.log_prob[got.mask].lt(0).all()


def test_the_padding_token_counts_where_it_was_sampled_as_end(model):
    probs = reference.log_probs(model, RAGGED[0], 1.0)[-1].exp().detach()
    noise = uniforms(12, 8)
    noise[0, 0] = float(probs[:PAD].sum() + probs[PAD] / 2)
    got = sample(model, RAGGED, ends=(PAD,), noise=noise)
    assert rows_of(got)[0] == [PAD]
    assert got.mask[0].tolist() == [True] + [False] * 7
    assert float(got.log_prob[0, 0]) == pytest.approx(float(probs[PAD].log()), abs=1e-5)
    assert not bool(got.truncated[0])


def test_a_sampled_padding_token_is_a_token_when_it_ends_nothing(model):
    unended = sample(model, RAGGED, ends=())
    pad = int(unended.ids[0, 1])
    got = sample(model, RAGGED, ends=(int(unended.ids[0, 3]),), pad_id=pad)
    assert int(got.lengths[0]) == 4
    assert bool(got.mask[0, 1])
    assert float(got.log_prob[0, 1]) < 0


@pytest.mark.parametrize("position", [0, 1, 2])
def test_each_of_several_end_tokens_ends(model, position):
    line = sample(model, RAGGED, ends=()).ids[4].tolist()
    ends = (250, line[position], 251)
    got = sample(model, RAGGED, ends=ends)
    assert int(got.lengths[4]) == line.index(line[position]) + 1
    assert not bool(got.truncated[4])


def test_an_end_token_at_the_very_limit_is_not_a_truncation(model):
    line = sample(model, RAGGED, ends=()).ids[4].tolist()
    noise = uniforms(12, 8)[:, :3]
    assert line[2] not in line[:2]
    got = sample(model, RAGGED, time=3, ends=(line[2],), noise=noise)
    assert int(got.lengths[4]) == 3
    assert not bool(got.truncated[4])
    one_short = sample(model, RAGGED, time=2, ends=(line[2],), noise=noise[:, :2].contiguous())
    assert int(one_short.lengths[4]) == 2
    assert bool(one_short.truncated[4])


def test_without_end_tokens_everything_runs_to_the_limit(model):
    got = sample(model, RAGGED, ends=())
    assert got.lengths.tolist() == [8] * 12
    assert got.truncated.all()
    assert got.ids.shape == (12, 8)


def test_the_width_is_that_of_the_longest_completion(model):
    line = sample(model, [RAGGED[0]], group_size=1, ends=()).ids[0].tolist()
    got = sample(model, [RAGGED[0]], group_size=1, ends=(line[3],))
    assert got.ids.tolist() == [line[:4]]


@pytest.mark.parametrize("prompts", [RAGGED, SAME_START], ids=["ragged", "same_start"])
@pytest.mark.parametrize("decode_rows", [1, 3, 6, 7, 100])
def test_samples_do_not_depend_on_how_many_rows_are_decoded_at_once(model, prompts, decode_rows):
    whole, dealt = sample(model, prompts), sample(model, prompts, decode_rows=decode_rows)
    assert rows_of(dealt) == rows_of(whole)
    assert dealt.truncated.tolist() == whole.truncated.tolist()
    torch.testing.assert_close(dealt.log_prob, whole.log_prob, rtol=0, atol=1e-6)


def test_samples_do_not_depend_on_the_company(model):
    noise = uniforms(12, 8)
    together = rows_of(sample(model, RAGGED))
    reordered = rows_of(sample(model, RAGGED[::-1], noise=noise.view(4, 3, 8).flip(0).reshape(12, 8)))
    assert [reordered[9 - row + row % 3 * 2] for row in range(12)] == together
    others = sample(model, [RAGGED[0], [8, 8], [250] * 12], noise=torch.cat([noise[:3], uniforms(6, 8, seed=5)]))
    assert rows_of(others)[:3] == together[:3]


def watch(model) -> list[tuple[int, int]]:
    """Record the shape of the ids of every forward pass."""
    shapes: list[tuple[int, int]] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_a_prompt_is_prefilled_once_for_its_group_and_ended_rows_leave(model):
    shapes = watch(model)
    got = sample(model, RAGGED)
    assert shapes[0] == (4, 9)
    alive = [int((got.lengths > step).sum()) for step in range(1, 8)]
    assert shapes[1:] == [(rows, 1) for rows in alive if rows]
    assert alive[0] < 12


def test_decode_rows_bounds_the_batch_and_keeps_groups_whole(model):
    shapes = watch(model)
    sample(model, RAGGED, ends=(), decode_rows=7)
    assert {rows for rows, width in shapes if width == 1} == {6}
    shapes.clear()
    sample(model, RAGGED[:3], ends=(), decode_rows=2)
    assert {rows for rows, width in shapes if width == 1 and rows > 1} == {3}


def test_a_common_beginning_is_computed_once(model):
    shapes = watch(model)
    sample(model, SAME_START)
    assert shapes[:2] == [(1, 8), (4, 5)]  # all but the last token of the shortest prompt; then the longest rest


def test_log_probabilities_are_those_of_a_full_forward_at_the_sampling_temperature(tiny_model):
    got = sample(tiny_model, RAGGED, temperature=0.7)
    for row, tokens in enumerate(rows_of(got)):
        expected, _ = reference.score(tiny_model, RAGGED[row // 3], tokens, temperature=0.7)
        torch.testing.assert_close(got.log_prob[row, : len(tokens)].double(), expected, rtol=0, atol=1e-4)


def test_generation_leaves_the_model_as_it_was(model):
    before = rows_of(sample(model, RAGGED))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    model.config.use_cache = False
    # what a user's generation config says has no part in it
    model.generation_config.update(temperature=0.01, top_k=1, do_sample=False, max_new_tokens=1, eos_token_id=99)
    settings = model.generation_config.to_dict()
    got = sample(model, RAGGED)
    assert rows_of(got) == before
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is False
    assert model.generation_config.to_dict() == settings
    assert not got.log_prob.requires_grad
    assert torch.is_grad_enabled()
    sample(model.eval(), RAGGED)
    assert not any(module.training for module in model.modules())


def test_errors_say_what_is_wrong_and_leave_the_mode_alone(model):
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        sample(model, [[1], []], noise=uniforms(6, 8))
    with pytest.raises(ValueError, match=r"`uniforms` of shape \(3, 8\), got \(3, 7\)"):
        sample(model, [[1]], noise=uniforms(3, 7))
    with pytest.raises(ValueError, match=r"`uniforms` of shape \(1, 2\), got None"):
        generate_groups(model, [[1]], group_size=1, max_new_tokens=2, eos_ids=(), pad_id=0)
    model.train()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="logits are NaN or infinite"):
            sample(model, RAGGED, temperature=temperature)
    assert model.training


def test_greedy_needs_no_random_numbers(model):
    got = generate_groups(
        model, RAGGED, group_size=1, max_new_tokens=4, eos_ids=(), pad_id=PAD, temperature=0.0, uniforms=None
    )
    assert got.ids.tolist() == [
        reference.complete(model, prompt, [0.0] * 4, ends=(), temperature=0.0)[0] for prompt in RAGGED
    ]


def test_sampled_counts_follow_the_exact_probabilities():
    logits = torch.tensor([2.0, -1.0, 0.5, float("-inf"), 0.0, -3.0])
    count = 20_000
    for temperature in (1.0, 0.5):
        exact = (logits.double() / temperature).softmax(-1)
        # evenly spread numbers: every count is exact up to one at either end of its interval
        even = (torch.arange(count) + 0.5) / count
        token, _ = sample_tokens(logits.expand(count, 6), even, temperature=temperature)
        assert (torch.bincount(token, minlength=6) - count * exact).abs().max() <= 1
        assert bool((token.diff() >= 0).all())
        # random numbers: chi-square with 4 degrees of freedom, 18.5 is its 99.9 % point
        token, _ = sample_tokens(logits.expand(count, 6), uniforms(1, count)[0], temperature=temperature)
        seen, expected = torch.bincount(token, minlength=6), count * exact
        live = expected > 0
        assert float(((seen - expected)[live] ** 2 / expected[live]).sum()) < 18.5
        assert int(seen[~live].sum()) == 0


@pytest.mark.parametrize("size", [4, 5000])
def test_tokens_without_probability_are_never_drawn(size):
    never = float("-inf")
    middle = torch.randn(size, generator=torch.Generator().manual_seed(1))
    logits = torch.cat([torch.full((3,), never), middle, torch.full((3,), never)])
    last = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    # 1 itself is not in [0, 1), but float64 numbers just below it become it in float32
    edges = torch.stack([torch.tensor(0.0), torch.tensor(1e-30), last, torch.tensor(1.0)])
    token, log_prob = sample_tokens(logits.expand(4, -1), edges, temperature=1.0)
    assert token[:2].tolist() == [3, 3]
    assert token[2:].ge(3).all() and token[2:].lt(3 + size).all()
    assert log_prob.isfinite().all()
    if size == 4:
        assert token[2:].tolist() == [6, 6]


def test_a_tail_too_small_for_float32_ends_at_a_token_that_has_mass():
    logits = torch.tensor([[0.0, -40.0, -90.0, -200.0]])  # 1 + e^-40 is 1 in float32; e^-200 is 0
    token, log_prob = sample_tokens(logits, torch.tensor([1.0]), temperature=1.0)
    assert token.tolist() == [0]
    assert log_prob.tolist() == [0.0]


def test_top_p_keeps_the_smallest_set_and_reports_the_full_distribution():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    count = 7000
    even = ((torch.arange(count) + 0.5) / count).float()
    # 0.4 + 0.3 = 0.7 >= 0.65: tokens 1 and 3, with 4/7 and 3/7
    token, log_prob = sample_tokens(probs.log().expand(count, 4), even, temperature=1.0, top_p=0.65)
    assert torch.bincount(token, minlength=4).tolist() == pytest.approx([0, 4000, 0, 3000], abs=1)
    torch.testing.assert_close(log_prob, probs.log()[token])
    # 0.7 is not enough for 0.75, so the next token comes in whole
    token, _ = sample_tokens(probs.log().expand(count, 4), even, temperature=1.0, top_p=0.75)
    assert sorted(set(token.tolist())) == [1, 2, 3]
    token, _ = sample_tokens(probs.log().expand(count, 4), even, temperature=1.0, top_p=1e-9)
    assert set(token.tolist()) == {1}


def test_temperature_zero_is_argmax_with_log_probabilities_at_temperature_one():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    token, log_prob = sample_tokens(logits, None, temperature=0.0)
    assert token.tolist() == [1]
    torch.testing.assert_close(log_prob, logits.log_softmax(-1)[:, 1])
    with pytest.raises(ValueError, match="temperature 0.5 needs one uniform number per row"):
        sample_tokens(logits, None, temperature=0.5)


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    token, log_prob = sample_tokens(logits, torch.tensor([0.3, 0.9]), temperature=1.0)
    expected = logits.double().log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(log_prob.double(), expected, rtol=0, atol=1e-5)


def same(one: Tensor | None, other: Tensor | None) -> None:
    assert one is not None
    assert other is not None
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_growing_cache_holds_what_the_dynamic_cache_holds(model):
    random = torch.Generator().manual_seed(0)
    growing, plain = growing_cache(model), DynamicCache(config=model.config)
    assert [type(layer) for layer in growing.layers] == [GrowingLayer] * 2
    rows = 2

    def both(method: str, *arguments) -> None:
        for cache in (growing, plain):
            getattr(cache, method)(*arguments)

    for added in (5, 1, 1, "repeat", 1, 3, "select", 1, 1, 1, 9, "select", "repeat", 1, 1, 1, 1, 1, 1):
        match added:
            case "repeat":
                both("batch_repeat_interleave", 3)
                rows *= 3
            case "select":
                kept = torch.arange(rows)[torch.rand(rows, generator=random) < 0.7]
                both("batch_select_indices", kept)
                rows = len(kept)
            case int():
                keys, values = (torch.randn(rows, 2, added, 8, generator=random) for _ in range(2))
                for layer in range(2):
                    got, expected = (cache.update(keys + layer, values, layer) for cache in (growing, plain))
                    same(got[0], expected[0])
                    same(got[1], expected[1])
        for one, other in zip(growing.layers, plain.layers, strict=True):
            same(one.keys, other.keys)
            same(one.values, other.values)
        assert growing.get_seq_length() == plain.get_seq_length()
    assert rows > 1


def test_the_growing_cache_seldom_copies(model):
    cache = growing_cache(model)
    storages = set()
    for _ in range(200):
        cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0)
        layer = cache.layers[0]
        assert isinstance(layer, GrowingLayer)
        storages.add(layer.storage[0].data_ptr())
    assert len(storages) < 20


def test_a_sliding_window_keeps_its_own_cache_and_its_own_numbers():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=120,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
        initializer_range=0.3,
        pad_token_id=PAD,
    )
    model = MistralForCausalLM(config).double().eval()
    assert not any(isinstance(layer, GrowingLayer) for layer in growing_cache(model).layers)
    prompts = [[*HEADER, 1], [*HEADER, 2, 3, 4], [9, 8]]
    for case in (prompts, prompts[:2]):
        got = sample(model, case, group_size=2, ends=tuple(range(20)))
        noise = uniforms(len(case) * 2, 8).tolist()
        expected = [
            reference.complete(model, case[row // 2], noise[row], ends=range(20))[0] for row in range(len(case) * 2)
        ]
        assert rows_of(got) == expected
