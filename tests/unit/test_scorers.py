"""The contract of scorers; one joins by being registered. Truth: the pair alone, scored alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from core2_sampler.benchmarks.scorers import SCORERS, t2icompbench_scorer
from core2_sampler.benchmarks.scorers.tiny import write_tiny
from core2_sampler.benchmarks.suites import T2I_CATEGORIES

PROMPTS = ["a red circle", "two stars", "a blue ring and a black cross"]
ALL_PROMPTS = [*PROMPTS, ""]
EMBEDDED = ("shapes", "shapes-clip")


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


IMAGES = [noise(64, 64), noise(40, 70, 1), noise(90, 33, 2)]


@pytest.fixture(scope="module", params=SCORERS.names())
def name(request):
    if request.param == "hpsv21":
        pytest.importorskip("open_clip")
    return request.param


@pytest.fixture(scope="module")
def source(name, tmp_path_factory):
    return write_tiny(name, tmp_path_factory.mktemp(name), ALL_PROMPTS)


@pytest.fixture(scope="module")
def scorer(name, source):
    return SCORERS.get(name).load(source)


def test_it_gives_one_finite_number_a_pair(scorer):
    scores = scorer.score(IMAGES, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    assert scores.device.type == "cpu" and not scores.requires_grad
    assert torch.isfinite(scores).all()


def test_it_sees_the_image_and_most_see_the_prompt(scorer, name):
    if name == "shapes":
        pytest.skip("noise is wrong for every caption; its verdicts have a test of their own")
    assert scorer.score(IMAGES, PROMPTS[:1] * 3).unique().numel() == 3
    # One pair at a time: the rows of a batch may be rounded differently on several threads.
    by_prompt = torch.cat([scorer.score(IMAGES[:1], [prompt]) for prompt in PROMPTS])
    assert by_prompt.unique().numel() == (1 if name == "aes" else 3)


def test_it_is_deterministic_and_leaves_the_random_state_alone(scorer, global_random_state):
    assert torch.equal(scorer.score(IMAGES, PROMPTS), scorer.score(IMAGES, PROMPTS))


def test_a_score_depends_on_its_own_pair_alone_and_order_is_kept(scorer):
    together = scorer.score(IMAGES, PROMPTS)
    alone = torch.cat([scorer.score([i], [p]) for i, p in zip(IMAGES, PROMPTS, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    reverse = scorer.score(IMAGES[::-1], PROMPTS[::-1]).flip(0)
    torch.testing.assert_close(together, reverse, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_an_image_of_any_mode_counts_as_its_rgb(scorer, mode):
    image = IMAGES[1].convert(mode)
    given = scorer.score([image], PROMPTS[:1])
    assert torch.equal(given, scorer.score([image.convert("RGB")], PROMPTS[:1]))


@pytest.mark.parametrize("size", [(1, 1), (7, 200), (200, 7)])
def test_an_image_may_have_any_size(scorer, size):
    assert torch.isfinite(scorer.score([noise(*size)], PROMPTS[:1])).all()


def test_an_empty_prompt_is_scored_or_refused_by_name(scorer):
    try:
        score = scorer.score(IMAGES[:1], [""])
    except ValueError as error:
        assert "prompt must be a caption" in str(error)
    else:
        assert math.isfinite(score.item())


@pytest.mark.parametrize(("images", "prompts"), [(3, 2), (0, 0)])
def test_every_image_needs_one_prompt(scorer, images, prompts):
    with pytest.raises(ValueError, match=f"one prompt, got {images} images and {prompts} prompts"):
        scorer.score(IMAGES[:images], PROMPTS[:prompts])


def test_the_key_names_the_scorer_and_its_weights(scorer, name, source, tmp_path):
    assert scorer.key.split(";")[0] == name
    assert SCORERS.get(name).load(source).key == scorer.key
    if name not in (*EMBEDDED, "plugin"):
        other = write_tiny(name, tmp_path / "other", ALL_PROMPTS, seed=1)
        assert SCORERS.get(name).load(other).key != scorer.key
        half = SCORERS.get(name).load(source, dtype=torch.bfloat16)
        assert half.key != scorer.key and "dtype=bfloat16" in half.key
        close = half.score(IMAGES, PROMPTS)
        torch.testing.assert_close(close, scorer.score(IMAGES, PROMPTS), atol=1.0, rtol=0.1)


@pytest.mark.parametrize("name", sorted(set(SCORERS.names()) - set(EMBEDDED)))
def test_offline_it_says_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises((ValueError, ModuleNotFoundError), match="own copy|pip install|a command"):
        SCORERS.get(name).load()


def test_each_category_of_t2icompbench_has_its_scorer_or_says_why_not():
    supported = ("color", "shape", "texture", "non_spatial")
    for category in T2I_CATEGORIES:
        if category in supported:
            assert t2icompbench_scorer(category) in SCORERS.names()
        else:
            with pytest.raises(ValueError, match="not supported: it is judged by the UniDet"):
                t2icompbench_scorer(category)
    with pytest.raises(ValueError, match="did you mean 'color'"):
        t2icompbench_scorer("colour")
