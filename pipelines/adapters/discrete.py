"""Networks trained on a table of timesteps, and the schedulers made for them.

Ours are variance-exploding coordinates, ``x = x0 + sigma * noise``. With ``s = sqrt(1 + sigma**2)``
the network sees ``x / s``, and so do the callers of a variance-preserving scheduler (DDIM,
DPM-Solver); the latents of the others (Euler and its kin) are ``x`` itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    retrieve_timesteps,
)
from torch import Tensor

from core2_sampler.pipelines.adapters.base import Schedule, Solver
from core2_sampler.precision import wide
from core2_sampler.samplers import sample_dpmpp_2m, sample_euler

_SAME = 1e-5
"""Log noise levels closer than this are one: far below a timestep, far above float32's rounding."""

_LEAST_SIGNAL = 2.0**-24
"""diffusers' own floor of ``alphas_cumprod`` where training ends in pure noise."""

_FEW_STEPS = 15
"""Below it, ``lower_order_final`` makes DPM-Solver's last step first order."""


def eps_from_v(v: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the noise that a v prediction means, in float32: ``v / s + sigma * x / s**2``.

    Args:
        v: what the network says at ``x / s``, [B, C, H, W].
        x: latents, same shape.
        sigma: noise levels, [B, 1, 1, 1].

    Reference:
        Salimans & Ho, arXiv 2202.00512, appendix D, with alpha = 1 / s.
    """
    square = 1 + sigma**2
    return wide(v) * square.rsqrt() + wide(x) * (sigma / square)


def v_from_eps(eps: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """Undo `eps_from_v`, with the same arguments."""
    square = 1 + sigma**2
    return (wide(eps) - wide(x) * (sigma / square)) * square.sqrt()


@dataclass(frozen=True, slots=True)
class Clock:
    """Which timestep a network is told at a noise level.

    Exactly the scheduler's at its own noise levels and at those of training; in between, linear in
    the logarithm of the noise level.

    Attributes:
        levels: log noise levels of training, ascending, [T].
        times: their timesteps, [T].
        exact_levels: log noise levels of the scheduler's grid, then those of training.
        exact_times: their timesteps.
    """

    levels: Tensor
    times: Tensor
    exact_levels: Tensor
    exact_times: Tensor

    @classmethod
    def of(cls, scheduler: Any, device: torch.device) -> Clock:
        """Read a scheduler's training table, and its grid if one was set.

        Raises:
            ValueError: the scheduler has no such table, or the network predicts something else
                than noise or v.
        """
        _check_table(scheduler)
        levels, times = _table(scheduler)
        exact_levels, exact_times = levels, times
        if scheduler.num_inference_steps is not None:
            grid = grid_levels(scheduler).log()
            exact_levels = torch.cat([grid, levels])
            exact_times = torch.cat([scheduler.timesteps.double().cpu(), times])
        tables = (levels, times, exact_levels, exact_times)
        return cls(*(table.to(device, torch.float32) for table in tables))

    def timestep(self, sigma: Tensor) -> Tensor:
        """Return timesteps [B], float32, for noise levels [B]; never waits for the device."""
        levels = sigma.float().log()
        distance, nearest = (levels[:, None] - self.exact_levels).abs().min(1)
        between = _interpolate(levels, self.levels, self.times)
        return torch.where(distance < _SAME, self.exact_times[nearest], between)


def grid_levels(scheduler: Any) -> Tensor:
    """Return the noise level of each of a scheduler's timesteps, [N], float64.

    A scheduler that we do not know in closed form may count its own otherwise: its latents reach
    the network through ``scale_model_input``, so that the table of training is right for all.
    """
    timesteps = scheduler.timesteps.double().cpu()
    if type(scheduler) in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        return scheduler.sigmas.double().cpu()[: len(timesteps)]
    levels, times = _table(scheduler)
    return _interpolate(timesteps, times, levels).exp()


def discrete_schedule(
    pipe: Any,
    num_steps: int | None,
    *,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
    denoising_end: float | None = None,
    eta: float = 0.0,
) -> Schedule:
    """Set a scheduler's grid as ``StableDiffusionXLPipeline`` does, and return it.

    Args:
        pipe: tells scheduler and device.
        num_steps: inference steps.
        timesteps: timesteps of one's own, descending.
        sigmas: noise levels of one's own, descending, with the final one.
        denoising_end: share of the noise schedule after which to stop, above 0 and below 1.
        eta: noise of the DDIM step.

    Returns:
        The schedule; see `closed_form`.

    Raises:
        ValueError: the scheduler's noise levels have no meaning in our coordinates.
    """
    scheduler = pipe.scheduler
    _check_table(scheduler)
    times, num_steps = retrieve_timesteps(
        scheduler, num_steps, pipe._execution_device, timesteps, sigmas
    )
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if bool((scheduler.alphas_cumprod[times.long().cpu().clamp(min=0)] == 0).any()):
        raise ValueError(
            "the scheduler's noise levels must be finite with core2, got an infinite one (pure "
            f"noise in {type(scheduler).__name__}): use EulerDiscreteScheduler, which caps it"
        )
    form = closed_form(scheduler, eta)
    kept = len(times)
    if denoising_end is not None and 0 < denoising_end < 1:
        train = scheduler.config.num_train_timesteps
        kept = num_steps = int((times >= round(train - denoising_end * train)).sum())
    if form is None:
        return _stepped(scheduler, times[:kept], num_steps)
    solver, levels, preserving = form
    scale = (1 + levels**2).rsqrt() if preserving else None
    noise_scale = float(scheduler.init_noise_sigma) / (1.0 if scale is None else float(scale[0]))
    return Schedule(
        times[:kept],
        num_steps,
        levels[: kept + 1],
        solver,
        noise_scale,
        None if scale is None else scale[: kept + 1],
    )


def closed_form(scheduler: Any, eta: float = 0.0) -> tuple[Solver, Tensor, bool] | None:
    """Return the solver that is exactly the scheduler's update, if there is one.

    Args:
        scheduler: set by ``set_timesteps``; a subclass or a replaced ``step`` may do anything.
        eta: noise of the DDIM step.

    Returns:
        ``(solver, noise levels [N + 1], whether the scheduler's latents preserve variance)``:
        for Euler, for DDIM without noise or clipping whose steps meet, and for second order
        midpoint DPM-Solver++; None for everything else.
    """
    config, steps = scheduler.config, len(scheduler.timesteps)
    if "step" in vars(scheduler) or config.get("thresholding", False):
        return None
    if type(scheduler) is EulerDiscreteScheduler:
        return sample_euler, scheduler.sigmas.double().cpu()[: steps + 1], False
    if type(scheduler) is DDIMScheduler and eta == 0 and not config.clip_sample:
        levels = _ddim_levels(scheduler)
        return None if levels is None else (sample_euler, levels, True)
    if type(scheduler) is DPMSolverMultistepScheduler and _is_2m(config, steps):
        levels = scheduler.sigmas.double().cpu()[: steps + 1]
        return partial(sample_dpmpp_2m, path="ve"), levels, True
    return None


def _ddim_levels(scheduler: Any) -> Tensor | None:
    """Return DDIM's levels, [N + 1]; None where a step does not end where the next one starts."""
    times = scheduler.timesteps.cpu()
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    if not torch.equal(times[:-1] - stride, times[1:]):
        return None
    end = int(times[-1]) - stride
    final = scheduler.alphas_cumprod[end] if end >= 0 else scheduler.final_alpha_cumprod
    signal = torch.cat([scheduler.alphas_cumprod.cpu()[times], final.cpu()[None]]).double()
    return ((1 - signal) / signal).sqrt()


def _is_2m(config: Any, steps: int) -> bool:
    first_order_end = config.euler_at_final or (config.lower_order_final and steps < _FEW_STEPS)
    return (
        config.algorithm_type == "dpmsolver++"
        and config.solver_type == "midpoint"
        and config.solver_order == 2
        and config.variance_type not in ("learned", "learned_range")
        and not config.use_flow_sigmas
        and (config.final_sigmas_type == "zero" or not first_order_end)
    )


def _stepped(scheduler: Any, times: Tensor, num_steps: int) -> Schedule:
    """Return the schedule of a scheduler that makes its own updates."""
    levels = grid_levels(scheduler)[: len(times)]

    def model_input(latents: Tensor, i: int) -> Tensor:
        seen = scheduler.scale_model_input(latents, times[i])
        return wide(seen) * float((1 + levels[i] ** 2).sqrt())

    def model_output(d: Tensor, x: Tensor, i: int) -> Tensor:
        return v_from_eps(d, x, levels[i].to(x.device, x.dtype))

    is_v = scheduler.config.prediction_type == "v_prediction"
    return Schedule(
        times,
        num_steps,
        levels,
        None,
        float((1 + levels[0] ** 2).sqrt()),
        model_input=model_input,
        model_output=model_output if is_v else None,
    )


def _check_table(scheduler: Any) -> None:
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            "the scheduler must have a training table (alphas_cumprod) with core2, got "
            f"{type(scheduler).__name__}: use EulerDiscreteScheduler, or call without core2"
        )
    predicted = scheduler.config.prediction_type
    if predicted not in ("epsilon", "v_prediction"):
        raise ValueError(
            "the scheduler's prediction_type must be epsilon or v_prediction with core2, got "
            f"{predicted}: call without core2"
        )


def _table(scheduler: Any) -> tuple[Tensor, Tensor]:
    """Return training's log noise levels, ascending, and their timesteps, [T], float64."""
    signal = scheduler.alphas_cumprod.double().cpu().clamp(min=_LEAST_SIGNAL)
    levels = ((1 - signal) / signal).log() / 2
    config = scheduler.config
    continuous = config.get("timestep_type") == "continuous"
    if continuous and config.prediction_type == "v_prediction":
        return levels, levels / 4  # as diffusers names them
    return levels, torch.arange(len(levels), dtype=torch.float64)


def _interpolate(at: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the piecewise linear function through (inputs, outputs) at ``at``, constant beyond."""
    i = torch.searchsorted(inputs, at.contiguous()).clamp(1, len(inputs) - 1)
    share = ((at - inputs[i - 1]) / (inputs[i] - inputs[i - 1])).clamp(0, 1)
    return torch.lerp(outputs[i - 1], outputs[i], share)
