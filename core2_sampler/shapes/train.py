"""Train the networks of the Shapes world from nothing: VAE, CLIP, then a denoiser.

Every part is time-boxed, resumable after a kill (the same call goes on) and independent of the
device. ``core2 shapes train --part vae --minutes 14 --out runs/shapes`` and so on; CONTRIBUTING has
the whole chain with its measured times.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModelWithProjection

from core2_sampler.shapes import models
from core2_sampler.shapes.render import render
from core2_sampler.shapes.tokenizer import build_tokenizer
from core2_sampler.shapes.world import Prompt, training_prompt
from core2_sampler.training import Log, TimeBox, fit

PARTS = ("vae", "clip", "sd3")
PROMPT_DROPOUT = 0.1
_KL_WEIGHT = 2e-3  # per latent element, against the mean absolute error of a pixel in [-1, 1]
_BATCH = {"vae": 32, "clip": 192, "sd3": 128}
_RATE = {"vae": 2e-3, "clip": 1e-3, "sd3": 1.5e-3}


def sample_prompts(part: str, step: int, count: int) -> list[Prompt]:
    """Draw the training prompts of a step: a function of the part and the step alone."""
    rng = random.Random(f"{part}/{step}")
    return [training_prompt(rng) for _ in range(count)]


def to_pixels(images: list[Image.Image]) -> Tensor:
    """Return images as float32 [B, 3, H, W] in [-1, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def sample_images(step: int, prompts: list[Prompt]) -> Tensor:
    """Render the images of a step, [B, 3, 64, 64] in [-1, 1]."""
    return to_pixels([render(prompt, step * 4096 + i) for i, prompt in enumerate(prompts)])


def _autocast(device: torch.device) -> AbstractContextManager[None]:
    """bfloat16 where the processor multiplies it faster than float32."""
    supported = device.type != "cpu" or torch.backends.mkldnn.is_available()
    return torch.autocast(device.type, torch.bfloat16, enabled=supported)


def _vae_loss(vae: AutoencoderKL, device: torch.device) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        prompts = sample_prompts("vae", step, _BATCH["vae"])
        pixels = sample_images(step, prompts).to(device)
        with _autocast(device):
            posterior = vae.encode(pixels).latent_dist
            generator = torch.Generator(device).manual_seed(step)
            restored = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = restored.float() - pixels
        return error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl

    return loss


def _clip_loss(clip: CLIPModel, device: torch.device) -> Callable[[int], Tensor]:
    tokenizer = build_tokenizer()

    def loss(step: int) -> Tensor:
        prompts = sample_prompts("clip", step, _BATCH["clip"])
        pixels = sample_images(step, prompts).to(device)
        tokens = tokenizer([p.text for p in prompts], padding="max_length", return_tensors="pt")
        with _autocast(device):
            out = clip(tokens.input_ids.to(device), pixels)
        logits = out.logits_per_text.float()
        contents = [prompt.content for prompt in prompts]
        same = torch.tensor([[a == b for b in contents] for a in contents], device=device)
        target = same.float() / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    return loss


@torch.no_grad()
def encode_text(encoder: CLIPTextModelWithProjection, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Encode captions as the SD3.5 pipeline does when both its CLIP slots hold ``encoder``.

    Returns:
        Token embeddings [B, 2 * 16, 256] (the second half is the empty T5 part) and pooled [B, 256].
    """
    tokens = build_tokenizer()(texts, padding="max_length", truncation=True, return_tensors="pt")
    out = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=True)
    hidden = torch.cat([out.hidden_states[-2]] * 2, dim=-1)
    pooled = torch.cat([out.text_embeds] * 2, dim=-1)
    return torch.cat([hidden, torch.zeros_like(hidden)], dim=1), pooled


class LatentBank:
    """Encoded training images that a denoiser draws its batches from.

    Rendering and encoding cost a quarter of a training step; images are drawn again with fresh
    noise, so a bank of ``size`` of them is filled while training runs and then reused.
    """

    def __init__(self, vae: AutoencoderKL, size: int, batch: int) -> None:
        """Fill nothing yet; ``size`` images at most, ``batch`` new ones a step until then."""
        self._vae, self._size, self._batch = vae, size, batch
        self._latents: list[Tensor] = []
        self._texts: list[str] = []

    def _grow(self) -> None:
        index = len(self._latents)
        prompts = sample_prompts("bank", index, self._batch)
        pixels = sample_images(index, prompts).to(self._vae.device)
        with torch.no_grad(), _autocast(self._vae.device):
            latents = self._vae.encode(pixels).latent_dist.mean
        self._latents.append(latents.float() * self._vae.config.scaling_factor)
        self._texts += [prompt.text for prompt in prompts]

    def draw(self, step: int, count: int) -> tuple[Tensor, list[str]]:
        """Return latents [B, 4, 16, 16] and their captions; a function of the step alone."""
        while len(self._latents) * self._batch < min(self._size, (step + 4) * self._batch):
            self._grow()
        rng = random.Random(f"draw/{step}")
        known = min(len(self._texts), (step + 4) * self._batch)
        picks = [rng.randrange(known) for _ in range(count)]
        latents = [self._latents[p // self._batch][p % self._batch] for p in picks]
        return torch.stack(latents), [self._texts[p] for p in picks]


def _flow_loss(
    denoiser: nn.Module, vae: AutoencoderKL, encoder: CLIPTextModelWithProjection, part: str
) -> Callable[[int], Tensor]:
    """Rectified flow: predict noise - x0 at sigma drawn from a logit-normal (arXiv 2403.03206)."""
    bank = LatentBank(vae, size=100_000, batch=256)
    device = vae.device

    def loss(step: int) -> Tensor:
        x0, texts = bank.draw(step, _BATCH[part])
        rng = random.Random(f"dropout/{step}")
        texts = ["" if rng.random() < PROMPT_DROPOUT else text for text in texts]
        generator = torch.Generator().manual_seed(step)
        sigma = torch.sigmoid(torch.randn(len(texts), generator=generator)).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        level = sigma[:, None, None, None]
        with _autocast(device):
            embeds, pooled = encode_text(encoder, texts)
            x = (1 - level) * x0 + level * noise
            d = denoiser(x, embeds, pooled, 1000 * sigma).sample
        return (d.float() - (noise - x0)).square().mean()

    return loss


def _latent_scale(vae: AutoencoderKL) -> float:
    """Return 1 / standard deviation of the latents of 512 training images."""
    pixels = sample_images(0, sample_prompts("scale", 0, 512)).to(vae.device)
    with torch.no_grad():
        return 1 / float(vae.encode(pixels).latent_dist.mean.std())


def train_vae(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the autoencoder into ``folder/vae``."""
    vae = models.build_vae().to(device)
    box = TimeBox(minutes, _RATE["vae"])
    vae = fit(vae, _vae_loss(vae, device), box, folder / "vae.run", log=log)
    vae.register_to_config(scaling_factor=round(_latent_scale(vae), 4), shift_factor=0.0)
    vae.half().save_pretrained(folder / "vae")


def train_clip(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the CLIP pair into ``folder/clip``; its text tower into ``folder/text_encoder``."""
    clip = models.build_clip().to(device)
    box = TimeBox(minutes, _RATE["clip"])
    clip = fit(clip, _clip_loss(clip, device), box, folder / "clip.run", log=log, ema_decay=0.99)
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    clip.half().save_pretrained(folder / "clip")
    build_tokenizer().save_pretrained(folder / "clip")
    models.build_image_processor().save_pretrained(folder / "clip")
    encoder.half().save_pretrained(folder / "text_encoder")


def train_sd3(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the SD3.5-style transformer; ``folder/sd3`` becomes a stock pipeline folder."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().to(device)
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder")
    transformer = models.build_sd3().to(device)
    loss = _flow_loss(transformer, vae, encoder.float().to(device).eval(), "sd3")
    box = TimeBox(minutes, _RATE["sd3"])
    transformer = fit(transformer, loss, box, folder / "sd3.run", log=log)
    pipeline = models.assemble_sd3(transformer, folder)
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "sd3")


def train(part: str, folder: Path, minutes: float, device: str = "cpu", log: Log = print) -> None:
    """Train one part into ``folder``; the same call after a kill goes on.

    Args:
        part: one of ``PARTS``; ``sd3`` needs ``vae`` and ``clip`` to be there.
        folder: holds the finished parts and their checkpoints.
        minutes: time box; the learning rate falls at its end.
        device: a torch device.
        log: called with lines of progress.

    Raises:
        ValueError: if ``part`` is unknown or what it needs is missing.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if part == "sd3":
        for needed in ("vae", "text_encoder"):
            if not (folder / needed).is_dir():
                raise ValueError(f"{folder / needed} must exist: train vae and clip first")
    torch.manual_seed(0)  # initial weights; nothing else draws from the global generator
    runs = {"vae": train_vae, "clip": train_clip, "sd3": train_sd3}
    runs[part](folder, minutes, torch.device(device), log)
