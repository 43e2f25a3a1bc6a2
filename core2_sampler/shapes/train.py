"""Train the networks of the Shapes world from nothing: VAE, CLIP, T5, then a denoiser.

Every part is time-boxed, resumable after a kill (the same call goes on) and independent of the
device. ``core2 shapes train --part vae --minutes 14 --out runs/shapes`` and so on; CONTRIBUTING has
the whole chain with its measured times.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModelWithProjection, T5EncoderModel

from core2_sampler.shapes import models
from core2_sampler.shapes.batches import (
    LONG_TOKENS,
    TextEncoders,
    autocast,
    sample_images,
    sample_prompts,
    text_length,
)
from core2_sampler.shapes.denoising import RECIPES, SceneProbe, denoiser_loss
from core2_sampler.shapes.tokenizer import build_t5_tokenizer, build_tokenizer
from core2_sampler.training import FitConfig, Log, fit

PARTS = ("vae", "clip", "t5", *RECIPES)
_SHARED = ("vae", "text_encoder", "text_encoder_3")  # what a denoiser is trained beside
_EMA_DECAY = {"vae": 0.999, "clip": 0.99, "t5": 0.99}  # denoisers: 0.999
_BATCH = {"vae": 32, "clip": 192, "t5": 256}
_RATE = {"vae": 2e-3, "clip": 1e-3, "t5": 2e-3}  # denoisers: 1e-3
_MASK_SHARE = 0.3  # of the words that T5 has to guess
_KL_WEIGHT = 2e-3  # per latent element, against the mean absolute error of a pixel in [-1, 1]


def _vae_loss(vae: AutoencoderKL, device: torch.device) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        prompts = sample_prompts("vae", step, _BATCH["vae"])
        pixels = sample_images(step, prompts).to(device)
        with autocast(device):
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
        with autocast(device):
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
        with autocast(device):
            hidden = t5(ids.masked_fill(masked, mask_id)).last_hidden_state
            logits = hidden[masked] @ t5.get_input_embeddings().weight.T
        return F.cross_entropy(logits.float() * t5.config.d_model**-0.5, ids[masked])

    return loss


def _latent_scale(vae: AutoencoderKL) -> float:
    """Return 1 / standard deviation of the latents of 512 training images."""
    pixels = sample_images(0, sample_prompts("scale", 0, 512)).to(vae.device)
    with torch.no_grad():
        return 1 / float(vae.encode(pixels).latent_dist.mean.std())


def _config(part: str, minutes: float) -> FitConfig:
    return FitConfig(
        minutes=minutes,
        learning_rate=_RATE.get(part, 1e-3),
        hold_share=0.6,
        final_share=0.01,
        warmup_steps=100,
        ema_decay=_EMA_DECAY.get(part, 0.999),
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


def train_denoiser(part: str, folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train a denoiser; ``folder/<part>`` becomes a stock pipeline folder."""
    recipe, begun = RECIPES[part], folder / f"{part}.start"  # see `_take_over`
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().to(device)
    network: Any = recipe.build()
    if begun.exists():
        network = type(network).from_pretrained(begun)
    probe = SceneProbe(network, *recipe.probed).to(device)
    loss = denoiser_loss(recipe, probe, vae, TextEncoders.load(folder, device))
    fit(probe, loss, _config(part, minutes), folder=folder / f"{part}.run", log=log)
    save_half(recipe.assemble(network, folder), folder / part)


def _take_over(part: str, start: Path, folder: Path) -> None:
    """Copy the networks of a trained pipeline that ``folder`` does not have yet.

    A pipeline of another family lends its VAE and text encoders only.
    """
    if missing := [name for name in _SHARED if not (start / name).is_dir()]:
        raise ValueError(
            f"start must be the folder of an SD3 pipeline, got {start} without {missing[0]}"
        )
    for name in _SHARED:
        if not (folder / name).exists():
            shutil.copytree(start / name, folder / name)
    recipe, begun = RECIPES[part], folder / f"{part}.start"
    config = start / recipe.folder / "config.json"
    wanted = type(recipe.build()).__name__
    if config.is_file() and json.loads(config.read_text())["_class_name"] == wanted:
        shutil.copytree(start / recipe.folder, begun, dirs_exist_ok=True)


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
        part: one of ``PARTS``; a denoiser needs the VAE, CLIP and T5 to be there.
        folder: holds the finished parts and their checkpoints.
        minutes: time box; the learning rate falls at its end.
        device: a torch device.
        start: folder of a trained SD3 pipeline; its VAE and text encoders become parts, and where
            `part` is ``sd3``, its denoiser is where training begins.
        log: called with lines of progress.

    Raises:
        ValueError: if ``part`` is unknown or what it needs is missing.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if start is not None:
        if part not in RECIPES:
            raise ValueError(f"start must be left out for part {part!r}, got {start}")
        _take_over(part, start, folder)
    if part in RECIPES:
        for needed in _SHARED:
            if not (folder / needed).is_dir():
                raise ValueError(f"{folder / needed} must exist: train vae, clip and t5 first")
    torch.manual_seed(0)  # initial weights; nothing else draws from the global generator
    parts = {"vae": train_vae, "clip": train_clip, "t5": train_t5}
    run = parts.get(part, partial(train_denoiser, part))
    run(folder, minutes, torch.device(device), log)
