"""What a reader of a run's report meets: titled metrics, pictures, words about samples and none about completions."""

import json
import re

import pytest

from rlalign.diffusion.dso import DSOTrainer
from rlalign.diffusion.flow_grpo import FlowGRPOTrainer
from rlalign.diffusion.tiny import tiny_pipeline
from rlalign.training.metric_names import describe, is_titled
from rlalign.training.metrics import read
from rlalign.training.report import write_report
from rlalign.training.report_compare import compare
from rlalign.training.report_data import read_run
from rlalign.training.report_findings import find
from tests.diffusion.small_runs import (
    SMALL,
    PretendSimulator,
    brightness,
    merged,
    points_pipeline,
    points_trainer,
    tiny_prompts,
)

OF_OUTCOMES = re.compile(r"eval/\w+_(mean|stderr)|eval/n")
"""Named after what the user's reward returns."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    rows, call = tiny_prompts("sd3")
    more = {
        "total_steps": 2,
        "objective": {"kl_coef": 0.1},
        "rollout": {"prompts_per_step": 2},
        "eval": {"pictures": 4},
    }
    FlowGRPOTrainer(tiny_pipeline("sd3"), rows, brightness, run_dir=folder, call=call, **merged(SMALL, more)).fit()
    return folder


def test_every_metric_has_a_title(run):
    names = {name for record in read(run / "metrics.jsonl") for name in record if "/" in name}
    assert {"policy/kl", "denoising/clip_high_frac_03", "rollout/trajectory_mib", "policy/weight_distance"} <= names
    assert [name for name in names if not is_titled(name) and not OF_OUTCOMES.fullmatch(name)] == []
    assert describe("denoising/clip_low_frac_03").title == "Clipped from below, denoising step 4"
    assert describe("policy/kl", generator=True).unit == "nats per dimension"


def test_every_metric_of_dso_has_a_title(tmp_path):
    DSOTrainer(
        points_pipeline(),
        [0, 1],
        PretendSimulator(),
        run_dir=tmp_path / "run",
        total_updates=1,
        samples=24,
        pairs_per_step=4,
        eval={"samples": 8, "num_inference_steps": 3, "pictures": 0},
    ).fit()
    names = {name for record in read(tmp_path / "run/metrics.jsonl") for name in record if "/" in name}
    assert {"policy/err_win", "policy/implicit_accuracy", "data/win_frac", "data/conditions_mib"} <= names
    of_outcomes = re.compile(rf"{OF_OUTCOMES.pattern}|data/(stable|robust|margin)_mean")
    assert [name for name in names if not is_titled(name) and not of_outcomes.fullmatch(name)] == []


def test_the_verdict_is_about_the_gold_outcome_whatever_was_trained(tmp_path):
    points_trainer(tmp_path / "run", PretendSimulator(), total_steps=1).fit()
    found = compare(read_run(tmp_path / "run"))
    assert [item.name for item in found] == ["robust", "stable"]  # trained was `stable`
    assert found[0].title == "Held-out robust" and found[0].share and found[0].unit == "sample"
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "Outcomes in training" in page and "Reward by function" not in page


def test_what_a_rise_has_cost_stands_beside_it(tmp_path):
    watch = "tests.diffusion.test_flow_grpo_report:spread_of_points"
    points_trainer(tmp_path / "run", PretendSimulator(), total_steps=1, eval={"samples": 8, "watch": watch}).fit()
    run = read_run(tmp_path / "run")
    last = compare(run)[-1]
    assert last.title == "Held-out spread" and last.change is not None and not last.change.defined
    assert last.after.estimate == run.eval["eval/spread_mean"].values[-1] > 0
    assert find(run).verdict.sentence.startswith("Held-out robust")
    assert "<td>Spread</td>" in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def spread_of_points(samples, prompts):
    return {"spread": float(samples.std())}


def test_the_page_shows_pictures_and_speaks_of_samples(run):
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 2
    assert "8 samples" in page and "paired bootstrap over the same samples" in page
    text = re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", page, flags=re.S).lower()
    for word in ("problem", "completion", "token", "episode", "talk to it", "perplexity"):
        assert word not in text, word
    assert "trainer.fit(resume=true)" in text  # its generator and reward were Python objects
    settings = json.loads((run / "config.resolved.json").read_text())
    settings |= {"reward": {"function": "a:b"}, "pipeline": settings["pipeline"] | {"source": "somebody/sd"}}
    (run / "config.resolved.json").write_text(json.dumps(settings))
    assert "Draw samples with it" in write_report(run).read_text(encoding="utf-8")
