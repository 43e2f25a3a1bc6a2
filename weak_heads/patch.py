"""The patch head: a transformer on squares of the latents and of cond, and on nothing else.

It knows what the released heads know and the latents beside, at a small share of their cost: one
token for 4 x 4 latents, and a width that has nothing to do with the denoiser's.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

from core2_sampler.types import Denoiser
from core2_sampler.weak_heads.base import network_config
from core2_sampler.weak_heads.tokens import TokenHead, pad_to, pooled_dim_of


class PatchHead(TokenHead):
    """A transformer on patches of (x, cond), under the noise level and the pooled prompt.

    Positions are sines of row and column, so any resolution works; sides between two patches are
    filled up with zeros.
    """

    @register_to_config
    def __init__(
        self,
        family: str,
        latent_channels: int,
        pooled_dim: int,
        patch_size: int = 4,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 4,
        weak_guidance: float | None = None,
    ) -> None:
        """Build the head.

        Args:
            family: family of the denoiser.
            latent_channels: C.
            pooled_dim: width of the pooled prompt embedding.
            patch_size: side of the square of latents behind one token.
            width: width of the head, a multiple of 4 and of ``num_heads``.
            num_layers: transformer blocks.
            num_heads: attention heads.
            weak_guidance: FLUX: the embedded guidance that stands for uncond in the gap it learns;
                None is the negative prompt.
        """
        super().__init__()
        if width % 4 or width % num_heads:
            raise ValueError(
                f"width must be a multiple of 4 and of num_heads, got {width} and {num_heads}"
            )
        self._build(pooled_dim, width, num_layers, num_heads)

    @classmethod
    def fit_config(cls, denoiser: Denoiser) -> dict[str, Any]:
        """Return the arguments of the constructor that follow from the denoiser."""
        width = pooled_dim_of(network_config(denoiser))
        return super().fit_config(denoiser) | {"pooled_dim": width}

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
            features: not used.

        Raises:
            ValueError: if the latents are not those of the denoiser.
        """
        self.check_latents(cond.shape[1])
        side, (height, width) = self.config.patch_size, cond.shape[2:]
        whole = pad_to(cond, side)
        tokens = self._read(pad_to(x, side), whole, sigma)
        tokens = tokens + self._positions(whole.shape[2] // side, whole.shape[3] // side, tokens)
        gap = self._write(tokens, sigma, pooled, whole.shape[2:])
        return gap[..., :height, :width].to(cond.dtype)

    def _positions(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return a code of row and column for each token, [rows * columns, width]."""
        half = self.config.width // 2
        down, right = (
            get_timestep_embedding(torch.arange(count, device=like.device), half).to(like.dtype)
            for count in (rows, columns)
        )
        return torch.cat([down.repeat_interleave(columns, 0), right.repeat(rows, 1)], 1)
