"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that wants the network is a wrong test
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # or help has colours where CI asks for them


@pytest.fixture
def global_random_state() -> Iterator[None]:
    """Fail the test if it moved the global random state: images depend on generators only."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture
def world() -> tuple[Any, ...]:
    """A Gaussian denoiser, latents, two prompts and the noise levels of 6 steps, in float64."""
    from core2_sampler.schedules import flow_sigmas
    from core2_sampler.testing import GaussianDenoiser

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    denoiser = GaussianDenoiser(spread=0.5)
    cond, uncond = denoiser.prompt(randn(2, 3)), denoiser.prompt(randn(2, 3))
    return denoiser, randn(2, 3, 4, 4), cond, uncond, flow_sigmas(6)
