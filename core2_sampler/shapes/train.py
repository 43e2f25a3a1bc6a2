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
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModelWithProjection, T5EncoderModel

from core2_sampler.evaluators.kinds import contrastive_loss
from core2_sampler.shapes import models
from core2_sampler.shapes.batches import (
    LONG_TOKENS,
    TextEncoders,
    autocast,
    sample_prompts,
    sample_scenes,
    text_length,
)
from core2_sampler.shapes.denoising import RECIPES, Probed, denoiser_loss
from core2_sampler.shapes.probes import PatchProbe, WordProbe, word_answers
from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_t5_tokenizer, build_tokenizer
from core2_sampler.shapes.world import Prompt
from core2_sampler.training import FitConfig, Log, fit


class _Source(NamedTuple):
    """Where a part lies in a folder of trained ones, and how it is made anew."""

    folder: str
    build: Callable[[], nn.Module]


PARTS = ("vae", "clip", "t5", *RECIPES)
_SOURCES: dict[str, Any] = {
    "vae": _Source("vae", models.build_vae),
    "clip": _Source("clip", models.build_clip),
    "t5": _Source("text_encoder_3", models.build_t5),
    **RECIPES,
}
_SHARED = ("vae", "text_encoder", "text_encoder_3")  # what a denoiser is trained beside
_EMA_DECAY = {"vae": 0.999, "clip": 0.99, "t5": 0.99}  # denoisers: 0.999
_BATCH = {"vae": 32, "clip": 192, "t5": 256}
_RATE = {"vae": 2e-3, "clip": 1e-3, "t5": 1e-3}  # denoisers: 1e-3
_WORDS_WEIGHT = 0.2  # of the cross entropies of words, against those of captions and patches
_KL_WEIGHT = 2e-3  # per latent element, against the mean absolute error of a pixel in [-1, 1]


def _vae_loss(vae: AutoencoderKL, device: torch.device) -> Callable[[int], Tensor]:
    def loss(step: int) -> Tensor:
        prompts = sample_prompts("vae", step, _BATCH["vae"])
        pixels = sample_scenes(step, prompts)[0].to(device)
        with autocast(device):
            posterior = vae.encode(pixels).latent_dist
            generator = torch.Generator(device).manual_seed(step)
            restored = vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = restored.float() - pixels
        return error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl

    return loss


def _answers(prompts: list[Prompt], length: int, *, begin: int, causal: bool) -> Tensor:
    return torch.stack([word_answers(p, length, begin=begin, causal=causal) for p in prompts])


class _ClipLesson(nn.Module):
    """A CLIP pair and what it learns by: captions match images, words and patches are named."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.words, self.whole = WordProbe(models.TEXT_WIDTH), WordProbe(models.TEXT_WIDTH)
        self.patches = PatchProbe(models.TEXT_WIDTH)
        self.tokenizer = build_tokenizer()

    def loss(self, step: int) -> Tensor:
        device = self.clip.device
        prompts = sample_prompts("clip", step, _BATCH["clip"])
        pixels, labels = (part.to(device) for part in sample_scenes(step, prompts))
        texts = [prompt.text for prompt in prompts]
        tokens = self.tokenizer(texts, padding="max_length", return_tensors="pt")
        answers = _answers(prompts, MAX_TOKENS, begin=1, causal=True).to(device)
        with autocast(device):
            out = self.clip(tokens.input_ids.to(device), pixels, output_hidden_states=True)
            text = out.text_model_output
            words = self.words(text.hidden_states[-2], answers)
            whole = self.whole(text.pooler_output, answers[:, -1])  # projected already
            patches = self.patches(out.vision_model_output.last_hidden_state[:, 1:], labels)
        contents = [prompt.content for prompt in prompts]
        match = contrastive_loss(out.logits_per_text.float(), contents)
        return match + _WORDS_WEIGHT * (words + whole) + patches


class _T5Lesson(nn.Module):
    """A T5 encoder and the probe of its words; padding is seen, as pipelines let it be."""

    def __init__(self, t5: T5EncoderModel) -> None:
        super().__init__()
        self.t5, self.words = t5, WordProbe(t5.config.d_model)
        self.tokenizer = build_t5_tokenizer()

    def loss(self, step: int) -> Tensor:
        length, device = text_length(step), self.t5.device
        share = 8 if length == LONG_TOKENS else 1
        prompts = sample_prompts("t5", step, _BATCH["t5"] // share)
        texts = [prompt.text for prompt in prompts]
        ids = self.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
        answers = _answers(prompts, length, begin=0, causal=False).to(device)
        with autocast(device):
            states = self.t5(ids.input_ids.to(device)).last_hidden_state
            return self.words(states, answers)


def _latent_scale(vae: AutoencoderKL) -> float:
    """Return 1 / standard deviation of the latents of 512 training images."""
    pixels = sample_scenes(0, sample_prompts("scale", 0, 512))[0].to(vae.device)
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
    vae: AutoencoderKL = _untrained("vae", folder).to(device)
    fit(vae, _vae_loss(vae, device), _config("vae", minutes), folder=folder / "vae.run", log=log)
    vae.register_to_config(scaling_factor=round(_latent_scale(vae), 4), shift_factor=0.0)
    vae.half().save_pretrained(folder / "vae")


def train_clip(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the CLIP pair into ``folder/clip``; its text tower into ``folder/text_encoder``."""
    clip: CLIPModel = _untrained("clip", folder)
    lesson = _ClipLesson(clip).to(device)
    fit(lesson, lesson.loss, _config("clip", minutes), folder=folder / "clip.run", log=log)
    encoder = CLIPTextModelWithProjection(clip.config.text_config)
    encoder.text_model.load_state_dict(clip.text_model.state_dict())
    encoder.text_projection.load_state_dict(clip.text_projection.state_dict())
    clip.half().save_pretrained(folder / "clip")
    build_tokenizer().save_pretrained(folder / "clip")
    models.build_image_processor().save_pretrained(folder / "clip")
    encoder.half().save_pretrained(folder / "text_encoder")


