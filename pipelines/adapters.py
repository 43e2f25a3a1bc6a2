"""What differs between model families: how to call the network, encode a prompt, make a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    calculate_shift,
    retrieve_timesteps,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from core2_sampler.schedules import sigmas_from_scheduler
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

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return ``d`` [B, C, H, W] for latents ``x`` [B, C, H, W] at ``sigma`` [B]."""
        return self.module(
            hidden_states=x.to(conditioning.prompt_embeds.dtype),
            timestep=sigma * self.num_train_timesteps,
            encoder_hidden_states=conditioning.prompt_embeds,
            pooled_projections=conditioning.pooled,
            return_dict=False,
            **conditioning.extra,
        )[0]

    @contextmanager
    def capture_features(self) -> Iterator[Callable[[], Tensor]]:
        """Record the input of the last linear layer, [B, tokens, width].

        Yields:
            A callable that returns the record of the latest pass.

        Raises:
            RuntimeError: from that callable, if there was no pass yet.
        """
        latest: list[Tensor] = []

        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            latest[:] = inputs[:1]

        def read() -> Tensor:
            if not latest:
                raise RuntimeError("features must be read after a pass of the denoiser, got none")
            return latest[0]

        handle = self.module.get_submodule("proj_out").register_forward_pre_hook(hook)
        try:
            yield read
        finally:
            handle.remove()


def sd3_denoiser(pipe: Any) -> SD3Denoiser:
    """Return the denoiser of a Stable Diffusion 3 pipeline.

    Args:
        pipe: a ``StableDiffusion3Pipeline`` or a subclass.
    """
    return SD3Denoiser(pipe.transformer, pipe.scheduler.config.num_train_timesteps)


@torch.no_grad()
def sd3_encode(
    pipe: Any,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    max_sequence_length: int = 256,
) -> tuple[Conditioning, Conditioning]:
    """Encode prompts as the pipeline's own call does.

    Args:
        pipe: a ``StableDiffusion3Pipeline`` or a subclass.
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


def sd3_latents(
    pipe: Any,
    generators: Sequence[torch.Generator],
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """Draw the initial latents that the pipeline would draw, one generator an image.

    Args:
        pipe: a ``StableDiffusion3Pipeline`` or a subclass.
        generators: one an image, so that an image never depends on its batch-mates.
        height: pixels; None is the model's own size.
        width: pixels; None is the model's own size.

    Returns:
        Noise, [B, C, H, W], in the transformer's dtype on the pipeline's device.
    """
    default = pipe.default_sample_size * pipe.vae_scale_factor
    shape = (
        len(generators),
        pipe.transformer.config.in_channels,
        (height or default) // pipe.vae_scale_factor,
        (width or default) // pipe.vae_scale_factor,
    )
    return randn_tensor(
        shape,
        generator=list(generators),
        device=pipe._execution_device,
        dtype=pipe.transformer.dtype,
    )


def sd3_timesteps(
    pipe: Any,
    num_steps: int | None,
    latent_size: tuple[int, int],
    *,
    sigmas: list[float] | None = None,
    mu: float | None = None,
) -> tuple[Tensor, int]:
    """Set the scheduler's grid as the stock call does, dynamic shifting included.

    Args:
        pipe: a ``StableDiffusion3Pipeline`` or a subclass.
        num_steps: inference steps.
        latent_size: height and width of the latents.
        sigmas: a grid of one's own, descending, without the final 0.
        mu: shift of a scheduler with dynamic shifting; None is that of the latents' size.

    Returns:
        The scheduler's timesteps, and the number of inference steps.
    """
    config = pipe.scheduler.config
    if config.get("use_dynamic_shifting", None) and mu is None:
        patch = pipe.transformer.config.patch_size
        mu = calculate_shift(
            (latent_size[0] // patch) * (latent_size[1] // patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.16),
        )
    shift = {} if mu is None else {"mu": mu}
    device = pipe._execution_device
    return retrieve_timesteps(pipe.scheduler, num_steps, device, sigmas=sigmas, **shift)


def sd3_sigmas(pipe: Any, num_steps: int, latent_size: tuple[int, int]) -> Tensor:
    """Return the noise levels that the pipeline's scheduler gives, [N + 1], float64, on the CPU.

    Args:
        pipe: a ``StableDiffusion3Pipeline`` or a subclass.
        num_steps: number of steps N.
        latent_size: height and width of the latents.
    """
    sd3_timesteps(pipe, num_steps, latent_size)
    return sigmas_from_scheduler(pipe.scheduler)


def has_euler_form(scheduler: Any) -> bool:
    """Say whether the scheduler's update is ``x + (sigma_next - sigma) * d`` and nothing else.

    Args:
        scheduler: a diffusers scheduler.

    Returns:
        True for the stock flow-match Euler scheduler without stochastic sampling; a subclass or
        a replaced ``step`` may do anything, so it is False for those.
    """
    return (
        type(scheduler) is FlowMatchEulerDiscreteScheduler
        and "step" not in vars(scheduler)
        and not scheduler.config.get("stochastic_sampling", False)
        and not scheduler.config.get("invert_sigmas", False)
    )
