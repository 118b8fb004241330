"""What is trained, what stays as it came, and whether plain diffusers gets back what was saved."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from torch import nn

from rlalign.config import ConfigError
from rlalign.diffusion.config import AverageConfig, FlowGRPOConfig, LoRASettings, PipelineConfig, SDEConfig
from rlalign.diffusion.generator import ConditionalFlowPipeline, FlowTransformer
from rlalign.diffusion.policy import TunedPipeline, denoiser_of
from rlalign.diffusion.sampling import StochasticSampler
from rlalign.diffusion.tiny import TINY_KINDS, tiny_call, tiny_pipeline
from tests.diffusion.small_runs import points_pipeline

# diffusers' Euler scheduler of SDXL hands a tensor to numpy in a way that numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
LORA = LoRASettings(r=2, alpha=7.0)  # alpha / r = 3.5: lost settings would show


def tuned(pipeline, /, **settings):
    return TunedPipeline(pipeline, FlowGRPOConfig(**{"lora": LORA, "average": None, **settings}))


def shaken(model, size=0.5):
    source = torch.Generator().manual_seed(5)
    for parameter in model.parameters.values():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=source).to(parameter.dtype))


def drawn(pipeline, kind):
    noise = [torch.Generator().manual_seed(k) for k in range(2)]
    if kind == "points":
        return torch.from_numpy(pipeline([0, 1], num_inference_steps=3, generator=noise).samples)
    call = {name: like(pipeline, value) for name, value in tiny_call(kind, 2).items()}
    return pipeline(**call, generator=noise, output_type="latent").images


def like(pipeline, value):
    return value.to(pipeline.dtype) if isinstance(value, torch.Tensor) else value


def made(kind):
    return points_pipeline() if kind == "points" else tiny_pipeline(kind)


@pytest.mark.parametrize("kind", [*TINY_KINDS, "points"])
def test_a_saved_adapter_gives_the_same_samples_in_plain_diffusers(tmp_path, kind):
    trained = tuned(made(kind))
    before = drawn(trained.pipeline, kind)
    shaken(trained)
    expected = drawn(trained.pipeline, kind)
    assert (expected - before).abs().max() > 0.01
    trained.save(tmp_path / "lora")
    fresh = made(kind)
    fresh.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(drawn(fresh, kind), expected, rtol=0, atol=1e-6)
    # With a weight of its own, as users mix adapters: half of it is another generator.
    fresh.set_adapters(fresh.get_active_adapters(), 0.5)
    assert (drawn(fresh, kind) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sd15", "points"])
def test_full_tuning_saves_a_whole_pipeline(tmp_path, kind):
    trained = tuned(made(kind), lora=None)
    shaken(trained, 0.05)
    trained.save(tmp_path / "model")
    cls = ConditionalFlowPipeline if kind == "points" else DiffusionPipeline
    loaded = cls.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(drawn(loaded, kind), drawn(trained.pipeline, kind), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["sd3", "sd15"])
def test_only_the_adapter_is_trained_and_in_float32(kind):
    trained = tuned(tiny_pipeline(kind).to(torch.bfloat16))
    assert {p.dtype for p in trained.parameters.values()} == {torch.float32}
    names = {name for name, p in trained.denoiser.named_parameters() if p.requires_grad}
    assert names == set(trained.parameters) and all("lora" in name for name in names)
    others = [p for p in trained.denoiser.parameters() if not p.requires_grad]
    assert {p.dtype for p in others} == {torch.bfloat16}
    assert not any(p.requires_grad for p in trained.pipeline.vae.parameters())
    if kind == "sd3":  # the text stream's projections are targets too
        assert any("add_k_proj" in name for name in names)
    assert drawn(trained.pipeline, kind).isfinite().all()


@pytest.mark.parametrize("kind", ["sd3", "sd15", "points"])
@pytest.mark.parametrize("lora", [LORA, None])
def test_the_reference_is_the_generator_as_it_came_to_the_last_bit(kind, lora):
    pipeline = made(kind)
    before = drawn(pipeline, kind)
    trained = tuned(pipeline, lora=lora)
    shaken(trained, 0.2)
    now = drawn(pipeline, kind)
    with trained.reference():
        assert torch.equal(drawn(pipeline, kind), before)
    assert torch.equal(drawn(pipeline, kind), now)
    with pytest.raises(RuntimeError, match="inside"), trained.reference():
        raise RuntimeError("inside")
    assert torch.equal(drawn(pipeline, kind), now)


def test_the_average_is_used_inside_and_the_live_weights_are_back_after():
    trained = tuned(points_pipeline(), average=AverageConfig(decay=0.9, every=2))
    begin = {name: p.detach().clone() for name, p in trained.parameters.items()}
    trained.stepped(1)
    assert trained.average.updates == 0
    shaken(trained)
    live = drawn(trained.pipeline, "points")
    with trained.averaged():  # no update yet: nothing but the beginning to show, so the live weights stand in
        assert torch.equal(drawn(trained.pipeline, "points"), live)
    now = {name: p.detach().clone() for name, p in trained.parameters.items()}
    trained.stepped(2)
    with trained.averaged():  # the first decay is 1/10, as in the authors' code: .1 of the beginning, .9 of now
        for name, p in trained.parameters.items():
            torch.testing.assert_close(p.detach(), 0.1 * begin[name] + 0.9 * now[name])
        assert not torch.equal(drawn(trained.pipeline, "points"), live)
    assert torch.equal(drawn(trained.pipeline, "points"), live)
    assert all(torch.equal(p, now[name]) for name, p in trained.parameters.items())


def test_what_is_saved_is_the_average(tmp_path):
    trained = tuned(points_pipeline(), average=AverageConfig(every=1))
    shaken(trained)
    trained.stepped(1)
    trained.save(tmp_path / "lora")
    saved = load_file(tmp_path / "lora/pytorch_lora_weights.safetensors")
    with trained.averaged():
        inside = {name: p.detach().clone() for name, p in trained.parameters.items()}
    expected = sorted(float(value.sum()) for value in inside.values())
    assert sorted(float(value.sum()) for value in saved.values()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("lora", [LORA, None])
def test_distance_is_the_norm_of_the_weights_movement(lora):
    pipeline = points_pipeline()
    before = copy.deepcopy(pipeline.transformer)
    trained = tuned(pipeline, lora=lora)
    assert trained.distance() == 0
    shaken(trained)
    distance = trained.distance()
    if lora is not None:
        pipeline.transformer.fuse_lora()
    after = {n.replace(".base_layer", ""): p for n, p in pipeline.transformer.named_parameters() if "lora" not in n}
    moves = [(after[name] - p).double().norm() for name, p in before.named_parameters()]
    assert distance == pytest.approx(torch.stack(moves).norm().item(), rel=1e-5)


def test_state_goes_to_another_process_and_back():
    settings = {"average": AverageConfig(every=1)}
    one, other = tuned(points_pipeline(), **settings), tuned(points_pipeline(), **settings)
    shaken(one)
    one.stepped(1)
    other.load_state_dict(one.state_dict())
    assert torch.equal(drawn(one.pipeline, "points"), drawn(other.pipeline, "points"))
    with one.averaged(), other.averaged():
        assert torch.equal(drawn(one.pipeline, "points"), drawn(other.pipeline, "points"))
    with pytest.raises(ConfigError, match="trained other tensors"):
        tuned(points_pipeline(), lora=None).load_state_dict(one.state_dict())


@pytest.mark.parametrize("kind", ["sd15", "sd3", "flux", "points"])
def test_gradient_checkpointing_gives_the_same_gradient(kind):
    found = []
    for checkpointing in (False, True):
        trained = tuned(made(kind), pipeline=PipelineConfig(gradient_checkpointing=checkpointing))
        source = torch.Generator().manual_seed(7)
        for parameter in trained.parameters.values():
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=source))
        sde = SDEConfig(kind="ddim" if kind == "sd15" else "flow_sde")
        sampler = StochasticSampler(trained.pipeline, sde)
        call = {"labels": [0, 1], "num_inference_steps": 4} if kind == "points" else tiny_call(kind, 2)
        trajectory = sampler.sample(call, seeds=[0, 1])
        sampler.replay(trajectory, *trajectory.decisions()).mean.sin().sum().backward()
        found.append({name: p.grad for name, p in trained.parameters.items()})
        assert trained.denoiser.is_gradient_checkpointing == checkpointing
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


class Plain(ModelMixin):
    """A denoiser that takes neither adapters nor checkpointing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Odd(DiffusionPipeline):
    def __init__(self, model, scheduler):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)


