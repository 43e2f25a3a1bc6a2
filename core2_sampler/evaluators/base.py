"""The contract of what scores latents."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from core2_sampler.types import Conditioning


@runtime_checkable
class Evaluator(Protocol):
    """What scores noisy latents; higher is better, and a row's score depends on that row alone."""

    def check_family(self, family: str) -> None:
        """Raise ValueError unless it was made for this model family."""
        ...

    def check_latents(self, channels: int) -> None:
        """Raise ValueError unless it was made for latents with so many channels."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return a score [B] for latents ``x`` [B, C, H, W] at ``sigma`` [B] and B prompts."""
        ...
