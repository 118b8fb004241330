"""Simulated sets: clean latents, outcomes that belong to them, one folder, and no labels of another simulator."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from rlalign.config import ConfigError
from rlalign.diffusion.config import PipelineConfig
from rlalign.diffusion.config_dso import DSOConfig, SimulatedDataConfig
from rlalign.diffusion.policy import TunedPipeline
from rlalign.diffusion.prompts import Prompts
from rlalign.diffusion.rewards import Judge
from rlalign.diffusion.simulated import (
    SimulatedSet,
    chosen_prompts,
    draw_clean,
    read_set,
    settings_of,
    simulate,
    write_set,
)
from rlalign.diffusion.tiny import tiny_pipeline
from tests.diffusion.half_plane import CLASSES, RightHalf, untrained
from tests.diffusion.small_runs import tiny_prompts


def config(**data: Any) -> DSOConfig:
    return DSOConfig(
        lora=None,
        pipeline=PipelineConfig(call={"guidance_scale": 1.0}),
        data=SimulatedDataConfig(**{"samples": 12, "num_inference_steps": 3, **data}),
    )


def simulated(simulator: Any = None, *, number: int = 0, **data: Any) -> tuple[SimulatedSet, dict[str, Any]]:
    """A set, and the settings that a run with the same would expect."""
    cfg, pipeline = config(**data), untrained()
    tuned, prompts, judge = TunedPipeline(pipeline, cfg), Prompts.of(CLASSES, pipeline), Judge(simulator or RightHalf())
    found = simulate(tuned, prompts, judge, cfg, round_number=number, accelerator=Accelerator(cpu=True))
    return found, settings_of(cfg, pipeline, prompts, judge, round_number=number)


def test_clean_latents_are_the_samples_as_the_denoiser_sees_them():
    pipeline = untrained()
    latents, samples = draw_clean(pipeline, {"labels": [0, 1, 1], "num_inference_steps": 4}, seeds=[5, 6, 7])
    torch.testing.assert_close(pipeline.encode(samples), latents)
    alone, _ = draw_clean(pipeline, {"labels": [1], "num_inference_steps": 4}, seeds=[6])
    torch.testing.assert_close(alone[0], latents[1])
    assert "step" not in vars(pipeline.scheduler)


def test_latents_of_flux_stay_packed():
    pipeline = tiny_pipeline("flux")
    rows, rest = tiny_prompts("flux", 2)
    call = Prompts.of(rows, pipeline).call([0, 1]) | rest | {"num_inference_steps": 2}
    latents, images = draw_clean(pipeline, call, seeds=[0, 1])
    assert latents.shape == (2, 16, 4)  # tokens and channels, where the images are 8 x 8
    assert len(images) == 2


def test_a_call_that_makes_several_samples_per_prompt_is_refused():
    pipeline = tiny_pipeline("sd15")
    call = {"prompt": ["a", "b"], "num_images_per_prompt": 2, "num_inference_steps": 2, "height": 8, "width": 8}
    call["output_type"] = "latent"
    with pytest.raises(ValueError):
        draw_clean(pipeline, call, seeds=[0, 1])


def test_outcomes_belong_to_their_samples():
    found, _ = simulated()
    assert len(found) == 12
    assert sorted(found.prompts.tolist()) == [0] * 6 + [1] * 6
    # the untrained pipeline has mean 0 and deviation 1: latents are points
    assert torch.equal(found.outcomes["right"], (found.latents[:, 0, 0] > 0).float())
    torch.testing.assert_close(found.outcomes["far"], found.latents[:, 0, 0])
    assert 0 < found.outcomes["right"].mean() < 1


def test_the_set_does_not_depend_on_batches_and_differs_between_rounds():
    found, other = simulated()[0], simulated(batch_size=5)[0]
    torch.testing.assert_close(found.latents, other.latents)
    assert torch.equal(found.prompts, other.prompts)
    assert not torch.isclose(found.latents, simulated(number=1)[0].latents).any()


def test_a_broken_simulation_costs_its_sample_alone():
    whole, _ = simulated()
    limit = float(whole.latents[:, 0, 1].abs().median())
    found, _ = simulated(RightHalf(y_limit=limit))
    broken = found.latents[:, 0, 1].abs() > limit
    assert 0 < int(broken.sum()) < 12
    assert torch.equal(found.outcomes["right"].isnan(), broken)
    assert torch.equal(found.outcomes["right"][~broken], whole.outcomes["right"][~broken])


def test_few_prompts_are_all_used_and_of_many_as_many_as_get_four_samples():
    pipeline = untrained()
    few = Prompts.of([0, 1], pipeline)
    assert sorted(chosen_prompts(few, config(), 0)) == [0, 1]
    many = Prompts.of([0, 1] * 10, pipeline)
    first, second = chosen_prompts(many, config(), 0), chosen_prompts(many, config(), 1)
    assert (len(first), len(second)) == (3, 3)  # 12 samples
    assert not set(first) & set(second)


def test_a_set_is_read_as_it_was_written(tmp_path: Path):
    found, expected = simulated(RightHalf(y_limit=1.5))
    written = write_set(found, tmp_path / "data" / "round-0")
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["round-0"]
    again = read_set(tmp_path / "data" / "round-0", expected)
    assert again.sha256 == written.sha256
    assert torch.equal(again.latents, found.latents)
    assert torch.equal(again.prompts, found.prompts)
    assert sorted(again.outcomes) == sorted(found.outcomes)
    np.testing.assert_array_equal(again.outcomes["right"], found.outcomes["right"])


def test_settings_say_what_decided_the_labels(tmp_path: Path):
    found, _ = simulated(RightHalf(timestep=0.01))
    write_set(found, tmp_path / "set")
    settings = json.loads((tmp_path / "set" / "settings.json").read_text())
    assert settings["simulator"] == {"simulator": "right half", "y_limit": "inf", "timestep": 0.01}
    assert settings["call"] == {"guidance_scale": 1.0, "num_inference_steps": 3}
    assert (settings["seed"], settings["round"], settings["samples"]) == (0, 0, 12)
    assert settings["pipeline"]["class"] == "ConditionalFlowPipeline"


def test_labels_of_another_simulator_are_refused_in_a_sentence(tmp_path: Path):
    found, _ = simulated(RightHalf(timestep=0.01))
    write_set(found, tmp_path / "set")
    _, expected = simulated(RightHalf(timestep=0.002))
    with pytest.raises(ConfigError, match=r"another simulator \(`timestep` 0.01 there, 0.002 here\)"):
        read_set(tmp_path / "set", expected)


def test_other_prompts_and_another_pipeline_are_refused(tmp_path: Path):
    found, expected = simulated()
    write_set(found, tmp_path / "set")
    with pytest.raises(ConfigError, match="other prompts"):
        read_set(tmp_path / "set", expected | {"prompts": {"count": 3, "sha256": "0"}})
    with pytest.raises(ConfigError, match="not of a FluxPipeline"):
        read_set(tmp_path / "set", expected | {"pipeline": {"class": "FluxPipeline"}})


def test_a_damaged_or_absent_set_is_refused(tmp_path: Path):
    found, expected = simulated()
    write_set(found, tmp_path / "set")
    table = tmp_path / "set" / "samples.safetensors"
    data = bytearray(table.read_bytes())
    data[-1] ^= 1
    table.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        read_set(tmp_path / "set", expected)
    with pytest.raises(ConfigError, match="holds no simulated samples"):
        read_set(tmp_path / "nothing", expected)


def test_a_set_replaces_an_older_one_whole(tmp_path: Path):
    old, _ = simulated()
    new, expected = simulated(samples=8)
    write_set(old, tmp_path / "set")
    write_set(new, tmp_path / "set")
    assert len(read_set(tmp_path / "set", expected)) == 8
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
