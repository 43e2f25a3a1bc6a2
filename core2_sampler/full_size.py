"""The published networks at full size, without weights: their configurations and their inputs.

Everything here lives on the ``meta`` device: classes, shapes and operations are real, nothing is
allocated and nothing is computed, so any machine can run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from core2_sampler.registry import Registry
from core2_sampler.types import Conditioning

VAE_FACTOR = 8
"""Pixels behind one latent, per side, in all of these models."""


@dataclass(frozen=True, slots=True)
class FullSize:
    """A published network and the shapes of one call of it.

    Attributes:
        repo: its repository on the Hugging Face hub.
        family: ``sdxl``, ``sd3`` or ``flux``.
        network: name of its class in diffusers.
        config: of the class; what is left out has the class's default.
        latent_channels: C of ``x`` [B, C, H, W].
        prompt: tokens of the encoded prompt as the stock call makes it, and their width.
        pooled: width of the pooled prompt embedding.
        extra: shapes, without the batch, of what else `Conditioning.extra` holds.
    """

    repo: str
    family: str
    network: str
    config: Mapping[str, Any]
    latent_channels: int
    prompt: tuple[int, int]
    pooled: int
    extra: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


_SD35 = {
    "attention_head_dim": 64,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
    "sample_size": 128,
}
_FLUX1 = {
    "attention_head_dim": 128,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}

FULL_SIZE: Registry[FullSize] = Registry("full-size model")
"""The published networks by name."""

FULL_SIZE.register("sdxl")(
    FullSize(
        repo="stabilityai/stable-diffusion-xl-base-1.0",
        family="sdxl",
        network="UNet2DConditionModel",
        config={
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "in_channels": 4,
            "layers_per_block": 2,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
            "transformer_layers_per_block": (1, 2, 10),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "use_linear_projection": True,
        },
        latent_channels=4,
        prompt=(77, 2048),
        pooled=1280,
        extra={"time_ids": (6,)},  # original size, crop and target size
    )
)
FULL_SIZE.register("sd35-medium")(
    FullSize(
        repo="stabilityai/stable-diffusion-3.5-medium",
        family="sd3",
        network="SD3Transformer2DModel",
        config=_SD35
        | {
            "caption_projection_dim": 1536,
            "dual_attention_layers": tuple(range(13)),
            "num_attention_heads": 24,
            "num_layers": 24,
            "pos_embed_max_size": 384,
        },
        latent_channels=16,
        prompt=(77 + 256, 4096),  # CLIP, then T5
        pooled=2048,
    )
)
FULL_SIZE.register("sd35-large")(
    FullSize(
        repo="stabilityai/stable-diffusion-3.5-large",
        family="sd3",
        network="SD3Transformer2DModel",
        config=_SD35
        | {
            "caption_projection_dim": 2432,
            "num_attention_heads": 38,
            "num_layers": 38,
            "pos_embed_max_size": 192,
        },
        latent_channels=16,
        prompt=(77 + 256, 4096),
        pooled=2048,
    )
)
FULL_SIZE.register("flux-dev")(
    FullSize(
        repo="black-forest-labs/FLUX.1-dev",
        family="flux",
        network="FluxTransformer2DModel",
        config=_FLUX1 | {"guidance_embeds": True},
        latent_channels=16,
        prompt=(512, 4096),
        pooled=768,
        extra={"guidance": ()},
    )
)
FULL_SIZE.register("flux-schnell")(
    FullSize(
        repo="black-forest-labs/FLUX.1-schnell",
        family="flux",
        network="FluxTransformer2DModel",
        config=_FLUX1 | {"guidance_embeds": False},
        latent_channels=16,
        prompt=(256, 4096),  # the most that it was trained for
        pooled=768,
    )
)


@dataclass(frozen=True, slots=True)
class Call:
    """The inputs of one call of a `Denoiser`, on the meta device.

    Attributes:
        x: latents, [B, C, H, W].
        sigma: noise levels, [B].
        prompt: encoded prompts, B rows.
    """

    x: Tensor
    sigma: Tensor
    prompt: Conditioning


def build_network(model: FullSize) -> nn.Module:
    """Return the network on the meta device.

    Args:
        model: an entry of `FULL_SIZE`.
    """
    import diffusers

    with torch.device("meta"):
        network = getattr(diffusers, model.network).from_config(dict(model.config))
    return network.eval().requires_grad_(False)


def example_call(
    model: FullSize, batch_size: int = 1, height: int = 1024, width: int = 1024
) -> Call:
    """Return the inputs of one call.

    Args:
        model: an entry of `FULL_SIZE`.
        batch_size: B.
        height: of the image, px.
        width: of the image, px.

    Raises:
        ValueError: if a side is not a multiple of 16.
    """
    if height % (2 * VAE_FACTOR) or width % (2 * VAE_FACTOR):
        raise ValueError(
            f"height and width must be multiples of {2 * VAE_FACTOR}, got {height} and {width}"
        )

    def rows(*shape: int) -> Tensor:
        return torch.empty(batch_size, *shape, device="meta")

    x = rows(model.latent_channels, height // VAE_FACTOR, width // VAE_FACTOR)
    extra = {name: rows(*shape) for name, shape in model.extra.items()}
    return Call(x, rows(), Conditioning(rows(*model.prompt), rows(model.pooled), extra))
