"""Sampling elsewhere: what a server is sent, what comes back, and that training corrects for the difference.

The stand-in for TRL's client holds a model of its own and samples from whatever weights it was sent last.
"""

import copy
import inspect
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DistributedType
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor

from rlalign.config import ConfigError
from rlalign.llm import engine as engines
from rlalign.llm.collect import row_uniforms
from rlalign.llm.config import PolicyGradientConfig, RolloutConfig, VLLMServer
from rlalign.llm.consistency import check_consistency
from rlalign.llm.engine import (
    Engine,
    EngineError,
    TransformersEngine,
    VLLMServerEngine,
    address,
    connect_client,
    generations_from,
)
from rlalign.llm.generate import generate_groups
from rlalign.llm.served_weights import announcements, served_weights
from rlalign.training.journal import Journal
from tests.llm.tiny_runs import HELD_OUT, largest_difference, make_trainer, settings, weights

SERVED = {"engine": {"type": "vllm_server"}}


class FakeClient:
    """Answers as TRL's client does, from a model of its own.

    Args:
        shift: Added to every log-probability it reports, as a server of lower precision might.
        silent: Report no log-probabilities.
    """

    def __init__(self, model: Any, *, shift: float = 0.0, silent: bool = False):
        self.model, self.shift, self.silent = copy.deepcopy(model), shift, silent
        self.requests: list[dict[str, Any]] = []
        self.calls: list[str] = []

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], named: Iterator[tuple[str, Tensor]]
    ) -> None:
        self.calls.append("weights")
        # The real one collects tensors into chunks before any leaves, so all must stay valid until the end.
        received = list(named)
        assert [(name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in received] == metadata
        own = dict(self.model.named_parameters())
        assert [name for name, _ in received] == list(own)
        with torch.no_grad():
            for name, tensor in received:
                own[name].copy_(tensor)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    def generate(self, **request: Any) -> dict[str, Any]:
        self.calls.append("generate")
        prompts, rows, time = request["prompts"], request["n"], request["max_tokens"]
        uniforms = row_uniforms(len(self.requests), range(len(prompts)), group_size=rows, time=time, seed=0)
        self.requests.append(request)
        ends = request["generation_kwargs"]["stop_token_ids"]
        options = {"group_size": rows, "max_new_tokens": time, "eos_ids": ends, "pad_id": 0, "uniforms": uniforms}
        made = generate_groups(self.model, prompts, temperature=request["temperature"], **options)
        ids = [row[:n] for row, n in zip(made.ids.tolist(), made.lengths.tolist(), strict=True)]
        reported = [
            [[value + self.shift] for value in row[:n]]
            for row, n in zip(made.log_prob.tolist(), made.lengths.tolist(), strict=True)
        ]
        return {
            "prompt_ids": prompts,
            "completion_ids": ids,
            "logprobs": None if self.silent else reported,
            "logprob_token_ids": None if self.silent else [[[token] for token in row] for row in ids],
        }


@pytest.fixture
def served(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """A trainer whose config asks for a server, and the client it got."""

    def make(*, shift: float = 0.0, silent: bool = False, peft_config: Any = None, eval_dataset: Any = None, **changes):
        client = FakeClient(tiny_model, shift=shift, silent=silent)
        monkeypatch.setattr(engines, "connect_client", lambda cfg, accelerator: client)
        changes["rollout"] = SERVED | changes.get("rollout", {})
        options = {"peft_config": peft_config, "eval_dataset": eval_dataset}
        return make_trainer(tiny_model, tiny_tokenizer, tmp_path / "served", **options, **changes), client

    return make


# --- what is sent --------------------------------------------------------------------------------------------------


def test_a_server_that_computes_the_same_changes_nothing(tiny_model, tiny_tokenizer, tmp_path, served):
    plain = make_trainer(copy.deepcopy(tiny_model), tiny_tokenizer, tmp_path / "plain").fit()
    trainer, _ = served()
    before = weights(trainer.policy.model)
    trainer.fit()
    assert largest_difference(before, weights(trainer.policy.model)) > 1e-4
    assert largest_difference(weights(plain.policy.model), weights(trainer.policy.model)) < 1e-6


def test_weights_go_out_before_every_rollout(served):
    trainer, client = served(total_steps=3)
    for _ in trainer.steps():
        sampled_from = weights(client.model)
    assert client.calls == ["weights", "reset", "generate"] * 3
    assert largest_difference(sampled_from, weights(trainer.policy.model)) > 1e-5  # the last update came after
    trainer.policy.engine.update_weights(trainer.policy.model)
    assert largest_difference(weights(client.model), weights(trainer.policy.model)) == 0.0


def test_the_server_gets_token_ids_and_nothing_that_bends_the_distribution(served):
    trainer, client = served(rollout={"temperature": 0.7})
    trainer.collect()
    (request,) = client.requests
    assert all(isinstance(token, int) for prompt in request["prompts"] for token in prompt)
    assert [request[name] for name in ("n", "max_tokens", "temperature")] == [4, 6, 0.7]
    bends = {name: request[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")}
    assert bends == {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert request["logprobs"] == 0  # the sampled token's alone
    assert request["generation_kwargs"] == {"stop_token_ids": list(trainer.policy.end_ids)}


def test_trl_takes_every_argument_that_we_send(served):
    from trl.generation.vllm_client import VLLMClient
    from trl.scripts.vllm_serve import ScriptArguments, build_command

    trainer, client = served()
    trainer.collect()
    inspect.signature(VLLMClient.generate).bind(client, **client.requests[0])
    inspect.signature(VLLMClient.update_named_params).bind(client, [], iter([]))
    inspect.signature(VLLMClient.reset_prefix_cache).bind(client)
    inspect.signature(VLLMClient.get_server_info).bind(client)
    inspect.signature(VLLMClient.init_communicator).bind(client, device="cuda")
    inspect.signature(VLLMClient).bind(base_url="http://127.0.0.1:8000", group_port=1, connection_timeout=1.0)
    command = " ".join(build_command(ScriptArguments(model="m", host="127.0.0.1", port=8000)))
    assert "--host 127.0.0.1 --port 8000" in command
    assert "--logprobs-mode processed_logprobs" in command


def test_evaluation_and_greedy_baselines_stay_in_the_process(served):
    trainer, client = served(eval_dataset=HELD_OUT, advantage={"type": "greedy_baseline"})
    trainer.evaluate()
    assert client.calls == []
    rollout = trainer.collect()
    assert rollout.baseline_reward is not None
    assert client.calls.count("generate") == 1


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny_model):
    """An adapter on attention and a fully trained norm, both away from where they began."""
    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], modules_to_save=["norm"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_an_adapter_is_served_merged_under_the_plain_names(tiny_model, adapted):
    ids = torch.tensor([[1, 2, 3, 4]])
    client = FakeClient(copy.deepcopy(adapted).merge_and_unload())
    for parameter in client.model.parameters():
        parameter.data.zero_()
    client.update_named_params(announcements(adapted), served_weights(adapted))
    torch.testing.assert_close(client.model(ids).logits, adapted(ids).logits, rtol=0, atol=1e-5)


def test_serving_leaves_the_frozen_weights_as_they_are_to_the_last_bit(adapted):
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    for _ in range(3):
        assert len(list(served_weights(adapted))) == len(announcements(adapted))
    after = adapted.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module.merged for module in adapted.modules() if "merged_adapters" in vars(module))


def test_an_adapter_trains_through_a_server(served):
    trainer, client = served(peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.fit()
    trainer.policy.engine.update_weights(trainer.policy.model)
    ids = torch.tensor([[1, 2, 3]])
    trained = trainer.policy.model(ids).logits
    torch.testing.assert_close(client.model(ids).logits, trained, rtol=0, atol=1e-5)
    with trainer.policy.model.disable_adapter():
        assert (trainer.policy.model(ids).logits - trained).abs().max() > 1e-3


def test_what_cannot_be_merged_is_refused(tiny_model):
    model = get_peft_model(tiny_model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="PromptTuningConfig cannot be merged.*use LoRA"):
        announcements(model)


# --- what comes back -----------------------------------------------------------------------------------------------


def answer(**changes: Any) -> dict[str, Any]:
    """Two prompts, two completions each; 9 ends a completion."""
    return {
        "prompt_ids": [[1, 2], [3]],
        "completion_ids": [[5, 9], [6, 7, 8], [9], [5]],
        "logprobs": [[[-1.0], [-2.0]], [[-0.5], [None], [-0.25]], [[-3.0]], [[-0.1, -4.0]]],
        "logprob_token_ids": [[[5], [9]], [[6], [7], [8]], [[9]], [[4, 5]]],
    } | changes


def read(made: dict[str, Any], prompts: Sequence[Sequence[int]] = ((1, 2), (3,))) -> Any:
    return generations_from(made, prompts, group_size=2, eos_ids=[9], pad_id=0)


def test_an_answer_is_laid_out_with_its_token_ids_as_they_are():
    got = read(answer())
    assert got.ids.tolist() == [[5, 9, 0], [6, 7, 8], [9, 0, 0], [5, 0, 0]]
    assert got.lengths.tolist() == [2, 3, 1, 1]
    # The last completion is shorter than the limit and has no end: the server ran out of context.
    assert got.truncated.tolist() == [False, True, False, True]
    nan = math.nan
    # The last completion's token 5 is only second among the candidates at its position.
    expected = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, nan, -0.25], [-3.0, 0.0, 0.0], [-4.0, 0.0, 0.0]])
    torch.testing.assert_close(got.log_prob, expected, equal_nan=True)
    assert got.external


def test_a_server_without_log_probs_gives_nan():
    got = read(answer(logprobs=None, logprob_token_ids=None))
    assert got.log_prob.isnan().tolist() == got.mask.tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": [[0, 1, 2], [3]]}, "continued other tokens than it was sent"),
        ({"completion_ids": [[5], [6], [9]]}, "3 completions, 0 of them empty, where 4"),
        ({"completion_ids": [[5], [6], [9], []]}, "4 completions, 1 of them empty"),
    ],
)
def test_an_answer_to_another_question_is_refused(changes, message):
    with pytest.raises(EngineError, match=message):
        read(answer(**changes))


