"""Recorded latents in main memory, and pipelines that keep their networks there until they are used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import big_modeling
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rlalign.diffusion.config import SDEConfig
from rlalign.diffusion.dso import DSOTrainer
from rlalign.diffusion.flow_grpo import FlowGRPOTrainer
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.tiny import tiny_call, tiny_pipeline
from tests.diffusion.pretend_device import SCENARIOS
from tests.diffusion.small_runs import SMALL, brightness, merged, points_trainer, tiny_prompts
from tests.e2e.test_two_processes import python
from tests.llm.commands import ROOT

pytestmark = pytest.mark.usefixtures("no_report")


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.tuned.parameters.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------- recorded latents


@pytest.mark.parametrize("guard", [True, False])
def test_offloaded_recordings_train_the_same_weights(tmp_path: Path, guard):
    """On a CPU the recordings are in main memory either way: this shows that nothing else depends on the switch."""
    trained = {}
    for offload in (False, True):
        rollout = {"offload": offload, "batch_size": 6}
        trainer = points_trainer(tmp_path / str(offload), total_steps=2, guard=guard, rollout=rollout)
        trainer.fit()
        assert trainer.sampler.storage == ("cpu" if offload else None)
        for piece in trainer.drawn.trajectories:
            assert piece.latents.device == piece.means.device == torch.device("cpu")
        trained[offload] = weights(trainer)
    assert_equal(trained[True], trained[False])


def test_latents_and_means_go_to_the_storage_and_the_samples_stay():
    """The meta device stands in for another memory: what was sent there has a shape and no values."""
    sde, call = SDEConfig(), tiny_call("sd3", 2) | {"output_type": "latent"}
    here, there = (
        StochasticSampler(tiny_pipeline("sd3"), sde, storage=storage).sample(call, seeds=[0, 1])
        for storage in (None, "meta")
    )
    assert there.latents.is_meta and there.means.is_meta
    assert there.latents.shape == here.latents.shape and there.means.dtype == here.means.dtype
    assert there.device == here.device == torch.device("cpu")  # where the pipeline works
    assert torch.equal(there.output[0], here.output[0])
    assert there.nbytes == here.nbytes


# ---------------------------------------------------------------- networks that are moved in and out


class Moving(CpuOffload):
    """Moves a network as between two memories: each time its tensors get new ones, and NaN is left in the old."""

    moves: list[tuple[str, str]]

    def init_hook(self, module: nn.Module) -> nn.Module:
        self.inside = False
        return self.moved(module, "out")

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = self.prev_module_hook
        if before is not None and before.hook.inside:
            before.offload()
        if not self.inside:
            self.inside = True
            self.moved(module, "in")
        return args, kwargs

    def moved(self, module: nn.Module, way: str) -> nn.Module:
        self.moves.append((type(module).__name__, way))
        for tensor in [*module.parameters(), *module.buffers()]:
            left, tensor.data = tensor.data, tensor.data.clone()
            if left.is_floating_point():
                left.fill_(torch.nan)
        return module


@pytest.fixture
def moves(monkeypatch) -> list[tuple[str, str]]:
    """What `enable_model_cpu_offload` moves, in order, and which way."""
    monkeypatch.setattr(big_modeling, "CpuOffload", Moving)
    monkeypatch.setattr(Moving, "moves", [], raising=False)
    return Moving.moves


def pipeline_of(kind: Any, *, offloaded: bool) -> DiffusionPipeline:
    pipeline = tiny_pipeline(kind)
    if offloaded:
        pipeline.enable_model_cpu_offload(device="cpu")
    return pipeline


def settings_of(kind: Any) -> tuple[list[Any], dict[str, Any]]:
    rows, call = tiny_prompts(kind)
    settings = merged(SMALL, {"call": call, "eval": {"samples": 2, "num_inference_steps": 2}})
    return rows, merged(settings, {"average": {"every": 1}})


def flow_grpo(kind: Any, folder: Path, *, offloaded: bool) -> FlowGRPOTrainer:
    rows, settings = settings_of(kind)
    rollout = {"prompts_per_step": 2, "group_size": 2, "num_inference_steps": 3, "batch_size": 2}
    rollout |= {"sde": {"kind": "flow_sde" if kind == "sd3" else "ddim"}}
    settings = merged(settings, {"total_steps": 2, "rollout": rollout, "objective": {"kl_coef": 0.1}})
    return FlowGRPOTrainer(pipeline_of(kind, offloaded=offloaded), rows, brightness, run_dir=folder, **settings)


def by_turns(samples: Any, prompts: Any) -> list[float]:
    return [float(k // 2 % 2) for k in range(len(samples))]


def dso(kind: Any, folder: Path, *, offloaded: bool) -> DSOTrainer:
    rows, settings = settings_of(kind)
    del settings["total_steps"], settings["rollout"]
    settings |= {"total_updates": 2, "data": {"samples": 8, "num_inference_steps": 3}, "pairs_per_step": 4}
    return DSOTrainer(pipeline_of(kind, offloaded=offloaded), rows, by_turns, run_dir=folder, **settings)


def test_a_pipeline_with_cpu_offload_is_sampled_and_replayed(moves):
    sampler = StochasticSampler(pipeline_of("sd3", offloaded=True), SDEConfig())
    trajectory = sampler.sample(tiny_call("sd3", 2), seeds=[0, 1])
    assert sampler.parity(trajectory) <= 1e-6
    found = [way for name, way in moves if name == "SD3Transformer2DModel"]
    assert found == ["out", "in", "out", "out", "in"]  # offloaded; run; the decoder's turn; the call's end; replayed


@pytest.mark.parametrize("kind", ["sd3", "sd15"])
@pytest.mark.parametrize("build", [flow_grpo, dso])
def test_a_pipeline_with_cpu_offload_is_trained_as_without(tmp_path: Path, moves, build, kind):
    """Real hooks of accelerate on one device: what an accelerator adds, tensors that do not meet, is not seen here."""
    plain = build(kind, tmp_path / "plain", offloaded=False).fit()
    assert not moves
    trainer = build(kind, tmp_path / "moved", offloaded=True)
    assert trainer.tuned.device.type == "cpu"
    begun = weights(trainer)
    trainer.fit()
    denoiser = type(trainer.tuned.denoiser).__name__
    assert {(name, way) for name in (denoiser, "AutoencoderKL") for way in ("in", "out")} <= set(moves)
    assert any(not torch.equal(now, begun[name]) for name, now in weights(trainer).items())
    assert_equal(weights(trainer), weights(plain))
    assert trainer.evaluate() == plain.evaluate()
    assert hasattr(trainer.tuned.denoiser, "_hf_hook")


# ---------------------------------------------------------------- a device with a memory of its own


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float | str]:
    """Differences from what the CPU trains, or errors; in one process, since the device cannot be taken out again."""
    folder = tmp_path_factory.mktemp("pretend")
    done = python(str(ROOT / "tests/diffusion/pretend_device.py"), str(folder), *SCENARIOS, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"scenario"')]
    return {line["scenario"]: line["found"] for line in lines}


@pytest.mark.e2e
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_device_trains_what_the_cpu_trains(found, name):
    """Its tensors do not meet the CPU's, as with a GPU; its arithmetic is the CPU's, so that weights agree."""
    assert isinstance(found[name], float), found[name]
    assert found[name] <= 1e-6
