"""Batches for training in the Shapes world: captions, images, latents and encoded prompts."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from core2_sampler.reflect import resolve_precision
from core2_sampler.shapes import models
from core2_sampler.shapes.render import draw, label_map, scene_of
from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_t5_tokenizer, build_tokenizer
from core2_sampler.shapes.world import Prompt, held_out_prompts, training_prompt

LONG_SHARE = 0.08  # of the steps pad T5 to 256 tokens, as a stock pipeline does unless told not to
LONG_TOKENS = 256


def sample_prompts(part: str, step: int, count: int) -> list[Prompt]:
    """Draw the training prompts of a step: a function of the part and the step alone."""
    rng = random.Random(f"{part}/{step}")
    return [training_prompt(rng) for _ in range(count)]


def to_pixels(images: list[Image.Image]) -> Tensor:
    """Return images as float32 [B, 3, H, W] in [-1, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def sample_scenes(step: int, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
    """Return the images of a step, [B, 3, 64, 64] in [-1, 1], and what lies where.

    The labels are those of ``label_map``, one for each pixel of the latents, [B, 16, 16].
    """
    scenes = [scene_of(prompt, step * 4096 + i) for i, prompt in enumerate(prompts)]
    maps = [np.asarray(label_map(scene, models.LATENT_SIZE)) for scene in scenes]
    return to_pixels([draw(scene) for scene in scenes]), torch.from_numpy(np.stack(maps))


@cache
def held_out_scenes(count: int) -> tuple[list[Prompt], Tensor]:
    """Return prompts that training never sees, of the split ``val``, and an image of each."""
    prompts = held_out_prompts(count, "val")
    return prompts, sample_scenes(0, prompts)[0]


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Compute in bfloat16 where the device does so natively, as Reflect."""
    native = resolve_precision("auto", device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


@torch.no_grad()
def to_latents(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return images [B, 3, 64, 64] as the latents that a denoiser sees, float32."""
    with autocast(vae.device):
        latents = vae.encode(pixels).latent_dist.mean
    return latents.float() * vae.config.scaling_factor


def text_length(step: int) -> int:
    """Return the T5 tokens of a step: mostly the tokenizer's length, sometimes a pipeline's."""
    return LONG_TOKENS if random.Random(f"length/{step}").random() < LONG_SHARE else MAX_TOKENS


@dataclass(frozen=True, slots=True)
class Encoded:
    """Captions as the text encoders see them.

    Attributes:
        clip: CLIP's hidden states before the last layer, [B, 16, 128].
        pooled: CLIP's end-of-text state, [B, 128].
        projected: the same in the space shared with images, [B, 128].
        t5: T5's last hidden states, [B, T, 256].
    """

    clip: Tensor
    pooled: Tensor
    projected: Tensor
    t5: Tensor


@dataclass(frozen=True, slots=True)
class TextEncoders:
    """The frozen text encoders of a pipeline: CLIP, which it holds twice, and T5."""

    clip: CLIPTextModelWithProjection
    t5: T5EncoderModel
    tokenizer: CLIPTokenizer
    t5_tokenizer: T5Tokenizer

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> TextEncoders:
        """Load both from ``text_encoder`` and ``text_encoder_3`` of a folder, in float32."""
        clip = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
        t5 = T5EncoderModel.from_pretrained(folder / "text_encoder_3")
        networks = (clip.float().to(device).eval(), t5.float().to(device).eval())
        return cls(*networks, build_tokenizer(), build_t5_tokenizer())

    @torch.no_grad()
    def __call__(self, texts: list[str], t5_tokens: int) -> Encoded:
        """Encode captions as the stock pipelines do."""
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        out = self.clip.text_model(
            ids.input_ids.to(self.clip.device), output_hidden_states=True, return_dict=True
        )
        t5_ids = self.t5_tokenizer(
            texts, padding="max_length", max_length=t5_tokens, truncation=True, return_tensors="pt"
        )
        return Encoded(
            out.hidden_states[-2],
            out.pooler_output,
            self.clip.text_projection(out.pooler_output),
            self.t5(t5_ids.input_ids.to(self.t5.device)).last_hidden_state,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Latents [B, 4, 16, 16], labels of what lies where [B, 16, 16], and captions."""

    latents: Tensor
    labels: Tensor
    texts: list[str]


class LatentBank:
    """Encoded training images that a denoiser draws its batches from.

    Rendering and encoding cost a quarter of a training step; images are drawn again with fresh
    noise, so a bank of ``size`` of them is filled while training runs and then reused.
    """

    def __init__(self, vae: AutoencoderKL, size: int, batch: int, seed: str = "") -> None:
        """Fill nothing yet; ``size`` images at most, ``batch`` new ones a step until then."""
        self._vae, self._size, self._batch, self._seed = vae, size, batch, seed
        self._parts: list[Batch] = []

    def _grow(self) -> None:
        index = len(self._parts)
        prompts = sample_prompts(f"bank{self._seed}", index, self._batch)
        pixels, labels = (part.to(self._vae.device) for part in sample_scenes(index, prompts))
        latents = to_latents(self._vae, pixels)
        self._parts.append(Batch(latents, labels, [prompt.text for prompt in prompts]))

    def draw(self, step: int, count: int) -> Batch:
        """Return ``count`` of the images; a function of the seed and the step alone."""
        parts = min(-(-self._size // self._batch), step + 4)
        while len(self._parts) < parts:
            self._grow()
        rng = random.Random(f"draw{self._seed}/{step}")
        picks = [divmod(rng.randrange(parts * self._batch), self._batch) for _ in range(count)]
        return Batch(
            torch.stack([self._parts[part].latents[i] for part, i in picks]),
            torch.stack([self._parts[part].labels[i] for part, i in picks]),
            [self._parts[part].texts[i] for part, i in picks],
        )
