"""Detection by transformers' Mask2Former with the pre- and post-processing of GenEval's detector.

The processing that comes with the model squashes images to 384x384 and paints overlaps away; here
it is that of mmdet 2, with which GenEval's thresholds were chosen. The weights are others than
upstream's, so the scores are calibrated differently: a port, and called one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from core2_sampler.benchmarks.cache import hash_component
from core2_sampler.benchmarks.geneval.prompts import OBJECT_NAMES
from core2_sampler.benchmarks.geneval.rules import Detection
from core2_sampler.benchmarks.scorers.base import need

DETECTOR = "facebook/mask2former-swin-small-coco-instance"

_MEAN = (123.675, 116.28, 103.53)  # ImageNet's, of RGB in 0..255
_STD = (58.395, 57.12, 57.375)
_DIVISOR = 32  # px; what the backbone halves five times
_MAX_DETECTIONS = 100  # pairs of query and class an image
_EPSILON = 1e-6

Size = tuple[int, int]
"""Height and width in px."""


@dataclass(frozen=True, slots=True)
class Mask2FormerDetector:
    """Finds COCO's objects with a Mask2Former for instance segmentation.

    Attributes:
        model: a ``Mask2FormerForUniversalSegmentation`` of 80 classes in COCO's order.
        name: which weights.
        short_edge: images are scaled to this shorter edge, px,
        long_edge: unless their longer edge would exceed this, px.
    """

    model: Any
    name: str
    short_edge: int = 800
    long_edge: int = 1333

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> dict[str, list[Detection]]:
        """Return all candidates by object name, with masks [H, W] of the image's size."""
        original = (image.height, image.width)
        resized = scaled_size(original, self.short_edge, self.long_edge)
        pixels = preprocess(image, resized).to(self.model.device)
        output = self.model(pixel_values=pixels)
        padded = (pixels.shape[-2], pixels.shape[-1])
        pairs = post_process(
            output.class_queries_logits[0].float(),
            output.masks_queries_logits[0].float(),
            (padded, resized, original),
        )
        found: dict[str, list[Detection]] = {}
        for index, detection in pairs:
            # By index: the names in the model's config are not GenEval's.
            found.setdefault(OBJECT_NAMES[index], []).append(detection)
        return found


def load_detector(name: str = DETECTOR, *, device: str = "cpu") -> Mask2FormerDetector:
    """Load the detector from the hub or a folder.

    Raises:
        ModuleNotFoundError: if scipy is missing, which this model needs even without training.
        ValueError: if the model does not know COCO's 80 classes.
    """
    need("GenEval's detector", "scipy")
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(name)
    if model.config.num_labels != len(OBJECT_NAMES):
        raise ValueError(
            f"GenEval's detector must know the {len(OBJECT_NAMES)} classes of COCO, got "
            f"{model.config.num_labels} in {name}: take an instance model such as {DETECTOR}"
        )
    model = model.to(device=device, dtype=torch.float32).eval()
    return Mask2FormerDetector(model, f"{name}@{hash_component(model)[:12]}")


def scaled_size(size: Size, short_edge: int, long_edge: int) -> Size:
    """Return the size that mmdet's resize with a kept ratio gives; halves are rounded up."""
    scale = min(long_edge / max(size), short_edge / min(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def preprocess(image: Image.Image, resized: Size) -> Tensor:
    """Return an image as the model takes it: scaled, normalized, zeros at right and bottom.

    Bilinear without antialiasing, the nearest to the cv2 resize of mmdet.

    Returns:
        Pixels [1, 3, H, W], H and W multiples of 32.
    """
    array = np.array(image.convert("RGB"), dtype=np.float32)
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None]  # [1, 3, h, w]
    pixels = _scale(pixels, resized).round()
    mean, std = (torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    height, width = resized
    return functional.pad((pixels - mean) / std, (0, -width % _DIVISOR, 0, -height % _DIVISOR))


def post_process(
    class_logits: Tensor, mask_logits: Tensor, sizes: tuple[Size, Size, Size]
) -> list[tuple[int, Detection]]:
    """Turn the outputs of the queries into detections, as mmdet's instance post-processing does.

    Args:
        class_logits: of each query, [Q, classes + 1]; the last class is "no object".
        mask_logits: of each query, [Q, h, w].
        sizes: of the padded input, of what of it is image, and of the original image.

    Returns:
        Class index and detection of the 100 likeliest pairs of query and class, likeliest first.
        A score is the class's probability times the mean probability of the mask's pixels.
    """
    classes = class_logits.shape[1] - 1
    probabilities = class_logits.softmax(-1)[:, :-1].flatten()
    top, pairs = probabilities.topk(min(_MAX_DETECTIONS, len(probabilities)))
    regions: dict[int, tuple[np.ndarray, float]] = {}
    found = []
    for probability, pair in zip(top.tolist(), pairs.tolist(), strict=True):
        query, index = divmod(pair, classes)
        if query not in regions:
            regions[query] = _region(mask_logits[query], sizes)
        mask, certainty = regions[query]
        found.append((index, Detection(_tight_box(mask), probability * certainty, mask)))
    return found


def _region(logits: Tensor, sizes: tuple[Size, Size, Size]) -> tuple[np.ndarray, float]:
    """Return the mask [H, W] of a query at the original size and its mean probability."""
    padded, (height, width), original = sizes
    full = _scale(logits[None, None], padded)[..., :height, :width]
    full = _scale(full, original)[0, 0]
    mask = full > 0
    certainty = (full.sigmoid() * mask).sum() / (mask.sum() + _EPSILON)
    return mask.cpu().numpy(), float(certainty)


def _tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] + 1),
        float(rows[-1] + 1),
    )


def _scale(images: Tensor, size: Size) -> Tensor:
    return functional.interpolate(images, size, mode="bilinear", align_corners=False)
