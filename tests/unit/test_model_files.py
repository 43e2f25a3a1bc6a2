"""What a model's JSON files tell. Truth: the loaded pipeline itself."""

from __future__ import annotations

import pytest

from core2_sampler import testing
from core2_sampler.config import ConfigError
from core2_sampler.model_files import EMBEDDED, FAMILIES, find_model
from core2_sampler.pipelines.auto import PIPELINES
from core2_sampler.shapes import MODELS


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """Return a tiny pipeline of each family, and its folder as the command line knows it."""
    pipe = getattr(testing, f"tiny_{request.param}_pipeline")()
    folder = tmp_path_factory.mktemp(request.param)
    pipe.save_pretrained(folder)
    return pipe, find_model(str(folder))


def test_the_files_tell_what_the_pipeline_is(saved):
    pipe, model = saved
    family = pipe.family
    channels, height, _ = family.latent_shape(pipe)
    assert model.family == family.name
    assert model.channels == channels == family.denoiser(pipe).latent_channels
    assert model.size == height * pipe.vae_scale_factor
    assert (model.tokens is None) == (family.name == "sdxl")


def test_every_family_has_a_pipeline():
    assert len(PIPELINES.names()) == len(FAMILIES)


def test_sizes_are_those_that_the_stock_call_takes(saved):
    """A unit more is fine, half a unit more is refused; SD3 has a greatest size."""
    _, model = saved
    unit = {"sd3": 4, "sdxl": 8, "flux": 4}[model.family]
    assert model.multiple == unit
    assert model.check_size(None, 2 * unit) == (model.size, 2 * unit)
    for wrong in (unit // 2, unit + unit // 2, 0, -unit):
        with pytest.raises(ConfigError, match=f"a multiple of {unit}"):
            model.check_size(wrong, None)
    if model.largest is None:
        assert model.check_size(1000 * unit, None)[0] == 1000 * unit
    else:
        with pytest.raises(ConfigError, match=f"to {model.largest}"):
            model.check_size(model.largest + unit, None)


def test_without_a_head_the_scale_is_that_of_the_stock_call(saved):
    pipe, model = saved
    stock = {"sd3": 7.0, "sdxl": 5.0, "flux": 1.0}
    assert model.guidance_scale == stock[pipe.family.name]


def test_the_embedded_models_are_those_that_are_here():
    assert set(EMBEDDED.values()) == {f for f in FAMILIES if (MODELS / f).is_dir()}
