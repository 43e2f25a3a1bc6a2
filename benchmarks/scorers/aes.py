"""AES: LAION's aesthetic predictor v2, an affine map of the image embedding of CLIP ViT-L/14."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from core2_sampler.benchmarks.fetch import fetch
from core2_sampler.benchmarks.scorers.base import (
    AffineMlp,
    Images,
    Source,
    first_file,
    make_key,
    model_parts,
    pairs,
    place,
    read_state,
)
from core2_sampler.benchmarks.scorers.clip import embed_images, load_clip

CLIP = "openai/clip-vit-large-patch14"
MLP = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/"
    "6934dd81792f086e613a121dbce43082cb8be85e/sac+logos+ava1-l14-linearMSE.pth"
)
MLP_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


class AesScorer:
    """Scores how pleasing an image is, about 1 to 10; the prompt does not count.

    Args:
        model: a ``CLIPModel``.
        processor: its image processor.
        mlp: the map of its unit-length image embedding.
    """

    def __init__(self, model: Any, processor: Any, mlp: AffineMlp) -> None:
        self.model, self.processor, self.mlp = model, processor, mlp
        head = model_parts(mlp)["weights"]
        self.key = make_key("aes", head=head, **model_parts(model, processor))

    @classmethod
    def load(
        cls, source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Return the scorer, as ``Loader`` says.

        Args:
            source: folder with the CLIP model in ``clip`` and one file ``*linearMSE.pth`` or
                ``*linearMSE.safetensors``.
            device: of the model.
            dtype: of the CLIP model.
        """
        if source is None:
            path, clip = fetch(MLP, MLP_SHA256), CLIP
        else:
            path, clip = first_file(Path(source), "*linearMSE.*"), str(Path(source) / "clip")
        model, _, processor = load_clip(clip, None, device, dtype)
        mlp = AffineMlp(model.config.projection_dim)
        mlp.load_state_dict(read_state(path))
        return cls(model, processor, place(mlp, device, torch.float32))

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return one score an image, as ``Scorer`` says."""
        embeds = embed_images(self.model, self.processor, pairs(images, prompts))
        return self.mlp(embeds).cpu()
