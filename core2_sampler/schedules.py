"""Noise levels: computed in float64 on the CPU, descending, with the final 0 at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sigmas_from_scheduler(scheduler: Any) -> Tensor:
    """Return the grid that a diffusers scheduler was set to by ``set_timesteps``.

    Args:
        scheduler: a scheduler that holds ``sigmas``, final value included.

    Returns:
        Noise levels, [N + 1], float64, on the CPU.

    Raises:
        ValueError: the scheduler has no sigmas, or no timesteps were set.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    timesteps = getattr(scheduler, "timesteps", None)
    if sigmas is None or timesteps is None or getattr(scheduler, "num_inference_steps", 0) is None:
        raise ValueError(
            "the scheduler must hold sigmas and have its timesteps set, "
            f"got {type(scheduler).__name__}; call set_timesteps first"
        )
    return torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Shift flow noise levels towards noise, ``shift * s / (1 + (shift - 1) * s)``.

    Args:
        sigmas: noise levels in 0..1, any shape.
        shift: above 0; 1 changes nothing, 3 is Stable Diffusion 3's.

    Returns:
        The shifted levels.

    Raises:
        ValueError: `shift` is not above 0.

    Reference:
        Esser et al., arXiv 2403.03206, eq. 23.
    """
    if not shift > 0:
        raise ValueError(f"shift must be above 0, got {shift}")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def flow_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """Return N equal steps of flow time from 1 to 0, shifted.

    Args:
        num_steps: number of steps N, at least 1.
        shift: see `shift_sigmas`.

    Returns:
        Noise levels, [N + 1], from exactly 1 to exactly 0, float64.

    Raises:
        ValueError: N is below 1 or `shift` is not above 0.
    """
    _check_steps(num_steps)
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Return the grid of Karras et al.: equal steps of ``sigma ** (1 / rho)``, and 0 at the end.

    Args:
        num_steps: number of steps N, at least 1.
        sigma_min: last level before 0.
        sigma_max: first level.
        rho: 7 in the paper; higher puts more steps at low noise.

    Returns:
        Noise levels, [N + 1], float64.

    Raises:
        ValueError: N is below 1 or not ``0 < sigma_min <= sigma_max``.

    Reference:
        Karras et al., arXiv 2206.00364, eq. 5.
    """
    _check_steps(num_steps)
    if not 0 < sigma_min <= sigma_max:
        raise ValueError(
            "sigma_min must be above 0 and at most sigma_max, "
            f"got sigma_min {sigma_min}, sigma_max {sigma_max}"
        )
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
