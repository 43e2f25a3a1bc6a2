"""A judge of tiny random models of the real classes: it runs the whole path, and means nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from core2_sampler.benchmarks.cache import hash_component
from core2_sampler.benchmarks.geneval.color import ColorClassifier
from core2_sampler.benchmarks.geneval.detect import Mask2FormerDetector
from core2_sampler.benchmarks.geneval.judge import GenEvalJudge
from core2_sampler.benchmarks.geneval.prompts import OBJECT_NAMES

_PIXELS = 32  # px; side of the CLIP model's input, shorter side of the detector's
_TOKENS = 48


def tiny_judge(*, seed: int = 0) -> GenEvalJudge:
    """Return a judge whose name says that its models are random.

    Args:
        seed: of the weights; the global random state is left alone.
    """
    detector = tiny_mask2former(seed=seed)
    clip = TinyClip(seed=seed)
    return GenEvalJudge(
        Mask2FormerDetector(
            detector, f"random@{hash_component(detector)[:12]}", 2 * _PIXELS, 4 * _PIXELS
        ),
        ColorClassifier(clip, f"random@{hash_component(clip.model)[:12]}"),
    )


def tiny_mask2former(num_labels: int = len(OBJECT_NAMES), *, seed: int = 0) -> Any:
    """Return a random Mask2Former on a Swin backbone that is sure of some of its classes."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        num_labels=num_labels,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Mask2FormerForUniversalSegmentation(config).eval()
        model.class_predictor.weight.normal_(std=2.0)
    return model


class TinyClip:
    """A ``Clip`` of a random CLIPModel, whose inputs matter, on the tokenizer of Shapes."""

    def __init__(self, *, seed: int = 0) -> None:
        from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

        from core2_sampler.shapes.tokenizer import build_tokenizer

        self.tokenizer = build_tokenizer()  # of bytes and the words of Shapes: takes any text
        self.processor = CLIPImageProcessorPil(
            size={"shortest_edge": _PIXELS}, crop_size={"height": _PIXELS, "width": _PIXELS}
        )
        tower = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        text = tower | {
            "vocab_size": len(self.tokenizer),
            "max_position_embeddings": _TOKENS,
            "eos_token_id": self.tokenizer.eos_token_id,
        }
        vision = tower | {"image_size": _PIXELS, "patch_size": 8}
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            self.model = CLIPModel(config).eval()
            for parameter in self.model.parameters():
                parameter.normal_(std=0.5)

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the embeddings of images of any size, [N, 8]."""
        pixels = self.processor(list(images), return_tensors="pt").pixel_values
        embeddings: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
        return embeddings

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, [N, 8]."""
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=_TOKENS,
            return_tensors="pt",
        )
        embeddings: Tensor = self.model.get_text_features(**tokens).pooler_output
        return embeddings
