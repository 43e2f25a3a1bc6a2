"""Train the networks of the Shapes world from nothing: VAE, CLIP, T5, then a denoiser.

Every part is time-boxed, resumable after a kill (the same call goes on) and independent of the
device. ``core2 shapes train --part vae --minutes 14 --out runs/shapes`` and so on; CONTRIBUTING has
the whole chain with its measured times.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from core2_sampler.reflect import resolve_precision
from core2_sampler.shapes import models
from core2_sampler.shapes.render import render
from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_t5_tokenizer, build_tokenizer
from core2_sampler.shapes.world import Prompt, training_prompt
from core2_sampler.training import FitConfig, Log, fit

DENOISERS = ("sd3",)
PARTS = ("vae", "clip", "t5", *DENOISERS)
_SHARED = ("vae", "text_encoder", "text_encoder_3")  # what a denoiser is trained beside
PROMPT_DROPOUT = 0.1
LONG_SHARE = 0.08  # of the steps pad T5 to 256 tokens, as a stock pipeline does unless told not to
LONG_TOKENS = 256
_EMA_DECAY = {"vae": 0.999, "clip": 0.99, "t5": 0.99, "sd3": 0.999}
_MASK_SHARE = 0.3  # of the words that T5 has to guess
_KL_WEIGHT = 2e-3  # per latent element, against the mean absolute error of a pixel in [-1, 1]
_BATCH = {"vae": 32, "clip": 192, "t5": 256, "sd3": 64}
_RATE = {"vae": 2e-3, "clip": 1e-3, "t5": 2e-3, "sd3": 1e-3}


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
    """bfloat16 where the device computes it natively, as in Reflect."""
    native = resolve_precision("auto", device) == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


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


def _t5_loss(t5: T5EncoderModel, device: torch.device) -> Callable[[int], Tensor]:
    """Guess masked words from the others; padding is seen, as pipelines let it be."""
    tokenizer = build_t5_tokenizer()
    mask_id, pad_id = tokenizer.convert_tokens_to_ids("<extra_id_0>"), tokenizer.pad_token_id

    def loss(step: int) -> Tensor:
        texts = [prompt.text for prompt in sample_prompts("t5", step, _BATCH["t5"])]
        length = text_length(step)
        if length == LONG_TOKENS:
            texts = texts[: len(texts) // 8]
        ids = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
        ids = ids.input_ids.to(device)
        generator = torch.Generator().manual_seed(step)
        masked = (torch.rand(ids.shape, generator=generator) < _MASK_SHARE).to(device)
        masked &= ids != pad_id
        with _autocast(device):
            hidden = t5(ids.masked_fill(masked, mask_id)).last_hidden_state
            logits = hidden[masked] @ t5.get_input_embeddings().weight.T
        return F.cross_entropy(logits.float() * t5.config.d_model**-0.5, ids[masked])

    return loss


def text_length(step: int) -> int:
    """Return the T5 tokens of a step: mostly the tokenizer's length, sometimes a pipeline's."""
    return LONG_TOKENS if random.Random(f"length/{step}").random() < LONG_SHARE else MAX_TOKENS


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
    def __call__(self, texts: list[str], t5_tokens: int) -> tuple[Tensor, Tensor]:
        """Encode captions as the stock SD3 pipeline does.

        Returns:
            Token embeddings [B, 16 + t5_tokens, 256] and pooled embeddings [B, 256].
        """
        ids = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        out = self.clip(ids.input_ids.to(self.clip.device), output_hidden_states=True)
        t5_ids = self.t5_tokenizer(
            texts, padding="max_length", max_length=t5_tokens, truncation=True, return_tensors="pt"
        )
        t5 = self.t5(t5_ids.input_ids.to(self.t5.device)).last_hidden_state
        hidden = torch.cat([out.hidden_states[-2]] * 2, dim=-1)
        pooled = torch.cat([out.text_embeds] * 2, dim=-1)
        return torch.cat([hidden, t5], dim=1), pooled


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
    denoiser: nn.Module, vae: AutoencoderKL, encode: TextEncoders, part: str
) -> Callable[[int], Tensor]:
    """Rectified flow: predict noise - x0 at sigma drawn from a logit-normal (arXiv 2403.03206)."""
    bank = LatentBank(vae, size=48_000, batch=128)
    device = vae.device

    def loss(step: int) -> Tensor:
        length = text_length(step)
        share = 4 if length == LONG_TOKENS else 1  # a long step costs what the others do
        x0, texts = bank.draw(step, _BATCH[part] // share)
        rng = random.Random(f"dropout/{step}")
        texts = ["" if rng.random() < PROMPT_DROPOUT else text for text in texts]
        generator = torch.Generator().manual_seed(step)
        sigma = torch.sigmoid(torch.randn(len(texts), generator=generator)).to(device)
        noise = torch.randn(x0.shape, generator=generator).to(device)
        level = sigma[:, None, None, None]
        with _autocast(device):
            embeds, pooled = encode(texts, length)
            x = (1 - level) * x0 + level * noise
            d = denoiser(x, embeds, pooled, 1000 * sigma).sample
        return (d.float() - (noise - x0)).square().mean()

    return loss


def _latent_scale(vae: AutoencoderKL) -> float:
    """Return 1 / standard deviation of the latents of 512 training images."""
    pixels = sample_images(0, sample_prompts("scale", 0, 512)).to(vae.device)
    with torch.no_grad():
        return 1 / float(vae.encode(pixels).latent_dist.mean.std())


def _config(part: str, minutes: float) -> FitConfig:
    return FitConfig(
        minutes=minutes,
        learning_rate=_RATE[part],
        hold_share=0.6,
        final_share=0.01,
        warmup_steps=100,
        ema_decay=_EMA_DECAY[part],
    )


def train_vae(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the autoencoder into ``folder/vae``."""
    vae = models.build_vae().to(device)
    fit(vae, _vae_loss(vae, device), _config("vae", minutes), folder=folder / "vae.run", log=log)
    vae.register_to_config(scaling_factor=round(_latent_scale(vae), 4), shift_factor=0.0)
    vae.half().save_pretrained(folder / "vae")


