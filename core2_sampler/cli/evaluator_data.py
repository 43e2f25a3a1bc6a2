"""The pairs that ``core2 evaluators train`` learns from: rendered, real or generated images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core2_sampler.config import ConfigError
from core2_sampler.evaluators.kinds import KINDS
from core2_sampler.model_files import EMBEDDED

if TYPE_CHECKING:
    from torch import Tensor

    from core2_sampler.cli.evaluators import TrainOptions
    from core2_sampler.evaluators.images import Accept, Captioned, Finals
    from core2_sampler.evaluators.pairs import PairSource

_BANK = (48_000, 64)  # rendered images: kept at most, and drawn anew in a step until then
_SPARE = 16  # captions drawn for each that is wanted
_VAL_PROMPTS = 480


def pair_source(options: TrainOptions, pipe: Any) -> PairSource:
    """Return the pairs that the kind learns from.

    Args:
        options: of the command.
        pipe: makes and decodes latents.

    Raises:
        ConfigError: if there are no images for the model.
    """
    from core2_sampler.evaluators.images import final_latents
    from core2_sampler.evaluators.pairs import CaptionPairs, EditPairs, RankedPairs, RealPairs
    from core2_sampler.trajectory import TrajectoryStore

    kind = KINDS.get(options.kinds[0])
    if options.data is None:
        images = _images(options, pipe)
        if kind.lesson == "captions":
            return CaptionPairs(images)
        return EditPairs(images, kind.words, kind.swaps)
    generated = final_latents(TrajectoryStore(options.data))
    if kind.lesson == "generated":
        return RealPairs(_images(options, pipe), generated, options.held_out_share)
    ranks = rank(generated, options.scorers, pipe)
    return RankedPairs(generated, ranks, options.held_out_share)


def _images(options: TrainOptions, pipe: Any) -> Captioned:
    from core2_sampler.evaluators.images import ImageFolder

    if options.images is not None:
        size = pipe.family.latent_shape(pipe)[1] * pipe.vae_scale_factor
        encode = partial(_encode_file, pipe, size)
        return ImageFolder(options.images, encode, options.held_out_share)
    if options.model not in EMBEDDED:
        raise ConfigError(f"images must be given for a model that is not embedded: {options.model}")
    return ShapesImages(pipe)


def _encode_file(pipe: Any, size: int, file: Path) -> Tensor:
    """Return the clean latents of an image file's middle square, [C, H, W]."""
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return encode_pixels(pipe, pipe.image_processor.preprocess(square))[0]


def encode_pixels(pipe: Any, pixels: Tensor) -> Tensor:
    """Return clean latents [B, C, H, W] of images [B, 3, H, W] in [-1, 1]."""
    import torch

    vae = pipe.vae
    with torch.no_grad():
        mean = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean.float()
    return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def rank(generated: Finals, scorers: Sequence[str], pipe: Any) -> list[tuple[float, ...]]:
    """Return what each scorer says of each generated image, decoded.

    Args:
        generated: images as clean latents.
        scorers: names of `core2_sampler.benchmarks.scorers.SCORERS`.
        pipe: decodes.
    """
    import torch

    from core2_sampler.benchmarks.scorers import SCORERS

    judges = [SCORERS.get(name).load(device=str(pipe.vae.device)) for name in scorers]
    told: list[tuple[float, ...]] = []
    texts = [record.prompt for record in generated.records]
    for start in range(0, len(texts), 16):
        part = slice(start, start + 16)
        with torch.no_grad():
            pixels = pipe.family.decode(pipe, generated.x0[part].to(pipe.vae.device))
        images = pipe.image_processor.postprocess(pixels, output_type="pil")
        scores = [judge.score(images, texts[part]).tolist() for judge in judges]
        told += zip(*scores, strict=True)
    return told


class ShapesImages:
    """Rendered images of the Shapes world, as `core2_sampler.evaluators.images.Captioned`."""

    def __init__(self, pipe: Any) -> None:
        """Take the pipeline whose VAE makes the latents."""
        from core2_sampler.shapes.batches import LatentBank

        self._pipe, self._bank = pipe, LatentBank(pipe.vae, *_BANK)

    def draw(self, step: int, count: int, accept: Accept | None = None) -> tuple[Tensor, list[str]]:
        """Return images of training captions."""
        batch = self._bank.draw(step, count if accept is None else count * _SPARE)
        return _wanted(batch.latents, batch.texts, accept, count)

    def held_out(self, accept: Accept | None = None) -> tuple[Tensor, list[str]]:
        """Return images of the captions for choosing, of contents that training never sees."""
        return _wanted(*self._validation, accept, _VAL_PROMPTS)

    @cached_property
    def _validation(self) -> tuple[Tensor, list[str]]:
        from core2_sampler.shapes.batches import sample_scenes
        from core2_sampler.shapes.world import held_out_prompts

        prompts = held_out_prompts(_VAL_PROMPTS, "val")
        random.Random(0).shuffle(prompts)  # or a batch would be of one task
        pixels, _ = sample_scenes(0, prompts)
        return encode_pixels(self._pipe, pixels), [prompt.text for prompt in prompts]


def _wanted(
    latents: Tensor, texts: list[str], accept: Accept | None, count: int
) -> tuple[Tensor, list[str]]:
    """Return the first ``count`` of the images whose caption is accepted."""
    chosen = [i for i, text in enumerate(texts) if accept is None or accept(text)][:count]
    return latents[chosen], [texts[i] for i in chosen]
