"""A denoiser whose sampling has a known solution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core2_sampler.types import Conditioning


class GaussianDenoiser:
    """The exact denoiser of data drawn from ``N(mean, spread**2)``, prompt by prompt.

    The prompt is the mean: ``conditioning.pooled`` [B, C]. All prompts have the same spread, so
    classifier-free guidance at scale s is exactly the denoiser of the mean
    ``uncond + s * (cond - uncond)``, and `solution` is the truth for every solver.

    Args:
        spread: standard deviation of the data.
        path: ``flow`` is ``x = (1 - sigma) x0 + sigma noise``, ``ve`` is ``x = x0 + sigma noise``.
    """

    family = "gaussian"
    latent_channels = 4

    def __init__(self, spread: float = 0.5, path: Literal["flow", "ve"] = "flow") -> None:
        self.module: nn.Module = _GaussianField(spread, path)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Return ``d`` [B, C, H, W] for latents ``x`` [B, C, H, W] at ``sigma`` [B]."""
        return self.module(x, sigma, conditioning.pooled)

    @contextmanager
    def capture_features(self) -> Iterator[Callable[[], Tensor]]:
        """Record the standardised latents, [B, H * W, C]."""
        latest: list[Tensor] = []
        proj_out = self.module.get_submodule("proj_out")
        handle = proj_out.register_forward_pre_hook(lambda _m, inputs: latest.insert(0, inputs[0]))
        try:
            yield lambda: latest[0].flatten(2).transpose(1, 2)
        finally:
            handle.remove()

    def prompt(self, mean: Tensor) -> Conditioning:
        """Return the prompt that stands for a mean [B, C]."""
        return Conditioning(mean[:, None], mean)

    def solution(self, x: Tensor, sigma: float, sigma_next: float, mean: Tensor) -> Tensor:
        """Return where the ODE takes ``x`` from one noise level to another.

        Args:
            x: latents at `sigma`, [B, C, H, W].
            sigma: noise level of `x`.
            sigma_next: noise level wanted.
            mean: of the data, [B, C].

        Returns:
            Latents at `sigma_next`.

        Reference:
            Gaussian marginals N(a m, v) with a the signal's factor and v = a^2 spread^2 + sigma^2:
            the flow keeps ``(x - a m) / sqrt(v)``.
        """
        field: Any = self.module
        m = mean[:, :, None, None]
        a, v = field.marginal(torch.tensor(sigma, dtype=x.dtype))
        a_next, v_next = field.marginal(torch.tensor(sigma_next, dtype=x.dtype))
        return a_next * m + (v_next / v).sqrt() * (x - a * m)


class _GaussianField(nn.Module):
    """``dx/dsigma`` by Bayes' rule, independent of `GaussianDenoiser.solution`."""

    def __init__(self, spread: float, path: str) -> None:
        super().__init__()
        self.spread, self.path = spread, path
        self.proj_out = nn.Identity()

    def marginal(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signal's factor and the variance of x at a noise level."""
        signal = 1 - sigma if self.path == "flow" else torch.ones_like(sigma)
        return signal, (signal * self.spread) ** 2 + sigma**2

    def forward(self, x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        s, m = sigma[:, None, None, None].to(x), mean[:, :, None, None].to(x)
        a, v = self.marginal(s)
        residual = self.proj_out((x - a * m) / v)
        noise = s * residual  # E[noise | x]
        if self.path == "ve":
            return noise
        return noise - (m + a * self.spread**2 * residual)  # E[noise - x0 | x]
