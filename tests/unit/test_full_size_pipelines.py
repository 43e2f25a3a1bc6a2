"""The pipelines on the published networks, which are on the meta device.

Truth: what the stock class hands to the same network, up to its first pass. Embeddings have the
published widths; the size is the call's own default.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)

from core2_sampler.full_size import FULL_SIZE, build_network
from core2_sampler.pipelines.flux import CoRe2FluxPipeline
from core2_sampler.pipelines.sd3 import CoRe2StableDiffusion3Pipeline
from core2_sampler.pipelines.sdxl import CoRe2StableDiffusionXLPipeline
from core2_sampler.plan import Core2Config

CLASSES = {
    "sdxl": (StableDiffusionXLPipeline, CoRe2StableDiffusionXLPipeline),
    "sd3": (StableDiffusion3Pipeline, CoRe2StableDiffusion3Pipeline),
    "flux": (FluxPipeline, CoRe2FluxPipeline),
}
LATENTS = {  # of two images of 1024 px as the networks get them
    "sdxl": ("sample", (2, 4, 128, 128)),
    "sd3": ("hidden_states", (2, 16, 128, 128)),
    "flux": ("hidden_states", (2, 4096, 64)),
}


class FirstPass(Exception):
    """The network was called."""


def shapes(value):
    """Return nested arguments with shapes for tensors, without those that are None."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        kept = {k: shapes(v) for k, v in value.items() if v is not None}
        return {k: v for k, v in kept.items() if v != {}}
    return value


def first_pass(pipeline_class, model, network, **call):
    """Return the shapes that a pipeline on the CPU hands to a network in its first pass."""
    on_cpu = type("OnCpu", (pipeline_class,), {"_execution_device": torch.device("cpu")})
    parts = {name: None for name in inspect.signature(pipeline_class).parameters}
    parts.pop("force_zeros_for_empty_prompt", None)
    parts.pop("add_watermarker", None)
    euler = EulerDiscreteScheduler if model.family == "sdxl" else FlowMatchEulerDiscreteScheduler
    parts["scheduler"] = euler()
    parts["unet" if model.family == "sdxl" else "transformer"] = network
    parts["vae"] = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,  # eight pixels to a latent
        norm_num_groups=2,
        latent_channels=model.latent_channels,
    )
    pipe = on_cpu(**parts)
    pipe.set_progress_bar_config(disable=True)
    seen = {}

    def look(_module, args, kwargs):
        seen.update(inspect.signature(network.forward).bind(*args, **kwargs).arguments)
        raise FirstPass

    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(FirstPass):
        pipe(num_inference_steps=2, output_type="latent", **call)
    handle.remove()
    seen.pop("return_dict", None)
    seen.pop("timestep")  # one for all rows in the stock SDXL call, one for each in ours
    return shapes(seen)


def embeds(model, rows, prefix=""):
    return {
        f"{prefix}prompt_embeds": torch.zeros(rows, *model.prompt),
        f"{'negative_' if prefix else ''}pooled_prompt_embeds": torch.zeros(rows, model.pooled),
    }


@pytest.mark.parametrize("name", FULL_SIZE.names())
def test_our_pipelines_hand_the_published_networks_what_the_stock_pipelines_do(name):
    model = FULL_SIZE.get(name)
    network = build_network(model)
    stock, ours = CLASSES[model.family]
    scale = "true_cfg_scale" if model.family == "flux" else "guidance_scale"
    call = embeds(model, 2) | {scale: 1.0}
    wanted = first_pass(stock, model, network, **call)
    assert first_pass(ours, model, network, **call, core2=Core2Config(mode="cond")) == wanted
    latents, shape = LATENTS[model.family]
    assert wanted[latents] == shape
    call = embeds(model, 1) | embeds(model, 1, "negative_") | {scale: 4.0}
    guided = first_pass(ours, model, network, **call, core2=Core2Config(mode="cfg"))
    if model.family != "flux":  # whose stock call makes a pass of each side
        wanted = first_pass(stock, model, network, **call)
    assert guided == wanted