# --- correction ----------------------------------------------------------------------------------------------------


def objective_weights(trainer: Any, rollout: Any) -> Tensor:
    """The weights of all real decisions in the loss of a fresh rollout."""
    batch = trainer.estimator(rollout)
    found = []
    for layout, _ in trainer.policy.shares(batch, whole_groups=False):
        shape = (batch.batch_size, batch.time)
        log_prob, entropy = (layout.scatter(values, shape) for values in trainer.policy.forward(layout))
        here = layout.scatter(torch.ones(len(layout.target)), shape) > 0
        found.append(trainer.objective(batch, log_prob, entropy, here)[1][here])
    return torch.cat(found).detach()


@pytest.mark.parametrize(
    ("shift", "correction", "weight"),
    [
        (0.0, {}, 1.0),
        (-math.log(1.5), {}, 1.5),  # the trainer finds every token 1.5 times as likely as the server said
        (-math.log(3.0), {}, 2.0),  # truncated at the cap
        (math.log(4.0), {}, 0.25),
        (math.log(4.0), {"kind": "masked"}, 0.0),  # below the floor of 0.5
        (-math.log(3.0), {"kind": "none"}, 1.0),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2])
def test_decisions_are_weighted_by_trainer_over_engine(served, shift, correction, weight, epochs):
    trainer, _ = served(shift=shift, correction=correction, optim={"update_epochs": epochs})
    got = objective_weights(trainer, trainer.collect())
    torch.testing.assert_close(got, torch.full_like(got, weight), rtol=1e-4, atol=0)


