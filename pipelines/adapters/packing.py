"""FLUX latents as the network's tokens, and back."""

from __future__ import annotations

import math

from diffusers import FluxPipeline
from torch import Tensor


def pack(x: Tensor) -> Tensor:
    """Return latents [B, C, H, W] as the network's tokens, [B, H/2 * W/2, 4C].

    Raises:
        ValueError: a side is odd.
    """
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        raise ValueError(
            f"FLUX latents must have an even height and width, got {tuple(x.shape[-2:])}: "
            "crop or pad them"
        )
    return FluxPipeline._pack_latents(x, *x.shape)


def unpack(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Return tokens [B, H/2 * W/2, 4C] as latents [B, C, H, W]; `size` is (H, W)."""
    return FluxPipeline._unpack_latents(tokens, *size, vae_scale_factor=1)


def square_size(tokens: int) -> tuple[int, int]:
    """Return (H, W) of the square latents that are packed into so many tokens.

    Raises:
        ValueError: no square has as many.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f"packed latents must be square where no size is given, got {tokens} tokens: "
            "give height and width"
        )
    return 2 * side, 2 * side