def train_clip(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the CLIP pair into ``folder/clip``; its text tower into ``folder/text_encoder``."""
    clip = models.build_clip().to(device)
    loss = _clip_loss(clip, device)
    fit(clip, loss, _config("clip", minutes), folder=folder / "clip.run", log=log)
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    clip.half().save_pretrained(folder / "clip")
    build_tokenizer().save_pretrained(folder / "clip")
    models.build_image_processor().save_pretrained(folder / "clip")
    encoder.half().save_pretrained(folder / "text_encoder")


def train_t5(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the T5 encoder into ``folder/text_encoder_3``."""
    t5 = models.build_t5().to(device)
    fit(t5, _t5_loss(t5, device), _config("t5", minutes), folder=folder / "t5.run", log=log)
    t5.half().save_pretrained(folder / "text_encoder_3")


def train_sd3(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the SD3.5-style transformer; ``folder/sd3`` becomes a stock pipeline folder."""
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().to(device)
    begun = folder / "sd3.start"  # see `_take_over`
    fresh = models.build_sd3()
    transformer = SD3Transformer2DModel.from_pretrained(begun) if begun.exists() else fresh
    transformer = transformer.to(device)
    loss = _flow_loss(transformer, vae, TextEncoders.load(folder, device), "sd3")
    fit(transformer, loss, _config("sd3", minutes), folder=folder / "sd3.run", log=log)
    save_half(models.assemble_sd3(transformer, folder), folder / "sd3")


def _take_over(start: Path, folder: Path) -> None:
    """Copy the networks of a trained pipeline that ``folder`` does not have yet."""
    if not (start / "model_index.json").is_file():
        raise ValueError(f"start must be a pipeline folder, got {start}")
    for name in _SHARED:
        if not (folder / name).exists():
            shutil.copytree(start / name, folder / name)
    if not (folder / "sd3.start").exists():
        shutil.copytree(start / "transformer", folder / "sd3.start")


def save_half(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in float16 that ``from_pretrained`` loads in float32 unless told otherwise.

    diffusers loads networks in float32 by default, but transformers in the dtype that the config
    names: left alone, the text encoders would not match the denoiser. Where the networks were
    loaded from is nobody else's business.
    """
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    for path in [folder / "model_index.json", *folder.glob("*/config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train(
    part: str,
    folder: Path,
    minutes: float,
    device: str = "cpu",
    *,
    start: Path | None = None,
    log: Log = print,
) -> None:
    """Train one part into ``folder``; the same call after a kill goes on.

    Args:
        part: one of ``PARTS``; ``sd3`` needs the three others to be there.
        folder: holds the finished parts and their checkpoints.
        minutes: time box; the learning rate falls at its end.
        device: a torch device.
        start: a trained pipeline folder; its VAE and text encoders become parts, and its denoiser
            is where a denoiser part begins.
        log: called with lines of progress.

    Raises:
        ValueError: if ``part`` is unknown or what it needs is missing.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if start is not None:
        if part not in DENOISERS:
            raise ValueError(f"start must be left out for part {part!r}, got {start}")
        _take_over(start, folder)
    if part in DENOISERS:
        for needed in _SHARED:
            if not (folder / needed).is_dir():
                raise ValueError(f"{folder / needed} must exist: train vae, clip and t5 first")
    torch.manual_seed(0)  # initial weights; nothing else draws from the global generator
    runs = {"vae": train_vae, "clip": train_clip, "t5": train_t5, "sd3": train_sd3}
    runs[part](folder, minutes, torch.device(device), log)