@pytest.mark.parametrize("changes", [{"optim": {"minibatches": 2}}, {"kl": {"coef": 0.1, "where": "reward"}}])
def test_old_log_probs_are_the_trainers_own_wherever_they_are_read(served, changes):
    trainer, _ = served(shift=-0.3, **changes)
    rollout = trainer.collect()
    mask = rollout.mask
    gap = (rollout.log_prob_old - rollout.log_prob_engine)[mask]
    torch.testing.assert_close(gap, torch.full_like(gap, 0.3), rtol=0, atol=1e-4)
    own = trainer.policy.score(rollout, trainer.policy.forward)
    torch.testing.assert_close(rollout.log_prob_old[mask], own[mask], rtol=0, atol=1e-6)


def test_a_clip_never_sees_the_engines_log_probs(served):
    """Two minibatches, no learning rate to speak of: against the trainer's own numbers nothing is ever clipped."""
    trainer, _ = served(shift=-0.7, optim={"minibatches": 2, "learning_rate": 1e-12})
    *_, last = trainer.steps()
    assert last["policy/clip_low_frac"] == last["policy/clip_high_frac"] == 0.0
    assert last["policy/sampling_gap_nats"] == pytest.approx(0.7, abs=1e-3)


def test_missing_log_probs_mean_no_correction(served, tiny_model, tiny_tokenizer, tmp_path):
    plain = make_trainer(copy.deepcopy(tiny_model), tiny_tokenizer, tmp_path / "plain").fit()
    trainer, _ = served(silent=True)
    *_, last = trainer.steps()
    assert last["policy/sampling_gap_nats"] == last["policy/sampling_gap_max_nats"] == 0.0
    assert largest_difference(weights(plain.policy.model), weights(trainer.policy.model)) < 1e-6


