"""Pretraining: the same bits for the same seed, a cache that mends itself, and distributions known in advance."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from rlalign.config import ConfigError
from rlalign.diffusion import pretrain as pretraining
from rlalign.diffusion.config_pretrain import PretrainConfig
from rlalign.diffusion.generator import ConditionalFlowPipeline
from rlalign.diffusion.pretrain import cached_generator, pretrain

TOY = """
import numpy as np

def points(count, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    return rng.standard_normal((count, 1, 2)) + shift + labels[:, None, None], labels

def broken(count, seed):
    raise OSError("no such disk")
"""


def small(**fields) -> PretrainConfig:
    plain = {"class_names": ["a", "b"], "count": 64, "width": 16, "layers": 1, "heads": 2, "steps": 4, "batch_size": 8}
    return PretrainConfig(**{**plain, **fields})


def gaussians(centres: np.ndarray, count: int, seed: int, deviation: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """One two-dimensional token per sample; class k around centres[k]."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(centres), count)
    return (centres[labels] + deviation * rng.standard_normal((count, 2)))[:, None], labels


def weights(pipeline: ConditionalFlowPipeline) -> dict[str, torch.Tensor]:
    return pipeline.transformer.state_dict()


def same(a: ConditionalFlowPipeline, b: ConditionalFlowPipeline) -> bool:
    return all(torch.equal(value, weights(b)[name]) for name, value in weights(a).items())


DATA, LABELS = gaussians(np.array([[0.0, 0.0], [3.0, -1.0]]), 256, seed=0)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_state_alone():
    torch.manual_seed(11)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = pretrain(DATA, LABELS, small(threads=2))
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    torch.manual_seed(12)
    assert same(first, pretrain(DATA, LABELS, small(threads=2)))
    assert not same(first, pretrain(DATA, LABELS, small(threads=2, seed=1)))
    assert not first.transformer.training


def test_the_first_loss_is_that_of_a_velocity_of_zero():
    # E |noise - x|^2 per number of two independent standard variables: 2
    seen = []
    pretrain(DATA, LABELS, small(steps=1, batch_size=4096), progress=lambda *told: seen.append(told))
    assert seen == [(1, 1, pytest.approx(2.0, abs=0.1))]


def test_channels_are_standardised_and_samples_come_back_in_the_data_s_units():
    data = DATA * [10.0, 0.1] + [100.0, -5.0]
    pipeline = pretrain(data, LABELS, small())
    encoded = pipeline.encode(data)
    torch.testing.assert_close(encoded.mean((0, 1)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(encoded.std((0, 1), correction=0), torch.ones(2))
    samples = pipeline([0] * 64, generator=torch.Generator().manual_seed(0)).samples
    assert abs(samples[..., 0].mean() - 100) < 30 and abs(samples[..., 1].mean() + 5) < 0.5


def test_a_constant_channel_is_no_division_by_zero():
    data = DATA.copy()
    data[..., 1] = 7.0
    samples = pretrain(data, LABELS, small())([0, 1]).samples
    np.testing.assert_allclose(samples[..., 1], 7.0, atol=1e-3)


@pytest.mark.parametrize(("label_drop", "learned"), [(0.0, False), (0.5, True)])
def test_only_hidden_labels_teach_the_null_class(label_drop, learned):
    null = [
        weights(pretrain(DATA, LABELS, small(steps=steps, label_drop=label_drop, warmup_steps=0)))["label.weight"][2]
        for steps in (1, 6)
    ]
    assert torch.equal(*null) is not learned


@pytest.mark.parametrize(
    ("data", "labels", "message"),
    [
        (DATA[:, 0], LABELS, r"expected data \[N, tokens, channels\]"),
        (DATA, LABELS[:5], "and labels"),
        (DATA, LABELS + 1, "integers from 0 to 1 for the 2 `class_names`, got int64 from 1 to 2"),
        (DATA, LABELS.astype(float), "got float64"),
        (np.where(DATA > 4, np.nan, DATA), LABELS, "of 256 samples are not finite"),
    ],
)
def test_data_that_does_not_fit_is_named(data, labels, message):
    with pytest.raises(ValueError, match=message):
        pretrain(data, labels, small())


def test_a_diverged_training_says_so():
    with pytest.raises(ValueError, match="the loss is .* lower `pretrain.learning_rate`"):
        pretrain(1e3 * DATA, LABELS, small(steps=60, learning_rate=1e30, warmup_steps=0))


def test_progress_without_a_terminal_is_a_line_per_quarter(capsys, monkeypatch):
    monkeypatch.setattr(pretraining, "_LOOK", 1)
    pretrain(DATA, LABELS, small(steps=20))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"pretraining: step {k} of 20" for k in (5, 10, 15, 20)]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretrainConfig:
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toy.py").write_text(TOY)
    return small(data=f"{tmp_path / 'toy.py'}:points")


def test_a_generator_is_trained_once(toy, monkeypatch):
    notes = []
    first = cached_generator(toy, note=notes.append)
    assert len(notes) == 1 and "once" in notes[0]
    monkeypatch.setattr(pretraining, "pretrain", lambda *_, **__: pytest.fail("trained again"))
    assert same(first, cached_generator(toy, note=notes.append))
    assert len(notes) == 1 and first.class_names == ["a", "b"]


def test_the_cache_is_keyed_by_configuration_and_data(toy):
    def folders() -> int:
        return len([path for path in (pretraining.cache_directory() / "generators").iterdir() if path.is_dir()])

    for number, config in enumerate(
        (
            toy,
            dataclasses.replace(toy, seed=1),
            dataclasses.replace(toy, steps=5),
            dataclasses.replace(toy, data_args={"shift": 2.0}),
        ),
        1,
    ):
        cached_generator(config, note=lambda _: None)
        assert folders() == number
    changed = Path(toy.data.rpartition(":")[0])
    changed.write_text(TOY.replace("standard_normal", "random"))  # same configuration, other data
    cached_generator(dataclasses.replace(toy, data=f"{changed}:points"), note=lambda _: None)
    assert folders() == 5


@pytest.mark.parametrize("harm", ["flip a bit", "lose a file", "lose the sums"])
def test_a_damaged_cache_is_trained_again_and_says_so(toy, harm):
    first = cached_generator(toy, note=lambda _: None)
    (folder,) = (path for path in (pretraining.cache_directory() / "generators").iterdir() if path.is_dir())
    file = next(folder.rglob("*.safetensors"))
    match harm:
        case "flip a bit":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(bytes(content))
        case "lose a file":
            file.unlink()
        case "lose the sums":
            (folder / "sha256.json").unlink()
    notes = []
    again = cached_generator(toy, note=notes.append)
    assert len(notes) == 2 and "is damaged" in notes[0] and same(first, again)
    cached_generator(toy, note=notes.append)
    assert len(notes) == 2


def test_a_killed_training_leaves_nothing_behind(toy, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConditionalFlowPipeline, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            cached_generator(toy, note=lambda _: None)
    root = pretraining.cache_directory() / "generators"
    assert not [path for path in root.iterdir() if path.is_dir()]
    cached_generator(toy, note=lambda _: None)
    assert len([path for path in root.iterdir() if path.is_dir()]) == 1


def test_mistakes_are_told_in_the_configuration_s_terms(toy, tmp_path, monkeypatch):
    place = toy.data.rpartition(":")[0]
    for data, message in (
        (f"{place}:nothing", "`pretrain.data`=.* ImportError"),
        (f"{place}:broken", "it failed: OSError: no such disk"),
        ("no_such_module:points", "ModuleNotFoundError"),
    ):
        with pytest.raises(ConfigError, match=message):
            cached_generator(dataclasses.replace(toy, data=data))
    with pytest.raises(ConfigError, match="`pretrain`: labels must be integers from 0 to 0"):
        cached_generator(dataclasses.replace(toy, class_names=["only"]), note=lambda _: None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="set RLALIGN_CACHE to another folder"):
        cached_generator(toy)


def test_settings_are_strict():
    adapter = TypeAdapter(PretrainConfig)
    assert adapter.validate_python({}) == PretrainConfig()
    for bad in ({"step": 3}, {"steps": 0}, {"label_drop": 1.0}, {"learning_rate": float("nan")}):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)


@pytest.mark.learning
def test_the_generator_learns_classes_known_in_advance():
    centres = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    data, labels = gaussians(centres, 4000, seed=1, deviation=0.5)
    config = small(class_names=["x", "y", "z"], width=32, layers=2, steps=800, batch_size=128, average_decay=0.99)
    pipeline = pretrain(data, labels, config)
    asked = torch.arange(3000) % 3
    samples = pipeline(asked, generator=torch.Generator().manual_seed(5), num_inference_steps=40).samples[:, 0]
    for k in range(3):
        mine = samples[asked == k]
        np.testing.assert_allclose(mine.mean(0), centres[k], atol=0.12)
        np.testing.assert_allclose(mine.std(0), 0.5, atol=0.08)
        assert abs(np.corrcoef(mine.T)[0, 1]) < 0.15


@pytest.mark.learning
def test_guidance_sharpens():
    # Two classes that overlap: a sample of class 0 lies on the wrong side with probability P(z > 1) = 0.159.
    centres = np.array([[-1.0, 0.0], [1.0, 0.0]])
    data, labels = gaussians(centres, 4000, seed=2)
    pipeline = pretrain(data, labels, small(width=32, layers=2, steps=600, batch_size=128, average_decay=0.99))
    means, wrong = [], []
    for scale in (1.0, 3.0):
        x = pipeline([0] * 2000, generator=torch.Generator().manual_seed(5), guidance_scale=scale).samples[:, 0, 0]
        means.append(x.mean())
        wrong.append((x > 0).mean())
    assert means[0] == pytest.approx(-1.0, abs=0.15) and wrong[0] == pytest.approx(0.159, abs=0.05)
    assert means[1] < means[0] - 0.4 and wrong[1] < 0.3 * wrong[0]
