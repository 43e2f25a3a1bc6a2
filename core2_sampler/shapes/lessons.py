"""What the VAE and the encoders of the Shapes world learn by, and how they do on held-out captions.

A lesson has the loss of a training step, and a report on captions of the split ``val``, which
training never sees and no published number is of.
"""

from __future__ import annotations

import importlib.util

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from transformers import CLIPModel, T5EncoderModel

from core2_sampler.evaluators.kinds import contrastive_loss
from core2_sampler.shapes import models
from core2_sampler.shapes.batches import (
    LONG_TOKENS,
    autocast,
    held_out_scenes,
    sample_prompts,
    sample_scenes,
    text_length,
)
from core2_sampler.shapes.judge import judge
from core2_sampler.shapes.probes import PatchProbe, WordProbe, word_answers
from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_t5_tokenizer, build_tokenizer
from core2_sampler.shapes.world import Prompt, held_out_prompts

_BATCH = {"vae": 32, "clip": 192, "t5": 256}
_WORDS_WEIGHT = 0.2  # of the cross entropies of words, against those of captions and patches
_KL_WEIGHT = 2e-3  # per latent element, against the mean absolute error of a pixel in [-1, 1]
_JUDGED = 64  # held-out images of the VAE's report
_CAPTIONS = 240  # held-out captions of the encoders' reports


class VaeLesson:
    """An autoencoder, which learns to restore images."""

    def __init__(self, vae: AutoencoderKL) -> None:
        """Train ``vae`` where it is."""
        self.vae = vae

    def loss(self, step: int) -> Tensor:
        """Return the error of the restored pixels, and how far the latents are from noise."""
        device = self.vae.device
        prompts = sample_prompts("vae", step, _BATCH["vae"])
        pixels = sample_scenes(step, prompts)[0].to(device)
        with autocast(device):
            posterior = self.vae.encode(pixels).latent_dist
            generator = torch.Generator(device).manual_seed(step)
            restored = self.vae.decode(posterior.sample(generator)).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = restored.float() - pixels
        return error.abs().mean() + error.square().mean() + _KL_WEIGHT * kl

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Return the PSNR of restored images, dB, and the share of them that the judge accepts.

        Without scipy the judge cannot look, and its share is left out.
        """
        prompts, pixels = held_out_scenes(_JUDGED)
        latents = self.vae.encode(pixels.to(self.vae.device)).latent_dist.mean
        restored = self.vae.decode(latents).sample.clamp(-1, 1).cpu()
        error = (restored - pixels).square().mean((1, 2, 3))
        found = {"psnr": float((10 * torch.log10(4 / error)).mean())}  # the range of a pixel is 2
        if importlib.util.find_spec("scipy") is not None:
            images = VaeImageProcessor().postprocess(restored)
            verdicts = [judge(each, p).correct for each, p in zip(images, prompts, strict=True)]
            found["accepted"] = sum(verdicts) / len(verdicts)
        return found


def _answers(prompts: list[Prompt], length: int, *, begin: int, causal: bool) -> Tensor:
    return torch.stack([word_answers(p, length, begin=begin, causal=causal) for p in prompts])


class ClipLesson(nn.Module):
    """A CLIP pair and what it learns by: captions match images, words and patches are named."""

    def __init__(self, clip: CLIPModel) -> None:
        """Train ``clip`` where it is, beside probes that are thrown away."""
        super().__init__()
        self.clip = clip
        self.words, self.whole = WordProbe(models.TEXT_WIDTH), WordProbe(models.TEXT_WIDTH)
        self.patches = PatchProbe(models.TEXT_WIDTH)
        self.tokenizer = build_tokenizer()

    def _ids(self, prompts: list[Prompt]) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        tokens = self.tokenizer(texts, padding="max_length", return_tensors="pt")
        return tokens.input_ids.to(self.clip.device)

    def loss(self, step: int) -> Tensor:
        """Return the contrastive loss and those of the probes."""
        device = self.clip.device
        prompts = sample_prompts("clip", step, _BATCH["clip"])
        pixels, labels = (part.to(device) for part in sample_scenes(step, prompts))
        answers = _answers(prompts, MAX_TOKENS, begin=1, causal=True).to(device)
        with autocast(device):
            out = self.clip(self._ids(prompts), pixels, output_hidden_states=True)
            text = out.text_model_output
            words = self.words(text.hidden_states[-2], answers)
            whole = self.whole(text.pooler_output, answers[:, -1])  # projected already
            patches = self.patches(out.vision_model_output.last_hidden_state[:, 1:], labels)
        contents = [prompt.content for prompt in prompts]
        match = contrastive_loss(out.logits_per_text.float(), contents)
        return match + _WORDS_WEIGHT * (words + whole) + patches

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Return the share of images whose best caption, of all, says what they show."""
        prompts, pixels = held_out_scenes(_CAPTIONS)
        logits = self.clip(self._ids(prompts), pixels.to(self.clip.device)).logits_per_image
        best = logits.argmax(-1).tolist()
        right = [prompts[i].content == prompts[j].content for i, j in enumerate(best)]
        return {"top1": sum(right) / len(right)}


class T5Lesson(nn.Module):
    """A T5 encoder and the probe of its words; padding is seen, as pipelines let it be."""

    def __init__(self, t5: T5EncoderModel) -> None:
        """Train ``t5`` where it is, beside a probe that is thrown away."""
        super().__init__()
        self.t5, self.words = t5, WordProbe(t5.config.d_model)
        self.tokenizer = build_t5_tokenizer()

    def _read(self, prompts: list[Prompt], length: int) -> tuple[Tensor, Tensor]:
        """Return the state of every word, and what the probe is asked of it."""
        device = self.t5.device
        texts = [prompt.text for prompt in prompts]
        ids = self.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
        answers = _answers(prompts, length, begin=0, causal=False).to(device)
        return self.t5(ids.input_ids.to(device)).last_hidden_state, answers

    def loss(self, step: int) -> Tensor:
        """Return the loss of the probe."""
        length = text_length(step)
        share = 8 if length == LONG_TOKENS else 1
        prompts = sample_prompts("t5", step, _BATCH["t5"] // share)
        with autocast(self.t5.device):
            return self.words(*self._read(prompts, length))

    @torch.no_grad()
    def report(self) -> dict[str, float]:
        """Return the share of words that name their own object, its relation, and the other."""
        right = self.words.right(*self._read(held_out_prompts(_CAPTIONS, "val"), MAX_TOKENS))
        own, relation, other = (float(part.mean()) for part in right.split((3, 1, 2)))
        return {"own": own, "relation": relation, "other": other}
