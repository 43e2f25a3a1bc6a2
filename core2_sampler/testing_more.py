"""Stock pipelines in miniature, each with what its call needs: what `attach` is tried on.

All are random and of diffusers' real classes. Where a text encoder would not be cheap the call gets
embeddings. Two images of 8 x 8 latents (video: two frames), and a negative prompt that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel

from core2_sampler import testing

Arguments = dict[str, Any]

_WIDTH = 16
"""Of the embeddings in the place of a text encoder's."""

_TEXTS = {
    "prompt": ["a red circle", "two blue rings"],
    "negative_prompt": ["dark", "dim"],
}


@dataclass(frozen=True, slots=True)
class TinyStock:
    """A stock pipeline class in miniature.

    Attributes:
        name: of the class in diffusers.
        parts: makes its components.
        arguments: what its call needs, but for guidance scale, steps and generator.
        scale: the call's argument that is the scale of classifier-free guidance.
        unguided: the value of it that turns guidance off.
        steps: inference steps to ask for; 3 are made.
    """

    name: str
    parts: Callable[[], Arguments]
    arguments: Callable[[], Arguments]
    scale: str = "guidance_scale"
    unguided: float = 1.0
    steps: int = 3

    def pipe(self, seed: int = 0) -> Any:
        """Build the pipeline, on the CPU in float32, without a progress bar."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = getattr(diffusers, self.name)(**self.parts())
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.eval()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def network(self, pipe: Any) -> Any:
        """Return the pipeline's denoiser."""
        return pipe.unet if "unet" in pipe.components else pipe.transformer

    def sample(self, pipe: Any, scale: float = 4.0, **options: Any) -> Tensor:
        """Return the final latents of a call.

        Args:
            pipe: of `pipe`.
            scale: classifier-free guidance, as the call counts it.
            **options: further arguments of the call, or others than usual.
        """
        call = {
            "num_inference_steps": self.steps,
            "output_type": "latent",
            "generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)],
            self.scale: scale,
            "return_dict": False,
        }
        with torch.random.fork_rng(devices=[]):  # some loops encode images with the global one
            torch.manual_seed(0)
            return pipe(**{**call, **self.arguments(), **options})[0]


def _sdxl(**extra: Any) -> Arguments:
    return {**_components(testing.tiny_sdxl_pipeline()), "add_watermarker": False, **extra}


def _sdxl_controlnet() -> Arguments:
    parts = _sdxl()
    return {**parts, "controlnet": _controlnet(parts["unet"])}


def _sd() -> Arguments:
    sdxl = testing.tiny_sdxl_pipeline()
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=_WIDTH,
    )
    return {
        "vae": sdxl.vae,
        "text_encoder": CLIPTextModel(sdxl.text_encoder.config),
        "tokenizer": sdxl.tokenizer,
        "unet": unet,
        "scheduler": diffusers.DDIMScheduler(**testing.SDXL_SCHEDULER, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sd_controlnet() -> Arguments:
    parts = _sd()
    return {**parts, "controlnet": _controlnet(parts["unet"])}


def _controlnet(unet: Any) -> Any:
    return _loud(
        diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    )


def _sd3() -> Arguments:
    return _components(testing.tiny_sd3_pipeline())


def _sd3_of_16_channels() -> Arguments:
    """Return parts of the one number of channels that the inpainting pipeline takes."""
    parts, channels = _sd3(), {"in_channels": 16, "out_channels": 16}
    transformer, vae = parts["transformer"], parts["vae"]
    return {
        **parts,
        "transformer": type(transformer).from_config({**transformer.config, **channels}),
        "vae": type(vae).from_config({**vae.config, "latent_channels": 16}),
    }


def _sd3_controlnet() -> Arguments:
    parts = _sd3()
    net = diffusers.SD3ControlNetModel.from_transformer(
        parts["transformer"], num_layers=1, num_extra_conditioning_channels=0
    )
    with torch.no_grad():  # the loop draws another control image for each prompt: give it no choice
        moments = parts["vae"].encoder.conv_out
        moments.weight.chunk(2)[1].zero_()
        moments.bias.chunk(2)[1].fill_(-30)
    return {**parts, "controlnet": _loud(net)}


def _flux() -> Arguments:
    return _components(testing.tiny_flux_pipeline())


def _flux_controlnet() -> Arguments:
    parts = _flux()
    net = diffusers.FluxControlNetModel.from_transformer(
        parts["transformer"],
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
    )
    return {**parts, "controlnet": _loud(net)}


def _pixart() -> Arguments:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=_WIDTH,
        use_additional_conditions=False,
    )
    return _bare(transformer, diffusers.DDIMScheduler(**testing.SDXL_SCHEDULER, clip_sample=False))


def _sana() -> Arguments:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=_WIDTH,
        sample_size=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return _bare(transformer, scheduler)


def _aura_flow() -> Arguments:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    with torch.no_grad():  # a random network hardly hears its prompt
        for name, parameter in transformer.named_parameters():
            if "add_" in name or "context" in name or "to_" in name:
                parameter.mul_(8)
    return _bare(transformer)


def _cogview4() -> Arguments:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=_WIDTH,
        time_embed_dim=16,
        condition_dim=8,
        rope_axes_dim=(8, 8),
        sample_size=8,
    )
    return _bare(transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))


