"""The policy: packing chosen or refused, micro-batches that add up, references, old log-probabilities, state."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rlalign import config
from rlalign.config import ConfigError
from rlalign.functional.masked import aggregate, aggregate_denominator
from rlalign.llm.policy import Policy, silence_dropout
from rlalign.llm.scoring import Scorer
from tests.llm.hand_made import completion_of, hand_made, prompt_of, ragged
from tests.reference import sampling as reference

AGGREGATIONS = ["token", "sequence_mean", "sequence_sum", "group", "constant"]
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(autouse=True)
def a_fresh_accelerator() -> Iterator[None]:
    """Its precision is a setting of the whole process, fixed by the first one made."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def build(tiny_model, tiny_tokenizer):
    """A policy on the CPU; settings are nested as in a YAML."""

    def made(model: Any = None, /, *, peft_config: Any = None, **settings: Any) -> Policy:
        cfg = config.build({"method": "policy_gradient", "model": {"name": "tiny", "device": "cpu"}, **settings})
        return Policy.build(tiny_model if model is None else model, tiny_tokenizer, cfg, peft_config)

    return made


def expected_scores(model, rollout, temperature: float = 1.0) -> Tensor:
    """Row by row, token by token, without packing or padding."""
    total = torch.zeros(rollout.batch_size, rollout.time, dtype=torch.float64)
    with torch.no_grad():
        for row in rollout.mask.any(1).nonzero().squeeze(1).tolist():
            written = completion_of(rollout, row)
            total[row, : len(written)] = reference.score(model, prompt_of(rollout, row), written, temperature)[0]
    return total.masked_fill(~rollout.mask, 0)


# Packing.


def test_the_packed_path_is_taken_after_it_agreed_once(build):
    policy = build()
    assert policy.packing is None
    policy.complete(ragged())
    assert policy.packing == policy.scorer.packing == "prefix_shared"
    assert policy.new_notes() == []


def test_a_model_that_takes_no_4d_mask_is_trained_on_padded_rows_with_a_note(build, tiny_model):
    def refuse(module, args, kwargs):
        if kwargs["attention_mask"] is not None and kwargs["attention_mask"].ndim == 4:
            raise ValueError("only padding masks here")

    tiny_model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    policy = build(kl={"coef": 0.1})
    got = policy.complete(ragged())
    assert policy.packing == policy.scorer.packing == "padded"
    assert policy.new_notes() == [
        "Packing is off (the model does not take the packed layout): one padded row per completion."
    ]
    assert policy.new_notes() == []
    assert got.log_prob_ref is not None
    torch.testing.assert_close(got.log_prob_ref.double(), expected_scores(tiny_model, ragged()), rtol=0, atol=1e-4)


def cohere(logit_scale: float) -> CohereForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = CohereConfig(vocab_size=259, **sizes, logit_scale=logit_scale, initializer_range=0.3, pad_token_id=0)
    return CohereForCausalLM(settings).eval()


def test_a_model_whose_packed_numbers_are_wrong_is_trained_on_padded_rows_with_a_note(build):
    policy = build(cohere(0.25))
    policy.complete(ragged())
    assert policy.packing == "padded"
    (note,) = policy.new_notes()
    assert "log-probabilities differ by" in note
    torch.testing.assert_close(
        policy.score(ragged(), policy.scorer).double(), expected_scores(policy.model, ragged()), rtol=0, atol=1e-4
    )
    same = build(cohere(1.0))
    same.complete(ragged())
    assert same.packing == "prefix_shared"


def test_a_first_batch_without_a_decision_is_still_a_check(build):
    policy = build(cohere(0.25))
    empty = ragged()
    policy.complete(replace(empty, mask=torch.zeros_like(empty.mask)))
    assert policy.packing == "padded"


