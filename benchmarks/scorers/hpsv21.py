"""HPSv2.1 (arXiv 2306.09341): the cosine of a fine-tuned open_clip ViT-H-14, times 100."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from core2_sampler.benchmarks.cache import digest
from core2_sampler.benchmarks.fetch import fetch
from core2_sampler.benchmarks.scorers.base import (
    Images,
    Source,
    make_key,
    model_parts,
    pairs,
    place,
    read_state,
)
from core2_sampler.benchmarks.scorers.clip import FORMULAS

ARCHITECTURE = "ViT-H-14"
CHECKPOINT = "hf:xswu/HPSv2/HPS_v2.1_compressed.pt"
FORMULA = "100*cos"

OPEN_CLIP = ("open_clip", "torchvision")
"""The packages of open_clip's models."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def open_clip() -> Any:
    """Import open_clip.

    Raises:
        ModuleNotFoundError: if it, or the torchvision it needs, is missing.
    """
    try:
        import open_clip as module
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"open_clip must be installed, got no {error.name}: pip install 'core2-sampler[bench]'"
        ) from error
    return module


def preprocess(image: Image.Image, size: int) -> Tensor:
    """Return an image as HPSv2 prepares it: longest side to ``size``, zero padding, normalised.

    The resize acts on a tensor. It is antialiased, as torchvision does by default since 0.17; with
    older ones the published code did not.

    Args:
        image: RGB, any size.
        size: of the model's input, px.

    Returns:
        [3, size, size] float32.
    """
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255  # [1, 3, H, W]
    scale = size / max(image.size)
    if scale != 1:
        height, width = (max(1, round(side * scale)) for side in x.shape[-2:])
        x = nn.functional.interpolate(
            x, (height, width), mode="bicubic", align_corners=False, antialias=True
        )
    rows, columns = size - x.shape[-2], size - x.shape[-1]
    around = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    x = nn.functional.pad(x[0], around)
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class HpsScorer:
    """Scores human preference, about 20 to 35.

    Args:
        model: an open_clip ``CLIP``.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        size = model.visual.image_size
        self.size = size[0] if isinstance(size, tuple) else size
        self.key = make_key(
            "hpsv21",
            formula=FORMULA,
            architecture=digest(str(model)),
            preprocess=f"longest{self.size}-bicubic-antialias-pad0",
            **model_parts(model),
        )

    @classmethod
    def load(
        cls, source: Source = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> Self:
        """Return the scorer, as ``Loader`` says.

        Args:
            source: the checkpoint ``HPS_v2.1_compressed.pt``, or a folder of open_clip's own
                format (``open_clip_config.json`` and weights).
            device: of the model.
            dtype: of the model.
        """
        clip = open_clip()
        if source is not None and Path(source).is_dir():
            name = f"local-dir:{source}"
            model = clip.create_model(name, require_pretrained=True)
        else:
            path = fetch(CHECKPOINT if source is None else source)
            name = ARCHITECTURE
            model = clip.create_model(name)
            load_checkpoint(model, path)
        return cls(place(model, device, dtype), clip.get_tokenizer(name))

    @torch.no_grad()
    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Return one score a pair, as ``Scorer`` says; prompts are cut at 77 tokens."""
        weight = next(self.model.parameters())
        pixels = torch.stack([preprocess(image, self.size) for image in pairs(images, prompts)])
        image = self.model.encode_image(pixels.to(weight), normalize=False)
        text = self.model.encode_text(self.tokenizer(list(prompts)).to(weight.device))
        image, text = (nn.functional.normalize(x.float(), dim=-1) for x in (image, text))
        return FORMULAS[FORMULA]((image * text).sum(-1), 1.0).cpu()


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a published HPSv2 checkpoint, whose weights lie under ``state_dict``."""
    state: Any = read_state(path)
    model.load_state_dict(state.get("state_dict", state))
