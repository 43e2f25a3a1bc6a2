"""What every weak head has in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from core2_sampler.types import Conditioning, Denoiser

_SDXL_SIZE_IDS = 6
"""Original size, crop and target size, which stand beside the pooled embedding."""


class WeakHead(ModelMixin, ConfigMixin):
    """A small model that predicts the gap; zero-initialised, so that untrained it means cond.

    An output head (``in_model`` False) is called on a finished cond pass, as ``OutputHead`` says.
    An in-model head changes the denoiser's pass, as ``InModelHead`` says. Each is saved with
    ``save_pretrained`` as ``config.json`` and safetensors; the config has at least ``family`` and
    ``latent_channels``.
    """

    in_model = False
    needs_features = False

    @classmethod
    def for_denoiser(cls, denoiser: Denoiser, *, seed: int = 0, **options: Any) -> Self:
        """Build an untrained head that fits a denoiser, on its device.

        Args:
            denoiser: the base model.
            seed: of the initial weights; the global random state is left alone.
            options: arguments of the head's constructor that do not follow from the denoiser.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = cls(**cls.fit_config(denoiser), **options)
        return head.to(next((p.device for p in denoiser.module.parameters()), "cpu"))

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Self:
        """Load a head as ``ModelMixin`` does, but from safetensors only, never from a pickle."""
        return super().from_pretrained(path, **(kwargs | {"use_safetensors": True}))

    @classmethod
    def fit_config(cls, denoiser: Denoiser) -> dict[str, Any]:
        """Return the arguments of the constructor that follow from the denoiser."""
        return {"family": denoiser.family, "latent_channels": denoiser.latent_channels}

    @property
    def observes(self) -> bool:
        """Whether it wants to see the true gaps of slow steps."""
        return type(self).observe is not WeakHead.observe

    @property
    def static_state(self) -> bool:
        """Whether a CUDA graph may hold it: it keeps nothing between steps, or in place."""
        own, none = type(self), WeakHead
        return (own.begin, own.reset, own.observe) == (none.begin, none.reset, none.observe)

    @property
    def needs_negative(self) -> Literal["call", "empty"] | None:
        """The negative prompt that `begin` must give: the call's own, or the empty one always.

        It is encoded even where no step runs it.
        """
        return None

    def begin(self, sigmas: Sequence[float], negative: Conditioning | None) -> None:
        """Learn what run is to come; pipelines call it once, before the first step.

        Args:
            sigmas: noise levels, [N] without the final one.
            negative: the negative prompt of `needs_negative`, B rows or 1.
        """

    def reset(self) -> None:
        """Forget what an earlier run left behind."""

    def observe(self, gap: Tensor) -> None:
        """See the true gap of a slow step."""

    def check_family(self, family: str) -> None:
        """Raise ValueError unless the head was made for this family."""
        if self.config.family != family:
            raise ValueError(
                f"the weak head must be made for {family}, got one for {self.config.family}: "
                "train one for this model"
            )

    def check_gap(self, weak_guidance: float | None) -> None:
        """Raise ValueError unless the head learned this gap; one that learned none fits any.

        Args:
            weak_guidance: FLUX: the embedded guidance that stands for uncond; None is the negative
                prompt.
        """
        learned = self.config.get("weak_guidance", weak_guidance)
        if learned != weak_guidance:
            raise ValueError(
                f"weak_guidance must be {learned} for this weak head, which learned that gap, got "
                f"{weak_guidance}"
            )

    def check_latents(self, channels: int) -> None:
        """Raise ValueError unless the head was made for latents with so many channels."""
        if self.config.latent_channels != channels:
            raise ValueError(
                f"latents must have {self.config.latent_channels} channels for this "
                f"{type(self).__name__}, got {channels}: use the head of this model"
            )


def sdxl_pooled_dim(config: Any) -> int:
    """Return the width of the pooled prompt embedding that a UNet in the SDXL layout takes.

    Args:
        config: of the network.
    """
    return (
        config.projection_class_embeddings_input_dim
        - _SDXL_SIZE_IDS * config.addition_time_embed_dim
    )


def network_config(denoiser: Denoiser) -> Any:
    """Return the diffusers config of the denoiser's network."""
    return cast(Any, denoiser.module).config
