"""Heads that see latents as tokens: the transformer that they share, conditioned on the noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from core2_sampler.weak_heads.base import WeakHead, sdxl_pooled_dim

_SIGMA_WIDTH = 128


class TokenHead(WeakHead):
    """A transformer on one token for each square of latents, from which it makes their gap.

    A subclass has ``latent_channels`` and ``patch_size`` in its config, and says in ``forward``
    what else a token tells.
    """

    def _build(self, pooled_dim: int, width: int, num_layers: int, num_heads: int) -> None:
        """Make the layers; the last one starts at zero."""
        patch = self.config.latent_channels * self.config.patch_size**2
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

    def _read(self, x: Tensor, cond: Tensor, sigma: Tensor) -> Tensor:
        """Return a token of each square of x and cond [B, C, H, W], row by row, [B, T, width]."""
        dtype, side = self.proj_out.weight.dtype, self.config.patch_size
        pair = torch.cat([as_seen(self.config.family, x, sigma).to(dtype), cond.to(dtype)], 1)
        return self.patches_in(F.unfold(pair, side, stride=side).mT)

    def _write(self, tokens: Tensor, sigma: Tensor, pooled: Tensor, size: torch.Size) -> Tensor:
        """Return the gap that the tokens [B, T, width] lead to, [B, C, *size] in float32."""
        dtype, side = self.proj_out.weight.dtype, self.config.patch_size
        waves = get_timestep_embedding(1000 * sigma.float(), _SIGMA_WIDTH).to(dtype)
        embedding = self.embed(self.sigma_in(waves) + self.pooled_in(pooled.to(dtype)))
        for block in self.blocks:
            tokens = block(tokens, embedding)
        scale, shift = self.modulation(embedding)[:, None].chunk(2, -1)
        patches = self.proj_out(self.norm_out(tokens) * (1 + scale) + shift)
        return F.fold(patches.mT.float(), size, side, stride=side)


def as_seen(family: str, x: Tensor, sigma: Tensor) -> Tensor:
    """Return latents [B, C, H, W] as the network is shown them; SDXL's grow with sigma [B]."""
    return x / (sigma[:, None, None, None] ** 2 + 1).sqrt() if family == "sdxl" else x


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Return x [B, C, H, W] with zeros below and to the right, up to multiples of a number."""
    return F.pad(x, (0, -x.shape[3] % multiple, 0, -x.shape[2] % multiple))


def pooled_dim_of(config: Any) -> int:
    """Return the width of the pooled prompt embedding that a network takes.

    Args:
        config: of the network.

    Raises:
        ValueError: if it takes none.
    """
    if config.get("addition_embed_type") == "text_time":  # of a UNet
        return sdxl_pooled_dim(config)
    if config.get("pooled_projection_dim") is None:
        raise ValueError(
            "a network must take a pooled prompt embedding, which this kind of head reads, got one "
            "that takes none: use a conv or adapter head"
        )
    return config.pooled_projection_dim


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