def train_t5(folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train the T5 encoder into ``folder/text_encoder_3``."""
    lesson = _T5Lesson(_untrained("t5", folder)).to(device)
    fit(lesson, lesson.loss, _config("t5", minutes), folder=folder / "t5.run", log=log)
    lesson.t5.half().save_pretrained(folder / "text_encoder_3")


def train_denoiser(part: str, folder: Path, minutes: float, device: torch.device, log: Log) -> None:
    """Train a denoiser; ``folder/<part>`` becomes a stock pipeline folder."""
    recipe = RECIPES[part]
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().to(device)
    network = _untrained(part, folder)
    probed = Probed(network, *recipe.probed).to(device)
    loss = denoiser_loss(recipe, probed, vae, TextEncoders.load(folder, device))
    fit(probed, loss, _config(part, minutes), folder=folder / f"{part}.run", log=log)
    save_half(recipe.assemble(network, folder), folder / part)


def _untrained(part: str, folder: Path) -> Any:
    """Return the network of a part: new, or the one that `_take_over` put there."""
    network = _SOURCES[part].build()
    begun = folder / f"{part}.start"
    return type(network).from_pretrained(begun).float() if begun.exists() else network


def _take_over(part: str, start: Path, folder: Path) -> None:
    """Copy the networks of a trained pipeline that ``folder`` does not have yet.

    An SD3 pipeline lends its VAE and text encoders; those of the others are not all there.
    """
    if not start.is_dir():
        raise ValueError(f"start must be a folder that exists, got {start}")
    if part in RECIPES:
        missing = [name for name in _SHARED if not (folder / name).exists()]
        if missing and not (start / "text_encoder_3").is_dir():
            raise ValueError(
                f"start must be the folder of an SD3 pipeline, got {start}: or put {missing[0]} of "
                f"one into {folder}"
            )
        for name in missing:
            shutil.copytree(start / name, folder / name)
    own, begun = start / _SOURCES[part].folder, folder / f"{part}.start"
    if (own / "config.json").is_file():
        config = json.loads((own / "config.json").read_text(encoding="utf-8"))
        made_by = config.get("_class_name") or config["architectures"][0]
        if made_by == type(_SOURCES[part].build()).__name__:
            shutil.copytree(own, begun, dirs_exist_ok=True)


def save_half(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Save a pipeline in float16 that ``from_pretrained`` loads in float32 unless told otherwise.

    diffusers loads networks in float32 by default, but transformers in the dtype that the config
    names: left alone, the text encoders would not match the denoiser. Where the networks were
    loaded from is nobody else's business.
    """
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    tokenizers = folder.glob("*/tokenizer_config.json")
    for path in [folder / "model_index.json", *folder.glob("*/config.json"), *tokenizers]:
        config = json.loads(path.read_text(encoding="utf-8"))
        for name in ("_name_or_path", "is_local", "local_files_only"):
            config.pop(name, None)
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
        start: folder that holds the trained part (for CLIP, one with ``clip`` in it): training
            begins there. The folder of an SD3 pipeline also lends any denoiser its VAE and text
            encoders, where `folder` has none.
        log: called with lines of progress.

    Raises:
        ValueError: if ``part`` is unknown or what it needs is missing.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if start is not None:
        _take_over(part, start, folder)
    if part in RECIPES:
        for needed in _SHARED:
            if not (folder / needed).is_dir():
                raise ValueError(f"{folder / needed} must exist: train vae, clip and t5 first")
    torch.manual_seed(0)  # initial weights; nothing else draws from the global generator
    parts = {"vae": train_vae, "clip": train_clip, "t5": train_t5}
    run = parts.get(part, partial(train_denoiser, part))
    run(folder, minutes, torch.device(device), log)
