"""Components of stock pipelines in miniature: random, of diffusers' real classes.

Of ours where a pipeline of diffusers takes the same; else a network alone, where a text encoder
would not be cheap and the call gets embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import CLIPTextModel

from core2_sampler.testing.pipelines import (
    SDXL_SCHEDULER,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_sdxl_pipeline,
)

Arguments = dict[str, Any]

WIDTH = 16
"""Of the embeddings in the place of a text encoder's."""

DDIM = partial(diffusers.DDIMScheduler, **SDXL_SCHEDULER, clip_sample=False)
FLOW = partial(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0)
FLOW_BY_SIZE = partial(diffusers.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True)
FLOW_DPM = partial(
    diffusers.DPMSolverMultistepScheduler,
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=3.0,
)

_TWO_HEADS: Arguments = {"num_attention_heads": 2, "attention_head_dim": 8}
_FOUR_CHANNELS: Arguments = {"in_channels": 4, "out_channels": 4}

_TRANSFORMERS: dict[str, Arguments] = {
    "PixArtTransformer2DModel": {
        **_TWO_HEADS,
        "num_layers": 1,
        "cross_attention_dim": 16,
        "sample_size": 8,
        "caption_channels": WIDTH,
        "use_additional_conditions": False,
    },
    "SanaTransformer2DModel": {
        **_FOUR_CHANNELS,
        **_TWO_HEADS,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": WIDTH,
        "sample_size": 8,
    },
    "AuraFlowTransformer2DModel": {
        **_TWO_HEADS,
        "sample_size": 8,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "joint_attention_dim": WIDTH,
        "caption_projection_dim": 16,
        "pos_embed_max_size": 64,
    },
    "CogView4Transformer2DModel": {
        **_FOUR_CHANNELS,
        **_TWO_HEADS,
        "num_layers": 1,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 16,
        "condition_dim": 8,
        "rope_axes_dim": (8, 8),
        "sample_size": 8,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 2,
        "multiple_of": 16,
        "axes_dim_rope": (8, 4, 4),
        "axes_lens": (64, 32, 32),
        "cap_feat_dim": WIDTH,
    },
    "ChromaTransformer2DModel": {
        **_TWO_HEADS,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 4, 8),
        "approximator_hidden_dim": 16,
        "approximator_layers": 1,
    },
    "QwenImageTransformer2DModel": {
        **_TWO_HEADS,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    },
    "WanTransformer3DModel": {
        **_FOUR_CHANNELS,
        **_TWO_HEADS,
        "attention_head_dim": 12,
        "text_dim": WIDTH,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    },
    "LTXVideoTransformer3DModel": {
        **_FOUR_CHANNELS,
        **_TWO_HEADS,
        "cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": WIDTH,
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [8, 4, 4],
        "axes_lens": [256, 32, 32],
    },
}
"""Configs of networks by their class; the sizes that do not matter are as small as may be."""


def bare(transformer: str, scheduler: Callable[[], Any] = FLOW) -> Arguments:
    """Return the components of a pipeline that is given embeddings and returns latents.

    Args:
        transformer: class of its network, one of `_TRANSFORMERS`.
        scheduler: makes its scheduler.
    """
    return {
        "transformer": getattr(diffusers, transformer)(**_TRANSFORMERS[transformer]),
        "scheduler": scheduler(),
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
    }


def aura_flow() -> Arguments:
    """Return the components of an AuraFlow pipeline that hears its prompt."""
    parts = bare("AuraFlowTransformer2DModel")
    with torch.no_grad():  # a random network hardly does
        for name, parameter in parts["transformer"].named_parameters():
            if "add_" in name or "context" in name or "to_" in name:
                parameter.mul_(8)
    return parts


def z_image() -> Arguments:
    """Return the components of a Z-Image pipeline, with a VAE for its image-to-image."""
    parts = bare("ZImageTransformer2DModel")
    with torch.no_grad():  # both are made without values
        parts["transformer"].x_pad_token.zero_()
        parts["transformer"].cap_pad_token.zero_()
    return {**parts, "vae": tiny_sd3_pipeline().vae}


def sdxl() -> Arguments:
    """Return the components of a Stable Diffusion XL pipeline."""
    return {**_components(tiny_sdxl_pipeline()), "add_watermarker": False}


def sd() -> Arguments:
    """Return the components of a Stable Diffusion 1 pipeline."""
    xl = tiny_sdxl_pipeline()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
    )
    return {
        "vae": xl.vae,
        "text_encoder": CLIPTextModel(xl.text_encoder.config),
        "tokenizer": xl.tokenizer,
        "unet": unet,
        "scheduler": DDIM(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def with_controlnet(unet_parts: Callable[[], Arguments]) -> Arguments:
    """Return the components of a pipeline with a UNet, and a ControlNet for it."""
    parts = unet_parts()
    net = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(8, 8)
    )
    return {**parts, "controlnet": _loud(net)}


def sd3() -> Arguments:
    """Return the components of a Stable Diffusion 3 pipeline."""
    return _components(tiny_sd3_pipeline())


def sd3_of_16_channels() -> Arguments:
    """Return `sd3` with the one number of channels that the inpainting pipeline takes."""
    parts, channels = sd3(), {"in_channels": 16, "out_channels": 16}
    transformer, vae = parts["transformer"], parts["vae"]
    return {
        **parts,
        "transformer": type(transformer).from_config({**transformer.config, **channels}),
        "vae": type(vae).from_config({**vae.config, "latent_channels": 16}),
    }


def sd3_controlnet() -> Arguments:
    """Return `sd3` with a ControlNet."""
    parts = sd3()
    net = diffusers.SD3ControlNetModel.from_transformer(
        parts["transformer"], num_layers=1, num_extra_conditioning_channels=0
    )
    with torch.no_grad():  # the loop draws another control image for each prompt: give it no choice
        moments = parts["vae"].encoder.conv_out
        moments.weight.chunk(2)[1].zero_()
        moments.bias.chunk(2)[1].fill_(-30)
    return {**parts, "controlnet": _loud(net)}


def flux() -> Arguments:
    """Return the components of a FLUX pipeline."""
    return _components(tiny_flux_pipeline())


def flux_controlnet() -> Arguments:
    """Return `flux` with a ControlNet."""
    parts = flux()
    net = diffusers.FluxControlNetModel.from_transformer(
        parts["transformer"], num_layers=1, num_single_layers=1, **_TWO_HEADS
    )
    return {**parts, "controlnet": _loud(net)}


def _components(pipe: Any) -> Arguments:
    return {name: part for name, part in pipe.components.items() if name != "weak_head"}


def _loud(controlnet: nn.Module) -> nn.Module:
    """Let a ControlNet, which starts at zero, act."""
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return controlnet
