"""FLUX.1: a velocity network on packed latents, its guidance distilled into an embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, FluxPipeline
from diffusers.hooks import SeaCacheConfig
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn

from core2_sampler.guidance import Prompts
from core2_sampler.pipelines.adapters.base import Schedule, capture_input, draw_noise
from core2_sampler.pipelines.adapters.flow import flow_schedule, shift_of_size
from core2_sampler.pipelines.adapters.packing import pack, square_size, unpack
from core2_sampler.steps import Plan
from core2_sampler.types import Conditioning

STOCK_GUIDANCE = 3.5
"""The guidance that the stock call embeds unless it is told another."""

_STOCK_MAX_SHIFT = 1.15


def with_guidance(
    module: nn.Module,
    prompt_embeds: Tensor,
    pooled: Tensor,
    guidance_scale: float,
    extra: Mapping[str, Any] | None = None,
) -> Conditioning:
    """Return a prompt together with the guidance to embed, where the network embeds any.

    Args:
        module: the network.
        prompt_embeds: of T5, [B, T, D].
        pooled: of CLIP, [B, P].
        guidance_scale: that the network was distilled at.
        extra: further keyword arguments of the network.
    """
    arguments = dict(extra or {})
    if cast(Any, module).config.guidance_embeds:
        arguments["guidance"] = torch.full(
            (len(prompt_embeds),), guidance_scale, dtype=torch.float32, device=prompt_embeds.device
        )
    return Conditioning(prompt_embeds, pooled, arguments)


def check_cache(module: nn.Module, plan: Plan) -> None:
    """Refuse a cache between steps (``enable_cache``) that the plan's passes would confuse.

    A CFG pair is one pass of 2B rows here, so a cache that counts passes or keeps one state for
    all of them fails in a plan that has pairs. First-block caching compares before it reuses, and
    keeps apart what `FluxDenoiser` names apart; but it cannot see an in-model head go on and off.
    Zigzag steps go back and forth between noise levels, which no cache expects. FasterCache makes
    up the negative half of a batch that is not here, and SeaCache must be told steps by number.

    Args:
        module: the network.
        plan: of the run to come.

    Raises:
        ValueError: see above.
    """
    config = getattr(module, "_cache_config", None)
    if config is not None and plan.zigs:
        raise ValueError(
            "the transformer's cache must be off for zigzag steps, got "
            f"{type(config).__name__}: call disable_cache(), or use another mode"
        )
    faster = isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled
    if faster or isinstance(config, SeaCacheConfig):
        raise ValueError(
            "the transformer's cache must be one that knows passes by their rows alone, got "
            f"{type(config).__name__}: call disable_cache(), or use FirstBlockCacheConfig"
        )
    kinds = plan.kinds
    one_pass_a_step = kinds in ({"cond"}, {"fast"})
    first_block = isinstance(config, FirstBlockCacheConfig) and not (
        plan.needs_head and plan.in_model
    )
    if config is None or one_pass_a_step or first_block:
        return
    raise ValueError(
        f"the transformer's cache must be first-block caching, or off, for steps of kind "
        f"{', '.join(sorted(kinds))}, got {type(config).__name__}: call disable_cache(), or use "
        "core2='fast'"
    )


@dataclass(slots=True)
class FluxDenoiser:
    """A ``FluxTransformer2DModel`` (or one wrapped by ``torch.compile``) as a `Denoiser`.

    The network predicts the velocity ``dx/dsigma`` itself. Packing stays in here.

    Attributes:
        module: the network.
        num_train_timesteps: of the scheduler it was trained with.
        family: ``"flux"``.
    """

    module: nn.Module
    num_train_timesteps: int = 1000
    family: str = "flux"
    _positions: tuple[Any, Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def latent_channels(self) -> int:
        """Channels of ``x``."""
        return cast(Any, self.module).config.in_channels // 4

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return ``d`` [B, C, H, W] for latents ``x`` [B, C, H, W] at ``sigma`` [B].

        The guidance to embed is ``conditioning.extra["guidance"]`` [B], or the stock call's.
        """
        module, embeds = cast(Any, self.module), conditioning.prompt_embeds
        text_ids, image_ids = self._ids(embeds, x.shape[-2], x.shape[-1])
        prompt = self._guided(conditioning)
        # A cache must not mix passes of other rows: what it keeps of B rows is wrong for 2B.
        with module.cache_context(f"{len(x)} rows"):
            tokens = module(
                hidden_states=pack(x.to(embeds.dtype)),
                timestep=self._timestep(sigma, embeds.dtype),
                pooled_projections=prompt.pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
                **prompt.extra,
            )[0]
        return unpack(tokens, (x.shape[-2], x.shape[-1]))

    def embed_time(self, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the embedding that modulates every block, [B, width], at ``sigma`` [B]."""
        module, dtype = cast(Any, self.module), conditioning.prompt_embeds.dtype
        prompt, inputs = self._guided(conditioning), [self._timestep(sigma, dtype)]
        if "guidance" in prompt.extra:
            inputs.append(prompt.extra["guidance"].to(dtype))
        # As the network's own forward, which is told a thousandth of what it embeds.
        return module.time_text_embed(*(1000 * each for each in inputs), prompt.pooled)

    def _timestep(self, sigma: Tensor, dtype: torch.dtype) -> Tensor:
        # The stock call rounds the timestep to the latents' dtype before it divides.
        return (sigma * self.num_train_timesteps).to(dtype) / 1000

    def _guided(self, prompt: Conditioning) -> Conditioning:
        if not cast(Any, self.module).config.guidance_embeds or "guidance" in prompt.extra:
            return prompt
        embeds, pooled, extra = prompt.prompt_embeds, prompt.pooled, prompt.extra
        return with_guidance(self.module, embeds, pooled, STOCK_GUIDANCE, extra)

    def capture_features(self) -> AbstractContextManager[Callable[[], Tensor]]:
        """Record the input of the last linear layer: image tokens, [B, H/2 * W/2, width]."""
        return capture_input(self.module.get_submodule("proj_out"))

    def _ids(self, embeds: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the positions of text and image tokens; made once, so that no step copies."""
        key = (embeds.shape[1], height, width, embeds.device, embeds.dtype)
        if self._positions is None or self._positions[0] != key:
            text = torch.zeros(embeds.shape[1], 3, device=embeds.device, dtype=embeds.dtype)
            image = FluxPipeline._prepare_latent_image_ids(
                1, height // 2, width // 2, embeds.device, embeds.dtype
            )
            self._positions = (key, text, image)
        return self._positions[1:]


class FluxFamily:
    """FLUX.1 as a `Family`."""

    name = "flux"
    scale_argument = "true_cfg_scale"

    def denoiser(self, pipe: Any) -> FluxDenoiser:
        """Return the denoiser of a ``FluxPipeline``."""
        return FluxDenoiser(pipe.transformer, pipe.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def encode(
        self,
        pipe: Any,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        max_sequence_length: int = 512,
        guidance_scale: float = STOCK_GUIDANCE,
        weak_guidance: float | None = None,
    ) -> Prompts:
        """Encode prompts as the pipeline's own call does.

        Args:
            pipe: a ``FluxPipeline``.
            prompts: B prompts.
            negative_prompts: B negative prompts; None is the empty prompt.
            max_sequence_length: T5 tokens.
            guidance_scale: guidance to embed, in both sides.
            weak_guidance: makes uncond the prompt itself at this guidance instead of the negative
                prompt, see `CoRe2FluxPipeline`.

        Returns:
            ``(cond, uncond)``, B rows each.
        """

        def side(texts: Sequence[str], guidance: float) -> Conditioning:
            embeds, pooled, _ = pipe.encode_prompt(
                prompt=list(texts), prompt_2=None, max_sequence_length=max_sequence_length
            )
            return with_guidance(pipe.transformer, embeds, pooled, guidance)

        cond = side(prompts, guidance_scale)
        if weak_guidance is not None:
            embeds, pooled = cond.prompt_embeds, cond.pooled
            return cond, with_guidance(pipe.transformer, embeds, pooled, weak_guidance)
        negative = [""] * len(prompts) if negative_prompts is None else negative_prompts
        return cond, side(negative, guidance_scale)

    def latent_shape(self, pipe: Any) -> tuple[int, int, int]:
        """Return (C, H, W) of ``x`` at the size of the VAE's images: the network names no size."""
        default = pipe.default_sample_size * pipe.vae_scale_factor
        pixels = pipe.vae.config.get("sample_size", default)
        side = 2 * (pixels // (2 * pipe.vae_scale_factor))
        return pipe.transformer.config.in_channels // 4, side, side

    def noise(
        self,
        pipe: Any,
        generators: Sequence[torch.Generator],
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Draw the packed initial latents that the stock call would draw, one generator each."""
        channels, *size = self.latent_shape(pipe)
        sides = [
            2 * (pixels // (2 * pipe.vae_scale_factor)) if pixels else side
            for pixels, side in zip((height, width), size, strict=True)
        ]
        return pack(draw_noise(pipe, generators, (channels, *sides), pipe.transformer.dtype))

    def schedule(
        self,
        pipe: Any,
        num_steps: int,
        latent_size: tuple[int, int],
        *,
        sigmas: list[float] | None = None,
    ) -> Schedule:
        """Set the scheduler's grid as the stock call does, dynamic shifting included.

        Args:
            pipe: a ``FluxPipeline``.
            num_steps: inference steps N.
            latent_size: height and width of ``x``.
            sigmas: a grid of one's own, descending, without the final 0; as in the stock call not
                for a scheduler with ``use_flow_sigmas``.

        Returns:
            The schedule; in closed form where the scheduler is flow-match Euler.
        """
        config = pipe.scheduler.config
        if config.get("use_flow_sigmas", False):
            sigmas = None
        elif sigmas is None:
            sigmas = np.linspace(1.0, 1 / num_steps, num_steps).tolist()
        tokens = (latent_size[0] // 2) * (latent_size[1] // 2)
        schedule = flow_schedule(
            pipe,
            num_steps,
            sigmas=sigmas,
            mu=shift_of_size(config, tokens, max_shift=_STOCK_MAX_SHIFT),
            pack=pack,
            unpack=partial(unpack, size=latent_size),
        )
        pipe.scheduler.set_begin_index(0)
        return schedule

    def decode(self, pipe: Any, latents: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return images [B, 3, height, width] in [-1, 1] of final packed latents.

        Args:
            pipe: a ``FluxPipeline``.
            latents: as the stock call returns them, [B, H/2 * W/2, 4C].
            size: (H, W); None is square.
        """
        config = pipe.vae.config
        x = unpack(latents, size or square_size(latents.shape[1]))
        x = (x / config.scaling_factor) + config.shift_factor
        return pipe.vae.decode(x.to(get_module_execution_device(pipe.vae)), return_dict=False)[0]
