"""Scores that are a cosine of CLIP embeddings: CLIPScore in its four scales, and PickScore.

The scales in use differ by factors of 40, so the formula is part of every name and key. Images are
prepared through PIL, as OpenAI's CLIP does, whether torchvision is installed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core2_sampler.benchmarks.scorers.base import (
    Images,
    Source,
    loading,
    make_key,
    model_parts,
    pairs,
    place,
)

FORMULAS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "cos": lambda cos, scale: cos,
    "100*cos": lambda cos, scale: 100 * cos,
    "2.5*max(cos,0)": lambda cos, scale: 2.5 * cos.clamp(min=0),
    "exp(logit_scale)*cos": lambda cos, scale: scale * cos,
}
"""Score of a cosine [B], given the model's own scale ``exp(logit_scale)``."""


class ClipScorer:
    """Scores by the cosine between a CLIP model's image and text embeddings.

    Args:
        name: of the variant.
        model: a ``CLIPModel``.
        tokenizer: its tokenizer.
        processor: its image processor.
        formula: a name of ``FORMULAS``.
        prefix: what is put before every prompt.
        model_name: id or folder's name, for the key.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        processor: Any,
        *,
        formula: str,
        prefix: str = "",
        model_name: str = "given",
    ) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, processor
        self.formula, self.prefix = formula, prefix
        self.key = make_key(
            name,
            model=model_name,
            formula=formula,
            prefix=repr(prefix),
            vocabulary=len(tokenizer),
            **model_parts(model, processor),
        )

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return one score a pair, as ``Scorer`` says; prompts are cut at the model's length."""
        image = embed_images(self.model, self.processor, pairs(images, prompts))
        tokens = self.tokenizer(
            [self.prefix + prompt for prompt in prompts],
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        text = self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        cos = (image * nn.functional.normalize(text.float(), dim=-1)).sum(-1)
        return FORMULAS[self.formula](cos, self.model.logit_scale.exp().item()).cpu()


def embed_images(model: Any, processor: Any, images: Images) -> Tensor:
    """Return a CLIP model's image embeddings of unit length, float32, [B, D]."""
    pixels = processor(list(images), return_tensors="pt").pixel_values
    pixels = pixels.to(device=model.device, dtype=model.dtype)  # [B, 3, H, W]
    # transformers 5 returns an output object; its pooler_output is projected, not normalised
    embeds = model.get_image_features(pixel_values=pixels).pooler_output
    return nn.functional.normalize(embeds.float(), dim=-1)


def load_clip(source: str | Path, processor: Source, device: str, dtype: torch.dtype) -> Any:
    """Return a CLIP model, its tokenizer and its image processor.

    Args:
        source: folder or hub id of the model.
        processor: folder or hub id of tokenizer and image processor, where it is another.
        device: of the model.
        dtype: of the model.
    """
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    with loading(str(source)):
        model = CLIPModel.from_pretrained(source)
    with loading(str(processor or source)):
        tokenizer = CLIPTokenizer.from_pretrained(processor or source)
        images = CLIPImageProcessorPil.from_pretrained(processor or source)
    return place(model, device, dtype), tokenizer, images


@dataclass(frozen=True, slots=True)
class ClipVariant:
    """A published score that is a cosine of CLIP embeddings.

    Attributes:
        name: as registered.
        model: hub id.
        formula: a name of ``FORMULAS``.
        processor: hub id of tokenizer and image processor, where the model has none.
        prefix: what is put before every prompt.
    """

    name: str
    model: str
    formula: str
    processor: str | None = None
    prefix: str = ""

    def load(
        self, source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ClipScorer:
        """Return the scorer; ``source`` is a folder or hub id with model and processor."""
        processor = self.processor if source is None else None
        name = self.model if source is None else Path(source).name
        parts = load_clip(source or self.model, processor, device, dtype)
        return ClipScorer(
            self.name, *parts, formula=self.formula, prefix=self.prefix, model_name=name
        )


CLIPSCORE = ClipVariant("clipscore", "openai/clip-vit-large-patch14", "100*cos")
"""As torchmetrics 1.9 has it by default."""

CLIPSCORE_HESSEL = ClipVariant(
    "clipscore-hessel",
    "openai/clip-vit-base-patch32",
    "2.5*max(cos,0)",
    prefix="A photo depicts ",
)
"""As its paper has it (arXiv 2104.08718)."""

CLIPSCORE_GAEVAL = ClipVariant(
    "clipscore-gaeval", "openai/clip-vit-base-patch16", "exp(logit_scale)*cos"
)
"""As GA-Eval has it (arXiv 2602.22570)."""

T2ICOMPBENCH_CLIP = ClipVariant("t2icompbench-clip", "openai/clip-vit-base-patch32", "cos")
"""As T2I-CompBench has it for ``non_spatial`` (arXiv 2307.06350)."""

PICKSCORE = ClipVariant(
    "pickscore",
    "yuvalkirstain/PickScore_v1",
    "exp(logit_scale)*cos",
    processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
)
"""PickScore (arXiv 2305.01569), about 20 to 23."""