class WithPlain(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


def test_what_cannot_be_tuned_is_refused_in_one_sentence():
    scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConfigError, match=r"Odd has no `transformer` and no `unet`; its parts are model, scheduler\."):
        denoiser_of(Odd(Plain(), scheduler))
    with pytest.raises(ConfigError, match=r"Plain takes no adapter.*set `lora: null`"):
        tuned(WithPlain(Plain(), scheduler))
    with pytest.raises(ConfigError, match="Plain has no gradient checkpointing; set `pipeline.gradient_checkpointing"):
        tuned(WithPlain(Plain(), scheduler), lora=None, pipeline=PipelineConfig(gradient_checkpointing=True))
    with pytest.raises(ConfigError, match=r"`lora.targets`=\['nowhere'\] fit no linear layer of FlowTransformer"):
        tuned(points_pipeline(), lora=LoRASettings(targets=["nowhere"]))
    with pytest.raises(ConfigError, match="bfloat16 cannot hold an optimizer's steps: load the pipeline in float32"):
        tuned(points_pipeline().to(torch.bfloat16), lora=None)
    twice = points_pipeline()
    tuned(twice)
    with pytest.raises(ConfigError, match="FlowTransformer carries an adapter already .policy.*unload_lora_weights"):
        tuned(twice)


def test_what_an_adapter_learned_can_be_kept_and_tuned_on():
    pipeline = points_pipeline()
    shaken(tuned(pipeline))
    learned = drawn(pipeline, "points")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    again = tuned(pipeline)
    torch.testing.assert_close(drawn(pipeline, "points"), learned, rtol=0, atol=1e-5)
    shaken(again)
    with again.reference():
        torch.testing.assert_close(drawn(pipeline, "points"), learned, rtol=0, atol=1e-5)


def test_the_small_generator_is_what_the_tests_take_it_for():
    assert isinstance(points_pipeline().transformer, FlowTransformer)
    assert drawn(points_pipeline(), "points").shape == (2, 1, 2)