def _lumina2() -> Arguments:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(64, 32, 32),
        cap_feat_dim=_WIDTH,
    )
    return _bare(transformer)


def _chroma() -> Arguments:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return _bare(transformer)


def _qwen() -> Arguments:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    return _bare(transformer)


def _wan() -> Arguments:
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=_WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    return _bare(transformer)


def _ltx() -> Arguments:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=_WIDTH,
    )
    return _bare(transformer)


def _z_image() -> Arguments:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=_WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # both are made without values
        transformer.x_pad_token.zero_()
        transformer.cap_pad_token.zero_()
    return {**_bare(transformer), "vae": testing.tiny_sd3_pipeline().vae}


def _bare(transformer: Any, scheduler: Any = None) -> Arguments:
    """Return the components of a pipeline that is given embeddings and returns latents."""
    return {
        "transformer": transformer,
        "scheduler": scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": None,
        "text_encoder": None,
        "tokenizer": None,
    }


def _components(pipe: Any) -> Arguments:
    return {name: part for name, part in pipe.components.items() if name != "weak_head"}


def _loud(controlnet: nn.Module) -> nn.Module:
    """Let a ControlNet, which starts at zero, act."""
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return controlnet


def _texts(**extra: Any) -> Callable[[], Arguments]:
    """Return arguments of texts; an image or mask is drawn anew at each call."""
    return lambda: {**_TEXTS, **{k: v() if callable(v) else v for k, v in extra.items()}}


def _embeds(mask: str | None = None, **extra: Any) -> Callable[[], Arguments]:
    """Return arguments of embeddings, and of masks under the name ``mask``."""

    def arguments() -> Arguments:
        generator = torch.Generator().manual_seed(5)
        embeds = 3 * torch.randn(2, 2, 8, _WIDTH, generator=generator)
        found = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        if mask is not None:
            ones = torch.ones(2, 8, dtype=torch.bool)
            found |= {mask: ones, f"negative_{mask}": ones.clone()}
        return {**found, **extra}

    return arguments


def _lists(**extra: Any) -> Callable[[], Arguments]:
    """Return `_embeds` as lists of one tensor for each image."""

    def arguments() -> Arguments:
        images = {k: v() if callable(v) else v for k, v in extra.items()}
        return {name: list(rows) for name, rows in _embeds()().items()} | images

    return arguments


def _image() -> Image.Image:
    ramp = torch.arange(256, dtype=torch.uint8).view(16, 16)
    return Image.fromarray(torch.stack([ramp, ramp.T, 255 - ramp], 2).numpy())


def _half_white() -> Image.Image:
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (0, 0, 8, 16))
    return mask


def _images() -> list[Image.Image]:
    return [_image(), _image().rotate(90)]


_IMAGE: Arguments = {"image": _images, "strength": 0.75}
_INPAINT: Arguments = {"image": _image, "mask_image": _half_white, "strength": 0.75}
_SMALL: Arguments = {"height": 16, "width": 16}
_SIZED: Arguments = {"height": 64, "width": 64}
_SHORT: Arguments = {"max_sequence_length": 8}

