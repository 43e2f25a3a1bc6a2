"""How diffusers' pipelines call their networks, and what a pass is told and says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from core2_sampler.pipelines.adapters.base import unchanged
from core2_sampler.pipelines.loop import map_tensors
from core2_sampler.types import Conditioning


@dataclass(frozen=True, slots=True)
class Layout:
    """How diffusers' pipelines call a network.

    Attributes:
        tokens: a sample is [tokens, channels], not [channels, ...].
        lists: samples are the items of lists, not the rows of tensors.
        prompt_first: where both prompts share a batch, whether the prompt's rows come first.
        scale_offset: what to add to the pipeline's guidance scale to get ours.
        reads_cond: whether the loop goes on to use cond itself, as to normalise what is guided.
        to_data: whether it predicts the velocity towards the data, which the loop turns round.
        norm_dim: dimension of [B, C, H, W], or of tokens as [B, C, tokens, 1], along which the loop
            gives what is guided the norm of cond, unless its call turns that off.
    """

    tokens: bool = False
    lists: bool = False
    prompt_first: bool = False
    scale_offset: float = 0.0
    reads_cond: bool = False
    to_data: bool = False
    norm_dim: int | None = None


LAYOUTS = {
    "AuraFlowTransformer2DModel": Layout(),
    "ChromaTransformer2DModel": Layout(tokens=True),
    "CogView4Transformer2DModel": Layout(),
    "FluxTransformer2DModel": Layout(tokens=True),
    "LTXVideoTransformer3DModel": Layout(tokens=True),
    "Lumina2Transformer2DModel": Layout(reads_cond=True, to_data=True, norm_dim=3),
    "PixArtTransformer2DModel": Layout(),
    "QwenImageTransformer2DModel": Layout(tokens=True, reads_cond=True, norm_dim=1),
    "SD3Transformer2DModel": Layout(),
    "SanaTransformer2DModel": Layout(),
    "UNet2DConditionModel": Layout(),
    "WanTransformer3DModel": Layout(),
    # cond + scale * (cond - uncond)
    "ZImageTransformer2DModel": Layout(
        lists=True, prompt_first=True, scale_offset=1.0, reads_cond=True, to_data=True
    ),
}
"""The networks whose loops are known."""

GUIDED_LAYOUTS = {
    **LAYOUTS,
    "CosmosTransformer3DModel": Layout(),
    "ErnieImageTransformer2DModel": Layout(),
    "Flux2Transformer2DModel": Layout(tokens=True),
    "Flux3Transformer2DModel": Layout(tokens=True),
    "Krea2Transformer2DModel": Layout(tokens=True),
    "WanVACETransformer3DModel": Layout(),
}
"""The networks whose loops are known where a guider stands in them."""

SAMPLE_NAMES = ("hidden_states", "sample", "x")
"""What networks call that which they are to denoise."""

EMBEDS = "encoder_hidden_states"
"""Under this name a network is given the token embeddings."""

TEXT_EMBEDS = "added_cond_kwargs/text_embeds"

BY_TAP = "use a head on outputs, on features that `collect` has stored (features=true)"
"""What remains to be done where a pass cannot be made again."""

SHARED = {"image_rotary_emb", "ip_adapter_masks"}
"""Arguments, also inside others, whose first dimension is not that of the samples."""


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one pass."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def kept(self) -> Call:
        """Return the same tensors in dicts and lists of its own, which no loop edits."""
        return Call(self.args, map_tensors(unchanged, self.kwargs))


@dataclass(frozen=True, slots=True)
class Shown:
    """What a head is shown of a pass with the prompt, in the words of the library.

    Outside SDXL, SD3 and FLUX `x` and `cond` are what the network is given and says.

    Attributes:
        x: latents, [B, C, H, W].
        cond: prediction with the prompt, as `x`.
        sigma: noise levels, [B].
        prompt: the prompts, B rows; nothing beside the embeddings.
        features: last hidden state, [B, T, D], where it was captured.
    """

    x: Tensor
    cond: Tensor
    sigma: Tensor
    prompt: Conditioning
    features: Tensor | None


def told(value: Any, path: str) -> Any:
    """Return what lies under a path such as ``added_cond_kwargs/text_embeds``; None if nothing."""
    for name in path.split("/"):
        value = (value or {}).get(name)
    return value
