"""A network as a guider meets it: with the head that was given for it, and a clock."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

from core2_sampler.attachment.checks import check_head, find_head
from core2_sampler.attachment.clock import noise_levels
from core2_sampler.attachment.layouts import GUIDED_LAYOUTS
from core2_sampler.attachment.networks import Network, network_of
from core2_sampler.attachment.run import check_no_faster_cache
from core2_sampler.pipelines.loop import check_head as check_scales
from core2_sampler.plan import Core2Config, Plan
from core2_sampler.weak_heads.base import WeakHead

_SDXL_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Of Stable Diffusion 1.5 and XL alike."""


@dataclass(frozen=True, slots=True)
class GuidedNetwork:
    """A network, its head and what tells its noise levels.

    Attributes:
        network: as the loops of diffusers call it.
        head: the weak head, if any.
        scheduler: of the network's kind; not the one that makes the steps.
    """

    network: Network
    head: WeakHead | None
    scheduler: Any

    def is_of(self, denoiser: nn.Module) -> bool:
        """Say whether this is the network, also where ``torch.compile`` has wrapped it."""
        return self.network.module is unwrap_module(denoiser)

    def check(self, plan: Plan) -> None:
        """Refuse a run that only the network shows to be wrong.

        Args:
            plan: of the run.

        Raises:
            ValueError: a cache is on, or the head does not know a scale of the plan.
        """
        module = self.network.module
        check_no_faster_cache(module)
        config: Any = getattr(module, "_cache_config", None)
        if config is not None:
            raise ValueError(
                "a cache must be off, because modular pipelines do not tell it which prompt a pass "
                f"is of, got {type(config).__name__}: call disable_cache()"
            )
        check_scales(self.head, plan, self.network)  # type: ignore[arg-type]

    def sigma(self, timestep: Tensor) -> float:
        """Return the noise level of a timestep of the loop."""
        scheduler = self.scheduler
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            return float(timestep) / scheduler.config.num_train_timesteps
        scheduler.timesteps = torch.as_tensor(timestep).reshape(1)
        return float(noise_levels(scheduler)[0])


def guided_network(
    denoiser: nn.Module, given_head: Any, config: Core2Config, noise: Any
) -> GuidedNetwork:
    """Meet a network, and find the head that was given for it.

    Args:
        denoiser: the network.
        given_head: as for `core2_sampler.attach`.
        config: how the run spends its passes.
        noise: config of a UNet's scheduler; None is that of Stable Diffusion XL.

    Raises:
        ValueError: the network is not known, or the head does not fit it or needs what a guider
            is not told.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    if isinstance(unwrap_module(denoiser), UNet2DConditionModel):
        scheduler = DDIMScheduler.from_config(_SDXL_NOISE if noise is None else noise)
    parts = SimpleNamespace(
        unet=denoiser,
        transformer=denoiser,
        scheduler=scheduler,
        _execution_device="cpu",
        vae_scale_factor=8,
    )
    network = network_of(parts, denoiser, GUIDED_LAYOUTS)
    head = find_head(given_head, network)
    check_head(head, config, network)
    if head is not None and type(head).begin is not WeakHead.begin:
        raise ValueError(
            "a head must not need the noise levels ahead of the steps, which a guider is "
            f"not told, got {type(head).__name__}: use core2_sampler.attach"
        )
    return GuidedNetwork(network, head, scheduler)
