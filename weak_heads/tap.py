"""The tap head: reads the denoiser's last hidden state, from which cond itself was made.

The output layer of a denoiser reduces each token to a handful of numbers; what it throws away
tells much more about the gap than cond does.
"""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from core2_sampler.types import Denoiser
from core2_sampler.weak_heads.base import network_config
from core2_sampler.weak_heads.tokens import TokenHead, pooled_dim_of

_PATCH = 2  # latents a side behind a token of FLUX and of SDXL, whose denoisers make the tokens


class TapHead(TokenHead):
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
        weak_guidance: float | None = None,
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
            weak_guidance: FLUX: the embedded guidance that stands for uncond in the gap it learns;
                None is the negative prompt.
        """
        super().__init__()
        self.feature_norm = nn.LayerNorm(feature_dim)
        self.features_in = nn.Linear(feature_dim, width)
        self._build(pooled_dim, width, num_layers, num_heads)

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
        hidden = self.features_in(self.feature_norm(features.to(self.proj_out.weight.dtype)))
        tokens = hidden + self._read(x, cond, sigma)
        return self._write(tokens, sigma, pooled, cond.shape[2:]).to(cond.dtype)


def _token_layout(config: Any) -> dict[str, int]:
    """Return what the head must know of a network's last hidden state, from its config."""
    pooled_dim = pooled_dim_of(config)
    if "block_out_channels" in config:
        width, patch = config.block_out_channels[0] * _PATCH**2, _PATCH
    else:
        width = config.num_attention_heads * config.attention_head_dim
        patch = _PATCH if "guidance_embeds" in config else config.patch_size
    return {"feature_dim": width, "pooled_dim": pooled_dim, "patch_size": patch}
