"""Our pipelines in miniature: random, of the real classes, built in under a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from core2_sampler.pipelines.flux import CoRe2FluxPipeline
from core2_sampler.pipelines.sd3 import CoRe2StableDiffusion3Pipeline
from core2_sampler.pipelines.sdxl import CoRe2StableDiffusionXLPipeline
from core2_sampler.shapes.tokenizer import build_t5_tokenizer
from core2_sampler.weak_heads.base import WeakHead

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

SDXL_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""The noise schedule of Stable Diffusion XL, as its scheduler's config has it."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let what draws from the global random state draw from a seed; leave that state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def ready(pipe: Pipeline) -> Pipeline:
    """Put a pipeline in evaluation mode, turn its progress bar off, and return it."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd3_pipeline(
    *, weak_head: WeakHead | None = None, seed: int = 0, **scheduler: Any
) -> CoRe2StableDiffusion3Pipeline:
    """Build a random Stable Diffusion 3 pipeline: 16x16 px images, no T5.

    Args:
        weak_head: the pipeline's head.
        seed: of the weights; the global random state is left alone.
        **scheduler: config of the flow-match Euler scheduler.

    Returns:
        The pipeline, on the CPU in float32, without a progress bar.
    """
    with seeded(seed):
        pipe = CoRe2StableDiffusion3Pipeline(
            transformer=_tiny_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=_tiny_vae(),
            text_encoder=_tiny_text_encoder(),
            tokenizer=_tiny_tokenizer(),
            text_encoder_2=_tiny_text_encoder(),
            tokenizer_2=_tiny_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
            weak_head=weak_head,
        )
    return ready(pipe)


def tiny_flux_pipeline(
    *,
    weak_head: WeakHead | None = None,
    guidance_embeds: bool = True,
    seed: int = 0,
    **scheduler: Any,
) -> CoRe2FluxPipeline:
    """Build a random FLUX pipeline: 16x16 px images.

    The stock call's default size is 256 px, whatever the VAE: give height and width.

    Args:
        weak_head: the pipeline's head.
        guidance_embeds: True is as FLUX.1-dev, False as FLUX.1-schnell.
        seed: of the weights; the global random state is left alone.
        **scheduler: config of the flow-match Euler scheduler.

    Returns:
        The pipeline, on the CPU in float32, without a progress bar.
    """
    with seeded(seed):
        pipe = CoRe2FluxPipeline(
            transformer=_tiny_flux_transformer(guidance_embeds),
            scheduler=FlowMatchEulerDiscreteScheduler(
                **{"shift": 3.0, "use_dynamic_shifting": True, **scheduler}
            ),
            vae=_tiny_vae(),
            text_encoder=CLIPTextModel(_tiny_text_encoder().config),
            tokenizer=_tiny_tokenizer(),
            text_encoder_2=_tiny_t5(),
            tokenizer_2=build_t5_tokenizer(),
            weak_head=weak_head,
        )
    return ready(pipe)


def tiny_sdxl_pipeline(
    *,
    weak_head: WeakHead | None = None,
    seed: int = 0,
    time_cond_proj_dim: int | None = None,
    **scheduler: Any,
) -> CoRe2StableDiffusionXLPipeline:
    """Build a random Stable Diffusion XL pipeline: 16x16 px images.

    Args:
        weak_head: the pipeline's head.
        seed: of the weights; the global random state is left alone.
        time_cond_proj_dim: width of an embedded guidance scale, as networks distilled for it have.
        **scheduler: config of the Euler scheduler, SDXL's own by default.

    Returns:
        The pipeline, on the CPU in float32, without a progress bar or a watermark.
    """
    with seeded(seed):
        pipe = CoRe2StableDiffusionXLPipeline(
            vae=_tiny_vae(use_post_quant_conv=True),
            text_encoder=CLIPTextModel(_tiny_text_encoder().config),
            text_encoder_2=_tiny_text_encoder(),
            tokenizer=_tiny_tokenizer(),
            tokenizer_2=_tiny_tokenizer(),
            unet=_tiny_unet(time_cond_proj_dim),
            scheduler=EulerDiscreteScheduler(**{**SDXL_SCHEDULER, **scheduler}),
            add_watermarker=False,
            weak_head=weak_head,
        )
    return ready(pipe)


def _tiny_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer of single letters, made in memory, 16 tokens long."""
    tokens = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    vocab = [*tokens, *(f"{t}</w>" for t in tokens), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=[], model_max_length=16
    )


def _tiny_transformer() -> SD3Transformer2DModel:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    # A random network hardly hears its prompt: make it loud, so that guidance matters.
    with torch.no_grad():
        transformer.time_text_embed.text_embedder.linear_2.weight.mul_(5)
    return transformer


def _tiny_flux_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 2, 2),
    )
    embedders = transformer.time_text_embed
    with torch.no_grad():  # loud, as above
        embedders.text_embedder.linear_2.weight.mul_(5)
        if guidance_embeds:
            embedders.guidance_embedder.linear_2.weight.mul_(5)
    return transformer


def _tiny_t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(build_t5_tokenizer()),
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
        )
    )


def _tiny_unet(time_cond_proj_dim: int | None) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        time_cond_proj_dim=time_cond_proj_dim,
    )
    with torch.no_grad():  # loud, as above
        unet.add_embedding.linear_2.weight.mul_(5)
    return unet


def _tiny_vae(use_post_quant_conv: bool = False) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=use_post_quant_conv,
    )


def _tiny_text_encoder() -> CLIPTextModelWithProjection:
    tokenizer = _tiny_tokenizer()
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
