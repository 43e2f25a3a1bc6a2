"""The text encoders of the published models, of random weights, timed by themselves."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PretrainedConfig,
    T5Config,
    T5EncoderModel,
)

from core2_sampler.benchmarks.speed_models import fill
from core2_sampler.benchmarks.speed_timing import LEAST_RUNS, interleave, summary


def _clip(width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )


_CLIP_L, _CLIP_G = _clip(768, 12), _clip(1280, 32)
_T5_XXL = T5Config(
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    vocab_size=32128,
    feed_forward_proj="gated-gelu",
)

ENCODERS: dict[str, tuple[tuple[PretrainedConfig, int], ...]] = {
    "sdxl": ((_CLIP_L, 77), (_CLIP_G, 77)),
    "sd3": ((_CLIP_L, 77), (_CLIP_G, 77), (_T5_XXL, 256)),
    "flux": ((_CLIP_L, 77), (_T5_XXL, 512)),
}
"""The encoders of each family, and how many tokens the stock call gives each."""


def build_encoder(config: PretrainedConfig, device: str, dtype: torch.dtype) -> Any:
    """Return a text encoder of random weights."""
    kind = T5EncoderModel if isinstance(config, T5Config) else CLIPTextModelWithProjection
    with torch.device("meta"):
        encoder = kind(config)
    encoder = encoder.to(dtype).eval().requires_grad_(False)
    if device != "meta":
        encoder.to_empty(device=device)
        fill(encoder)
        for buffer in encoder.buffers():  # positions, which are no weights
            if not buffer.is_floating_point():
                buffer.copy_(torch.arange(buffer.numel(), device=device).view_as(buffer))
    return encoder


def text_seconds(
    family: str, device: str, dtype: torch.dtype, runs: int, seconds: float
) -> dict[str, float] | None:
    """Return the seconds of encoding one prompt, without the tokenizers.

    Args:
        family: of `ENCODERS`.
        device: to run on.
        dtype: of the weights.
        runs: see `core2_sampler.benchmarks.speed_timing.interleave`.
        seconds: the same.
    """
    inputs = [
        (
            build_encoder(config, device, dtype),
            torch.ones((1, length), dtype=torch.int64, device=device),
        )
        for config, length in ENCODERS[family]
    ]

    @torch.no_grad()
    def run() -> None:
        for encoder, ids in inputs:
            encoder(ids, output_hidden_states=True)

    for _ in range(LEAST_RUNS):
        run()
    times = interleave({"text": run}, runs, seconds, device.startswith("cuda"))["text"]
    return summary(times.device or times.wall)
