"""What `bench doctor` finds. Truth: configs written by hand, and pixels whose average is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil

from core2_sampler.benchmarks import doctor


@pytest.mark.parametrize(
    ("text", "vision", "ok"),
    [
        ("quick_gelu", "quick_gelu", True),
        ("gelu", "gelu", False),
        ("quick_gelu", "gelu", False),
    ],
)
def test_a_config_with_another_activation_is_found(tmp_path, text, vision, ok):
    CLIPConfig(
        text_config={"hidden_act": text}, vision_config={"hidden_act": vision}
    ).save_pretrained(tmp_path)
    check = doctor.check_activation(str(tmp_path), "quick_gelu")
    assert check.ok is ok
    assert "trained with quick_gelu" in check.means and vision in check.means


def test_a_model_that_is_not_here_is_not_checked():
    check = doctor.check_activation("owner/not-a-model", "gelu")
    assert check.ok is None and "not in the local cache" in check.means


def test_this_installation_prepares_images_and_embeds_as_the_originals():
    for check in (doctor.check_features(), doctor.check_clip_pixels(), doctor.check_antialias()):
        assert check.ok, check
    assert "BaseModelOutputWithPooling" in doctor.check_features().means


def test_a_resize_without_antialias_is_found(monkeypatch):
    def every_second_pixel(image, size):
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return x[:, ::2, : 2 * size]  # the columns still alternate

    monkeypatch.setattr(doctor, "preprocess", every_second_pixel)
    assert doctor.check_antialias().ok is False


def test_another_resampling_is_found(monkeypatch):
    monkeypatch.setattr(CLIPImageProcessorPil, "resample", Image.Resampling.NEAREST)
    assert doctor.check_clip_pixels().ok is False


def test_versions_are_compared_with_those_that_are_asked_for():
    """Truth: bounds around the versions that are here."""
    stated = ["torch>=2", "pillow<1", 'scipy>=99; extra == "bench"', "transformers"]
    found = {check.name.split()[-1]: check.ok for check in doctor.check_versions(stated)}
    assert found["torch"] is True and found["pillow"] is False and found["scipy"] is False
    assert found["transformers"] is None  # nothing is asked for
    assert found["spacy"] is None
    own = {check.name.split()[-1]: check.ok for check in doctor.check_versions()}
    assert own["torch"] is own["transformers"] is own["pillow"] is True


def test_everything_is_examined_without_a_network(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)  # OpenAI's defaults
    checks = doctor.examine({str(tmp_path): "quick_gelu"})
    assert checks[0].ok is True
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"open_clip", "HPSv2.1 antialias", "version of transformers"} <= set(names)
    assert all(check.means for check in checks)