STOCK = {
    stock.name: stock
    for stock in (
        TinyStock("StableDiffusionPipeline", _sd, _texts()),
        TinyStock("StableDiffusionImg2ImgPipeline", _sd, _texts(**_IMAGE), steps=4),
        TinyStock("StableDiffusionControlNetPipeline", _sd_controlnet, _texts(image=_image)),
        TinyStock("StableDiffusionXLPipeline", _sdxl, _texts()),
        TinyStock("StableDiffusionXLImg2ImgPipeline", _sdxl, _texts(**_IMAGE), steps=4),
        TinyStock("StableDiffusionXLInpaintPipeline", _sdxl, _texts(**_INPAINT, **_SMALL), steps=4),
        TinyStock("StableDiffusionXLControlNetPipeline", _sdxl_controlnet, _texts(image=_image)),
        TinyStock("StableDiffusion3Pipeline", _sd3, _texts(**_SHORT)),
        TinyStock("StableDiffusion3Img2ImgPipeline", _sd3, _texts(**_IMAGE, **_SHORT), steps=4),
        TinyStock(
            "StableDiffusion3InpaintPipeline",
            _sd3_of_16_channels,
            _texts(**_INPAINT, **_SHORT, **_SMALL),
            steps=4,
        ),
        TinyStock(
            "StableDiffusion3ControlNetPipeline",
            _sd3_controlnet,
            _texts(control_image=_image, **_SHORT, **_SMALL),
        ),
        TinyStock("FluxPipeline", _flux, _texts(**_SHORT, **_SMALL), "true_cfg_scale"),
        TinyStock(
            "FluxImg2ImgPipeline",
            _flux,
            _texts(**_IMAGE, **_SHORT, **_SMALL),
            "true_cfg_scale",
            steps=4,
        ),
        TinyStock(
            "FluxInpaintPipeline",
            _flux,
            _texts(**_INPAINT, **_SHORT, **_SMALL),
            "true_cfg_scale",
            steps=4,
        ),
        TinyStock(
            "FluxControlNetPipeline",
            _flux_controlnet,
            _texts(control_image=_image, **_SHORT, **_SMALL),
            "true_cfg_scale",
        ),
        TinyStock(
            "FluxKontextPipeline",
            _flux,
            _texts(image=_image, _auto_resize=False, max_area=256, **_SHORT, **_SMALL),
            "true_cfg_scale",
        ),
        TinyStock(
            "PixArtSigmaPipeline",
            _pixart,
            _embeds(
                "prompt_attention_mask",
                negative_prompt=None,
                use_resolution_binning=False,
                **_SIZED,
            ),
        ),
        TinyStock(
            "SanaPipeline",
            _sana,
            _embeds(
                "prompt_attention_mask",
                negative_prompt=None,
                use_resolution_binning=False,
                height=256,
                width=256,
            ),
        ),
        TinyStock("AuraFlowPipeline", _aura_flow, _embeds("prompt_attention_mask", **_SIZED)),
        TinyStock("CogView4Pipeline", _cogview4, _embeds(**_SIZED)),
        TinyStock("Lumina2Pipeline", _lumina2, _embeds("prompt_attention_mask", **_SIZED)),
        TinyStock("ChromaPipeline", _chroma, _embeds("prompt_attention_mask", **_SIZED)),
        TinyStock("QwenImagePipeline", _qwen, _embeds(**_SIZED), "true_cfg_scale"),
        TinyStock("WanPipeline", _wan, _embeds(num_frames=5, **_SIZED)),
        TinyStock(
            "LTXPipeline",
            _ltx,
            _embeds("prompt_attention_mask", num_frames=9, height=256, width=256),
        ),
        TinyStock("ZImagePipeline", _z_image, _lists(**_SMALL), unguided=0.0),
        TinyStock(
            "ZImageImg2ImgPipeline",
            _z_image,
            _lists(**_IMAGE, **_SMALL),
            unguided=0.0,
            steps=4,
        ),
    )
}
"""The pipelines by name."""
