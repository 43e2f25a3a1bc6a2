"""What SD3.5 and FLUX share: the grid of a flow-match scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
    calculate_shift,
    retrieve_timesteps,
)
from torch import Tensor

from core2_sampler.pipelines.adapters.base import Schedule, unchanged
from core2_sampler.samplers import sample_euler
from core2_sampler.schedules import sigmas_from_scheduler


def flow_schedule(
    pipe: Any,
    num_steps: int | None,
    *,
    sigmas: list[float] | None = None,
    mu: float | None = None,
    pack: Callable[[Tensor], Tensor] = unchanged,
    unpack: Callable[[Tensor], Tensor] = unchanged,
) -> Schedule:
    """Set a flow-match scheduler's grid, and return it.

    Args:
        pipe: tells scheduler and device.
        num_steps: inference steps.
        sigmas: a grid of one's own, descending, without the final 0.
        mu: shift of a scheduler with dynamic shifting.
        pack: see `Schedule`.
        unpack: see `Schedule`.

    Returns:
        The schedule; in closed form where the scheduler is flow-match Euler.
    """
    shift = {} if mu is None else {"mu": mu}
    timesteps, num_steps = retrieve_timesteps(
        pipe.scheduler, num_steps, pipe._execution_device, sigmas=sigmas, **shift
    )
    if has_euler_form(pipe.scheduler):
        levels, solver = sigmas_from_scheduler(pipe.scheduler), sample_euler
    else:
        levels, solver = timesteps.double().cpu() / pipe.scheduler.config.num_train_timesteps, None
    return Schedule(timesteps, num_steps, levels, solver, pack=pack, unpack=unpack)


def shift_of_size(config: Any, tokens: int, max_shift: float = 1.16) -> float:
    """Return ``mu`` of a scheduler with dynamic shifting.

    Args:
        config: of the scheduler.
        tokens: image tokens of the network.
        max_shift: where the config has none; the stock calls differ in it.
    """
    return calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", max_shift),
    )


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
