"""Picking the pipeline class, and one clear error for what is no model."""

from __future__ import annotations

import json

import pytest
from diffusers import StableDiffusion3Pipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

from core2_sampler import (
    CoRe2FluxPipeline,
    CoRe2Pipeline,
    CoRe2StableDiffusion3Pipeline,
    CoRe2StableDiffusionXLPipeline,
)
from core2_sampler.pipelines.auto import PIPELINES, load_pipeline, pipeline_class
from core2_sampler.testing import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_sdxl_pipeline
from core2_sampler.weak_heads.controls import CondHead


def test_a_folder_loads_by_its_index_with_its_head(tmp_path):
    tiny_sd3_pipeline(weak_head=CondHead("sd3", 4)).save_pretrained(tmp_path)
    for load in (CoRe2Pipeline.from_pretrained, load_pipeline):
        pipe = load(tmp_path)
        assert type(pipe) is CoRe2StableDiffusion3Pipeline
        assert type(pipe.weak_head) is CondHead


def test_a_stock_pipeline_or_one_of_ours_is_taken_over():
    ours = tiny_sd3_pipeline()
    parts = {k: v for k, v in ours.components.items() if k != "weak_head"}
    for source in (ours, StableDiffusion3Pipeline(**parts)):
        pipe = CoRe2Pipeline.from_pipe(source)
        assert type(pipe) is CoRe2StableDiffusion3Pipeline
        assert pipe.transformer is ours.transformer


def test_another_family_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FooPipeline"}))
    with pytest.raises(ValueError, match="StableDiffusion3Pipeline.*got FooPipeline"):
        load_pipeline(tmp_path)
    with pytest.raises(ValueError, match="got CondHead"):
        CoRe2Pipeline.from_pipe(CondHead("sd3", 4))


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model_index.json"):
        load_pipeline(tmp_path)
    for missing in (str(tmp_path / "gone"), tmp_path / "gone", "./gone", "gone", "a/b/c"):
        with pytest.raises(ValueError, match="folder or a hub id"):
            load_pipeline(missing)
    (tmp_path / "model_index.json").write_text("not json")
    with pytest.raises(ValueError, match="index must be readable"):
        load_pipeline(tmp_path)


def test_a_hub_id_that_cannot_be_reached_is_refused():
    with pytest.raises(ValueError, match="got 'nobody/nothing-here'"):
        load_pipeline("nobody/nothing-here", local_files_only=True)


def test_it_is_a_namespace():
    with pytest.raises(TypeError, match="from_pretrained"):
        CoRe2Pipeline()


def test_every_registered_class_derives_from_the_stock_class_it_stands_for():
    for name in PIPELINES.names():
        assert name in [base.__name__ for base in PIPELINES.get(name).__mro__]


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        ("StableDiffusion3Pipeline", CoRe2StableDiffusion3Pipeline),
        ("StableDiffusionXLPipeline", CoRe2StableDiffusionXLPipeline),
        ("FluxPipeline", CoRe2FluxPipeline),
    ],
)
def test_the_class_is_known_from_the_index_alone(stock, ours, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": stock}))
    assert pipeline_class(tmp_path) is ours


def test_a_folder_of_each_family_loads_by_its_index(tmp_path):
    for make in (tiny_sdxl_pipeline, tiny_flux_pipeline):
        pipe = make()
        pipe.save_pretrained(tmp_path / pipe.family.name)
        again = load_pipeline(tmp_path / pipe.family.name)
        assert type(again) is type(pipe)
        assert type(CoRe2Pipeline.from_pipe(again)) is type(pipe)


def test_a_class_derived_from_ours_takes_no_place_in_diffusers_maps():
    """Or loading one file twice would let the later class answer for the first."""
    known = AUTO_TEXT2IMAGE_PIPELINES_MAPPING["core2-stable-diffusion-3"]
    assert known is CoRe2StableDiffusion3Pipeline
    type("Derived", (CoRe2StableDiffusion3Pipeline,), {})
    assert AUTO_TEXT2IMAGE_PIPELINES_MAPPING["core2-stable-diffusion-3"] is known
    assert "Derived" not in [cls.__name__ for cls in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()]
