"""Stock pipelines in miniature, each with what its call needs: what `attach` is tried on.

Two images of 8 x 8 latents (video: two frames), and a negative prompt that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

from core2_sampler.testing import parts
from core2_sampler.testing.parts import WIDTH, Arguments
from core2_sampler.testing.pipelines import ready, seeded

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
        with seeded(seed):
            pipe = getattr(diffusers, self.name)(**self.parts())
        return ready(pipe)

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
        with seeded(0):  # some loops encode images with the global generator
            return pipe(**{**call, **self.arguments(), **options})[0]


def _texts(**extra: Any) -> Callable[[], Arguments]:
    """Return arguments of texts; an image or mask is drawn anew at each call."""
    return lambda: {**_TEXTS, **{k: v() if callable(v) else v for k, v in extra.items()}}


def _embeds(mask: str | None = None, **extra: Any) -> Callable[[], Arguments]:
    """Return arguments of embeddings, and of masks under the name ``mask``."""

    def arguments() -> Arguments:
        generator = torch.Generator().manual_seed(5)
        embeds = 3 * torch.randn(2, 2, 8, WIDTH, generator=generator)
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
        TinyStock("StableDiffusionPipeline", parts.sd, _texts()),
        TinyStock("StableDiffusionImg2ImgPipeline", parts.sd, _texts(**_IMAGE), steps=4),
        TinyStock(
            "StableDiffusionControlNetPipeline",
            partial(parts.with_controlnet, parts.sd),
            _texts(image=_image),
        ),
        TinyStock("StableDiffusionXLPipeline", parts.sdxl, _texts()),
        TinyStock("StableDiffusionXLImg2ImgPipeline", parts.sdxl, _texts(**_IMAGE), steps=4),
        TinyStock(
            "StableDiffusionXLInpaintPipeline", parts.sdxl, _texts(**_INPAINT, **_SMALL), steps=4
        ),
        TinyStock(
            "StableDiffusionXLControlNetPipeline",
            partial(parts.with_controlnet, parts.sdxl),
            _texts(image=_image),
        ),
        TinyStock("StableDiffusion3Pipeline", parts.sd3, _texts(**_SHORT)),
        TinyStock(
            "StableDiffusion3Img2ImgPipeline", parts.sd3, _texts(**_IMAGE, **_SHORT), steps=4
        ),
        TinyStock(
            "StableDiffusion3InpaintPipeline",
            parts.sd3_of_16_channels,
            _texts(**_INPAINT, **_SHORT, **_SMALL),
            steps=4,
        ),
        TinyStock(
            "StableDiffusion3ControlNetPipeline",
            parts.sd3_controlnet,
            _texts(control_image=_image, **_SHORT, **_SMALL),
        ),
        TinyStock("FluxPipeline", parts.flux, _texts(**_SHORT, **_SMALL), "true_cfg_scale"),
        TinyStock(
            "FluxImg2ImgPipeline",
            parts.flux,
            _texts(**_IMAGE, **_SHORT, **_SMALL),
            "true_cfg_scale",
            steps=4,
        ),
        TinyStock(
            "FluxInpaintPipeline",
            parts.flux,
            _texts(**_INPAINT, **_SHORT, **_SMALL),
            "true_cfg_scale",
            steps=4,
        ),
        TinyStock(
            "FluxControlNetPipeline",
            parts.flux_controlnet,
            _texts(control_image=_image, **_SHORT, **_SMALL),
            "true_cfg_scale",
        ),
        TinyStock(
            "FluxKontextPipeline",
            parts.flux,
            _texts(image=_image, _auto_resize=False, max_area=256, **_SHORT, **_SMALL),
            "true_cfg_scale",
        ),
        TinyStock(
            "PixArtSigmaPipeline",
            partial(parts.bare, "PixArtTransformer2DModel", parts.DDIM),
            _embeds(
                "prompt_attention_mask",
                negative_prompt=None,
                use_resolution_binning=False,
                **_SIZED,
            ),
        ),
        TinyStock(
            "SanaPipeline",
            partial(parts.bare, "SanaTransformer2DModel", parts.FLOW_DPM),
            _embeds(
                "prompt_attention_mask",
                negative_prompt=None,
                use_resolution_binning=False,
                height=256,
                width=256,
            ),
        ),
        TinyStock("AuraFlowPipeline", parts.aura_flow, _embeds("prompt_attention_mask", **_SIZED)),
        TinyStock(
            "CogView4Pipeline",
            partial(parts.bare, "CogView4Transformer2DModel", parts.FLOW_BY_SIZE),
            _embeds(**_SIZED),
        ),
        TinyStock(
            "Lumina2Pipeline",
            partial(parts.bare, "Lumina2Transformer2DModel"),
            _embeds("prompt_attention_mask", **_SIZED),
        ),
        TinyStock(
            "ChromaPipeline",
            partial(parts.bare, "ChromaTransformer2DModel"),
            _embeds("prompt_attention_mask", **_SIZED),
        ),
        TinyStock(
            "QwenImagePipeline",
            partial(parts.bare, "QwenImageTransformer2DModel"),
            _embeds(**_SIZED),
            "true_cfg_scale",
        ),
        TinyStock(
            "WanPipeline",
            partial(parts.bare, "WanTransformer3DModel"),
            _embeds(num_frames=5, **_SIZED),
        ),
        TinyStock(
            "LTXPipeline",
            partial(parts.bare, "LTXVideoTransformer3DModel"),
            _embeds("prompt_attention_mask", num_frames=9, height=256, width=256),
        ),
        TinyStock("ZImagePipeline", parts.z_image, _lists(**_SMALL), unguided=0.0),
        TinyStock(
            "ZImageImg2ImgPipeline",
            parts.z_image,
            _lists(**_IMAGE, **_SMALL),
            unguided=0.0,
            steps=4,
        ),
    )
}
"""The pipelines by name."""
