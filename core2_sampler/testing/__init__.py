"""Fixtures of tests and experiments: a denoiser with a known solution, tiny real pipelines."""

from core2_sampler.testing.gaussian import GaussianDenoiser
from core2_sampler.testing.pipelines import (
    SDXL_SCHEDULER,
    tiny_flux_pipeline,
    tiny_sd3_pipeline,
    tiny_sdxl_pipeline,
)

__all__ = [
    "SDXL_SCHEDULER",
    "GaussianDenoiser",
    "tiny_flux_pipeline",
    "tiny_sd3_pipeline",
    "tiny_sdxl_pipeline",
]
