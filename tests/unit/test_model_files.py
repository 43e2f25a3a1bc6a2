"""What a model's JSON files tell. Truth: the loaded pipeline itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest

from core2_sampler import testing
from core2_sampler.cli.loading import load_weak_head
from core2_sampler.config import ConfigError
from core2_sampler.fitting import find_head
from core2_sampler.model_files import EMBEDDED, FAMILIES, find_model
from core2_sampler.pipelines.auto import PIPELINES, load_pipeline
from core2_sampler.shapes import MODELS
from core2_sampler.weak_heads.tap import TapHead


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


@pytest.fixture
def with_head(tmp_path):
    """Return the configs of a model with a head of its own."""
    pipe = testing.tiny_sd3_pipeline()
    head = TapHead.for_denoiser(pipe.family.denoiser(pipe))
    pipe.register_modules(weak_head=head)
    pipe.save_pretrained(tmp_path)
    return tmp_path


def test_the_models_own_head_is_the_one_of_its_pipeline(with_head):
    head = find_head(None, find_model(str(with_head)))
    assert head.own and head.folder == with_head / "weak_head"
    pipe = load_pipeline(with_head)
    assert load_weak_head(head, pipe) is pipe.weak_head
    named = find_head(str(with_head / "weak_head"), find_model(str(with_head)))
    assert not named.own
    assert load_weak_head(named, pipe) is not pipe.weak_head


def test_a_hub_models_own_head_is_found(with_head, tmp_path, monkeypatch):
    """A repository in the cache of the hub's own client, which is then kept off the network."""
    cache, commit = tmp_path / "cache", "0" * 40
    repository = cache / "models--owner--model"
    shutil.copytree(with_head, repository / "snapshots" / commit, ignore=lambda *_: ["cache"])
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = replace(find_model(str(with_head)), source="owner/model", name="owner/model")
    head = find_head(None, model)
    assert head.own and not head.in_model and head.name == "owner/model/weak_head"


def test_the_default_scale_is_the_median_of_those_collected(with_head):
    card = {
        "data": {"rounds": {"0": {"guidance_scales": [2.0, 3.0]}, "1": {"guidance_scales": [9.0]}}}
    }
    (with_head / "weak_head/card.json").write_text(json.dumps(card))
    assert find_model(str(with_head)).guidance_scale == 3.0
