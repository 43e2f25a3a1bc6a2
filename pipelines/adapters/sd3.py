"""Stable Diffusion 3 and 3.5: a velocity network on the flow-match path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from core2_sampler.guidance import Prompts
from core2_sampler.pipelines.adapters.base import Schedule, capture_input, draw_noise_of_size
from core2_sampler.pipelines.adapters.flow import flow_schedule, shift_of_size
from core2_sampler.types import Conditioning


@dataclass(slots=True)
class SD3Denoiser:
    """An ``SD3Transformer2DModel`` (or one wrapped by ``torch.compile``) as a `Denoiser`.

    The network predicts the velocity ``dx/dsigma`` itself; its timestep is ``sigma`` times the
    number of training timesteps.

    Attributes:
        module: the network.
        num_train_timesteps: of the scheduler it was trained with.
        family: ``"sd3"``.
    """

    module: nn.Module
    num_train_timesteps: int = 1000
    family: str = "sd3"

    @property
    def latent_channels(self) -> int:
        """Channels of ``x``."""
        return cast(Any, self.module).config.in_channels

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return ``d`` [B, C, H, W] for latents ``x`` [B, C, H, W] at ``sigma`` [B]."""
        return self.module(
            hidden_states=x.to(conditioning.prompt_embeds.dtype),
            timestep=self._timestep(sigma),
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled,
            return_dict=False,
            **conditioning.extra,
        )[0]

    def embed_time(self, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the embedding that modulates every block, [B, width], at ``sigma`` [B]."""
        module = cast(Any, self.module)
        return module.time_text_embed(self._timestep(sigma), conditioning.pooled)

    def _timestep(self, sigma: Tensor) -> Tensor:
        return sigma * self.num_train_timesteps

    def capture_features(self) -> AbstractContextManager[Callable[[], Tensor]]:
        """Record the input of the last linear layer, [B, tokens, width]."""
        return capture_input(self.module.get_submodule("proj_out"))


class SD3Family:
    """Stable Diffusion 3 and 3.5 as a `Family`."""

    name = "sd3"
    scale_argument = "guidance_scale"

    def denoiser(self, pipe: Any) -> SD3Denoiser:
        """Return the denoiser of a ``StableDiffusion3Pipeline``."""
        return SD3Denoiser(pipe.transformer, pipe.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode(
        self,
        pipe: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        max_sequence_length: int = 256,
    ) -> Prompts:
        """Encode prompts as the pipeline's own call does.

        Args:
            pipe: a ``StableDiffusion3Pipeline``.
            prompts: B prompts.
            negative_prompts: B negative prompts; None is the empty prompt.
            max_sequence_length: T5 tokens, also where there is no T5 (zeros then).

        Returns:
            ``(cond, uncond)``, B rows each.
        """
        embeds, negative_embeds, pooled, negative_pooled = pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=None,
            prompt_3=None,
            negative_prompt=None if negative_prompts is None else list(negative_prompts),
            do_classifier_free_guidance=True,
            max_sequence_length=max_sequence_length,
        )
        return Conditioning(embeds, pooled), Conditioning(negative_embeds, negative_pooled)

    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Return (C, H, W) of the latents at the model's own size."""
        size = pipe.default_sample_size
        return pipe.transformer.config.in_channels, size, size

    def noise(
        self,
        pipe: Any,
        generators: Sequence[torch.Generator],
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Draw the initial latents that the stock call would draw, one generator an image."""
        return draw_noise_of_size(pipe, pipe.transformer, generators, height, width)

    def schedule(
        self,
        pipe: Any,
        num_steps: int | None,
        latent_size: tuple[int, int],
        *,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> Schedule:
        """Set the scheduler's grid as the stock call does, dynamic shifting included.

        Args:
            pipe: a ``StableDiffusion3Pipeline``.
            num_steps: inference steps.
            latent_size: height and width of the latents.
            sigmas: a grid of one's own, descending, without the final 0.
            mu: shift of a scheduler with dynamic shifting; None is that of the latents' size.

        Returns:
            The schedule; in closed form where the scheduler is flow-match Euler.
        """
        config = pipe.scheduler.config
        if config.get("use_dynamic_shifting", None) and mu is None:
            patch = pipe.transformer.config.patch_size
            tokens = (latent_size[0] // patch) * (latent_size[1] // patch)
            mu = shift_of_size(config, tokens)
        return flow_schedule(pipe, num_steps, sigmas=sigmas, mu=mu)

    def decode(self, pipe: Any, latents: Tensor) -> Tensor:
        """Return images [B, 3, H, W] in [-1, 1] of final latents."""
        config = pipe.vae.config
        latents = (latents / config.scaling_factor) + config.shift_factor
        return pipe.vae.decode(latents, return_dict=False)[0]
