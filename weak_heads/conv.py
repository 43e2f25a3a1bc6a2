"""The conv head: a small U-shaped convolution network on the latents and cond."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from core2_sampler.weak_heads.base import WeakHead
from core2_sampler.weak_heads.tokens import as_seen, pad_to


class ConvHead(WeakHead):
    """A UNet on (x, cond) under the noise level; it does not read the prompt.

    Any resolution works: sides that cannot be halved often enough are filled up with zeros.
    """

    @register_to_config
    def __init__(
        self,
        family: str,
        latent_channels: int,
        widths: tuple[int, ...] = (64, 128, 128),
        weak_guidance: float | None = None,
    ) -> None:
        """Build the head.

        Args:
            family: family of the denoiser.
            latent_channels: C.
            widths: channels at each resolution, each half of the one before; multiples of 32.
            weak_guidance: FLUX: the embedded guidance that stands for uncond in the gap it learns;
                None is the negative prompt.
        """
        super().__init__()
        self.network = UNet2DModel(
            in_channels=2 * latent_channels,
            out_channels=latent_channels,
            block_out_channels=tuple(widths),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            add_attention=False,
        )
        nn.init.zeros_(self.network.conv_out.weight)
        nn.init.zeros_(self.network.conv_out.bias)

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
            pooled: pooled embeddings; not used.
            features: not used.

        Raises:
            ValueError: if the latents are not those of the denoiser.
        """
        self.check_latents(cond.shape[1])
        dtype = self.network.conv_in.weight.dtype
        pair = torch.cat([as_seen(self.config.family, x, sigma).to(dtype), cond.to(dtype)], 1)
        pair = pad_to(pair, 2 ** (len(self.config.widths) - 1))
        gap = self.network(pair, 1000 * sigma.float(), return_dict=False)[0]
        return gap[..., : cond.shape[2], : cond.shape[3]].to(cond.dtype)
