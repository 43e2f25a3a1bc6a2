"""How the denoisers of the Shapes world are trained: one loss, three networks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from core2_sampler.shapes import models
from core2_sampler.shapes.batches import (
    LONG_TOKENS,
    Encoded,
    LatentBank,
    TextEncoders,
    autocast,
    held_out_scenes,
    text_length,
    to_latents,
)
from core2_sampler.shapes.probes import PatchProbe
from core2_sampler.shapes.render import SIZE
from core2_sampler.shapes.tokenizer import MAX_TOKENS

PROMPT_DROPOUT = 0.1
WRONG_CAPTIONS = 0.12
"""Share of training images under the caption of another: image-text pairs of the web are noisy,
which is much of what guidance corrects; from perfect captions alone it would have little to do."""
_PROBE_WEIGHT = 0.2  # of the cross entropy of `Probed`, against the denoiser's squared error
_BATCH = 64
_HELD_OUT, _NOISES = 64, 4  # images of a denoiser's report, and noises of each


@dataclass(frozen=True, slots=True)
class Recipe:
    """What differs between the denoisers.

    Attributes:
        folder: of the network in its pipeline's folder.
        build: makes the untrained network.
        assemble: makes the stock pipeline of a trained one and a folder of parts.
        call: asks the network: (network, latents, time, captions) to its answer.
        flow: whether it predicts the velocity of a flow, or else the noise of a DDPM.
        probed: the layer that `Probed` listens to, and its channels.
    """

    folder: str
    build: Callable[[], nn.Module]
    assemble: Callable[[Any, Any], DiffusionPipeline]
    call: Callable[[Any, Tensor, Tensor, Encoded], Tensor]
    flow: bool
    probed: tuple[str, int]


def _call_sd3(network: SD3Transformer2DModel, x: Tensor, time: Tensor, encoded: Encoded) -> Tensor:
    clip = torch.cat([encoded.clip] * 2, dim=-1)
    pooled = torch.cat([encoded.projected] * 2, dim=-1)
    return network(x, torch.cat([clip, encoded.t5], dim=1), pooled, time).sample


def _call_sdxl(network: UNet2DConditionModel, x: Tensor, time: Tensor, encoded: Encoded) -> Tensor:
    ids = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=x.device).expand(len(x), -1)
    added = {"text_embeds": encoded.projected, "time_ids": ids}
    tokens = torch.cat([encoded.clip] * 2, dim=-1)
    return network(x, time, tokens, added_cond_kwargs=added).sample


def _call_flux(
    network: FluxTransformer2DModel, x: Tensor, time: Tensor, encoded: Encoded
) -> Tensor:
    batch, channels, height, width = x.shape
    image_ids = FluxPipeline._prepare_latent_image_ids(
        batch, height // 2, width // 2, x.device, x.dtype
    )
    answer = network(
        hidden_states=FluxPipeline._pack_latents(x, batch, channels, height, width),
        timestep=time / 1000,
        guidance=torch.full((batch,), 3.5, device=x.device),  # the stock call's default
        pooled_projections=encoded.pooled,
        encoder_hidden_states=encoded.t5,
        txt_ids=torch.zeros(encoded.t5.shape[1], 3, device=x.device),
        img_ids=image_ids,
    ).sample
    return FluxPipeline._unpack_latents(answer, height, width, vae_scale_factor=1)


RECIPES = {
    "sd3": Recipe(
        "transformer",
        models.build_sd3,
        models.assemble_sd3,
        _call_sd3,
        flow=True,
        probed=("transformer_blocks.2", 192),
    ),
    "sdxl": Recipe(
        "unet",
        models.build_sdxl,
        models.assemble_sdxl,
        _call_sdxl,
        flow=False,
        probed=("mid_block", 128),
    ),
    "flux": Recipe(
        "transformer",
        models.build_flux,
        models.assemble_flux,
        _call_flux,
        flow=True,
        probed=("single_transformer_blocks.2", 160),
    ),
}
"""The denoisers by the name of their family."""


class Probed(nn.Module):
    """A denoiser, and the probe of what its middle layer makes of an image."""

    def __init__(self, denoiser: nn.Module, layer: str, width: int) -> None:
        """Listen to ``denoiser``'s module ``layer``, whose image tokens have ``width`` channels."""
        super().__init__()
        self.denoiser, self.patches = denoiser, PatchProbe(width)
        self._tokens: Tensor | None = None
        denoiser.get_submodule(layer).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: Any) -> None:
        tokens = output if isinstance(output, Tensor) else output[1]  # a block: (text, image)
        self._tokens = tokens.flatten(2).transpose(1, 2) if tokens.ndim == 4 else tokens

    def named(self, labels: Tensor) -> Tensor:
        """Return the cross entropy of the patches of the denoiser's last pass.

        Args:
            labels: of ``label_map``, [B, H, W].

        Raises:
            RuntimeError: if there was no pass yet.
        """
        if self._tokens is None:
            raise RuntimeError("the denoiser must run before its probe is read, got no pass yet")
        return self.patches(self._tokens, labels)