@pytest.mark.parametrize(("shift", "told"), [(-0.05, 1), (-0.01, 0)])
def test_a_gap_is_measured_every_step_and_told_once(served, monkeypatch, shift, told):
    notes: list[str] = []
    monkeypatch.setattr(Journal, "note", lambda self, text: notes.append(text))
    trainer, _ = served(shift=shift, total_steps=3)
    gaps = [metrics["policy/sampling_gap_nats"] for metrics in trainer.steps()]
    assert gaps == pytest.approx([-shift] * 3, abs=1e-4)
    assert sum("Sampling engine and trainer differ by 0.05" in note for note in notes) == told


def test_the_largest_gap_is_reported_beside_the_mean(served):
    trainer, client = served()
    honest = client.generate

    def one_liar(**request):
        made = honest(**request)
        made["logprobs"][0][0][0] -= 2.0
        return made

    client.generate = one_liar
    metrics = next(trainer.steps())
    assert metrics["policy/sampling_gap_max_nats"] == pytest.approx(2.0, abs=1e-3)
    assert 0 < metrics["policy/sampling_gap_nats"] < 0.5


# --- settings and failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "169.254.169.254", "gpu-box", "127.0.0.1.example.org", ""])
def test_other_machines_are_refused_unless_asked_for(host):
    with pytest.raises(ConfigError, match="`rollout.engine`: `host`=.*not this machine.*allow_remote"):
        settings(rollout={"engine": {"type": "vllm_server", "host": host}})
    with pytest.raises(ValueError, match="not this machine"):
        VLLMServer(host=host)
    assert VLLMServer(host=host, allow_remote=True).host == host


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:81"), ("localhost", "http://localhost:81"), ("::1", "http://[::1]:81")],
)
def test_this_machine_is_fine(host, url):
    assert address(VLLMServer(host=host, port=81)) == url


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "m", "device": "cpu"}}, "from CUDA devices only: set `model.device`"),
        ({"rollout": {"decode_rows": 8}}, "`rollout.decode_rows` is for .*transformers"),
        ({"rollout": {"engine": {"port": 70000}}}, "`rollout.engine.port` must be <= 65535"),
        ({"rollout": {"engine": {"hots": "::1"}}}, "`rollout.engine.hots` is not a setting; did you mean .*host"),
    ],
)
def test_settings_that_contradict_a_server_are_refused(changes, message):
    engine = SERVED["engine"] | changes.get("rollout", {}).get("engine", {})
    changes["rollout"] = changes.get("rollout", {}) | {"engine": engine}
    with pytest.raises(ConfigError, match=message):
        check_consistency(settings(**changes))


class StandIn(Accelerator):
    """An accelerator on a CUDA device that is not there."""

    device = torch.device("cuda", 0)
    distributed_type = DistributedType.NO
    is_main_process = True
    waited = 0

    def __init__(self, **changes: Any):
        vars(self).update(changes)

    def wait_for_everyone(self) -> None:
        self.waited += 1


@pytest.mark.parametrize(("module", "extra"), [("trl", "llm"), ("vllm", "vllm")])
def test_a_missing_package_gives_the_pip_line(monkeypatch, module, extra):
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(ConfigError, match=rf"needs the package {module} .*pip install 'rlalign\[{extra}\]'"):
        connect_client(VLLMServer(), StandIn())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": torch.device("cpu")}, "CUDA devices only, and this process trains on cpu.*transformers"),
        ({"distributed_type": DistributedType.FSDP}, "FSDP shards them"),
    ],
)
def test_a_machine_that_cannot_send_weights_is_refused(monkeypatch, changes, message):
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match=message):
        connect_client(VLLMServer(), StandIn(**changes))


