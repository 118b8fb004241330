"""Which network of a pipeline predicts."""

from types import SimpleNamespace

import pytest
from torch import nn

from rlalign.diffusion.networks import denoiser_named, denoisers


def pipeline_of(**components):
    return SimpleNamespace(components=components)


def test_known_names_come_first_then_the_only_network_that_is_no_coder():
    first, second, coder = nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)
    both = pipeline_of(other=coder, transformer_2=second, transformer=first, scheduler=object())
    assert denoisers(both) == [first, second]
    assert denoiser_named(both, None) is first
    assert denoiser_named(both, "other") is coder
    assert denoiser_named(pipeline_of(vae=coder, text_encoder_2=coder, network=second), None) is second


@pytest.mark.parametrize("components", [{}, {"one": nn.Linear(1, 1), "two": nn.Linear(1, 1)}])
def test_what_cannot_be_told_is_asked_for(components):
    with pytest.raises(ValueError, match="`denoiser=` one of them"):
        denoiser_named(pipeline_of(**components), None)


def test_a_wrong_name_is_told_the_right_ones():
    with pytest.raises(ValueError, match=r"no network 'unet'; give `denoiser=` one of \['network'\]"):
        denoiser_named(pipeline_of(network=nn.Linear(1, 1), scheduler=object()), "unet")
