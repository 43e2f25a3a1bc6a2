"""Stable Diffusion XL: an eps or v network, sampled in variance-exploding coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn
from torch.nn import functional as F

from core2_sampler.guidance import Prompts
from core2_sampler.pipelines.adapters.base import Schedule, capture_input, draw_noise_of_size
from core2_sampler.pipelines.adapters.discrete import Clock, discrete_schedule, eps_from_v
from core2_sampler.precision import wide
from core2_sampler.types import Conditioning

_FEATURE_PATCH = 2
"""Side of the square of hidden pixels that makes one token, as a transformer's patch does."""


@dataclass(slots=True)
class SDXLDenoiser:
    """A ``UNet2DConditionModel`` in the SDXL layout (or one wrapped by ``torch.compile``).

    ``x = x0 + sigma * noise`` and ``d`` is the predicted noise; the network itself sees
    ``x / sqrt(1 + sigma**2)`` and a timestep. ``Conditioning.pooled`` is its ``text_embeds``;
    ``extra`` may hold ``time_ids`` [B, 6] (else the size of the latents, uncropped),
    ``image_embeds`` and ``timestep_cond``.

    Attributes:
        module: the network.
        clock: from noise levels to timesteps.
        prediction_type: ``epsilon`` or ``v_prediction``.
        pixels: of the image, to one latent.
        cross_attention_kwargs: handed to the network untouched.
        family: ``"sdxl"``.
    """

    module: nn.Module
    clock: Clock
    prediction_type: str = "epsilon"
    pixels: int = 8
    cross_attention_kwargs: Mapping[str, Any] | None = None
    family: str = "sdxl"

    @property
    def latent_channels(self) -> int:
        """Channels of ``x``."""
        return cast(Any, self.module).config.in_channels

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return ``d`` [B, C, H, W] for latents ``x`` [B, C, H, W] at ``sigma`` [B]."""
        extra = dict(conditioning.extra)
        time_ids = extra.pop("time_ids", None)
        added = {
            "text_embeds": conditioning.pooled,
            "time_ids": self._size_ids(x, conditioning.pooled) if time_ids is None else time_ids,
        }
        if "image_embeds" in extra:
            added["image_embeds"] = extra.pop("image_embeds")
        level = sigma[:, None, None, None]
        output = self.module(
            (wide(x) * (1 + level**2).rsqrt()).to(conditioning.prompt_embeds.dtype),
            self.clock.timestep(sigma),
            encoder_hidden_states=conditioning.prompt_embeds,
            cross_attention_kwargs=self.cross_attention_kwargs,
            added_cond_kwargs=added,
            return_dict=False,
            **extra,
        )[0]
        return output if self.prediction_type == "epsilon" else eps_from_v(output, x, level)

    @contextmanager
    def capture_features(self) -> Iterator[Callable[[], Tensor]]:
        """Record the input of the last convolution as tokens, [B, H/2 * W/2, 4 * width]."""
        with capture_input(self.module.get_submodule("conv_out")) as read:

            def tokens() -> Tensor:
                hidden = read()  # [B, width, H, W]
                if hidden.shape[2] % _FEATURE_PATCH or hidden.shape[3] % _FEATURE_PATCH:
                    raise ValueError(
                        "latents must have even sides for a head that reads features, got "
                        f"{tuple(hidden.shape[2:])}: use a height and width that are multiples of "
                        f"{_FEATURE_PATCH * self.pixels} px"
                    )
                return F.pixel_unshuffle(hidden, _FEATURE_PATCH).flatten(2).mT

            yield tokens

    def _size_ids(self, x: Tensor, like: Tensor) -> Tensor:
        height, width = (side * self.pixels for side in x.shape[2:])
        return like.new_tensor([[height, width, 0, 0, height, width]]).expand(x.shape[0], -1)


class SDXLFamily:
    """Stable Diffusion XL as a `Family`."""

    name = "sdxl"
    scale_argument = "guidance_scale"

    def denoiser(self, pipe: Any) -> SDXLDenoiser:
        """Return the denoiser of a ``StableDiffusionXLPipeline``; its scheduler's grid is exact."""
        return SDXLDenoiser(
            pipe.unet,
            Clock.of(pipe.scheduler, pipe._execution_device),
            pipe.scheduler.config.prediction_type,
            pipe.vae_scale_factor,
        )

    @torch.no_grad()
    def encode(
        self, pipe: Any, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None
    ) -> Prompts:
        """Encode prompts as the pipeline's own call does.

        Args:
            pipe: a ``StableDiffusionXLPipeline``.
            prompts: B prompts.
            negative_prompts: B negative prompts; None is what the pipeline's config says: zeros,
                or the empty prompt.

        Returns:
            ``(cond, uncond)``, B rows each.
        """
        embeds, negative_embeds, pooled, negative_pooled = pipe.encode_prompt(
            prompt=list(prompts),
            negative_prompt=None if negative_prompts is None else list(negative_prompts),
            do_classifier_free_guidance=True,
            device=pipe._execution_device,
        )
        return Conditioning(embeds, pooled), Conditioning(negative_embeds, negative_pooled)

    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents at the model's own size."""
        size = pipe.default_sample_size
        return pipe.unet.config.in_channels, size, size

    def noise(
        self,
        pipe: Any,
        generators: Sequence[torch.Generator],
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Draw the initial latents that the stock call would draw, one generator an image."""
        return draw_noise_of_size(pipe, pipe.unet, generators, height, width)

    def schedule(
        self,
        pipe: Any,
        num_steps: int | None,
        latent_size: tuple[int, int],
        *,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        eta: float = 0.0,
    ) -> Schedule:
        """Set the scheduler's grid as the stock call does.

        Args:
            pipe: a ``StableDiffusionXLPipeline``.
            num_steps: inference steps.
            latent_size: height and width of the latents; the grid does not depend on them.
            timesteps: timesteps of one's own, descending.
            sigmas: noise levels of one's own, descending, with the final one.
            denoising_end: share of the noise schedule after which to stop, above 0 and below 1.
            eta: noise of the DDIM step; 0 is deterministic.

        Returns:
            The schedule; in closed form for Euler, for DDIM without noise, and for
            DPM-Solver++(2M) with the settings that this is.

        Raises:
            ValueError: the network's prediction or the scheduler's noise levels have no meaning
                in variance-exploding coordinates.
        """
        return discrete_schedule(
            pipe,
            num_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            denoising_end=denoising_end,
            eta=eta,
        )

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Return images [B, 3, H, W] in [-1, 1]; in float32 where the VAE fails in float16.

        There the convolutions are in bfloat16 if ``core2_compile(vae_bf16=True)`` says so.
        """
        vae = pipe.vae
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        if upcast:
            vae.to(torch.float32)
            latents = latents.to(torch.float32)
        mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
        scaling = vae.config.scaling_factor
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (mean, std))
            latents = latents * std / scaling + mean
        else:
            latents = latents / scaling
        latents = latents.to(get_module_execution_device(vae))
        half = upcast and getattr(pipe, "_core2_vae_bf16", False)
        with torch.autocast(latents.device.type, torch.bfloat16) if half else nullcontext():
            image = vae.decode(latents, return_dict=False)[0]
        if upcast:
            vae.to(torch.float16)
            image = image.float()
        return image