class Noised(NamedTuple):
    """Latents as a denoiser is trained on: its input, time in 0..1000, answer, and weight."""

    x: Tensor
    time: Tensor
    target: Tensor
    weight: Tensor | float


def noised(signal: Tensor | None, x0: Tensor, generator: torch.Generator) -> Noised:
    """Noise clean latents.

    Without `signal` a flow: the velocity at sigma from a logit-normal, shifted as for sampling
    (arXiv 2403.03206); else the noise at a uniform timestep of the variance-preserving schedule
    with that ``alphas_cumprod``. An error of the noise is weighed as the error of the velocity
    that it makes (arXiv 2202.00512): as it is, what will be where would hardly count.
    """
    noise = torch.randn(x0.shape, generator=generator).to(x0.device)
    if signal is None:
        normal = torch.randn(len(x0), generator=generator)
        sigma = torch.sigmoid(normal + math.log(models.FLOW_SHIFT)).to(x0.device)
        level = sigma[:, None, None, None]
        return Noised((1 - level) * x0 + level * noise, 1000 * sigma, noise - x0, 1.0)
    time = torch.randint(len(signal), (len(x0),), generator=generator)
    level = signal[time].to(x0.device)[:, None, None, None]
    x = level.sqrt() * x0 + (1 - level).sqrt() * noise
    return Noised(x, time.to(x0.device), noise, 1 / level)


def as_read(captions: list[str], rng: random.Random) -> list[str]:
    """Return captions as a denoiser is trained on: some of another image, some empty."""
    mixed = [rng.choice(captions) if rng.random() < WRONG_CAPTIONS else own for own in captions]
    return ["" if rng.random() < PROMPT_DROPOUT else text for text in mixed]


def denoiser_loss(
    recipe: Recipe, probed: Probed, vae: AutoencoderKL, encode: TextEncoders, seed: str = ""
) -> Callable[[int], Tensor]:
    """Return the loss of a training step: the denoiser's squared error, and the probe's.

    Under another ``seed`` the images, captions and noises are others.
    """
    bank = LatentBank(vae, size=48_000, batch=128, seed=seed)
    signal = None if recipe.flow else models.sdxl_scheduler().alphas_cumprod
    device = vae.device

    def loss(step: int) -> Tensor:
        length = text_length(step)
        share = 4 if length == LONG_TOKENS else 1  # a long step costs what the others do
        batch = bank.draw(step, _BATCH // share)
        rng = random.Random(f"captions{seed}/{step}")
        texts = as_read(batch.texts, rng)
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        given = noised(signal, batch.latents, noise)
        with autocast(device):
            error = denoiser_error(recipe, probed.denoiser, given, encode(texts, length))
            named = probed.named(batch.labels)
        return error + _PROBE_WEIGHT * named

    return loss


def denoiser_error(recipe: Recipe, network: nn.Module, given: Noised, encoded: Encoded) -> Tensor:
    """Return the mean squared error of what a denoiser answers, with its weight."""
    answer = recipe.call(network, given.x, given.time, encoded)
    return (given.weight * (answer.float() - given.target).square()).mean()


def denoiser_report(
    recipe: Recipe, network: nn.Module, vae: AutoencoderKL, encode: TextEncoders
) -> Callable[[], dict[str, float]]:
    """Return what gives the denoiser's error on held-out images, always under the same noise."""
    signal = None if recipe.flow else models.sdxl_scheduler().alphas_cumprod
    prompts, pixels = held_out_scenes(_HELD_OUT)
    latents = to_latents(vae, pixels.to(vae.device)).repeat(_NOISES, 1, 1, 1)
    given = noised(signal, latents, torch.Generator().manual_seed(0))
    encoded = encode([prompt.text for prompt in prompts] * _NOISES, MAX_TOKENS)

    @torch.no_grad()
    def report() -> dict[str, float]:
        with autocast(vae.device):
            return {"error": float(denoiser_error(recipe, network, given, encoded))}

    return report
