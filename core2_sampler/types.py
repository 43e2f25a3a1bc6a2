"""The contracts of the library: what a denoiser, a prompt and a weak head are.

Words and shapes are the same everywhere: ``x`` noisy latents [B, C, H, W], ``sigma`` a noise level
(never a timestep), ``d`` = dx/dsigma (the velocity for SD3.5 and FLUX, eps for SDXL in
variance-exploding coordinates), ``cond`` / ``uncond`` that derivative with the prompt / with the
negative prompt, and ``gap = cond - uncond``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Predict = Callable[[Tensor, int], Tensor]
"""``d = predict(x, i)``: the derivative dx/dsigma at step ``i``, prompt and guidance bound."""

OnStep = Callable[[int, Tensor], Tensor | None]
"""``on_step(i, x)``: called with the latents after step ``i``; a returned tensor replaces them."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """One side of classifier-free guidance: an encoded prompt.

    Attributes:
        prompt_embeds: token embeddings, [B, T, D].
        pooled: pooled embedding, [B, P].
        extra: further keyword arguments of the network, passed on untouched.
    """

    prompt_embeds: Tensor
    pooled: Tensor
    extra: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Denoiser(Protocol):
    """A network of one family behind the one interface that the engine knows."""

    family: str
    module: nn.Module

    @property
    def latent_channels(self) -> int:
        """Channels C of ``x``."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return ``d`` [B, C, H, W] for latents ``x`` [B, C, H, W] at ``sigma`` [B]."""
        ...

    def capture_features(self) -> AbstractContextManager[Callable[[], Tensor]]:
        """Record the last hidden state; the yielded callable returns that of the latest pass."""
        ...


@runtime_checkable
class OutputHead(Protocol):
    """A weak head that reads a finished cond pass and predicts ``gap``."""

    in_model: bool
    needs_features: bool

    def reset(self) -> None:
        """Forget what an earlier run left behind; called once before a run."""
        ...

    def observe(self, gap: Tensor) -> None:
        """See the true gap of a slow step; called after every one."""
        ...

    def __call__(
        self,
        cond: Tensor,
        *,
        x: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        pooled: Tensor,
        features: Tensor | None = None,
    ) -> Tensor:
        """Return the predicted gap, as ``cond`` [B, C, H, W]; ``sigma`` is [B]."""
        ...


@runtime_checkable
class InModelHead(Protocol):
    """A weak head that changes the pass itself: with it on, one pass returns the guided ``d``."""

    in_model: bool

    def attached(self, module: nn.Module) -> AbstractContextManager[None]:
        """Hook into the denoiser, still off; on exit the denoiser is as it was."""
        ...

    def active(self, guidance_scale: float) -> AbstractContextManager[None]:
        """Turn on for the passes inside the context, at this guidance scale."""
        ...