def test_packing_can_be_set_and_is_refused_where_it_cannot_work(build, tiny_model):
    assert build(packing="padded").packing == "padded"
    assert build(packing="prefix_shared").packing == "prefix_shared"
    tiny_model.config.sliding_window = 4
    with pytest.raises(ConfigError, match=r"`packing: prefix_shared`.*sliding window of 4.*`packing: auto`"):
        build(packing="prefix_shared")
    policy = build()
    policy.complete(ragged())
    assert policy.packing == "padded"
    assert "sliding window of 4" in policy.new_notes()[0]


# Micro-batches.


def eight() -> Any:
    """Two groups of four completions with equal lengths, so that a budget cuts them where it is told to."""
    tokens = torch.arange(8 * 3).view(2, 4, 3) + 40
    return hand_made([[5, 6], [7, 8]], tokens.tolist(), masked=[(1, 1), (6, 0), (6, 1)])


def gradient(policy: Policy, rollout, aggregation, *, processes: int = 1, signal=None, counted=None) -> Tensor:
    """Of a loss whose terms differ for every decision, 0 in rows without signal; `counted` gives the denominator."""
    policy.model.zero_grad()
    counted, shape = rollout if counted is None else counted, (rollout.batch_size, rollout.time)
    factor = rollout.inputs["completion_ids"].value.double().sin() + 0.1 * torch.arange(rollout.time)
    factor = factor if signal is None else factor * signal[:, None]
    count = (
        24 if aggregation == "constant" else aggregate_denominator(counted.mask, mode=aggregation, group=counted.group)
    )
    for layout, share in policy.shares(rollout, whole_groups=aggregation == "group"):
        log_prob, entropy = (layout.scatter(values, shape) for values in policy.forward(layout))
        here = layout.scatter(torch.ones(len(layout.target)), shape) > 0
        loss = aggregate(
            factor * (log_prob + 0.1 * entropy),
            here,
            weights=1 + torch.arange(rollout.time, dtype=torch.float64).expand(shape),
            mode=aggregation,
            group=rollout.group,
            denominator=count,
        )
        (share * loss / processes).backward()  # processes average their gradients
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("packing", ["prefix_shared", "padded"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_eight_times_one_is_four_times_two_is_once_eight(build, tiny_model, aggregation, packing):
    tiny_model.double()
    gradients, counts = {}, {}
    # Prompt 2 and completion 3: 5 tokens alone. Padded, n rows cost 5 n; packed, 2 + 3 n.
    for budget in (5, 10, 20, 1000):
        policy = build(packing=packing, optim={"micro_batch_tokens": budget})
        counts[budget] = len(policy.shares(eight(), whole_groups=False))
        gradients[budget] = gradient(policy, eight(), aggregation)
    assert counts == {5: 8, 10: 4, 20: 2, 1000: 1}
    for budget in (5, 10, 20):
        difference = (gradients[budget] - gradients[1000]).norm() / gradients[1000].norm()
        assert float(difference) < 1e-6  # transformers normalises in float32
    assert gradients[1000].norm() > 1e-3


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_groups_without_signal_can_be_dropped_when_they_stay_in_the_denominator(build, tiny_model, aggregation):
    tiny_model.double()
    policy, rollout = build(packing="prefix_shared"), ragged()
    signal = torch.isin(rollout.group, torch.tensor([3, 9]))
    whole = gradient(policy, rollout, aggregation, signal=signal)
    kept = gradient(policy, rollout.select(signal), aggregation, signal=signal[signal], counted=rollout)
    assert float((kept - whole).norm() / whole.norm()) < 1e-6
    fewer = gradient(policy, rollout.select(signal), aggregation, signal=signal[signal])
    assert float((fewer - whole).norm() / whole.norm()) > 0.01 or aggregation == "constant"


def test_whole_groups_stay_in_one_micro_batch_whatever_the_budget(build):
    for packing in ("prefix_shared", "padded"):
        for rollout in (eight(), ragged(), hand_made([[1] * 50], [[[2], [3]]])):
            policy = build(packing=packing, optim={"micro_batch_tokens": 1})
            shape = (rollout.batch_size, rollout.time)
            for layout, _ in policy.shares(rollout, whole_groups=True):
                here = layout.scatter(torch.ones(len(layout.target)), shape) > 0
                groups = rollout.group[here.any(1)].unique()
                assert torch.equal(here, rollout.mask & torch.isin(rollout.group, groups)[:, None])


def pretend(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    monkeypatch.setattr(Accelerator, "process_index", rank)


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("aggregation", ["token", "group"])
def test_the_mean_over_processes_is_the_gradient_of_one(build, tiny_model, monkeypatch, aggregation, processes):
    tiny_model.double()
    rollout = ragged()
    policy = build(packing="prefix_shared", optim={"micro_batch_tokens": 16})
    alone = gradient(policy, rollout, aggregation)
    total, seen, rounds = torch.zeros_like(alone), torch.zeros(rollout.batch_size, rollout.time), set()
    for rank in range(processes):
        pretend(monkeypatch, rank, processes)
        total += gradient(policy, rollout, aggregation, processes=processes)
        shares = policy.shares(rollout, whole_groups=aggregation == "group")
        rounds.add(len(shares))
        for layout, share in shares:
            assert share in (0.0, float(processes))
            seen += layout.scatter(torch.ones(len(layout.target)), seen.shape) * (share > 0)
    assert torch.equal(seen, rollout.mask.float())  # every decision counts once
    assert len(rounds) == 1  # no process waits for another
    assert float((total - alone).norm() / alone.norm()) < 1e-6


# References.


def moved(policy: Policy) -> None:
    """Train, roughly."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))


def test_without_a_coefficient_no_reference_is_made(build, monkeypatch):
    never = SimpleNamespace(deepcopy=lambda model: pytest.fail("a copy was made"))
    monkeypatch.setattr("rlalign.llm.policy.copy", never)
    for peft in (None, LORA):
        policy = build(kl={"coef": 0.0}, peft=peft)
        assert policy.reference is None
        assert policy.complete(ragged()).log_prob_ref is None


def test_the_reference_of_a_full_model_is_a_frozen_copy(build, tiny_model):
    before = expected_scores(tiny_model, ragged(), 0.7)
    policy = build(kl={"coef": 0.1}, rollout={"temperature": 0.7})
    moved(policy)
    got = policy.complete(ragged()).log_prob_ref
    assert got is not None
    torch.testing.assert_close(got.double(), before, rtol=0, atol=1e-4)
    assert (expected_scores(tiny_model, ragged(), 0.7) - before).abs().max() > 0.01
    with policy.reference() as scorer:
        assert not any(parameter.requires_grad for parameter in scorer.parameters())
        assert not scorer.model.training
    assert sum(p.numel() for p in policy.forward.parameters()) == sum(p.numel() for p in tiny_model.parameters())


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_the_reference_of_an_adapted_model_is_the_model_without_it_only_if_it_starts_at_zero(build, tiny_model, init):
    base = expected_scores(tiny_model, ragged())
    policy = build(kl={"coef": 0.1}, peft={**LORA, "init_lora_weights": init})
    before = expected_scores(policy.model, ragged())
    trainable = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    moved(policy)
    after = expected_scores(policy.model, ragged())
    got = policy.complete(ragged()).log_prob_ref
    assert got is not None
    torch.testing.assert_close(got.double(), before, rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 0.01
    assert bool((before - base).abs().max() > 0.01) == (init is False)
    with policy.reference() as scorer:
        assert (scorer is policy.scorer) == (init is not False)  # no second model where none is needed
    # The adapter is back on, and still the only thing that trains.
    torch.testing.assert_close(expected_scores(policy.model, ragged()), after, rtol=0, atol=0)
    assert [name for name, p in policy.model.named_parameters() if p.requires_grad] == trainable
    assert trainable


def test_trained_biases_keep_an_adapter_from_being_switched_off(build):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes, attention_bias=True, initializer_range=0.2)).eval()
    before = expected_scores(model, ragged())
    policy = build(model, kl={"coef": 0.1}, peft={**LORA, "bias": "all"})
    moved(policy)
    got = policy.complete(ragged()).log_prob_ref
    assert got is not None
    torch.testing.assert_close(got.double(), before, rtol=0, atol=1e-4)


def test_an_adapter_that_the_model_came_with_is_part_of_the_reference(build, tiny_model):
    model = get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", **LORA, init_lora_weights=False))
    before = expected_scores(model.eval(), ragged())
    policy = build(model, kl={"coef": 0.1})
    moved(policy)
    got = policy.complete(ragged()).log_prob_ref
    assert got is not None
    torch.testing.assert_close(got.double(), before, rtol=0, atol=1e-4)


# Old log-probabilities.


@pytest.mark.parametrize("optim", [{"update_epochs": 2}, {"minibatches": 2}, {}])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_old_log_probs_are_computed_again_only_for_several_updates_in_low_precision(build, optim, precision):
    policy = build(optim=optim, accelerate={"mixed_precision": precision}, packing="prefix_shared")
    rollout = replace(ragged(), log_prob_old=torch.full((12, 7), -9.0))
    got = policy.complete(rollout).log_prob_old
    if optim and precision == "bf16":
        torch.testing.assert_close(got, policy.score(rollout, policy.forward), rtol=0, atol=0)
        full = Scorer(policy.model, temperature=1.0, packing="prefix_shared")
        assert (got - policy.score(rollout, full)).abs().max() > 1e-4  # they are those of the precision that trains
    else:
        assert got.eq(-9.0).all()


def test_a_reference_under_an_adapter_computes_in_the_precision_that_trains(build):
    policy = build(kl={"coef": 0.1}, peft=LORA, accelerate={"mixed_precision": "bf16"}, packing="prefix_shared")
    rollout = policy.complete(ragged())
    assert rollout.log_prob_ref is not None
    # a fresh adapter changes nothing, so the divergence is exactly zero
    torch.testing.assert_close(rollout.log_prob_ref, policy.score(rollout, policy.forward), rtol=0, atol=0)


def test_sampling_and_scoring_agree_at_the_temperature_of_the_rollout(build):
    policy = build(rollout={"temperature": 0.6})
    prompts = [[5, 6, 7], [9]]
    noise = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    sampled = policy.sample(prompts, group_size=3, max_new_tokens=5, temperature=0.6, uniforms=noise)
    groups = [
        [row[:length] for row, length in zip(ids, lengths, strict=True)]
        for ids, lengths in zip(sampled.ids.view(2, 3, -1).tolist(), sampled.lengths.view(2, 3).tolist(), strict=True)
    ]
    rollout = policy.complete(hand_made(prompts, groups))
    torch.testing.assert_close(policy.score(rollout, policy.forward), sampled.log_prob, rtol=0, atol=1e-4)


def test_stop_texts_end_completions_like_end_tokens(build, tiny_tokenizer):
    policy = build(rollout={"stop": ["\n", "z"]})
    newline, z = (tiny_tokenizer(text)["input_ids"][0] for text in "\nz")
    assert policy.end_ids == (tiny_tokenizer.eos_token_id, newline, z)
    noise = torch.rand(100, 12, generator=torch.Generator().manual_seed(0))
    got = policy.sample([[5, 6, 7]], group_size=100, max_new_tokens=12, temperature=1.0, uniforms=noise)
    last = got.ids.gather(1, got.lengths[:, None] - 1).squeeze(1)
    assert set(last[~got.truncated].tolist()) == {tiny_tokenizer.eos_token_id, newline, z}
    with pytest.raises(ConfigError, match=r"`rollout.stop` takes texts of one token; 'ab' is 2 tokens"):
        build(rollout={"stop": ["ab"]})


# Dropout, checkpointing, state.


def with_dropout() -> GPT2LMHeadModel:
    settings = GPT2Config(
        vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2,
        attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(settings)


def test_dropout_is_silent_in_scoring_whatever_mode_the_model_came_in(build, tiny_model):
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    for model in (with_dropout().train(), tiny_model.train()):
        for checkpointing in (False, True):
            policy = build(model, model={"name": "x", "device": "cpu", "gradient_checkpointing": checkpointing})
            assert model.training == checkpointing
            one, two = (policy.score(ragged(), policy.scorer) for _ in range(2))
            torch.testing.assert_close(one, two, rtol=0, atol=0)
            torch.testing.assert_close(one.double(), expected_scores(model.eval(), ragged()), rtol=0, atol=1e-4)


def test_every_kind_of_dropout_is_silenced():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))
    attention = nn.Linear(1, 1)
    attention.attention_dropout = 0.3  # pyright: ignore[reportArgumentType]
    model.append(attention)
    silence_dropout(model, checkpointing=True)
    assert model.training
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.0, 0.0]
    assert attention.attention_dropout == 0.0
    silence_dropout(model, checkpointing=False)
    assert not model.training


@pytest.mark.parametrize("peft", [None, LORA])
def test_state_holds_what_trains_and_the_chosen_packing(build, peft):
    policy = build(cohere(0.25), peft=peft)
    policy.complete(ragged())
    state = policy.state_dict()
    assert state["packing"] == "padded"
    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert set(state["weights"]) == names
    assert all("lora" in name for name in names) == (peft is not None)
    saved = {name: value.clone() for name, value in state["weights"].items()}
    scores = policy.score(ragged(), policy.scorer)
    moved(policy)
    assert (policy.score(ragged(), policy.scorer) - scores).abs().max() > 0.01
    other = build(cohere(0.25), peft=peft)
    for target in (policy, other):
        target.load_state_dict({"weights": saved, "packing": "padded"})
        assert target.packing == target.scorer.packing == "padded"
    torch.testing.assert_close(policy.score(ragged(), policy.scorer), scores, rtol=0, atol=0)
    if peft is None:
        torch.testing.assert_close(other.score(ragged(), other.scorer), scores, rtol=0, atol=0)


def test_a_resumed_policy_packs_as_the_saved_one_did(build):
    saved = build()
    assert saved.state_dict()["packing"] is None
    saved.complete(ragged())
    resumed = build()
    resumed.load_state_dict(saved.state_dict())
    assert resumed.packing == resumed.scorer.packing == "prefix_shared"


def test_state_of_another_model_is_refused(build):
    policy = build()
    weights = policy.state_dict()["weights"]
    name = next(iter(weights))
    with pytest.raises(ValueError, match=f"`{name}` is in only one of the two"):
        policy.load_state_dict({"weights": {k: v for k, v in weights.items() if k != name}, "packing": None})
    with pytest.raises(ValueError, match=rf"`{name}` is \[3\] in the checkpoint"):
        policy.load_state_dict({"weights": {**weights, name: torch.zeros(3)}, "packing": None})


def test_what_cannot_be_built_is_refused_by_name(build, tiny_model, tiny_tokenizer):
    cfg = config.build({"method": "policy_gradient", "model": {"name": "x", "device": "cpu"}})
    with pytest.raises(ValueError, match="pass `tokenizer=`"):
        Policy.build(tiny_model, None, cfg, None)
    with pytest.raises(ValueError, match="learns prompts"):
        build(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    adapted = get_peft_model(tiny_model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    assert isinstance(adapted, PeftModel)
    with pytest.raises(ValueError, match="already carries an adapter"):
        build(adapted, peft=LORA)


def test_an_adapter_given_as_an_argument_wins_over_the_config(build):
    model = build(peft=LORA, peft_config=LoraConfig(task_type="CAUSAL_LM", r=7, target_modules=["q_proj"])).model
    assert {p.shape[0] for name, p in model.named_parameters() if "lora_A" in name} == {7}
