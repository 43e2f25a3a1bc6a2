"""GenEval's colors: zero-shot classification by CLIP of each object on a gray ground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from core2_sampler.benchmarks.cache import hash_component
from core2_sampler.benchmarks.geneval.prompts import COLORS
from core2_sampler.benchmarks.geneval.rules import Detection
from core2_sampler.benchmarks.scorers.base import loading
from core2_sampler.benchmarks.scorers.hpsv21 import open_clip

CLIP = "ViT-L-14-quickgelu"
"""OpenAI's weights were trained with QuickGELU; "ViT-L-14" builds plain GELU since open_clip 2.29
and only warns."""

_GROUND = "#999"
_TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


class Clip(Protocol):
    """What color classification needs of a CLIP model."""

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the embeddings of images of any size, [N, D]; any length."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, [N, D]; any length."""
        ...


@dataclass(frozen=True, slots=True)
class ColorClassifier:
    """Names the colors of detected objects.

    Attributes:
        clip: the CLIP model.
        name: which weights.
    """

    clip: Clip
    name: str
    _weights: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def __call__(
        self, image: Image.Image, detections: Sequence[Detection], object_name: str
    ) -> list[str]:
        """Return the color of each detection, one of ``COLORS``; of equal ones the first.

        Args:
            image: where they were found.
            detections: one or more objects of one class, with masks of the image's size.
            object_name: their class.
        """
        if object_name not in self._weights:
            self._weights[object_name] = color_weights(self.clip, object_name)
        crops = [masked_crop(image, detection) for detection in detections]
        features = functional.normalize(self.clip.encode_images(crops), dim=-1)
        best = (features @ self._weights[object_name]).argmax(dim=1)
        return [COLORS[index] for index in best.tolist()]


def masked_crop(image: Image.Image, detection: Detection) -> Image.Image:
    """Return an object's box of the image, gray where its mask is not.

    Raises:
        ValueError: if the mask does not have the image's size.
    """
    image = image.convert("RGB")
    if detection.mask is not None:
        if detection.mask.shape != (image.height, image.width):
            raise ValueError(
                f"a mask must have the image's height and width {(image.height, image.width)}, "
                f"got {detection.mask.shape}"
            )
        ground = Image.new("RGB", image.size, _GROUND)
        mask = Image.fromarray(detection.mask.astype("uint8") * 255)
        image = Image.composite(image, ground, mask)
    left, top, right, bottom = (round(side) for side in detection.box)
    return image.crop((left, top, right, bottom))


def color_weights(clip: Clip, object_name: str) -> Tensor:
    """Return the classifier of the colors of one kind of object, unit columns [D, 10].

    A color's vector is the mean of the unit vectors of its texts, made a unit vector.
    """
    columns = []
    for color in COLORS:
        texts = [text.format(color=color, name=object_name) for text in _TEMPLATES]
        features = functional.normalize(clip.encode_texts(texts), dim=-1)
        columns.append(functional.normalize(features.mean(dim=0), dim=0))
    return torch.stack(columns, dim=1)


@dataclass(frozen=True, slots=True)
class OpenClip:
    """A ``Clip`` of the open_clip package: its model, transform of images and tokenizer."""

    model: Any
    transform: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the embeddings of images of any size, [N, D]."""
        pixels = torch.stack([self.transform(image) for image in images])
        embeddings: Tensor = self.model.encode_image(pixels.to(self._device()))
        return embeddings

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, [N, D]."""
        embeddings: Tensor = self.model.encode_text(self.tokenizer(list(texts)).to(self._device()))
        return embeddings

    def _device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device


def load_colors(*, pretrained: str = "openai", device: str = "cpu") -> ColorClassifier:
    """Load GenEval's classifier: open_clip's ViT-L/14 with QuickGELU, in float32.

    Args:
        pretrained: open_clip's tag of the weights, or a file of them.
        device: where it runs.

    Raises:
        ModuleNotFoundError: if open_clip or torchvision is missing.
        ValueError: if the weights cannot be reached.
    """
    package = open_clip()
    with loading(f"the weights {pretrained} of {CLIP}"):  # or open_clip's own error is anything
        package.download_pretrained(package.get_pretrained_cfg(CLIP, pretrained))
    model, _, transform = package.create_model_and_transforms(
        CLIP, pretrained=pretrained, device=device
    )
    clip = OpenClip(model.eval(), transform, package.get_tokenizer(CLIP))
    return ColorClassifier(clip, f"{CLIP}@{hash_component(model)[:12]}")
