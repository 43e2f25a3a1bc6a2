"""The tap head: reads the denoiser's last hidden state, from which cond itself was made.

The output layer of a denoiser reduces each token to a handful of numbers; what it throws away
tells much more about the gap than cond does.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from core2_sampler.types import Denoiser
from core2_sampler.weak_heads.base import WeakHead, network_config, sdxl_pooled_dim

_SIGMA_WIDTH = 128
_PATCH = 2  # latents a side behind a token of FLUX and of SDXL, whose denoisers make the tokens


class TapHead(WeakHead):
    """A small transformer on [hidden state; patches of x and cond], one token per patch.

    It adds no position embedding of its own, so any resolution works: it knows of positions what
    the hidden states tell.
    """

    needs_features = True

    @register_to_config
    def __init__(
        self,
        family: str,
        latent_channels: int,
        feature_dim: int,
        pooled_dim: int,
        patch_size: int = 2,
        width: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
    ) -> None:
        """Build the head.

        Args:
            family: family of the denoiser.
            latent_channels: C.
            feature_dim: width of the denoiser's last hidden state.
            pooled_dim: width of the pooled prompt embedding.
            patch_size: side of the square of latents behind one hidden token.
            width: width of the head, a multiple of ``num_heads``.
            num_layers: transformer blocks.
            num_heads: attention heads.
        """
        super().__init__()
        patch = latent_channels * patch_size**2
        self.feature_norm = nn.LayerNorm(feature_dim)
        self.features_in = nn.Linear(feature_dim, width)
        self.patches_in = nn.Linear(2 * patch, width)
        self.sigma_in = nn.Linear(_SIGMA_WIDTH, width)
        self.pooled_in = nn.Linear(pooled_dim, width)
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, patch)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    @classmethod
    def fit_config(cls, denoiser: Denoiser) -> dict[str, Any]:
        """Return the arguments of the constructor that follow from the denoiser."""
        return super().fit_config(denoiser) | _token_layout(network_config(denoiser))

    def forward(
        self,
        cond: Tensor,
        *,
        x: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        features: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted gap, as ``cond`` [B, C, H, W].

        Args:
            cond: prediction with the prompt, [B, C, H, W].
            x: latents, as ``cond``.
            sigma: noise levels, [B].
            prompt_embeds: token embeddings; not used.
            pooled: pooled embeddings, [B, P].
            features: the denoiser's last hidden state, [B, H/p * W/p, D].

        Raises:
            ValueError: if the latents or the hidden state are not those of the denoiser.
        """
        self.check_latents(cond.shape[1])
        side = self.config.patch_size
        grid = (cond.shape[2] // side, cond.shape[3] // side)
        if features is None or features.shape[1] != grid[0] * grid[1]:
            got = None if features is None else tuple(features.shape)
            raise ValueError(
                f"features must be the denoiser's last hidden state [B, {grid[0] * grid[1]}, D] "
                f"for latents {tuple(cond.shape)}, got {got}: run inside capture_features()"
            )
        dtype = self.proj_out.weight.dtype
        if self.config.family == "sdxl":  # its x grows with sigma; the network sees it like this
            x = x / (sigma[:, None, None, None] ** 2 + 1).sqrt()
        pair = torch.cat([x.to(dtype), cond.to(dtype)], 1)
        patches = F.unfold(pair, side, stride=side).mT  # [B, T, 2 * C * p * p]
        tokens = self.features_in(self.feature_norm(features.to(dtype))) + self.patches_in(patches)
        waves = get_timestep_embedding(1000 * sigma.float(), _SIGMA_WIDTH).to(dtype)
        embedding = self.embed(self.sigma_in(waves) + self.pooled_in(pooled.to(dtype)))  # [B, W]
        for block in self.blocks:
            tokens = block(tokens, embedding)
        scale, shift = self.modulation(embedding)[:, None].chunk(2, -1)
        patches = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        gap = F.fold(patches.mT.float(), cond.shape[2:], side, stride=side)
        return gap.to(cond.dtype)


def _token_layout(config: Any) -> dict[str, int]:
    """Return what the head must know of a network's last hidden state, from its config."""
    if "block_out_channels" not in config:
        return {
            "feature_dim": config.num_attention_heads * config.attention_head_dim,
            "pooled_dim": config.pooled_projection_dim,
            "patch_size": _PATCH if "guidance_embeds" in config else config.patch_size,
        }
    if config.addition_embed_type != "text_time":
        raise ValueError(
            "a UNet must take a pooled prompt embedding (addition_embed_type text_time), got "
            f"{config.addition_embed_type}: use the adapter head"
        )
    return {
        "feature_dim": config.block_out_channels[0] * _PATCH**2,
        "pooled_dim": sdxl_pooled_dim(config),
        "patch_size": _PATCH,
    }


class _Block(nn.Module):
    """A pre-norm transformer block, modulated by the embedding (adaLN-Zero, arXiv 2212.09748)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, tokens: Tensor, embedding: Tensor) -> Tensor:
        """Map tokens [B, T, W] under an embedding [B, W]."""
        parts = self.modulation(embedding)[:, None].chunk(6, -1)
        scale, shift, gate, scale_ff, shift_ff, gate_ff = parts
        tokens = tokens + gate * self._attend(self.norm(tokens) * (1 + scale) + shift)
        return tokens + gate_ff * self.feed_forward(self.norm(tokens) * (1 + scale_ff) + shift_ff)

    def _attend(self, tokens: Tensor) -> Tensor:
        split = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1))  # [B, T, 3, heads, W']
        query, key, value = split.transpose(1, 3).unbind(2)  # [B, heads, T, W'] each
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.attention_out(mixed.transpose(1, 2).flatten(2))
