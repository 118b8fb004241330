"""A tiny model on the command line: train, resume, eval, sample, report, and the code each of them exits with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign import config
from rlalign.llm import run
from rlalign.training.metrics import metrics_hash, read
from rlalign.training.run_directory import RunDirectory
from tests.llm.commands import ROOT, fault, rlalign

EVAL_TOO = ("eval.every=2", "total_steps=4")


@pytest.fixture(scope="module")
def finished(workshop: Path) -> Path:
    """A finished run of four steps, checkpointed and evaluated every two."""
    done = rlalign(workshop, "train", "tiny.yaml", *EVAL_TOO, "--run-dir", "finished", "--seed", "9")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "Report: finished/report.html"
    return workshop / "finished"


def table(text: str) -> dict[str, float]:
    """What `rlalign eval` prints."""
    return {name: float(value) for name, value in (line.split() for line in text.splitlines())}


def test_a_run_directory_holds_everything_about_the_run(finished):
    names = {path.name for path in finished.iterdir() if not path.name.startswith(".")}
    files = {"config.yaml", "config.resolved.json", "versions.json", "status.json", "metrics.jsonl", "report.html"}
    assert names - {"best"} == files | {"samples", "checkpoints", "errors", "media", "model"}
    assert json.loads((finished / "status.json").read_text())["status"] == "done"
    assert (finished / "checkpoints/latest").read_text() == "ckpt-000004\n"
    resolved = config.load(finished / "config.resolved.json")
    assert (resolved.seed, resolved.total_steps, resolved.eval.every, resolved.method) == (9, 4, 2, "bnpo")
    text = (finished / "config.yaml").read_text()
    assert text.startswith("# A tiny run.\nmethod: bnpo\n")
    assert "#   eval.every=2\n" in text
    records = [(record["kind"], record["step"]) for record in read(finished / "metrics.jsonl")]
    train, evals = [("train", step) for step in (1, 2, 3, 4)], [("eval", step) for step in (0, 2, 4)]
    assert records == [evals[0], *train[:2], evals[1], *train[2:], evals[2]]
    samples = sorted(path.name for path in (finished / "samples").iterdir())
    assert samples == [f"eval-00000{n}.jsonl" for n in (0, 2, 4)] + [f"step-00000{n}.jsonl" for n in (1, 2, 3, 4)]


def test_the_model_loads_with_transformers(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer("say 3", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (finished / "model").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_eval_says_what_the_run_said(workshop, finished):
    records = {r["step"]: r for r in read(finished / "metrics.jsonl") if r["kind"] == "eval"}
    before = metrics_hash(finished / "metrics.jsonl")
    for checkpoint, step in ((None, 4), ("finished/checkpoints/ckpt-000002", 2), ("ckpt-000004", 4)):
        found = rlalign(workshop, "eval", "finished", *(() if checkpoint is None else ("--checkpoint", checkpoint)))
        assert found.code == 0, found.err
        printed = table(found.out)
        assert list(printed) == ["eval/reward_mean", "eval/reward_stderr", "eval/n", "eval/even_length_mean"]
        assert printed == pytest.approx({name: records[step][name] for name in printed}, rel=1e-3)
    assert metrics_hash(finished / "metrics.jsonl") == before


def test_reading_commands_run_beside_a_training(workshop, finished):
    with RunDirectory.open(finished):
        assert rlalign(workshop, "eval", "finished").code == 0
        assert rlalign(workshop, "sample", "finished").code == 0
        assert rlalign(workshop, "report", "finished").code == 0


def test_sample_completes_a_prompt_or_held_out_ones(workshop, finished):
    one, again = (rlalign(workshop, "sample", "finished", "say 3", "--count", "3") for _ in range(2))
    assert one.code == 0, one.err
    assert one.out == again.out
    assert len(set(one.out.rstrip("\n").split("\n"))) > 1
    shown = rlalign(workshop, "sample", "finished", "--count", "2").out
    assert shown.startswith("say 10\n-> ")
    assert "\nsay 11\n-> " in shown


def test_conversations_are_sampled_as_conversations(workshop):
    settings = ("data.system_prompt=Be brief.", "total_steps=1", "data.eval=null")
    done = rlalign(workshop, "train", "tiny.yaml", *settings, "--run-dir", "chat")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (workshop / "chat/samples/step-000001.jsonl").read_text().splitlines()]
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]
    asked = rlalign(workshop, "sample", "chat", "say 3")
    assert asked.code == 0, asked.err
    shown = rlalign(workshop, "sample", "chat")
    assert shown.out.startswith("say 0\n-> ")
    missing = rlalign(workshop, "eval", "chat")
    assert (missing.code, missing.err) == (
        2,
        "there is no held-out data: pass `eval_dataset`, or set `data.eval` in the config.\n",
    )


def test_a_prompt_is_asked_in_the_words_of_training(workshop, monkeypatch):
    """`sample` gives the tokens that training would have given the same question."""
    seen: list[Any] = []
    monkeypatch.setattr("rlalign.llm.data.encode_prompt", lambda prompt, _: seen.append(prompt) or [1, 2])
    monkeypatch.chdir(workshop)
    template, system = 'data.template="Q: {prompt}\\nA:"', "data.system_prompt=Be brief."
    for name, settings in (("plain", [template]), ("both", [template, system]), ("system", [system])):
        done = rlalign(workshop, "train", "tiny.yaml", *settings, "total_steps=1", "--run-dir", f"words-{name}")
        assert done.code == 0, done.err
        run.sample(Path(f"words-{name}"), "say 3")
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q: say 3\nA:"}]
    assert seen == ["Q: say 3\nA:", asked, [asked[0], {"role": "user", "content": "say 3"}]]


def test_a_template_with_other_columns_takes_no_prompt_of_ones_own(workshop):
    (workshop / "levels.jsonl").write_text('{"prompt": "say 1", "level": "easy"}\n' * 4)
    settings = ("data.train.source=levels.jsonl", "data.eval=null", 'data.template="{level}: {prompt}"')
    done = rlalign(workshop, "train", "tiny.yaml", *settings, "total_steps=1", "--run-dir", "levels")
    assert done.code == 0, done.err
    asked = rlalign(workshop, "sample", "levels", "say 3")
    assert asked.code == 2
    assert "`data.template` needs the columns level, which a prompt of yours does not have" in asked.err
    assert rlalign(workshop, "sample", "levels").out.startswith("easy: say 1\n-> ")


def test_report_is_drawn_again_from_the_directory(workshop, finished):
    (finished / "report.html").unlink()
    done = rlalign(workshop, "report", "finished")
    assert (done.code, done.out) == (0, "Report: finished/report.html\n")
    page = (finished / "report.html").read_text()
    assert "say 10" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_an_interrupted_run_resumes_to_the_end(workshop):
    stopped = rlalign(workshop, "train", "tiny.yaml", "--run-dir", "stopped", faults=[fault("update", 6, "SIGTERM")])
    assert stopped.code == 75
    assert stopped.err.endswith("Saved step 2. Continue: rlalign resume stopped\n")
    resumed = rlalign(workshop, "resume", "stopped")
    assert resumed.code == 0, resumed.err
    assert [r["step"] for r in read(workshop / "stopped/metrics.jsonl") if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.name=./no-such-model",), "no-such-model"),
        (("model.dtype=float12",), "`model.dtype` must be one of"),
        (("data.train.source=nothing.jsonl",), "nothing.jsonl"),
        (("rewards.0.function=rewards.py:even_lenght",), "Did you mean even_length?"),
        (("rewards=[]",), "`rewards` must be set in the config"),
        (("optim.minibatches=3",), "`optim.minibatches`=3 does not divide `rollout.prompts_per_step`=4"),
        (("rollout.max_prompt_tokens=2",), "longer than `rollout.max_prompt_tokens`=2"),
        (("log.trackers=[wandb]",), "wandb is not installed. Run: pip install"),
        (("--run-dir", "finished"), "finished already holds a run. Continue it with `rlalign resume finished`"),
        (("--run-dir", "-x"), ""),
        (("--run-dir", "a/" + "b" * 90), "is not allowed: use 1 to 80 of"),
    ],
)
def test_mistakes_exit_2_with_a_sentence(workshop, finished, arguments, message):
    options = arguments if "--run-dir" in arguments else (*arguments, "--run-dir", "refused")
    done = rlalign(workshop, "train", "tiny.yaml", *options)
    assert done.code == 2, done.err
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (workshop / "refused").exists()


def test_a_locked_run_is_named_with_its_owner(workshop, finished):
    with RunDirectory.open(finished):
        (finished / "status.json").write_text(json.dumps({"status": "running"}))
        done = rlalign(workshop, "resume", "finished")
    (finished / "status.json").write_text(json.dumps({"status": "done"}))
    assert done.code == 2
    assert f"run finished is locked by pid {os.getpid()} on host" in done.err


def test_the_first_line_of_a_new_user(workshop):
    """A process of its own, by the interpreter: what the forked commands of this file stand for."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")])}
    command = [sys.executable, "-m", "rlalign", "train", "tiny.yaml", "total_steps=1", "data.eval=null"]
    done = subprocess.run(command, cwd=workshop, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Report: runs/tiny/report.html"
    forked = rlalign(workshop, "train", "tiny.yaml", "total_steps=1", "data.eval=null", "--run-dir", "forked")
    assert forked.code == 0
    weights = "model/model.safetensors"
    assert (workshop / "runs/tiny" / weights).read_bytes() == (workshop / "forked" / weights).read_bytes()
    assert metrics_hash(workshop / "runs/tiny/metrics.jsonl") == metrics_hash(workshop / "forked/metrics.jsonl")
