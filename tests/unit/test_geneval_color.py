"""GenEval's colors: masked crops by hand, the ensemble against numpy on a tiny real CLIP."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from core2_sampler.benchmarks.geneval.color import (
    CLIP,
    ColorClassifier,
    OpenClip,
    color_weights,
    load_colors,
    masked_crop,
)
from core2_sampler.benchmarks.geneval.prompts import COLORS
from core2_sampler.benchmarks.geneval.rules import Detection
from core2_sampler.benchmarks.geneval.tiny import TinyClip


class CountedClip(TinyClip):
    """A tiny random CLIP that remembers the texts it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        self.texts += texts
        return super().encode_texts(texts)


def scene() -> tuple[Image.Image, list[Detection]]:
    """Noise, and three objects with ragged masks."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    boxes = [(2, 3, 30, 20), (10, 10, 59, 39), (40, 0, 60, 12)]
    detections = []
    for left, top, right, bottom in boxes:
        mask = np.zeros((40, 60), dtype=bool)
        mask[top:bottom, left:right] = rng.random((bottom - top, right - left)) < 0.7
        detections.append(Detection((left, top, right, bottom), 0.9, mask))
    return image, detections


def test_a_crop_is_the_box_with_gray_outside_the_mask():
    image, detections = scene()
    for detection in detections:
        left, top, right, bottom = detection.box
        expected = np.asarray(image).copy()
        expected[~detection.mask] = 0x99
        crop = masked_crop(image, detection)
        assert np.array_equal(np.asarray(crop), expected[top:bottom, left:right])


def test_without_a_mask_the_crop_is_the_box():
    image, detections = scene()
    crop = masked_crop(image, Detection(detections[0].box, 0.9))
    assert np.array_equal(np.asarray(crop), np.asarray(image)[3:20, 2:30])


def test_a_mask_of_another_size_is_refused():
    image, detections = scene()
    with pytest.raises(ValueError, match=r"\(20, 30\), got \(40, 60\)"):
        masked_crop(image.resize((30, 20)), detections[0])


@torch.no_grad()
def test_weights_are_the_mean_of_unit_vectors_over_three_templates():
    clip = TinyClip()
    weights = color_weights(clip, "tv remote").numpy()
    assert weights.shape == (8, 10)
    for column, color in zip(weights.T, COLORS, strict=True):
        texts = [
            f"a photo of a {color} tv remote",
            f"a photo of a {color}-colored tv remote",
            f"a photo of a {color} object",
        ]
        rows = clip.encode_texts(texts).double().numpy()
        assert np.abs(np.linalg.norm(rows, axis=1) - 1).max() > 0.1  # the model's are not unit
        mean = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
        np.testing.assert_allclose(column, mean / np.linalg.norm(mean), atol=1e-5)


@torch.no_grad()
def test_the_color_is_the_nearest_weight_and_texts_are_encoded_once_a_class():
    clip = CountedClip()
    classifier = ColorClassifier(clip, "tiny")
    image, detections = scene()
    colors = classifier(image, detections, "cow")
    assert len(clip.texts) == 30
    assert classifier(image, detections[::-1], "cow") == colors[::-1]
    assert len(clip.texts) == 30
    classifier(image, detections, "kite")
    assert len(clip.texts) == 60

    weights = color_weights(clip, "cow").double().numpy()
    for detection, color in zip(detections, colors, strict=True):
        left, top, right, bottom = detection.box
        pixels = np.where(detection.mask[..., None], np.asarray(image), np.uint8(0x99))
        crop = Image.fromarray(pixels[top:bottom, left:right])
        feature = clip.encode_images([crop]).double().numpy()[0]
        scores = (feature / np.linalg.norm(feature)) @ weights
        assert color == COLORS[int(scores.argmax())]


PALETTE = {
    "red": (255, 0, 0),
    "orange": (255, 128, 0),
    "yellow": (255, 255, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
    "purple": (128, 0, 160),
    "pink": (255, 130, 190),
    "brown": (110, 60, 20),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
}


class MeanColor:
    """An exact embedding: an image's mean color against gray, a text's color word likewise."""

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        means = [np.asarray(image).reshape(-1, 3).mean(0) for image in images]
        return torch.tensor(np.stack(means)) - 0x99

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        words = [text.split()[4].removesuffix("-colored") for text in texts]
        return torch.tensor([PALETTE[word] for word in words], dtype=torch.float64) - 0x99


@pytest.mark.parametrize("color", COLORS)
def test_an_object_is_told_from_its_surroundings(color: str):
    mask = np.zeros((30, 30), dtype=bool)
    mask[5:25, 5:15] = mask[20:25, 5:25] = True  # an L: its box is mostly surroundings
    pixels = np.zeros((30, 30, 3), dtype=np.uint8)
    pixels[:] = PALETTE["red" if color != "red" else "blue"]
    pixels[mask] = PALETTE[color]
    detection = Detection((5, 5, 25, 25), 0.9, mask)
    classifier = ColorClassifier(MeanColor(), "mean color")
    assert classifier(Image.fromarray(pixels), [detection], "cow") == [color]


@pytest.mark.skipif(importlib.util.find_spec("open_clip") is not None, reason="it is installed")
def test_a_missing_open_clip_names_the_extra():
    with pytest.raises(ModuleNotFoundError, match=r"core2-sampler\[bench\]"):
        load_colors()


def test_weights_that_cannot_be_had_are_one_clear_error(monkeypatch, tmp_path):
    pytest.importorskip("open_clip")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="weights openai of ViT-L-14-quickgelu must be reachable"):
        load_colors()


def test_open_clip_serves_quickgelu_and_tiny_real_weights():
    open_clip = pytest.importorskip("open_clip")
    assert open_clip.get_model_config(CLIP)["quick_gelu"] is True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(
            embed_dim=8,
            vision_cfg={"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
            text_cfg={"layers": 1, "width": 64, "heads": 1},
            quick_gelu=True,
        )
    transform = open_clip.image_transform(16, is_train=False)
    clip = OpenClip(model.eval(), transform, open_clip.get_tokenizer(CLIP))
    image, detections = scene()
    colors = ColorClassifier(clip, "tiny")(image, detections, "cow")
    assert len(colors) == 3
    assert set(colors) <= set(COLORS)
