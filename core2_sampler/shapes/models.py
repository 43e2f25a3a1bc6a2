"""The networks of the Shapes world: stock classes at a size that a laptop trains in an hour or two.

64x64 images become 16x16x4 latents (a VAE of factor 4), which SD3.5 and FLUX see as 64 tokens of
2x2 and SDXL as a 16x16 map.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    T5Config,
    T5EncoderModel,
)

from core2_sampler.shapes.render import SIZE
from core2_sampler.shapes.tokenizer import MAX_TOKENS, build_t5_tokenizer, build_tokenizer

LATENT_CHANNELS = 4
LATENT_SIZE = SIZE // 4
FLOW_SHIFT = 3.0
"""Of the flow models' noise levels, in training and in sampling: as in SD3.5, most lie high, where
it is decided what will be where; plain shapes show through much noise."""
_LOOK_AROUND = 4.0  # logits
TEXT_WIDTH = 128  # of the text encoder; the pipelines hold it twice, as SD3.5 and SDXL hold two


def build_vae() -> AutoencoderKL:
    """Return an untrained autoencoder, factor 4, 0.65 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def build_clip() -> CLIPModel:
    """Return an untrained CLIP pair, 1.5 M parameters; its text tower serves the pipelines."""
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        hidden_act="gelu",
    )
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(),
            vision_config=vision.to_dict(),
            projection_dim=TEXT_WIDTH,
        )
    )


def build_image_processor() -> CLIPImageProcessor:
    """Return the preprocessing of the CLIP image tower: 64x64, mean and std 0.5."""
    return CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def build_t5() -> T5EncoderModel:
    """Return an untrained T5 encoder, 1.8 M parameters, as wide as both CLIP embeddings joined."""
    tokenizer = build_t5_tokenizer()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=2 * TEXT_WIDTH,
            d_kv=64,
            d_ff=512,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    _look_around(t5)
    return t5


@torch.no_grad()
def _look_around(t5: T5EncoderModel) -> None:
    """Let the heads begin with the word before, the one after, all before and all after.

    T5 knows the order of words by its relative biases alone. From the stock start, which is almost
    flat, a small one settles on content and stays there: it reads a caption as a bag of words.
    """
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [32, 4]
    after = len(bias) // 2  # the buckets of earlier words come first, each at its distance
    for head, buckets in enumerate(
        (slice(1, 2), slice(after + 1, after + 2), slice(1, after), slice(after + 1, None))
    ):
        bias[buckets, head] += _LOOK_AROUND


def build_sd3() -> SD3Transformer2DModel:
    """Return an untrained SD3.5-style transformer: 5 layers of width 192, 6.6 M parameters."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=192,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=2 * LATENT_SIZE,
        qk_norm="rms_norm",
    )


def assemble_sd3(transformer: SD3Transformer2DModel, parts: Path) -> StableDiffusion3Pipeline:
    """Return the stock SD3 pipeline of ``transformer`` and the trained parts in a folder.

    Args:
        transformer: a trained network of ``build_sd3``.
        parts: folder that holds ``vae``, ``text_encoder`` and ``text_encoder_3``.
    """
    encoder = CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder")
    tokenizer = build_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel.from_pretrained(parts / "text_encoder_3"),
        tokenizer_3=build_t5_tokenizer(),
    )


def build_sdxl() -> UNet2DConditionModel:
    """Return an untrained UNet in SDXL's layout, 3.7 M parameters."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 128),
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=4,  # the number of heads, under the name that SDXL has for it
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 32,
    )


def sdxl_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's own noise schedule."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


def build_flux() -> FluxTransformer2DModel:
    """Return an untrained FLUX.1-dev-style transformer: guidance embedding, 3.6 M parameters."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=7,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 16, 16),
    )


def _plain_clip(parts: Path) -> CLIPTextModel:
    """Return the text encoder without its projection, which SDXL's first and FLUX's have not."""
    trained = CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder")
    plain = CLIPTextModel(trained.config)
    plain.load_state_dict(trained.text_model.state_dict(), strict=True)
    return plain


def assemble_sdxl(unet: UNet2DConditionModel, parts: Path) -> StableDiffusionXLPipeline:
    """Return the stock SDXL pipeline of ``unet`` and the trained parts in a folder.

    Args:
        unet: a trained network of ``build_sdxl``.
        parts: folder that holds ``vae`` and ``text_encoder``.
    """
    tokenizer = build_tokenizer()
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=sdxl_scheduler(),
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=_plain_clip(parts),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder"),
        tokenizer_2=tokenizer,
        force_zeros_for_empty_prompt=False,  # trained with the empty caption
        add_watermarker=False,
    )


def assemble_flux(transformer: FluxTransformer2DModel, parts: Path) -> FluxPipeline:
    """Return the stock FLUX pipeline of ``transformer`` and the trained parts in a folder.

    Args:
        transformer: a trained network of ``build_flux``.
        parts: folder that holds ``vae``, ``text_encoder`` and ``text_encoder_3``.
    """
    return FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT),
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=_plain_clip(parts),
        tokenizer=build_tokenizer(),
        text_encoder_2=T5EncoderModel.from_pretrained(parts / "text_encoder_3"),
        tokenizer_2=build_t5_tokenizer(),
    )