class FakeVLLMClient:
    """Records how TRL's client is made and joined."""

    def __init__(self, mode: str, record: list[Any]):
        self.mode, self.record = mode, record

    def __call__(self, **options: Any) -> "FakeVLLMClient":
        self.record.append(options)
        return self

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": self.mode}}

    def init_communicator(self, device: torch.device) -> None:
        self.record.append(device)


@pytest.fixture
def connected(monkeypatch):
    """`connect_client` against TRL's client class replaced: what it was asked."""
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.setenv("VLLM_HOST_IP", "to be restored")
    monkeypatch.delenv("VLLM_HOST_IP")

    def connect(cfg: VLLMServer, accelerator: Any, mode: str = "processed_logprobs") -> list[Any]:
        record: list[Any] = []
        monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", FakeVLLMClient(mode, record))
        connect_client(cfg, accelerator)
        return record

    return connect


def test_the_main_process_joins_the_group_that_carries_weights_on_loopback(connected, monkeypatch):
    options, device = connected(VLLMServer(timeout_s=5.0), StandIn())
    assert options == {"base_url": "http://127.0.0.1:8000", "group_port": 51216, "connection_timeout": 5.0}
    assert device == torch.device("cuda", 0)
    assert engines.os.environ["VLLM_HOST_IP"] == "127.0.0.1"


def test_other_processes_only_ask_for_completions(connected):
    assert len(connected(VLLMServer(), StandIn(is_main_process=False))) == 1
    assert "VLLM_HOST_IP" not in engines.os.environ


def test_a_server_on_another_machine_is_not_told_to_use_loopback(connected):
    connected(VLLMServer(host="10.0.0.2", allow_remote=True), StandIn())
    assert "VLLM_HOST_IP" not in engines.os.environ


def test_log_probs_of_another_distribution_are_refused(connected):
    with pytest.raises(EngineError, match="reports `raw_logprobs`.*--logprobs-mode processed_logprobs"):
        connected(VLLMServer(), StandIn(), mode="raw_logprobs")


def test_only_the_main_process_sends_and_all_wait(tiny_model):
    client, accelerator = FakeClient(tiny_model), StandIn(is_main_process=False)
    VLLMServerEngine(VLLMServer(), accelerator, connect=lambda *_: client).update_weights(tiny_model)
    assert (client.calls, accelerator.waited) == ([], 1)


@pytest.mark.parametrize("broken", ["update_named_params", "generate"])
def test_a_server_that_fails_is_named_with_its_start_command(served, broken):
    def refuse(*args, **options):
        raise Exception("Request failed: 500, out of blocks")

    trainer, client = served()
    setattr(client, broken, refuse)
    message = (
        "127.0.0.1:8000 failed while .*500, out of blocks.*`trl vllm-serve --model MODEL --host 127.0.0.1 --port 8000`"
    )
    with pytest.raises(EngineError, match=message) as caught:
        trainer.fit()
    assert isinstance(caught.value.__cause__, Exception)


def test_an_unreachable_server_is_told_before_anything_is_evaluated(
    tiny_model, tiny_tokenizer, tmp_path: Path, monkeypatch
):
    def unreachable(cfg, accelerator):
        raise ConnectionError("nobody there")

    monkeypatch.setattr(engines, "connect_client", unreachable)
    trainer = make_trainer(tiny_model, tiny_tokenizer, tmp_path / "run", eval_dataset=HELD_OUT, rollout=SERVED)
    with pytest.raises(EngineError, match="failed while connecting: ConnectionError: nobody there"):
        trainer.fit()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_both_engines_are_engines(tiny_model):
    accelerator = Accelerator(cpu=True)
    for engine in (TransformersEngine(tiny_model, accelerator), VLLMServerEngine(VLLMServer(), accelerator)):
        assert isinstance(engine, Engine)
    assert PolicyGradientConfig().rollout.engine.type == "transformers"
    assert RolloutConfig(engine=VLLMServer()).engine.type == "vllm_server"
