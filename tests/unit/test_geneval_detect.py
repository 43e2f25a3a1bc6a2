"""GenEval's detection: golden values, the host's image processor, and a tiny real Mask2Former."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil,
)

from core2_sampler.benchmarks.geneval.detect import (
    Mask2FormerDetector,
    load_detector,
    post_process,
    preprocess,
    scaled_size,
)
from core2_sampler.benchmarks.geneval.prompts import OBJECT_NAMES
from core2_sampler.benchmarks.geneval.tiny import tiny_mask2former


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (800, 800)),
        ((512, 768), (800, 1200)),
        ((480, 1280), (500, 1333)),  # the long edge limits: 480 * 1333 / 1280 = 499.875
        ((1000, 300), (1333, 400)),  # 399.9
    ],
)
def test_scaled_size_by_hand(size: tuple[int, int], expected: tuple[int, int]):
    assert scaled_size(size, 800, 1333) == expected


def test_pixels_are_those_of_the_hosts_processor_where_nothing_is_scaled():
    image = random_image(50, 70)
    host = Mask2FormerImageProcessorPil(do_resize=False)
    expected = torch.as_tensor(host(images=[image], return_tensors="pt")["pixel_values"])
    ours = preprocess(image, (70, 50))
    assert ours.shape == (1, 3, 96, 64)
    torch.testing.assert_close(ours[..., :70, :50], expected, rtol=0, atol=2e-5)
    assert not ours[..., 70:, :].any()
    assert not ours[..., 50:].any()


def test_scaling_is_bilinear_at_pixel_centers_in_whole_grays():
    image = Image.fromarray(np.array([[[0] * 3, [255] * 3]], dtype=np.uint8))
    red = preprocess(image, (1, 4))[0, 0, 0, :4] * 58.395 + 123.675
    # Centers at -0.25, 0.25, 0.75 and 1.25 of the two pixels: 0, 63.75, 191.25 and 255, rounded.
    torch.testing.assert_close(red, torch.tensor([0.0, 64.0, 191.0, 255.0]), rtol=0, atol=1e-4)


def test_detections_from_hand_made_logits():
    same = (4, 6)
    class_logits = torch.log(
        torch.tensor(
            [
                [0.7, 0.1, 0.2],  # class 0, class 1, no object
                [0.05, 0.9, 0.05],
                [0.02, 0.03, 0.95],
            ]
        )
    )
    masks = torch.full((3, *same), -5.0)
    masks[0, 1:3, 2:5] = 2.0
    masks[0, 1, 2] = 1.0
    masks[1, 0, 0] = 3.0
    masks[1, 3, 5] = 4.0  # two parts of one instance
    found = post_process(class_logits, masks, (same, same, same))
    expected = [
        (1, (0, 0, 6, 4), 0.9 * (sigmoid(3) + sigmoid(4)) / 2),
        (0, (2, 1, 5, 3), 0.7 * (5 * sigmoid(2) + sigmoid(1)) / 6),
        (1, (2, 1, 5, 3), 0.1 * (5 * sigmoid(2) + sigmoid(1)) / 6),
        (0, (0, 0, 6, 4), 0.05 * (sigmoid(3) + sigmoid(4)) / 2),
        (1, (0, 0, 0, 0), 0.0),  # an empty mask
        (0, (0, 0, 0, 0), 0.0),
    ]
    assert [(index, detection.box) for index, detection in found] == [e[:2] for e in expected]
    assert [d.score for _, d in found] == pytest.approx([e[2] for e in expected], rel=1e-5)
    assert np.array_equal(found[0][1].mask, (masks[1] > 0).numpy())


def test_masks_are_cut_from_the_padding_and_scaled_to_the_original():
    masks = torch.full((1, 2, 2), -1.0)
    masks[0, :, 1] = 1.0
    # 2x2 logits -> 8x8 input of which 8x6 is image -> 16x12 original. The logits cross zero between
    # the columns 3 and 4 of the input, that is in the middle of its 6 columns plus one.
    found = post_process(torch.zeros(1, 2), masks, ((8, 8), (8, 6), (16, 12)))
    (index, detection) = found[0]
    assert (index, detection.box) == (0, (8.0, 0.0, 12.0, 16.0))
    assert detection.mask.shape == (16, 12)


def test_overlapping_instances_are_all_kept_and_the_list_ends_at_100():
    generator = torch.Generator().manual_seed(0)
    class_logits = torch.randn(60, 4, generator=generator)
    masks = torch.ones(60, 2, 2)
    found = post_process(class_logits, masks, ((2, 2),) * 3)
    probabilities = np.exp(class_logits.numpy())
    probabilities = (probabilities / probabilities.sum(1, keepdims=True))[:, :3]
    expected = np.sort(probabilities.ravel())[::-1][:100] * sigmoid(1)
    assert [d.score for _, d in found] == pytest.approx(expected.tolist(), rel=1e-5)
    assert {d.box for _, d in found} == {(0, 0, 2, 2)}


# --- a tiny random model of the real class -------------------------------------------------------


def enlarge(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear scaling at pixel centers, edges repeated: one matrix for each axis."""

    def matrix(old: int, new: int) -> np.ndarray:
        place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.minimum(np.floor(place).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        weights = np.zeros((new, old))
        weights[np.arange(new), low] += 1 - (place - low)
        weights[np.arange(new), high] += place - low
        return weights

    rows, columns = (matrix(*pair) for pair in zip(logits.shape, size, strict=True))
    return rows @ logits @ columns.T


def test_the_detector_is_model_and_formula_on_a_tiny_real_model():
    model = tiny_mask2former()
    image = random_image(60, 40)
    found = Mask2FormerDetector(model, "tiny", short_edge=64, long_edge=128)(image)

    pixels = preprocess(image, (64, 96))  # both multiples of 32: no padding
    with torch.no_grad():
        output = model(pixel_values=pixels)
    odds = np.exp(output.class_queries_logits[0].double().numpy())
    probabilities = (odds / odds.sum(1, keepdims=True))[:, :-1]
    best: dict[tuple[str, float], tuple] = {}
    for query, logits in enumerate(output.masks_queries_logits[0].double().numpy()):
        full = enlarge(enlarge(logits, (64, 96)), (40, 60))
        mask = full > 0
        certainty = (1 / (1 + np.exp(-full)))[mask].mean() if mask.any() else 0.0
        for index, probability in enumerate(probabilities[query]):
            best[OBJECT_NAMES[index], query] = (probability, probability * certainty, mask)
    expected = sorted(best.items(), key=lambda item: -item[1][0])[:100]

    assert sum(map(len, found.values())) == 100
    seen_masks = 0
    for name in {key[0] for key, _ in expected}:
        ours, theirs = found[name], [value for key, value in expected if key[0] == name]
        assert [d.score for d in ours] == pytest.approx([v[1] for v in theirs], rel=1e-3, abs=1e-6)
        for detection, (_, _, mask) in zip(ours, theirs, strict=True):
            assert (detection.mask != mask).mean() < 0.002  # rounding where the logit crosses zero
            seen_masks += 0 < mask.mean() < 1
    assert seen_masks > 20
    assert max(d.score for items in found.values() for d in items) > 0.3


def test_a_saved_model_is_loaded_and_named_by_its_weights(tmp_path: Path):
    tiny_mask2former().save_pretrained(tmp_path / "model")
    detector = load_detector(str(tmp_path / "model"))
    assert not detector.model.training
    first = detector.name
    assert first.startswith(f"{tmp_path / 'model'}@")
    assert load_detector(str(tmp_path / "model")).name == first
    with torch.no_grad():
        detector.model.class_predictor.bias[0] += 1
    detector.model.save_pretrained(tmp_path / "model")
    assert load_detector(str(tmp_path / "model")).name != first


def test_a_model_of_other_classes_is_refused(tmp_path: Path):
    tiny_mask2former(num_labels=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="80 classes of COCO, got 3"):
        load_detector(str(tmp_path))
